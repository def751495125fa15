"""Results as tables in the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .controls import CONTROLS, MEMORY
from .intervals import Score
from .losses import LOSS_CONTROLS


def print_report(results: dict[str, Any], folder: str | Path, console: Console | None = None) -> None:
    """Prints a table a checkpoint, then what is known without reading, and where everything is."""
    console = console or Console(markup=False)
    task = results["task"]["name"]
    for run in results["runs"]:
        seed = "" if run["seed"] is None else f", seed {run['seed']}"
        scored = [entry for entry in run["lengths"] if "scores" in entry]
        with_loss = [entry for entry in run["lengths"] if "loss" in entry]
        if scored:
            console.print(score_table(scored, f"{run['checkpoint']}{seed}, {task}: share of right answers"))
        if with_loss:
            title = f"{run['checkpoint']}{seed}, {task}: loss from segment 2 on, and memory minus control"
            console.print(loss_table(with_loss, title))
        if run["lengths"]:
            say(console, speed_line(run["lengths"]))
        if "capacity" in run:
            best = run["capacity"]
            numbers = [f"{best[name]:,.0f}" for name in ("mean", "low", "high")]
            say(console, f"About {numbers[0]} pairs ({numbers[1]} to {numbers[2]}) of {best['length']} are stored.")
    if results["baselines"]:
        known = ", ".join(f"{name.replace('_', ' ')} {plain(value)}" for name, value in results["baselines"].items())
        say(console, f"Scored without reading, at the longest length: {known}.")
    say(console, f"Written to {folder}")


def score_table(entries: Sequence[dict[str, Any]], title: str) -> Table:
    """Shares of right answers by length; last what the best of the baselines gets without reading."""
    present = [name for name in CONTROLS.values() if any(name in entry["scores"] for entry in entries)]
    table = results_table(title, [MEMORY, "95% interval", *present, "not reading"])
    for entry in entries:
        scores = entry["scores"]
        cells = [plain(scores[MEMORY]["mean"]), bounds(scores[MEMORY], plain)]
        cells += [plain(scores[name]["mean"]) if name in scores else "" for name in present]
        cells.append(plain(max(entry["baselines"].values(), default=None)))
        table.add_row(entry["length"], f"{entry['segments']:,.0f}", *cells)
    return table


def loss_table(entries: Sequence[dict[str, Any]], title: str) -> Table:
    """Losses by length, and how much lower they are with memory."""
    present = [name for name in LOSS_CONTROLS.values() if any(name in entry["loss"] for entry in entries)]
    table = results_table(title, [MEMORY, *(f"minus {name}" for name in present)])
    for entry in entries:
        cells = [f"{entry['loss'][MEMORY]['mean']:.3f}"]
        for name in present:
            difference = entry["memory_minus"].get(name)
            cells.append(f"{difference['mean']:+.3f}\n{bounds(difference, '{:+.3f}'.format)}" if difference else "")
        table.add_row(entry["length"], f"{entry['segments']:,.0f}", *cells)
    return table


def results_table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("length", "segs", *columns):
        table.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
    return table


def speed_line(entries: Sequence[dict[str, Any]]) -> str:
    speeds, peak = [entry["tokens_per_s"] for entry in entries], max(entry["peak_gib"] for entry in entries)
    return f"{short(min(speeds))} to {short(max(speeds))} tokens/s, at most {peak:.2f} GiB."


def bounds(score: Score, form: Callable[[float], str]) -> str:
    """`(.975 .991)`."""
    return "" if score["low"] is None else f"({form(score['low'])} {form(score['high'])})"


def plain(share: float | None) -> str:
    """`.985`."""
    return "" if share is None else "1" if share == 1 else f"{share:.3f}".removeprefix("0")


def short(number: float) -> str:
    """`1.2M`, `96k`, `850`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.{0 if number >= 10 * size else 1}f}{unit}"
    return f"{number:.0f}"


def say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
