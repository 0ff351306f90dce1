"""Periods with processed logits on ONNX Runtime: its graphs compute, and PyTorch chooses tokens.

The graph `period` can't call a logits processor. So a chain is drafted, verified and accepted step
by step: ONNX Runtime computes the logits, and `ByEntries` chooses tokens by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sirius_runtime.backends.onnx_state import OnnxState
from sirius_runtime.by_entries import ByEntries, chooser
from sirius_runtime.decoder import Choose, Outcome
from sirius_runtime.plan import Plan
from sirius_runtime.sampling import Sampling
from sirius_runtime.scorer import Scorer
from sirius_runtime.stats import PhaseClock
from sirius_runtime.tree import Tree


@dataclass(frozen=True)
class OnnxByEntries:
    """As `ByEntries`, for chains."""

    inner: ByEntries

    def period(
        self, state: OnnxState, plan: Plan, most_B: np.ndarray, clock: PhaseClock
    ) -> Outcome:
        noise = None if plan.noise is None else torch.from_numpy(plan.noise)
        plan, most = replace(plan, noise=noise), torch.from_numpy(most_B)
        return self.inner.period(_InTensors(state), plan, most, clock)


class _InTensors:
    """An `OnnxState` in the form that `ByEntries` takes: its arrays as tensors over the same
    memory.
    """

    def __init__(self, state: OnnxState) -> None:
        self._state, self.program = state, state.program

    @property
    def length(self) -> Tensor:
        return torch.from_numpy(self._state.length)

    @property
    def root(self) -> Tensor:
        return torch.from_numpy(self._state.root)

    @property
    def active(self) -> Tensor:
        return torch.from_numpy(self._state.active)

    def nodes(self, entry: str, tree: Tree, nodes: Tensor) -> dict[str, Tensor]:
        start = self._state.length
        # The K/V of the tokens drafted so far follows the history in the caches.
        self._state.length = start + int(nodes[0])
        result = self._state.chain(entry, tree.tokens.index_select(1, nodes).numpy())
        self._state.length = start
        arrays = {n: value for n, value in result.items() if isinstance(value, np.ndarray)}
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def compact(self, nodes_BK: Tensor) -> None:
        raise AssertionError("a chain lies in order")

    def commit(self, advance: Tensor, root_B: Tensor) -> None:
        self._state.commit(advance.numpy(), root_B.numpy())

    def observe(self, statistic: Tensor) -> None:
        self._state.observe(statistic.numpy())

    def choose_neurons(self) -> None:
        self._state.choose_neurons()

    def count_kept(self, result: Mapping[str, Tensor], rows_B: Tensor) -> None:
        arrays = {name: value.numpy() for name, value in result.items() if name == "kept"}
        self._state.count_kept(arrays, rows_B.numpy())


def onnx_chooser(sampling: Sampling, scorer: Scorer) -> Choose:
    """As `chooser`, for NumPy arrays."""
    choose = chooser(sampling, scorer)

    def by_arrays(*arrays: np.ndarray | None) -> np.ndarray:
        token: Tensor = choose(*(None if a is None else torch.from_numpy(a) for a in arrays))
        return token.numpy()

    return by_arrays
