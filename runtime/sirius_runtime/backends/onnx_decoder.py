"""Sequences in progress on ONNX Runtime: prefill, steps, and one call of `period` a period.

The draft loop, the tree, acceptance and rollback are in the graph `period`; what is left here is
state and its bookkeeping. Shape letters as in `sirius_runtime.session`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sirius_runtime.backends.onnx_graphs import OnnxGraphs
from sirius_runtime.backends.onnx_state import Caches, DeviceCaches, HostCaches
from sirius_runtime.decoder import RowPeriod, Uniform
from sirius_runtime.errors import ArtifactError
from sirius_runtime.logits_options import TokenLogprobs
from sirius_runtime.onnx_files import SELECT
from sirius_runtime.plan import INTEGERS, Plan, sampling_numbers
from sirius_runtime.request import Request
from sirius_runtime.sampling import NO_TOKEN
from sirius_runtime.sizes import PREFILL_CHUNK, cache_slots
from sirius_runtime.stats import Phase, StatsRecorder, measured_density

_STAYS = ("k_new", "v_new", "k_kept", "v_kept")
"""Outputs that are read by other graphs alone: on a device they stay there."""


class OnnxDecoder:
    """See `sirius_runtime.decoder.Decoder`."""

    resizable = True

    def __init__(
        self,
        backend: OnnxGraphs,
        request: Request,
        rows: int,
        tokens: int,
        recorder: StatsRecorder,
        uniform: Uniform | None,
    ) -> None:
        self._backend, self._request, self._recorder = backend, request, recorder
        self._uniform, self._periods = uniform, 0
        program = backend.program
        state, period = program.state, request.period
        if backend.limits is not None and request.whole_periods:
            period = backend.limits.period  # its block is of the compiled size
        slots = cache_slots(tokens, period, max(request.widths))
        shape = (state.layers, rows, state.kv_heads, slots)
        arrays = {
            "k_cache": np.zeros((*shape, state.key_dim), backend.dtype),
            "v_cache": np.zeros((*shape, state.value_dim), backend.dtype),
        }
        self._caches: Caches = (
            DeviceCaches(arrays, backend.value, backend.graph("write").session)
            if backend.on_device
            else HostCaches(arrays, backend.value)
        )
        self._last_position = program.model.max_seq_len - 1
        self._statistic: np.ndarray | None = None
        self._kept_weights: dict[str, Any] = {}
        self._kept = np.zeros(len(program.sparsity.counted))
        self._kept_tokens = 0
        self._length = np.zeros(rows, np.int64)
        self._root = np.zeros(rows, np.int64)
        self._active = np.ones(rows, bool)

    # the seam

    def prefill(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        lengths = np.array([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        ids = np.zeros((len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        logits_BV = np.empty((len(prompts), self._backend.program.model.vocab_size), np.float32)
        for start in range(0, longest, PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            size = chunk.shape[1]
            self._length = np.minimum(lengths, start)
            inputs = {"last": np.clip(lengths - 1 - start, 0, size - 1)}
            if self._backend.kept:
                inputs["valid"] = np.arange(start, start + size) < lengths[:, None]
            result = self._tokens("prefill", chunk, inputs)
            ends_here = (lengths > start) & (lengths <= start + size)
            logits_BV[ends_here] = result["logits"][ends_here, 0]
            if "statistic" in result:
                part = result["statistic"]
                self._statistic = part if self._statistic is None else self._statistic + part
            self._recorder.prefill_passes += 1
        self._length = lengths
        # Once: with a pick a chunk, a longer neighbour would use up a row's random numbers.
        self._root = self._pick(logits_BV)
        self._choose_neurons()
        return self._root.tolist()

    def period(self, plan: Plan, sizes: Sequence[int], noise: np.ndarray | None) -> list[RowPeriod]:
        backend = self._backend
        assert backend.limits is not None
        uniform = np.zeros((len(self._root), 2, backend.limits.period))
        if noise is not None:
            uniform[:, :, : noise.shape[2]] = noise
        inputs = {
            "root": self._root,
            "active": self._active,
            "most": np.array(sizes),
            "length": self._length,
            "noise": uniform,
            **_scalars(plan.numbers()),
        }
        if self._statistic is not None:
            inputs["statistic"] = self._statistic
        with self._recorder.clock(Phase.PERIOD):
            result = self._run("period", inputs, self._kept_weights)
            self._caches.write(self._length, result["k_kept"], result["v_kept"])
        self._root, self._length = result["next_root"], result["next_length"]
        drafted = result["drafted"]
        if "kept" in result:
            self._kept += result["kept"].sum(1)
            self._kept_tokens += int(drafted.sum())
        self._recorder.draft_steps += int(result["levels"])
        self._recorder.full_passes += 1
        self._statistic = result.get("next_statistic")
        self._end_period()
        rows = zip(result["tokens"], result["advance"], drafted, strict=True)
        return [RowPeriod(tokens[:n].tolist(), int(levels)) for tokens, n, levels in rows]

    def full_step(self) -> list[int]:
        with self._recorder.clock(Phase.VERIFY):
            result = self._tokens("full", self._root[:, None])
        self._recorder.full_passes += 1
        return self._advance(result)

    def sparse_step(self) -> list[int]:
        with self._recorder.clock(Phase.DRAFT):
            result = self._tokens("sparse", self._root[:, None], weights=self._kept_weights)
        self._count_kept(result, self._active)
        return self._advance(result)

    def logprobs(self) -> list[list[TokenLogprobs]]:
        raise AssertionError("a ScoredOnnxDecoder gives them")

    def set_active(self, active: Sequence[bool]) -> None:
        self._active = np.array(active)

    def select(self, rows: Sequence[int]) -> None:
        self._caches.select(rows)
        if self._statistic is not None:
            self._statistic = np.ascontiguousarray(self._statistic[:, rows])
        self._kept_weights = {
            name: self._backend.value(value.numpy()[list(rows)])
            for name, value in self._kept_weights.items()
        }
        self._length, self._root, self._active = (
            value[list(rows)] for value in (self._length, self._root, self._active)
        )

    def density(self) -> float:
        return measured_density(self._backend.program.sparsity, self._kept, self._kept_tokens)

    def array(self, tokens: Sequence[Any]) -> np.ndarray:
        return np.array(tokens, np.int64)

    # what it is made of

    def _count_kept(self, result: Mapping[str, Any], rows_B: np.ndarray) -> None:
        """Counts a sparse step, and what it kept of these rows."""
        if "kept" in result:
            self._kept += (result["kept"] * rows_B).sum(1)
            self._kept_tokens += int(rows_B.sum())
        self._recorder.draft_steps += 1

    def _end_period(self) -> None:
        """Counts a period, and chooses neurons anew where it is time to."""
        self._periods += 1
        if self._request.refresh and self._periods % self._request.refresh == 0:
            self._choose_neurons()

    def _advance(self, result: Mapping[str, Any]) -> list[int]:
        token = self._pick(result["logits"][:, 0])
        self._root = np.where(self._active, token, self._root)
        self._length = self._length + self._active
        return self._root.tolist()

    def _pick(self, logits_BV: np.ndarray) -> np.ndarray:
        """The next token of each row: its likeliest, or one drawn with the row's own number."""
        if self._uniform is None:
            token = logits_BV.argmax(-1)
            best = np.take_along_axis(logits_BV, token[:, None], -1)[:, 0]
            return np.where(np.isfinite(best), token, NO_TOKEN)
        inputs = {
            "logits": logits_BV.astype(self._backend.dtype),
            "uniform": self._uniform(1)[:, 0],
            **_scalars(sampling_numbers(self._request.plan.sampling)),
        }
        return self._run("pick", inputs)["tokens"]

    def _choose_neurons(self) -> None:
        """Gathers the weights of the neurons of largest statistic."""
        if self._statistic is None:
            return
        session = self._backend.graph(SELECT).session
        binding = session.io_binding()
        binding.bind_cpu_input("statistic", self._statistic)
        for name in self._backend.kept:
            binding.bind_output(name, "cuda" if self._backend.on_device else "cpu")
        self._kept_weights.clear()  # before their successors need room
        run_bound(SELECT, session, binding)
        self._kept_weights = dict(zip(self._backend.kept, binding.get_outputs(), strict=True))

    def _tokens(
        self,
        entry: str,
        ids_BT: np.ndarray,
        more: Mapping[str, np.ndarray] | None = None,
        *,
        weights: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Runs an entry over a chain of tokens after each row's history, and keeps their K/V."""
        index = np.arange(ids_BT.shape[1])
        inputs = {
            "input_ids": np.ascontiguousarray(ids_BT),
            # Prompt padding, and tokens that their row will not commit, may lie beyond the last.
            "positions": np.minimum(self._length[:, None] + index, self._last_position),
            "length": self._length,
            "tree_mask": np.maximum(index[:, None] - index, -1)[None],
            **(more or {}),
        }
        result = self._run(entry, inputs, weights or {})
        self._caches.write(self._length, result["k_new"], result["v_new"])
        return result

    def _run(
        self, graph: str, inputs: Mapping[str, np.ndarray], weights: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A graph's outputs by name: arrays, but for those that stay (`OrtValue`s)."""
        backend, (session, reads, names) = self._backend, self._backend.graph(graph)
        binding = session.io_binding()
        for name, array in inputs.items():
            if name in reads:
                binding.bind_cpu_input(name, array)
        for name, value in {**self._caches.values, **(weights or {})}.items():
            if name in reads:
                binding.bind_ortvalue_input(name, value)
        for name in names:
            on_device = backend.on_device and name in _STAYS
            binding.bind_output(name, "cuda" if on_device else "cpu")
        run_bound(graph, session, binding)
        outputs = zip(names, binding.get_outputs(), strict=True)
        return {name: value if name in _STAYS else value.numpy() for name, value in outputs}


def run_bound(graph: str, session: Any, binding: Any) -> None:
    """Runs a graph; ArtifactError for what ONNX Runtime raises of it, but for want of memory."""
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # the library's own classes share no public root
        reason = " ".join(str(error).split())
        if "allocate" in reason:
            raise
        raise ArtifactError(
            f"ONNX graph {graph!r} failed as it ran ({reason:.300}); the artifact may be damaged: "
            "compile the model again"
        ) from error


def _scalars(numbers: Mapping[str, int | float]) -> dict[str, np.ndarray]:
    """Numbers as inputs of a graph."""
    return {
        name: np.array(value, np.int64 if name in INTEGERS else np.float32)
        for name, value in numbers.items()
    }
