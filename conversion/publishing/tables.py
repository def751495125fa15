"""Measurements as rows of tables, each a dict of cells by column. Numbers are rounded here, and nowhere computed."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup


CONDITIONS = ("memory", "memory off", "memory swapped", "fact deleted", "backbone")
# Of `ARMTCache.stats`, in words.
QUANTITIES = {
    "A_norm": "norm of A, the memory's matrix",
    "z_norm": "norm of z, which normalises reads",
    "A_growth": "doublings of A's norm in a thousand segments",
    "mean_gamma": "gamma, the new share of a key, on average",
    "zero_gamma_share": "share of the keys of which nothing was new",
    "lambda_max": "largest eigenvalue of a write (A grows where it stays above two)",
    "lambda_last": "the same of the last write",
    "min_kz_ratio": "smallest k·z of a write, in squares of the key's norm",
    "min_qz": "smallest denominator of a read",
    "min_denominator": "smallest denominator of a read or a write",
    "max_read_ratio": "largest read, in norms of what it is added to",
}
Row = dict[str, str]


def scores(results: dict[str, Any]) -> list[Row]:
    """Shares of right answers by length and seed; empty for tasks without right answers."""
    rows = []
    for entry, run in by_length(results):
        if "scores" in entry:
            row = {name: number(entry[name]) for name in ("tokens", "segments", "samples")}
            shown = [name for name in CONDITIONS if name in entry["scores"]]
            shown += [name for name in entry["scores"] if name not in CONDITIONS]
            cells = {name: share_with_interval(entry["scores"][name]) for name in shown}
            rows.append({"length": entry["length"], **row, "seed": seed(run), **cells})
    return rows


def losses(results: dict[str, Any]) -> list[Row]:
    """Losses by length, seed and segment; empty for tasks that have scores."""
    rows = []
    for entry, run in by_length(results):
        by_control = entry.get("loss_by_segment", {})
        for segment in range(max(map(len, by_control.values()), default=0)):
            row = {"length": entry["length"], "seed": seed(run), "segment": str(segment)}
            shown = {name: values[segment] for name, values in by_control.items() if segment < len(values)}
            rows.append(row | {name: with_interval(loss) for name, loss in shown.items()})
    return rows


def gains(results: dict[str, Any]) -> list[Row]:
    """Loss with memory minus that of each control, from the second segment on, by length and seed."""
    return [
        {"length": entry["length"], "seed": seed(run)}
        | {f"memory minus {name}": with_interval(gain) for name, gain in entry["memory_minus"].items()}
        for entry, run in by_length(results)
        if "memory_minus" in entry
    ]


def capacities(results: dict[str, Any]) -> list[Row]:
    """Pairs that a memory holds, by seed, of associative retrieval."""
    return [
        {"seed": seed(run), "pairs stored": with_interval(run["capacity"]), "length": run["capacity"]["length"]}
        for run in results["runs"]
        if run.get("capacity")
    ]


def baselines(results: dict[str, Any]) -> list[Row]:
    """What is scored without reading, by length where that makes a difference."""
    rows = {}
    for entry, _ in by_length(results):
        for name, share in entry.get("baselines", {}).items():
            rows.setdefault(name, {"baseline": name}).setdefault(entry["length"], percent(share))
    for name, share in results.get("baselines", {}).items():
        rows.setdefault(name, {"baseline": name, "score": percent(share)})
    return list(rows.values())


def speed(results: dict[str, Any]) -> list[Row]:
    """Tokens a second and peak memory by length and seed."""
    rows = []
    for entry, run in by_length(results):
        measured = {"tokens/s": entry.get("tokens_per_s"), "peak GiB": entry.get("peak_gib")}
        found = {name: number(value) for name, value in measured.items() if value is not None}
        if found:
            rows.append({"length": entry["length"], "seed": seed(run), **found})
    return rows


def health(run: dict[str, Any]) -> tuple[str, list[Row]]:
    """The longest length of a run that has them, and its statistics of the memory over layers and texts."""
    entries = [entry for entry in run["lengths"] if entry.get("stats")]
    if not entries:
        return "", []
    rows = [
        {"quantity": QUANTITIES.get(name, name.replace("_", " "))}
        | {key.replace("_", " "): number(value) for key, value in of.items()}
        for name, of in entries[-1]["stats"].items()
    ]
    return entries[-1]["length"], rows


def backgrounds(results: dict[str, Any]) -> list[str]:
    """What there is to say of the text around the facts, a sentence for all lengths of which it holds."""
    lengths: dict[str, dict[str, None]] = {}
    for entry, _ in by_length(results):
        background = entry.get("background")
        if background:
            again = "repeated to that length" if background["repeated"] else "none of them repeated"
            note = f"{number(background['unique_tokens'])} different background tokens, {again}."
            lengths.setdefault(note, {})[entry["length"]] = None
    return [f"{', '.join(of)}: {note}" for note, of in lengths.items()]


def by_length(results: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Entries with their runs, in the order of the lengths, the seeds of one length together."""
    order = list(dict.fromkeys(entry["length"] for run in results["runs"] for entry in run["lengths"]))
    entries = [(entry, run) for run in results["runs"] for entry in run["lengths"]]
    yield from sorted(entries, key=lambda pair: order.index(pair[0]["length"]))


def seed(run: dict[str, Any]) -> str:
    return "unknown" if run["seed"] is None else str(run["seed"])


def number(value: float) -> str:
    """Whole numbers in full, others to three digits, and large ones without a fraction."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def share_with_interval(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return ""
    return Markup(f"{percent(score['mean'])} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]")


def with_interval(score: dict[str, Any]) -> str:
    if score["mean"] is None:
        return ""
    return Markup(f"{score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
