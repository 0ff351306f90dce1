"""Streams blocks from the slow tier into a ring buffer, ahead of the calls that read them.

The blocks of an entry's steps have fixed places in the ring, so that a graph's arguments are bound
once. In a pass, `wait` returns when a step's blocks have arrived; `done` frees their places, and
loads of the next steps that fit are begun. When a pass ends, the loads of the pass that followed it
last time are begun at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from sirius_runtime.errors import BackendError
from sirius_runtime.tiers.placement import Step


class Load(NamedTuple):
    """A copy of a block: `room` bytes from offset `first` of the slow tier to offset `place` of the
    arena. Only the first `needed` bytes must exist in the slow tier.
    """

    first: int
    room: int
    needed: int
    place: int


class Pending(Protocol):
    """A load that was begun."""

    def wait(self) -> None:
        """Returns when the bytes have arrived; raises the load's error."""
        ...

    def cancel(self) -> None:
        """Cancels the load; returns when nothing more is written."""
        ...


class Tier(Protocol):
    """A slow tier."""

    def fetch(self, load: Load) -> Pending:
        """Begins a copy to the fast tier. Copies start in the order of calls; several may run."""
        ...

    def rows(self, start: int, size: int, rows: Sequence[int], into: memoryview) -> None:
        """Copies rows of `size` bytes of the matrix at offset `start` to `into`."""
        ...

    def release(self) -> None:
        """Marks that queued work may still read its blocks; later loads wait for that work."""
        ...


Schedule = tuple[tuple[Load, ...], ...]
"""The loads of a pass, by step."""


def scheduled(steps: Sequence[Step], begin: int, size: int) -> Schedule:
    """The loads of a pass into a ring of `size` bytes at offset `begin` of the arena. A step's
    blocks lie one after another, in their order.
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
        self._follows = {entry: entry for entry in schedules}  # the entry that last followed each
        self._entry: str | None = None  # the last entry that streamed
        self._schedule: Schedule = ()
        self._begun = 0  # number of steps whose loads were begun
        # For each step that is not done: its range [start, end) of the arena, and its loads.
        self._pending: list[tuple[int, int, list[Pending]]] = []

    @contextmanager
    def running(self, entry: str) -> Iterator[None]:
        """The context of an entry's pass. If it ends by an error, all loads are cancelled."""
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
        """Returns when the blocks of this step have arrived."""
        if step >= self._begun:
            raise BackendError(f"step {step} of a pass is read before the steps ahead of it ended")
        for pending in self._pending[0][2]:
            pending.wait()

    def done(self, step: int) -> None:
        """Marks that the step was computed, so that its places can be used again."""
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
