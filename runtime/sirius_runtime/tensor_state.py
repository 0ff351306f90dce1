"""The state of a batch in PyTorch tensors; entries write its caches in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sirius_runtime.decoder import Backend
from sirius_runtime.policy import select_neurons
from sirius_runtime.state import State
from sirius_runtime.tree import Tree

ROWS_OF = {
    **dict.fromkeys(("length", "root", "active"), 0),
    **dict.fromkeys(("k_cache", "v_cache", "statistic", "neurons"), 1),
}
"""The tensors that have rows, and the dimension of their rows."""


def empty_caches(backend: Backend, rows: int, slots: int) -> tuple[Tensor, Tensor]:
    """K/V caches [layers, rows, G, slots, D] of zeros."""
    state = backend.program.state
    shape = (state.layers, rows, state.kv_heads, slots)
    k_cache, v_cache = (
        torch.zeros(*shape, width, dtype=backend.dtype, device=backend.device)
        for width in (state.key_dim, state.value_dim)
    )
    return k_cache, v_cache


class TensorState(State):
    """See `State`. `k_cache` and `v_cache` [layers, B, G, S, D]; `neurons` [layers, B, kept]: the
    neurons that each prompt chose (griffin).

    Its methods read no values from the device.
    """

    xp: ClassVar[Any] = torch

    def __init__(
        self,
        backend: Backend,
        rows: int,
        slots: int,
        caches: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """A state of `rows` rows, with `slots` cache slots each, in `caches` of that shape if they
        are given.
        """
        self.backend = backend
        super().__init__(backend.program, rows)
        k_cache, v_cache = caches or empty_caches(backend, rows, slots)
        self.k_cache: Tensor = k_cache
        self.v_cache: Tensor = v_cache
        self._reads = {e.name: {i.name for i in e.inputs} for e in self.program.entries}

    def part(self, begin: int, end: int) -> TensorState:
        """A state of the rows [begin, end). Its caches are views of these caches, so its writes are
        seen here. Its other tensors are replaced when they change, which is not seen here.
        """
        own = copy.copy(self)
        own._each_with_rows(lambda value, dim: value.narrow(dim, begin, end - begin))
        return own

    def array(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=self.backend.device)

    def computing(self) -> AbstractContextManager[Any]:
        # The state's tensors are inference tensors too: compiled code distinguishes them from
        # others.
        return torch.inference_mode()

    def run(self, entry: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ROWS_OF}
        reads = self._reads[entry]
        return self.backend.run(entry, {k: v for k, v in (own | {**inputs}).items() if k in reads})

    def chain(self, entry: str, ids_BT: Tensor, **more: Tensor) -> dict[str, Tensor]:
        index = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        tree_mask = (index[:, None] - index).clamp(min=-1)[None]
        return self._tokens(entry, ids_BT, index, index, tree_mask, **more)

    def nodes(self, entry: str, tree: Tree, nodes: Tensor) -> dict[str, Tensor]:
        """Runs an entry over these nodes [T] of every row's tree."""
        return self._tokens(
            entry,
            tree.tokens.index_select(1, nodes),
            nodes,
            tree.depth.index_select(1, nodes).clamp(min=0),
            tree.mask.index_select(1, nodes),
        )

    def _tokens(
        self,
        entry: str,
        ids_BT: Tensor,
        slots: Tensor,
        depth: Tensor,
        tree_mask: Tensor,
        **more: Tensor,
    ) -> dict[str, Tensor]:
        """Runs an entry over tokens at block `slots` [T] and `depth` [T | B, T] after each row's
        history.
        """
        length = self.length[:, None]
        inputs = {
            "input_ids": ids_BT,
            "slots": length + slots,
            # The tokens of prompt padding, and tokens that a row will not commit, may have
            # positions beyond the last one.
            "positions": (length + depth).clamp(max=self._last_position),
            "tree_mask": tree_mask,
            **more,
        }
        return self.run(entry, inputs)

    def compact(self, nodes_BK: Tensor) -> None:
        """Moves the K/V of a path's nodes to the slots after `length`, in order."""
        source = (self.length[:, None] + nodes_BK)[None, :, None, :, None]
        self.write(
            *(
                cache.gather(3, source.expand(*cache.shape[:3], -1, cache.shape[4]))
                for cache in (self.k_cache, self.v_cache)
            )
        )

    def write(self, k_kept: Tensor, v_kept: Tensor) -> None:
        index = torch.arange(k_kept.shape[3], device=k_kept.device)
        slots = (self.length[:, None] + index)[None, :, None, :, None]
        for cache, kept in ((self.k_cache, k_kept), (self.v_cache, v_kept)):
            cache.scatter_(3, slots.expand(kept.shape), kept)

    def first_kv(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self.k_cache[:, :1, :, :tokens].clone(), self.v_cache[:, :1, :, :tokens].clone()

    def restore(self, k: Tensor, v: Tensor) -> None:
        self.k_cache[:, :, :, : k.shape[3]] = k
        self.v_cache[:, :, :, : v.shape[3]] = v

    def choose_neurons(self) -> None:
        if self.statistic is not None:
            self.neurons = select_neurons(self.statistic, self.program.sparsity.kept_neurons)

    def select(self, rows: Sequence[int]) -> None:
        index = self.array(np.array(rows))
        self._each_with_rows(lambda value, dim: value.index_select(dim, index))

    def fill(self, rows: int) -> None:
        more = rows - self.rows
        if more:
            self._each_with_rows(
                lambda value, dim: torch.cat(
                    [value, value.new_zeros([*value.shape[:dim], more, *value.shape[dim + 1 :]])],
                    dim,
                )
            )

    def _each_with_rows(self, change: Any) -> None:
        for name, dim in ROWS_OF.items():
            if (value := getattr(self, name)) is not None:
                setattr(self, name, change(value, dim))
