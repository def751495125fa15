"""Progress in the terminal."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, tokens: int | None) -> Iterator[Callable[[int], Any]]:
    """A bar over about so many tokens, None if nobody knows, in a terminal; yields a function that moves it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=tokens, rate="")

        def advance(read: int) -> None:
            progress.update(bar, advance=read)
            speed = progress.tasks[0].speed
            progress.update(bar, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield advance


def say_again(title: str, controls: Sequence[str]) -> None:
    """A line about a length that is not only added to."""
    say(f"{title}: measured again, with {', '.join(controls)}, since its answers are not there.")


def say_done(title: str, entry: dict[str, Any], seconds: float) -> None:
    """A line about what was measured at a length: a log shows how far the command is."""
    measured = entry["scores"] if "scores" in entry else entry.get("loss", {})
    means = [f"{name} {score['mean']:.3f}" for name, score in measured.items() if score["mean"] is not None]
    say(f"{title}: {', '.join(means)}; {entry['samples']} samples in {seconds:,.0f} s")


def say(line: str) -> None:
    Console(stderr=True, markup=False).print(line, style="dim", highlight=False, soft_wrap=True)
