"""Results as a table in the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .controls import CONTROLS, MEMORY
from .intervals import Score


def print_report(results: dict[str, Any], folder: str | Path, console: Console | None = None) -> None:
    """Prints one row a checkpoint and length, then the baselines and where everything is."""
    console = console or Console()
    console.print(score_table(results))
    if results["baselines"]:
        known = ", ".join(f"{name} {value:.3f}" for name, value in results["baselines"].items())
        console.print(f"without reading: {known}", highlight=False)
    for run in results["runs"]:
        if "capacity" in run:
            best = run["capacity"]
            console.print(
                f"{run['checkpoint']}: about {best['mean']:,.0f} pairs stored at {best['length']} "
                f"({best['low']:,.0f} to {best['high']:,.0f})",
                highlight=False,
            )
    console.print(f"written to {folder}", highlight=False, soft_wrap=True)


def score_table(results: dict[str, Any]) -> Table:
    """Scores with 95% intervals."""
    entries = [(run, entry) for run in results["runs"] for entry in run["lengths"]]
    present = [name for name in (MEMORY, *CONTROLS.values()) if any(name in entry["scores"] for _, entry in entries)]
    table = Table("checkpoint", title=f"{results['task']['name']}: share of right answers, 95% interval")
    table.columns[0].no_wrap = True
    for column in ("length", "segments", *present, "tokens/s", "GiB"):
        table.add_column(column, justify="right")
    previous = None
    for run, entry in entries:
        table.add_row(
            "" if run is previous else run["checkpoint"],
            entry["length"],
            f"{entry['segments']:,.0f}",
            *(score_text(entry["scores"].get(name), with_interval=name == MEMORY) for name in present),
            f"{entry['tokens_per_s']:,.0f}",
            f"{entry['peak_gib']:.2f}",
            end_section=entry is run["lengths"][-1],
        )
        previous = run
    return table


def score_text(score: Score | None, with_interval: bool = True) -> str:
    """`.985 [.975, .991]`."""
    if score is None or score["mean"] is None:
        return ""
    text = plain(score["mean"])
    if with_interval and score["low"] is not None:
        text += f" [{plain(score['low'])}, {plain(score['high'])}]"
    return text


def plain(share: float) -> str:
    return f"{share:.3f}".removeprefix("0")
