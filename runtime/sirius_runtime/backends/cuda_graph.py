"""Whole periods as CUDA graphs: a period is recorded once, and then is one launch.

The recording and its replay have not run on a GPU yet; what they record is tested on the CPU
(`sirius_runtime.static_session`).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sirius_runtime.backends.eager import EagerBackend
from sirius_runtime.backends.inductor import InductorBackend
from sirius_runtime.backends.period import Progress
from sirius_runtime.decoder import Decoder, Uniform
from sirius_runtime.errors import BackendError
from sirius_runtime.request import Request
from sirius_runtime.sizes import cache_slots
from sirius_runtime.spec import JSON, ProgramSpec
from sirius_runtime.static_session import Replay, StaticSession
from sirius_runtime.stats import StatsRecorder
from sirius_runtime.torch_decoder import TorchDecoder

LEAST_SLOTS = 512
"""Cache slots of the smallest session; larger ones have a power of two of them, so that prompts of
many lengths share recordings."""
IDLE = 2
"""Sessions kept for the next generation, with their caches and recordings."""
RECORDINGS = 16
"""Of one session: each threshold and temperature has its own."""


class GraphReplay:
    """The `Replay` of one session by CUDA graphs."""

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
        """Runs the work once, because a first run compiles and allocates, takes its effects back,
        and records it. What it writes to the caches lies beyond each row's length.
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


class StaticSessions:
    """Static sessions over a back end's entries, each lent to one generation at a time.

    A generation whose rows, period, refresh and (rounded) length were seen before gets their
    session, with its recordings.
    """

    def __init__(self, backend: EagerBackend, replay: Callable[[], Replay]) -> None:
        """`replay` makes what each session replays by."""
        self._backend, self._replay = backend, replay
        self._idle: list[tuple[Hashable, StaticSession]] = []  # the latest last

    @torch.inference_mode()
    def open(
        self,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
    ) -> Decoder:
        """As `Engine.open`, for a request whose period is fixed."""
        slots = LEAST_SLOTS
        while slots < cache_slots(tokens, request.period, max(request.widths)):
            slots *= 2
        key = (rows, slots, request.period, request.refresh)
        session = self._take(key)
        if session is None:
            session = StaticSession(
                self._backend,
                rows,
                slots,
                recorder,
                size=request.period,
                refresh=request.refresh,
                replay=self._replay(),
            )
        session.begin(recorder)
        own = None if uniform is None else _not_held(uniform)
        decoder = TorchDecoder(self._backend, request, rows, tokens, recorder, own, session)
        weakref.finalize(decoder, self._give_back, key, session)
        return decoder

    def _take(self, key: Hashable) -> StaticSession | None:
        for index, (known, session) in enumerate(self._idle):
            if known == key:
                del self._idle[index]
                return session
        return None

    def _give_back(self, key: Hashable, session: StaticSession) -> None:
        self._idle.append((key, session))
        del self._idle[:-IDLE]


def _not_held(uniform: Uniform) -> Uniform:
    """`uniform` without a hold on its generation, which holds the decoder: held in a ring, that
    would give its session back at the next garbage collection, and not at its end.
    """
    if not inspect.ismethod(uniform):
        return uniform
    method = weakref.WeakMethod(uniform)

    def numbers(*shape: int) -> np.ndarray:
        found = method()
        assert found is not None, "the generation has ended"
        return found(*shape)

    return numbers


class CudaGraphBackend(InductorBackend):
    """As `InductorBackend`, with periods and steps recorded as CUDA graphs, once for a number of
    rows, a period, a tree, an acceptance and a (rounded) length.

    State stays on the device; a period is one launch and one small copy to the host. Prompts are
    run as they come, and so are the periods of ``period="auto"``, which compares the times of
    drafting and of verifying: a recording does not tell them apart. So are those whose logits are
    processed, which may call the user's code.
    """

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
        self._sessions = StaticSessions(self, GraphReplay)

    def open(
        self,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
    ) -> Decoder:
        if request.adaptive or request.scoring is not None:
            return super().open(request, rows, tokens, recorder, uniform)
        return self._sessions.open(request, rows, tokens, recorder, uniform)
