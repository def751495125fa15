"""From single answers to what results.json says of a length."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..tasks import Task
from .controls import MEMORY, Answers
from .intervals import Score, interval


@dataclass
class Row:
    """
    A sample after it was answered.

    Attributes:
        sample: without its ids.
        tokens: of the sample.
        segments: of the prompt.
        distance: segments between the farthest supporting fact and the question, 0 if they are in the same one; None
            if there is no fact.
        texts, scores: of the answers, by control.
    """

    sample: dict[str, Any]
    tokens: int
    segments: int
    distance: int | None
    texts: dict[str, str]
    scores: dict[str, float]


def score_rows(task: Task, samples: Sequence[dict[str, Any]], answers: Answers, segment_size: int) -> list[Row]:
    """Scores the answers of a batch."""
    rows = []
    for number, sample in enumerate(samples):
        texts = {name: of[number] for name, of in answers.texts.items() if of[number] is not None}
        last = sample["prompt_length"] - 1
        starts = [last - distance for distance in sample["distances"]]
        rows.append(
            Row(
                {name: value for name, value in sample.items() if name not in ("input_ids", "labels")},
                len(sample["input_ids"]),
                last // segment_size + 1,
                last // segment_size - min(starts) // segment_size if len(starts) else None,
                texts,
                {name: task.score(text, sample) for name, text in texts.items()},
            )
        )
    return rows


def score_of(rows: Sequence[Row], control: str = MEMORY) -> Score:
    """Mean and interval of a control over the rows that have it."""
    some = [row for row in rows if control in row.scores]
    return interval([row.scores[control] for row in some], [row.sample["group"] for row in some])


def scores_by_control(rows: Sequence[Row]) -> dict[str, Score]:
    names = dict.fromkeys(name for row in rows for name in row.scores)
    return {name: score_of(rows, name) for name in names}


def scores_by_distance(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """
    Scores by the number of segments since the farthest supporting fact, in bins of 0, 1, 2, 3-4, 5-8, 9-16 ...: with
    memory, and of the controls too.
    """
    bins = defaultdict(list)
    for row in rows:
        if row.distance is not None:
            bins[math.ceil(math.log2(row.distance)) + 1 if row.distance else 0].append(row)
    result = []
    for number, some in sorted(bins.items()):
        first, last = (0, 0) if number == 0 else (2 ** (number - 2) + 1 if number > 1 else 1, 2 ** (number - 1))
        controls = {name: score for name, score in scores_by_control(some).items() if name != MEMORY}
        result.append({"segments": first, "to": last, **score_of(some), "controls": controls})
    return result


def scores_by_depth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Scores by where in the text the fact is, 0 at its start and 1 at its end, of tasks that lay out a grid."""
    depths = sorted({row.sample["depth"] for row in rows if "depth" in row.sample})
    return [{"depth": depth, **score_of([row for row in rows if row.sample["depth"] == depth])} for depth in depths]


def summarize_stats(of_batches: Iterable[dict[int, dict[str, Any]]]) -> dict[str, dict[str, float]] | None:
    """
    [`ARMTCache.stats`] of several batches as least, mean and largest value of each quantity over layers and rows, with
    the layer that has the largest; None before the first write.
    """
    values: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for stats in of_batches:
        for layer, quantities in stats.items():
            for name, of_rows in quantities.items():
                each = of_rows if isinstance(of_rows, list) else [of_rows]
                values[name] += [(float(value), layer) for value in each if value is not None]
    return {
        name: {
            "least": min(found)[0],
            "mean": sum(value for value, _ in found) / len(found),
            "largest": max(found)[0],
            "layer_of_largest": max(found)[1],
        }
        for name, found in values.items()
        if found
    } or None


def answer_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was answered, for a file of one JSON object a line."""
    kept = ("group", "question", "answer", "depth", "distances")
    return [
        {
            **{name: row.sample[name] for name in kept if name in row.sample},
            "tokens": row.tokens,
            "answers": row.texts,
            "scores": row.scores,
        }
        for row in rows
    ]
