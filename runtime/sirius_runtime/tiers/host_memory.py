"""The slow tier of a GPU: pinned memory of the host, copied on a stream beside the computation.

This has not run on a GPU. Its order of copies is tested on the CPU, where a copy is done at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.tiers.stream import Load


class _Copy:
    """A copy that was queued; `event`: after it, None where it is done."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def cancel(self) -> None:
        """What was queued is copied; who copies there next, queues behind it."""


class HostMemory:
    """Copies from the bytes of a file in the host's memory, pinned for a GPU, to its `arena`."""

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
