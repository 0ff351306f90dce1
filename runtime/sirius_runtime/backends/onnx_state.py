"""The state of a batch on ONNX Runtime. Its K/V caches lie in NumPy arrays or on a device.

k [layers, B, G, S, D] and v [layers, B, G, S, Dv] are inputs of the graphs. A graph returns the K/V
of its own tokens, which are written to the slots after `length`, in place. On a device the graph
`write` writes them: its inputs and outputs are the same buffers. Caches are copied to the host only
when rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from sirius_runtime.backends.onnx_graphs import OnnxGraphs
from sirius_runtime.onnx_files import SELECT
from sirius_runtime.state import State


class Caches(Protocol):
    """The caches of a batch."""

    values: dict[str, Any]
    """`OrtValue`s by the names of the graphs' inputs."""

    def write(self, length: np.ndarray, k_new: Any, v_new: Any) -> None:
        """Writes K/V [layers, B, G, T, D] (`OrtValue`s) to the slots after `length` [B]."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows."""
        ...


class HostCaches:
    """Caches that NumPy writes and ONNX Runtime reads."""

    def __init__(self, arrays: dict[str, np.ndarray], value: Callable[[np.ndarray], Any]) -> None:
        self._arrays, self._value = arrays, value
        self.values = {name: value(array) for name, array in arrays.items()}

    def write(self, length: np.ndarray, k_new: Any, v_new: Any) -> None:
        for name, new in (("k_cache", k_new), ("v_cache", v_new)):
            block, cache = new.numpy(), self._arrays[name]
            for row, start in enumerate(length.tolist()):
                cache[:, row, :, start : start + block.shape[3]] = block[:, row]

    def select(self, rows: Sequence[int]) -> None:
        kept = {name: np.ascontiguousarray(array[:, rows]) for name, array in self._arrays.items()}
        self._arrays = kept
        self.values = {name: self._value(array) for name, array in kept.items()}


class DeviceCaches:
    """Caches in a device's memory, written by the graph `write`."""

    def __init__(
        self, arrays: dict[str, np.ndarray], value: Callable[[np.ndarray], Any], session: Any
    ) -> None:
        self._value, self._session = value, session
        self.values = {name: value(array) for name, array in arrays.items()}

    def write(self, length: np.ndarray, k_new: Any, v_new: Any) -> None:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("length", self._value(length))
        for name, new in (("k", k_new), ("v", v_new)):
            cache = self.values[f"{name}_cache"]
            binding.bind_ortvalue_input(f"{name}_cache", cache)
            binding.bind_ortvalue_input(f"{name}_new", new)
            binding.bind_ortvalue_output(f"{name}_written", cache)
        self._session.run_with_iobinding(binding)

    def select(self, rows: Sequence[int]) -> None:
        self.values = {
            name: self._value(np.ascontiguousarray(value.numpy()[:, rows]))
            for name, value in self.values.items()
        }


class OnnxState(State):
    """See `sirius_runtime.state.State`. `neurons`: the weights of griffin's kept neurons, gathered
    once they are chosen: `OrtValue`s by the names of the graphs' inputs.
    """

    xp: ClassVar[Any] = np

    def __init__(self, backend: OnnxGraphs, rows: int, slots: int) -> None:
        """A state of `rows` rows, with `slots` cache slots each."""
        self.backend = backend
        super().__init__(backend.program, rows)
        self.neurons = {}
        state = self.program.state
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

    def array(self, values: np.ndarray) -> np.ndarray:
        return values

    def run(self, entry: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        own = {"length": self.length, "statistic": self.statistic}
        return self.backend.run(entry, {**own, **self._caches.values, **self.neurons, **inputs})

    def chain(self, entry: str, ids_BT: np.ndarray, **more: np.ndarray) -> dict[str, Any]:
        index = np.arange(ids_BT.shape[1])
        inputs = {
            "input_ids": np.ascontiguousarray(ids_BT),
            # The tokens of prompt padding, and tokens that a row will not commit, may have
            # positions beyond the last one.
            "positions": np.minimum(self.length[:, None] + index, self._last_position),
            "tree_mask": np.maximum(index[:, None] - index, -1)[None],
            **more,
        }
        result = self.run(entry, inputs)
        self.write(result["k_new"], result["v_new"])
        return result

    def write(self, k_kept: Any, v_kept: Any) -> None:
        self._caches.write(self.length, k_kept, v_kept)

    def first_kv(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = (self._caches.values[name].numpy() for name in ("k_cache", "v_cache"))
        return k[:, :1, :, :tokens].copy(), v[:, :1, :, :tokens].copy()

    def restore(self, k: np.ndarray, v: np.ndarray) -> None:
        repeated = (self.backend.value(np.repeat(part, self.rows, 1)) for part in (k, v))
        self._caches.write(np.zeros(self.rows, np.int64), *repeated)

    def choose_neurons(self) -> None:
        """Gathers the weights of the neurons with the largest statistic."""
        if self.statistic is None:
            return
        self.neurons.clear()  # frees the old weights before the new ones are gathered
        self.neurons = self.backend.run(SELECT, {"statistic": self.statistic})

    def select(self, rows: Sequence[int]) -> None:
        kept = list(rows)
        self._caches.select(kept)
        if self.statistic is not None:
            self.statistic = np.ascontiguousarray(self.statistic[:, kept])
        self.neurons = {
            name: self.backend.value(value.numpy()[kept]) for name, value in self.neurons.items()
        }
        self.length, self.root, self.active = (
            value[kept] for value in (self.length, self.root, self.active)
        )
