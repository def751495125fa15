"""How many pairs a memory holds: an estimate from how often it is right about one of N."""

from collections.abc import Sequence
from typing import Any

from ..tasks import Task
from ..tasks.associative_retrieval import AssociativeRetrieval
from .intervals import Score


def stored_pairs(task: Task, tokens: int, score: Score) -> Score | None:
    """
    The number of pairs that are stored after N different ones were told, after arXiv 2407.04841, which reads the
    capacity of a memory off the exact match on *remember*.

    Assumption: a pair is stored or it is not. One that is stored is answered rightly; for any other the value is
    guessed, and right with the probability c of a guess among all values. Asked for one of N pairs, of which M are
    stored, the model is then right with p = M/N + (1 - M/N) c, and

        M = N (p - c) / (1 - c).

    A model that loses the most as N grows has no one capacity: what M tends to, or the largest M of several N, is what
    is compared. M is at most N, so it says nothing beyond N while p is near 1. In *rewrite* it has no meaning, since
    keys come again.

    Args:
        task: any task.
        tokens: length of its samples.
        score: exact match at this length.

    Returns:
        M with the bounds of `score` put through the formula; None for other tasks.
    """
    if not isinstance(task, AssociativeRetrieval) or task.rewrite or score["mean"] is None:
        return None
    pairs, chance = task.pairs_in(tokens), task.symbols**-task.value_size

    def stored(share: float) -> float:
        return max(0.0, pairs * (share - chance) / (1 - chance))

    return {**{name: stored(score[name]) for name in ("mean", "low", "high")}, "samples": score["samples"]}


def capacity(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The largest estimate among the lengths of a checkpoint, with its length; None where there is none."""
    estimates = [{"length": entry["length"], **entry["stored_pairs"]} for entry in entries if "stored_pairs" in entry]
    return max(estimates, key=lambda estimate: estimate["mean"], default=None)
