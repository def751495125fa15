"""Progress in the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, tokens: int | None) -> Iterator[Callable[[int], Any]]:
    """A bar over about so many tokens, None if nobody knows; yields a function that moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(title, total=tokens, rate="")

        def advance(read: int) -> None:
            progress.update(bar, advance=read)
            speed = progress.tasks[0].speed
            progress.update(bar, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield advance
