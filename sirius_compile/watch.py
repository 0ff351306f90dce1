"""Progress of long work, for a display."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

_T = TypeVar("_T")


class Watch(Protocol):
    """Shows the progress of one piece of work at a time."""

    def count(self, what: str, total: int) -> AbstractContextManager[Callable[[], None]]:
        """A context for work of `total` equal parts; call its value after each part."""
        ...

    def measure(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A context for work on `total` bytes; call its value with the bytes that are done."""
        ...


class Unwatched:
    """Shows nothing."""

    @contextmanager
    def count(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        yield lambda: None

    @contextmanager
    def measure(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        yield lambda done: None


unwatched: Watch = Unwatched()


def each(watch: Watch, what: str, parts: Sequence[_T]) -> Iterator[_T]:
    """Yields `parts`, and counts each after its use."""
    with watch.count(what, len(parts)) as done:
        for part in parts:
            yield part
            done()
