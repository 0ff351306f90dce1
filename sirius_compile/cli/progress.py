"""A progress bar on stderr, if it is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sirius_compile.watch import Watch, unwatched


class Bar:
    """A `Watch` that draws a bar with the remaining time, and clears it when the work is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def count(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        with self._bar(what, total, MofNCompleteColumn()) as advance:
            yield lambda: advance(1)

    @contextmanager
    def measure(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        with self._bar(what, total, DownloadColumn(), TransferSpeedColumn()) as advance:
            yield advance

    @contextmanager
    def _bar(
        self, what: str, total: int, *amounts: ProgressColumn
    ) -> Iterator[Callable[[int], None]]:
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            *amounts,
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda done: progress.advance(task, done)


def bar() -> Watch:
    """A `Bar` if stderr is a terminal, else a `Watch` that shows nothing."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else unwatched
