"""Key/value caches of the ONNX back end: in memory that NumPy shares, or on a device.

k [layers, B, G, S, D] and v [layers, B, G, S, Dv] are inputs of the graphs, which give back the K/V
of their own tokens; these are written to the slots after `length`, in place. On a device a graph
writes them, whose inputs and outputs are the same buffers: no cache ever crosses to the host but
when rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np


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
