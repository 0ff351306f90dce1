"""Streams what a pass reads of the slow tier, ahead of the calls that read it.

The blocks of an entry's steps have places in a ring, one after another, so that a graph's arguments
are bound once. A pass goes through its steps: `wait` returns when the step's blocks have come,
`done` frees their places, and the next steps that fit are begun. When a pass ends, the next one's
first steps are begun at once: they come while the draft computes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from sirius_runtime.errors import BackendError
from sirius_runtime.tiers.placement import Step


class Load(NamedTuple):
    """A block on its way: `room` bytes from the slow tier's offset `first` to `place` in the fast
    one, of which the slow tier has to have the first `needed`.
    """

    first: int
    room: int
    needed: int
    place: int


class Pending(Protocol):
    """Loads that were begun."""

    def wait(self) -> None:
        """Returns when all is there, or raises what went wrong."""
        ...

    def cancel(self) -> None:
        """Gives them up; returns when nothing is written any more."""
        ...


class Tier(Protocol):
    """A slow tier."""

    def fetch(self, load: Load) -> Pending:
        """Begins a copy to the fast tier. Copies are made in this order, more than one at once."""
        ...

    def rows(self, start: int, size: int, rows: Sequence[int], into: memoryview) -> None:
        """Copies rows of `size` bytes of a matrix at offset `start`, one after another."""
        ...

    def release(self) -> None:
        """Says that work which was begun may still read its blocks: later loads follow it."""
        ...


Schedule = tuple[tuple[Load, ...], ...]
"""The loads of a pass, by step."""


def scheduled(steps: Sequence[Step], begin: int, size: int) -> Schedule:
    """Places for the steps of a pass, in a ring at `begin`. A step's blocks lie one after another,
    in their order.
    """
    at, found = 0, []
    for step in steps:
        room = sum(block.room for block in step)
        at = 0 if at + room > size else at
        loads = []
        for block in step:
            loads.append(Load(block.first, block.room, block.end - block.first, begin + at))
            at += block.room
        found.append(tuple(loads))
    return tuple(found)


class Stream:
    """Runs the schedules of entries, one pass at a time."""

    def __init__(self, tier: Tier, schedules: Mapping[str, Schedule]) -> None:
        self._tier, self._schedules = tier, dict(schedules)
        self._lock = threading.Lock()
        self._follows = {entry: entry for entry in schedules}  # what a pass was followed by
        self._entry: str | None = None  # the last one that streamed
        self._schedule: Schedule = ()
        self._begun = 0  # steps
        self._pending: list[tuple[int, int, list[Pending]]] = []  # of steps that are not done

    @contextmanager
    def running(self, entry: str) -> Iterator[None]:
        """The context of an entry's pass. Whatever it ends by, no read is left that others wait
        for.
        """
        schedule = self._schedules[entry]
        with self._lock:
            if not schedule:
                yield
                return
            try:
                if schedule != self._schedule or self._begun == 0:
                    self._give_up()
                    self._begin(schedule)
                yield
                if self._entry is not None:
                    self._follows[self._entry] = entry
                self._entry = entry
                self._give_up()
                self._begin(self._schedules[self._follows[entry]])
            except BaseException:
                self._give_up()
                raise

    def wait(self, step: int) -> None:
        """Returns when the blocks of this step are in their places."""
        if step >= self._begun:
            raise BackendError(f"step {step} of a pass is read before the steps ahead of it ended")
        for pending in self._pending[0][2]:
            pending.wait()

    def done(self, step: int) -> None:
        """Says that the step was computed."""
        del self._pending[0]
        self._tier.release()
        self._go_on()

    def close(self) -> None:
        with self._lock:
            self._give_up()

    def _begin(self, schedule: Schedule) -> None:
        self._schedule, self._begun = schedule, 0
        self._go_on()

    def _go_on(self) -> None:
        """Begins the next steps whose places are free."""
        while self._begun < len(self._schedule):
            loads = self._schedule[self._begun]
            start, end = loads[0].place, loads[-1].place + loads[-1].room
            if any(start < stop and begin < end for begin, stop, _ in self._pending):
                return
            held: list[Pending] = []
            self._pending.append((start, end, held))
            self._begun += 1
            for load in loads:
                held.append(self._tier.fetch(load))

    def _give_up(self) -> None:
        for *_, all_of in self._pending:
            for pending in all_of:
                pending.cancel()
        self._pending, self._schedule, self._begun = [], (), 0
