"""`armt evaluate`: what checkpoints recall at which length, beside their controls."""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoints import check_checkpoint
from ..tasks import Task
from ..tasks.options import task_for
from .batching import batches, even_sizes, halved_if_too_large, rows_for
from .capacity import capacity, stored_pairs
from .controls import CONTROLS, MEMORY, answer_samples
from .results import Results
from .scores import (
    answer_lines,
    score_rows,
    scores_by_control,
    scores_by_depth,
    scores_by_distance,
    summarize_stats,
)
from .subject import Subject, check_fits, distinct_names, load_subject, peak_gib, read_training, reset_peak


FEW, MANY = 100, 1000  # samples beyond and up to 1M


def evaluate(
    checkpoints: Sequence[str | Path],
    task: str,
    lengths: Sequence[str],
    out: str | Path,
    samples: int | None = None,
    task_options: dict[str, Any] | None = None,
    controls: Sequence[str] | None = None,
    batch_size: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
    compiled: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """
    Evaluates checkpoints on the test side of a task, and writes `results.json` and plots. What is in the folder
    already is kept, and not measured again.

    Args:
        checkpoints: folders or Hub ids, see [`load_checkpoint`]; several are seeds of one recipe.
        task: name of a task.
        lengths: such as `4k`, `32k`, `1M`; what they count is up to the task, see [`Task.tokens_of`].
        out: folder of the results.
        samples: at each length; default: 1,000 up to 1M, 100 beyond.
        task_options: of the task.
        controls: keys of `CONTROLS`; default: all.
        batch_size: samples read side by side; default: as many as fit.
        dtype: of the backbone.
        device: default: the GPU if there is one.
        compiled: use compiled code, see `compile_armt`.
        command: to be recorded.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: for what does not go together, a checkpoint that is not ARMT, a length that is too short, or
            results of another command in the folder.
    """
    controls = list(CONTROLS) if controls is None else list(controls)
    unknown = [control for control in controls if control not in CONTROLS]
    if unknown:
        raise ValueError(f"there is no control {', '.join(unknown)}; controls are: {', '.join(CONTROLS)}.")
    for value, name in ((samples, "samples"), (batch_size, "batch_size")):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    lengths = list(dict.fromkeys(length.strip() for length in lengths))
    names = distinct_names(checkpoints)
    for path in checkpoints:
        check_checkpoint(path)
    check_one_recipe(checkpoints)
    options = task_options or {}
    request = {"task": task, "options": options, "samples": samples, "controls": sorted(controls)}
    subject = load_subject(checkpoints[0], names[0], dtype, device, compiled)
    made = task_for(task, options, subject.tokenizer)
    plan = {length: made.tokens_of(length) for length in lengths}
    for tokens in plan.values():
        made.test(tokens, 1)  # fails here if it is too short, rather than after the others
    results = Results(out, request, environment(subject, command))
    for path, name in zip(checkpoints, names, strict=True):
        if name != subject.name:
            vocabulary = subject.tokenizer and subject.tokenizer.get_vocab()
            del subject
            subject = load_subject(path, name, dtype, device, compiled)
            if (subject.tokenizer and subject.tokenizer.get_vocab()) != vocabulary:
                raise ValueError(f"{name} has another tokenizer than {names[0]}, so their samples would differ.")
        check_fits(subject, made)
        run = results.run(name, subject.training.get("seed"), subject.weights)
        for length, tokens in sorted(plan.items(), key=lambda item: item[1]):
            if results.has(run, length):
                continue
            count = samples or (MANY if tokens <= made.tokens_of("1M") else FEW)
            with progress_bar(f"{name} {length}", count * tokens * (2 if "deleted" in controls else 1)) as advance:
                entry, answers = evaluate_length(subject, made, length, tokens, count, controls, batch_size, advance)
            results.content["baselines"] = results.content["baselines"] or entry["baselines"]
            best = capacity({"lengths": [*run["lengths"], entry]})
            if best:
                run["capacity"] = best
            results.add(run, entry, answers)
    return results.content


def evaluate_length(
    subject: Subject,
    task: Task,
    length: str,
    tokens: int,
    count: int,
    controls: Sequence[str],
    batch_size: int | None,
    progress: Callable[[int], Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    One length of one checkpoint.

    Returns:
        Its entry in results.json, and the answers.
    """
    if tokens + task.max_new_tokens > subject.context:
        controls = [control for control in controls if control != "backbone"]
    reset_peak(subject.model.device)
    rows, stats, seconds, read = [], [], 0.0, 0
    sizes = even_sizes(count, min(count, batch_size or rows_for(subject, max(1, tokens), count)))
    samples = map(as_arrays, task.test(tokens, count))
    for batch in batches(samples, sizes):

        def run(part: list[dict[str, Any]]):
            return answer_samples(subject, task, part, controls, progress)

        for part, answers in halved_if_too_large(run, batch):
            rows += score_rows(task, part, answers, subject.segment_size)
            stats.append(answers.stats)
            seconds, read = seconds + answers.seconds, read + answers.tokens
    scores = scores_by_control(rows)
    entry = {
        "length": length,
        "tokens": mean(row.tokens for row in rows),
        "segments": mean(row.segments for row in rows),
        "samples": len(rows),
        "background": background(task, tokens),
        "baselines": task.baselines([row.sample for row in rows]),
        "scores": scores,
        "by_distance": scores_by_distance(rows),
        "by_depth": scores_by_depth(rows),
        "stored_pairs": stored_pairs(task, tokens, scores[MEMORY]),
        "tokens_per_s": read / seconds,
        "peak_gib": peak_gib(subject.model.device),
        "stats": summarize_stats(stats),
    }
    for name in ("by_depth", "stored_pairs"):  # where a task has no such thing
        if not entry[name]:
            del entry[name]
    return entry, answer_lines(rows)


def as_arrays(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample to be answered: without labels, and with ids that take little room."""
    ids = np.asarray(sample["input_ids"], dtype=np.int32)
    return {**{name: value for name, value in sample.items() if name != "labels"}, "input_ids": ids}


def background(task: Task, tokens: int) -> dict[str, Any] | None:
    """How much text there is around the facts before it repeats; None if the task does not count it."""
    unique = getattr(task, "unique_background_tokens", lambda side: 0)("test")
    return {"unique_tokens": unique, "repeated": tokens > unique} if unique else None


def check_one_recipe(checkpoints: Sequence[str | Path]) -> None:
    """
    Raises:
        ValueError: if checkpoints were trained by recipes that differ in more than the seed.
    """
    recipes = {}
    for path in checkpoints:
        recipe = read_training(path).get("recipe")
        if isinstance(recipe, dict):
            recipes[str(path)] = {name: value for name, value in recipe.items() if name not in ("seed", "out")}
    paths = list(recipes)
    for path in paths[1:]:
        names = {**recipes[paths[0]], **recipes[path]}
        different = [name for name in names if recipes[path].get(name) != recipes[paths[0]].get(name)]
        if different:
            raise ValueError(
                f"{path} and {paths[0]} are not seeds of one recipe: they differ in {', '.join(different)}. Evaluate "
                "them into folders of their own."
            )


def environment(subject: Subject, command: str | None) -> dict[str, Any]:
    """What a number means nothing without."""
    device = subject.model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "versions": {
            "python": sys.version.split()[0],
            **{
                package: version(package) for package in ("modeling-armt", "torch", "transformers", "peft", "datasets")
            },
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


@contextmanager
def progress_bar(title: str, tokens: int):
    """A bar over so many tokens; yields a function that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=tokens or None, rate="")

        def advance(read: int) -> None:
            progress.update(bar, advance=read)
            speed = progress.tasks[0].speed
            progress.update(bar, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield advance
