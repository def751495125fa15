"""One length of one checkpoint, as it stands in results.json."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ..tasks import Task
from .batching import in_batches, rows_for
from .capacity import stored_pairs
from .controls import CONTROLS, MEMORY, Answers, answer_samples, in_order
from .losses import LOSS_CONTROLS, losses_of, rows_with_logits, summarize_losses
from .scores import (
    Row,
    answer_lines,
    score_rows,
    scores_by_control,
    scores_by_depth,
    scores_by_distance,
    summarize_stats,
)
from .subject import Subject, peak_gib, reset_peak


FEW, MANY = 100, 1000  # samples beyond and up to 1M


def controls_of(task: Task) -> dict[str, str]:
    """The controls that a task can have: their names on the command line, and in results."""
    return CONTROLS if task.exact else LOSS_CONTROLS


def applicable(subject: Subject, task: Task, tokens: int, controls: Sequence[str]) -> list[str]:
    """Controls without the backbone where a sample of so many tokens, with its answer, does not fit its context."""
    fits = tokens + (task.max_new_tokens if task.exact else 0) <= subject.context
    return [control for control in controls if fits or control != "backbone"]


def default_count(task: Task, tokens: int) -> int:
    return MANY if tokens <= task.tokens_of("1M") else FEW


def measure_answers(
    subject: Subject,
    task: Task,
    length: str,
    tokens: int,
    samples: int | None,
    controls: Sequence[str],
    batch_size: int | None,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    What a checkpoint answers at a length.

    Args:
        length, tokens: as asked for, and in tokens of the model.
        samples: None for the default.
        controls: keys of `CONTROLS`, see [`applicable`].
        batch_size: samples side by side, None for as many as fit.
        progress: called with numbers of tokens that were read.

    Returns:
        Its entry in results.json, and lines for the file of answers.
    """
    count = samples or default_count(task, tokens)
    reset_peak(subject.model.device)
    rows, batches = answer_all(subject, task, tokens, count, controls, batch_size, progress)
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
        "tokens_per_s": sum(batch.tokens for batch in batches) / sum(batch.seconds for batch in batches),
        "peak_gib": peak_gib(subject.model.device),
        "stats": summarize_stats(batch.stats for batch in batches),
    }
    for name in ("by_depth", "stored_pairs"):  # where a task has no such thing
        if not entry[name]:
            del entry[name]
    return entry, answer_lines(rows)


def add_controls(
    subject: Subject,
    task: Task,
    tokens: int,
    entry: dict[str, Any],
    lines: Sequence[dict[str, Any]],
    controls: Sequence[str],
    batch_size: int | None,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Controls of a length that was measured without them: only what they need is read.

    Args:
        tokens: of a sample, as they were for the entry.
        entry, lines: as [`measure_answers`] returned them, with `controls` in the entry.
        controls, batch_size, progress: as there; none of the entry's own controls.

    Returns:
        As [`measure_answers`] with the controls of both, but with the speed, the memory and the state of before.

    Raises:
        ValueError: if the lines are not of the task's samples, before these are read.
    """
    rows, _ = answer_all(subject, task, tokens, entry["samples"], controls, batch_size, progress, lines)
    kept = {MEMORY, *(CONTROLS[control] for control in entry["controls"])}
    for row, line in zip(rows, lines, strict=True):
        row.texts = in_order({name: text for name, text in line["answers"].items() if name in kept} | row.texts)
        row.scores = in_order({name: score for name, score in line["scores"].items() if name in kept} | row.scores)
    found = {"scores": scores_by_control(rows), "by_distance": scores_by_distance(rows)}
    return entry | found, answer_lines(rows)


def answer_all(
    subject: Subject,
    task: Task,
    tokens: int,
    count: int,
    controls: Sequence[str],
    batch_size: int | None,
    progress: Callable[[int], Any],
    lines: Sequence[dict[str, Any]] | None = None,
) -> tuple[list[Row], list[Answers]]:
    """
    All samples of a length, answered and scored, and the answers of each batch, see [`answer_samples`]; under controls
    only if there are lines of the samples already.
    """
    rows, batches = [], []
    most = min(count, batch_size or rows_for(subject, max(1, tokens), count))

    def run(part: list[dict[str, Any]]) -> Answers:
        if lines is not None:
            check_samples(lines, len(rows), part, count)
        return answer_samples(subject, task, part, controls, progress, controls_only=lines is not None)

    for part, answers in in_batches(run, map(without_labels, task.test(tokens, count)), most, count):
        rows += score_rows(task, part, answers, subject.segment_size)
        batches.append(answers)
    return rows, batches


def check_samples(lines: Sequence[dict[str, Any]], start: int, part: Sequence[dict[str, Any]], count: int) -> None:
    """
    Raises:
        ValueError: if the lines from a start on are not those of some samples, or not `count` in all.
    """

    def identity(of: dict[str, Any]) -> tuple[Any, ...]:
        return str(of["group"]), of["answer"], [int(distance) for distance in of["distances"]]

    there = lines[start : start + len(part)]
    if len(lines) != count or [identity(line) for line in there] != [identity(sample) for sample in part]:
        raise ValueError("The answers that were kept are of other samples. Remove them, and all is measured again.")


def measure_losses(
    subject: Subject,
    task: Task,
    length: str,
    tokens: int,
    samples: int | None,
    controls: Sequence[str],
    batch_size: int | None,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    The loss of a checkpoint at a length, of a task without right answers.

    Args:
        samples: None for all there are, up to the default.
        controls: keys of `LOSS_CONTROLS`, see [`applicable`].

    Returns:
        Its entry in results.json, and nothing for a file of answers.
    """
    reset_peak(subject.model.device)
    most = samples or default_count(task, tokens)
    size = min(batch_size or rows_with_logits(subject, rows_for(subject, tokens, most)), most)
    by_control: dict[str, list[np.ndarray]] = {}
    groups, stats, seconds, read = [], [], 0.0, 0

    def run(part: list[dict[str, Any]]):
        return losses_of(subject, part, controls, progress)

    for part, losses in in_batches(run, islice(task.test(tokens, samples), most), size):
        for name, values in losses.by_control.items():
            by_control.setdefault(name, []).extend(values)
        groups += [sample["group"] for sample in part]
        stats.append(losses.stats)
        seconds, read = seconds + losses.seconds, read + losses.tokens
    if not groups:
        raise ValueError(f"the test side of {task.name} has nothing of {tokens:,} tokens. Use a shorter length.")
    lengths = [len(values) for values in by_control[MEMORY]]
    entry = {
        "length": length,
        "tokens": mean(lengths),
        "segments": mean(-(-tokens // subject.segment_size) for tokens in lengths),
        "samples": len(groups),
        "groups": len(set(groups)),
        "background": None,
        **summarize_losses(by_control, groups, subject.segment_size),
        "tokens_per_s": read / seconds,
        "peak_gib": peak_gib(subject.model.device),
        "stats": summarize_stats(stats),
    }
    return entry, []


def without_labels(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample to be answered: without labels, and with ids that take little room."""
    ids = np.asarray(sample["input_ids"], dtype=np.int32)
    return {**{name: value for name, value in sample.items() if name != "labels"}, "input_ids": ids}


def background(task: Task, tokens: int) -> dict[str, Any] | None:
    """How much text there is around the facts before it repeats; None if the task does not count it."""
    unique = getattr(task, "unique_background_tokens", lambda side: 0)("test")
    return {"unique_tokens": unique, "repeated": tokens > unique} if unique else None


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
