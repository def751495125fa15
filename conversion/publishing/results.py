"""What `armt evaluate` measured: whether it may stand on a card, and as which tables."""

from collections.abc import Iterator
from typing import Any


SEEDS = 3
# Without these nobody can tell memory from what the last segment or a lucky guess gives.
CONTROLS = ("memory off", "memory swapped")
LOSS_CONTROLS = ("memory off", "full attention")
CONDITIONS = ("memory", "memory off", "memory swapped", "fact deleted", "backbone")


class ResultsError(ValueError):
    """Results that may not be shown as they are, with what they lack."""


def check_results(results: dict[str, Any]) -> None:
    """
    Results go on a card with their controls, their intervals and every seed, or not at all.

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
            f"the results lack {'; '.join(missing)}. A card shows controls and every seed, or no results: run "
            "`armt evaluate` on the checkpoints of all seeds together."
        )


def find_run(results: dict[str, Any], name: str, seed: int | None) -> dict[str, Any]:
    """
    The run of one checkpoint, by its folder's name or else by its seed.

    Raises:
        ResultsError: if there is none.
    """
    runs = results["runs"]
    found = [run for run in runs if run["checkpoint"] == name] or [
        run for run in runs if seed is not None and run["seed"] == seed
    ]
    if not found:
        measured = ", ".join(f"{run['checkpoint']} (seed {run['seed']})" for run in runs)
        raise ResultsError(f"the results are not of {name} (seed {seed}), but of {measured}.")
    return found[0]


def score_table(results: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of scores by length and seed; empty for tasks without right answers."""
    rows = []
    for entry, seed in _by_length(results):
        if "scores" not in entry:
            continue
        row = {"length": entry["length"], "tokens": number(entry["tokens"]), "segments": number(entry["segments"])}
        row |= {"samples": number(entry["samples"]), "seed": str(seed)}
        shown = [name for name in CONDITIONS if name in entry["scores"]]
        shown += [name for name in entry["scores"] if name not in CONDITIONS]
        rows.append(row | {name: _score(entry["scores"][name]) for name in shown})
    return rows


def loss_table(results: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of losses by length, seed and segment; empty for tasks that have scores."""
    rows = []
    for entry, seed in _by_length(results):
        by_condition = entry.get("loss_by_segment", {})
        for segment in range(max(map(len, by_condition.values()), default=0)):
            row = {"length": entry["length"], "seed": str(seed), "segment": str(segment)}
            losses = {name: values[segment] for name, values in by_condition.items() if segment < len(values)}
            rows.append(row | {name: _loss(loss) for name, loss in losses.items()})
    return rows


def speed_table(results: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of tokens per second and peak memory by length and seed."""
    rows = []
    for entry, seed in _by_length(results):
        measured = {"tokens/s": entry.get("tokens_per_s"), "peak GiB": entry.get("peak_gib")}
        found = {name: number(value) for name, value in measured.items() if value is not None}
        if found:
            rows.append({"length": entry["length"], "seed": str(seed), **found})
    return rows


def background_notes(results: dict[str, Any]) -> list[str]:
    """One sentence a length about the text around the facts."""
    notes = {}
    for entry, _ in _by_length(results):
        background = entry.get("background")
        if background:
            again = "repeated to that length" if background["repeated"] else "none of them repeated"
            notes[entry["length"]] = f"{number(background['unique_tokens'])} different background tokens, {again}"
    return [f"{length}: {note}." for length, note in notes.items()]


def number(value: float) -> str:
    """As on a card: whole numbers in full, others to three places, or what three digits need."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _score(score: dict[str, Any]) -> str:
    return f"{percent(score['mean'])} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _loss(loss: dict[str, Any]) -> str:
    return f"{loss['mean']:.3f} [{loss['low']:.3f}, {loss['high']:.3f}]"


def _by_length(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """Entries with their seeds, in the order of the lengths, seeds of one length together."""
    order = list(dict.fromkeys(entry["length"] for run in results["runs"] for entry in run["lengths"]))
    entries = [(entry, run["seed"]) for run in results["runs"] for entry in run["lengths"]]
    yield from sorted(entries, key=lambda pair: order.index(pair[0]["length"]))


def _missing(results: dict[str, Any]) -> Iterator[str]:
    runs = results["runs"]
    if not all(results.get(name) for name in ("task", "environment")):
        yield "the task or the environment"
    seeds = [run.get("seed") for run in runs]
    if None in seeds:
        names = ", ".join(run["checkpoint"] for run in runs if run.get("seed") is None)
        yield f"the seed of {names} (its training.json says it)"
    known = {seed for seed in seeds if seed is not None}
    if len(known) < SEEDS:
        listed = ", ".join(map(str, sorted(known))) or "none"
        yield f"seeds: {SEEDS} are needed, measured: {listed}"
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
            where = f"at {entry['length']} of seed {run.get('seed')}"
            if "scores" in entry:
                found, needed = entry["scores"], ("memory", *CONTROLS)
            else:
                found, needed = entry.get("loss_by_segment", {}), ("memory", *LOSS_CONTROLS)
            absent = [name for name in needed if name not in found]
            if absent:
                yield f"{', '.join(absent)} {where}"
            measured = [
                value for values in found.values() for value in (values if isinstance(values, list) else [values])
            ]
            if any(not {"mean", "low", "high"} <= value.keys() for value in measured):
                yield f"intervals {where}"
