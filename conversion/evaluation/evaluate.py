"""`armt evaluate`: what checkpoints recall at which length, beside their controls."""

import platform
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import check_checkpoint
from ..circumstances import versions
from ..tasks import Task
from ..tasks.options import task_for
from .measure import add_controls, applicable, controls_of, default_count, measure_answers, measure_losses
from .plots import plot_results
from .progress import progress_bar, say_again, say_done
from .results import Results
from .subject import Subject, check_fits, distinct_names, load_subject, read_training


# Entries of a recipe that seeds may differ in: their own, and those that change no number.
OWN_TO_A_SEED = ("seed", "out", "model", "workers", "save_steps", "logging_steps", "report_to")


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
    already is kept and not measured again. Where a control is added to a length, only what it needs is read if the
    answers of the length are there; if they are not, and of a loss, the length is measured again.

    Args:
        checkpoints: folders or Hub ids, see [`load_checkpoint`]; several are seeds of one recipe.
        task: name of a task.
        lengths: such as `4k`, `32k`, `1M`; what they count is up to the task, see [`Task.tokens_of`].
        out: folder of the results.
        samples: at each length; default: 1,000 up to 1M, 100 beyond.
        task_options: of the task.
        controls: see [`controls_of`]; default: all.
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
    for value, name in ((samples, "samples"), (batch_size, "batch_size")):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    names = distinct_names(checkpoints)
    for path in checkpoints:
        check_checkpoint(path)
    check_one_recipe(checkpoints)
    options = task_options or {}
    subject = load_subject(checkpoints[0], names[0], dtype, device, compiled)
    made = task_for(task, options, subject.tokenizer)
    check_fits(subject, made)
    controls = choose_controls(made, controls)
    plan = plan_lengths(made, lengths)
    request = {"task": task, "options": options, "samples": samples}
    results = Results(out, request, environment(subject, command))
    # Other lengths, and other controls, may come from another machine on another day.
    where = {name: results.content["environment"][name] for name in ("device", "dtype", "date")}
    measure = measure_answers if made.exact else measure_losses
    for path, name in zip(checkpoints, names, strict=True):
        if name != subject.name:
            vocabulary = subject.tokenizer and subject.tokenizer.get_vocab()
            del subject  # before the next one comes
            subject = load_subject(path, name, dtype, device, compiled)
            check_fits(subject, made)
            if (subject.tokenizer and subject.tokenizer.get_vocab()) != vocabulary:
                raise ValueError(f"{name} has another tokenizer than {names[0]}, so their samples would differ.")
        run = results.run(name, subject.training.get("seed"), subject.weights)
        for length, tokens in plan.items():
            known = results.entry(run, length)
            there = known["controls"] if known else []
            missing = [control for control in applicable(subject, made, tokens, controls) if control not in there]
            if known and not missing:
                continue
            started = time.monotonic()
            wanted = [control for control in controls_of(made) if control in (*there, *missing)]
            # Losses are kept as means only, which nothing can be added to.
            lines = results.answers(run, length) if known and made.exact else []
            if known and not lines:
                say_again(f"{name} {length}", missing)
            asked = missing if lines else wanted
            readings = ("deleted" in asked) + (not lines or "swapped" in asked)
            total = (samples or default_count(made, tokens)) * tokens * readings
            with progress_bar(f"{name} {length}", total if made.exact and total else None) as advance:
                if lines:
                    entry, answers = add_controls(subject, made, tokens, known, lines, asked, batch_size, advance)
                    entry["added"] = [*known.get("added", ()), {"controls": asked, **where}]
                else:
                    entry, answers = measure(subject, made, length, tokens, samples, asked, batch_size, advance)
                    entry |= where
            entry["controls"] = wanted
            results.add(run, entry, answers)
            say_done(f"{name} {length}", entry, time.monotonic() - started)
    plot_results(results.content, results.folder)
    return results.content


def choose_controls(task: Task, asked: Sequence[str] | None) -> list[str]:
    """
    The controls of a task that were asked for, all of them for None.

    Raises:
        ValueError: if it has no such control; with those that it has.
    """
    known = controls_of(task)
    unknown = [control for control in asked or () if control not in known]
    if unknown:
        raise ValueError(f"{task.name} has no control {', '.join(unknown)}; it has: {', '.join(known)}.")
    return [control for control in known if asked is None or control in asked]


def plan_lengths(task: Task, lengths: Sequence[str]) -> dict[str, int]:
    """
    Lengths in tokens of the model, the shortest first.

    Raises:
        ValueError: if there are none, one is no length, or too short for what must be in it.
    """
    plan = {length.strip(): task.tokens_of(length) for length in lengths if length.strip()}
    if not plan:
        raise ValueError("there are no lengths to evaluate at.")
    for tokens in plan.values():
        sample = task.test(tokens, 1)
        if not task.exact:  # these say so only when they are read
            next(iter(sample))
    return dict(sorted(plan.items(), key=lambda item: item[1]))


def check_one_recipe(checkpoints: Sequence[str | Path]) -> None:
    """
    Raises:
        ValueError: if checkpoints were trained by recipes that differ in more than the seed.
    """
    recipes = {}
    for path in checkpoints:
        recipe = read_training(path).get("recipe")
        if isinstance(recipe, dict):
            recipes[str(path)] = {name: value for name, value in recipe.items() if name not in OWN_TO_A_SEED}
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
        "versions": {"python": platform.python_version()}
        | versions("modeling-armt", "torch", "transformers", "peft", "datasets"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }
