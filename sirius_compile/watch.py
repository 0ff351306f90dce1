"""Who is told how far work of some seconds has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Watch(Protocol):
    """Shows the progress of one piece of work at a time."""

    def count(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """Within it, work of `total` equal parts is done; what it gives is called after each."""
        ...


class Unwatched:
    """Shows nothing."""

    @contextmanager
    def count(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        yield lambda: None


unwatched: Watch = Unwatched()


def each(watch: Watch, what: str, parts: Sequence[_T]) -> Iterator[_T]:
    """`parts`, each counted once it is done with."""
    with watch.count(what, len(parts)) as done:
        for part in parts:
            yield part
            done()
