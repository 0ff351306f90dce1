"""A progress bar on stderr, if it is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sirius_compile.watch import Watch, unwatched


class Bar:
    """A `Watch` that draws a bar with the remaining time, and clears it when the work is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def count(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)


def bar() -> Watch:
    """A `Bar` if stderr is a terminal, else a `Watch` that shows nothing."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else unwatched
