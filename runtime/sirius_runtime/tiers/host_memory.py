"""The slow tier of a GPU: pinned memory of the host, copied on its own CUDA stream.

This has not run on a GPU. The order of copies is tested on the CPU, where copies are synchronous.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.tiers.stream import Load


class _Copy:
    """A queued copy. `event`: recorded after the copy; None if the copy is done."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def cancel(self) -> None:
        """Nothing to do: a queued copy can't be cancelled, and later copies queue behind it."""


class HostMemory:
    """Copies blocks of a file in the host's memory (pinned for a GPU) to `arena` on the device."""

    def __init__(self, source: Tensor, arena: Tensor) -> None:
        """`source`, `arena`: uint8 [bytes], on the host and on the device."""
        self._cuda = arena.device.type == "cuda"
        self._source, self._arena = source.pin_memory() if self._cuda else source, arena
        self._copies = torch.cuda.Stream(arena.device) if self._cuda else None
        self._computed: torch.cuda.Event | None = None

    def fetch(self, load: Load) -> _Copy:
        beside: Any = nullcontext()
        if self._copies is not None:
            beside = torch.cuda.stream(self._copies)
            if self._computed is not None:
                self._copies.wait_event(self._computed)
        with beside:
            source = self._source[load.first : load.first + load.needed]
            place = self._arena[load.place : load.place + load.needed]
            place.copy_(source, non_blocking=True)
            return _Copy(None if self._copies is None else self._copies.record_event())

    def release(self) -> None:
        if self._cuda:
            self._computed = torch.cuda.current_stream().record_event()

    def rows(self, start: int, size: int, rows: Sequence[int], into: memoryview) -> None:
        whole = memoryview(self._source.numpy()).cast("B")  # type: ignore[arg-type]
        for index, row in enumerate(rows):
            begin = start + row * size
            into[index * size : (index + 1) * size] = whole[begin : begin + size]
