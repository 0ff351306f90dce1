"""Whole periods as CUDA graphs: a period is recorded once, then replayed by one launch.

Recording and replay have not run on a GPU yet. The work that is recorded is tested on the CPU
(`sirius_runtime.recorded`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.inductor import InductorBackend
from sirius_runtime.backends.period import Progress
from sirius_runtime.by_entries import ByEntries, chooser
from sirius_runtime.decoder import Decoder, Way, steps
from sirius_runtime.errors import BackendError
from sirius_runtime.recorded import Recorded, Replay, Storage
from sirius_runtime.request import Request
from sirius_runtime.sizes import cache_slots
from sirius_runtime.spec import JSON, ProgramSpec
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tensor_state import TensorState

LEAST_SLOTS = 512
"""Cache slots of the smallest state. Larger states have a power of two of slots, so that prompts of
many lengths share recordings.
"""
IDLE = 2
"""States kept for the next generation, with their caches and recordings."""
RECORDINGS = 16
"""Recordings kept of one state: each threshold and temperature has its own."""


class GraphReplay:
    """A `Replay` by CUDA graphs, for the work of one state."""

    def __init__(self) -> None:
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, key: Hashable, work: Callable[[], None], state: Sequence[Tensor]) -> None:
        graph = self._graphs.get(key)
        if graph is None:
            if len(self._graphs) == RECORDINGS:
                self._graphs.clear()
            graph = self._graphs[key] = self._record(work, state)
        graph.replay()

    def _record(self, work: Callable[[], None], state: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        """Runs the work once (a first run compiles and allocates), restores `state`, and records
        the work. The caches are not restored: the run writes only to slots beyond each row's
        length.
        """
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph


class Recordings:
    """States over a back end's entries and their recordings, each lent to one generation at a time.

    A generation whose rows, period, refresh and (rounded) length were seen before gets their state,
    with its recordings.
    """

    def __init__(self, backend: EagerBackend, replay: Callable[[], Replay]) -> None:
        """`replay` makes the `Replay` of each state."""
        self._backend, self._replay = backend, replay
        self._idle: list[tuple[Hashable, Storage]] = []  # most recently used last

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        """As `Backend.open`, for a request whose period is fixed."""
        slots = LEAST_SLOTS
        while slots < cache_slots(tokens, request.period, max(request.widths)):
            slots *= 2
        key = (rows, slots, request.period, request.refresh)
        with torch.inference_mode():
            storage = self._take(key)
            if storage is None:
                state = TensorState(self._backend, rows, slots)
                storage = Storage(state, request.period, self._replay())
            storage.state.reset()
        choose = chooser(request.plan.sampling)
        strategies = {Way.DRAFT: ByEntries(all_levels=True), **steps(choose)}
        decoder = Decoder(
            storage.state,
            {way: Recorded(way, inner, storage) for way, inner in strategies.items()},
            choose,
            clock,
            refresh=request.refresh,
            resizable=False,
        )
        weakref.finalize(decoder, self._give_back, key, storage)
        return decoder

    def _take(self, key: Hashable) -> Storage | None:
        for index, (known, storage) in enumerate(self._idle):
            if known == key:
                del self._idle[index]
                return storage
        return None

    def _give_back(self, key: Hashable, storage: Storage) -> None:
        self._idle.append((key, storage))
        del self._idle[:-IDLE]


class CudaGraphBackend(InductorBackend):
    """As `InductorBackend`, with periods and steps recorded as CUDA graphs: one recording for each
    combination of rows, period, tree, acceptance rule and (rounded) length.

    State stays on the device; a period is one launch and one small copy to the host. Three things
    run without a recording: prompts; the periods of ``period="auto"``, which needs separate times
    for drafting and verifying; and periods whose logits are processed, because a processor may call
    the user's code.
    """

    looks_up = False

    def __init__(
        self,
        program: ProgramSpec,
        documents: Mapping[str, JSON],
        weights: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Raises BackendError where `device` is no CUDA GPU, or inductor does not work."""
        if device.type != "cuda":
            raise BackendError(
                f"backend cudagraph records CUDA graphs, and the device is {device.type}: use "
                "backend eager or inductor, or name a CUDA GPU by device='cuda'"
            )
        super().__init__(program, documents, weights, dtype=dtype, device=device, progress=progress)
        self._recordings = Recordings(self, GraphReplay)

    def open(self, request: Request, rows: int, tokens: int, clock: PhaseClock) -> Decoder:
        if request.adaptive or request.scoring is not None:
            return super().open(request, rows, tokens, clock)
        return self._recordings.open(request, rows, tokens, clock)
