"""What `armt evaluate` measured, and whether it may stand on a card."""

from collections.abc import Iterator
from typing import Any


SEEDS = 3  # from which on a card may speak of seeds
# Without these nobody can tell memory from what the last segment or a lucky guess gives.
CONTROLS = ("memory off", "memory swapped")
LOSS_CONTROLS = ("memory off", "carried tokens")


class ResultsError(ValueError):
    """Results that may not be shown as they are, with what they lack."""


def check_results(results: dict[str, Any]) -> None:
    """
    Results go on a card with their controls, their intervals and every length of every seed, or not at all.

    Args:
        results: the content of a `results.json` of `armt evaluate`.

    Raises:
        ResultsError: naming everything that is missing.
    """
    try:
        missing = list(_missing(results))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ResultsError(f"results.json is not what `armt evaluate` writes: {error!r}.") from error
    if missing:
        raise ResultsError(
            f"the results lack {'; '.join(missing)}. A card shows controls and every length of every seed, or no "
            "results: run `armt evaluate` once more, which measures what is missing."
        )


def find_run(results: dict[str, Any], name: str, weights: set[str | None], seed: int | None) -> dict[str, Any]:
    """
    The run of one checkpoint: that of its weights, or, where the weights were not on this machine, of its seed.

    Args:
        results: checked.
        name: of the checkpoint, for the message.
        weights: hashes of its weights, and of those of the adapter that it was merged from.
        seed: of its training.

    Raises:
        ResultsError: if there is none.
    """
    runs = results["runs"]
    found = [run for run in runs if run.get("weights") is not None and run["weights"] in weights]
    found += [run for run in runs if run.get("weights") is None and seed is not None and run["seed"] == seed]
    if not found:
        measured = ", ".join(f"{run['checkpoint']} (seed {run['seed']})" for run in runs)
        raise ResultsError(
            f"the results are not of {name}: they were measured on other weights, of {measured}. Evaluate this "
            "checkpoint, or name its results."
        )
    return found[0]


def _missing(results: dict[str, Any]) -> Iterator[str]:
    runs = results["runs"]
    if not all(results.get(name) for name in ("task", "environment")):
        yield "the task or the environment"
    lengths = {run["checkpoint"]: [entry["length"] for entry in run["lengths"]] for run in runs}
    every = dict.fromkeys(length for found in lengths.values() for length in found)
    if not every:
        yield "any length"
    for name, found in lengths.items():
        absent = [length for length in every if length not in found]
        if absent:
            yield f"{', '.join(absent)} of {name}"
    scored = any("scores" in entry for run in runs for entry in run["lengths"])
    if scored and "chance" not in results.get("baselines", {}):
        yield "chance among the baselines"
    for run in runs:
        for entry in run["lengths"]:
            yield from _missing_of(entry, f"at {entry['length']} of seed {run['seed']}")


def _missing_of(entry: dict[str, Any], where: str) -> Iterator[str]:
    found = entry["scores"] if "scores" in entry else entry.get("loss_by_segment", {})
    needed = ["memory"]
    if entry["segments"] > 1:  # in a single segment nothing is read from memory
        needed += CONTROLS if "scores" in entry else LOSS_CONTROLS
    absent = [name for name in needed if name not in found]
    if absent:
        yield f"{', '.join(absent)} {where}"
    scores = [score for of in found.values() for score in (of if isinstance(of, list) else [of])]
    if any(score["mean"] is not None and None in (score.get("low"), score.get("high")) for score in scores):
        yield f"intervals {where} (more samples give one)"
