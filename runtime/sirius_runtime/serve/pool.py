"""Rows of K/V that are made once, and the order in which answers lie in them.

A batch is a run of neighbouring rows, because operators take one tensor of caches. Answers that run
together are kept side by side: where one comes or goes, as few rows as possible are moved.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sirius_runtime.decoder import Backend
from sirius_runtime.serve.prefixes import Block
from sirius_runtime.tensor_state import ROWS_OF, TensorState

T = TypeVar("T", bound=Hashable)


class Pool:
    """The state of so many rows; all its memory is taken at once."""

    def __init__(self, backend: Backend, rows: int, slots: int) -> None:
        """Room for so many cache slots a row."""
        program = backend.program
        self.state = state = TensorState(backend, rows, slots)
        for cache in (state.k_cache, state.v_cache):
            cache.fill_(0)  # a page that the system lends at first use might be missing later
        if program.sparsity.method.per_prompt:
            layers, sparsity = program.state.layers, program.sparsity
            device = backend.device
            state.statistic = torch.zeros(layers, rows, sparsity.neurons, device=device)
            state.neurons = torch.zeros(
                layers, rows, sparsity.kept_neurons, dtype=torch.int64, device=device
            )

    @property
    def nbytes(self) -> int:
        """Of the caches."""
        return self.state.k_cache.nbytes + self.state.v_cache.nbytes

    def part(self, begin: int, lengths: list[int], roots: list[int]) -> TensorState:
        """The state of neighbouring rows, whose caches hold so many tokens; the roots follow."""
        part = self.state.part(begin, begin + len(lengths))
        device = part.root.device
        part.length = torch.tensor(lengths, device=device)
        part.root = torch.tensor(roots, device=device)
        part.active = torch.ones(len(lengths), dtype=torch.bool, device=device)
        return part

    def keep_statistic(self, begin: int, part: TensorState) -> None:
        """Takes over what a part has observed."""
        state = self.state
        assert state.statistic is not None
        assert part.statistic is not None
        state.statistic[:, begin : begin + part.rows] = part.statistic

    def arrange(self, order: list[int], slots: int) -> None:
        """Moves rows: into row i what was in row `order[i]`, of the caches the first `slots`."""
        moved = [(old, new) for new, old in enumerate(order) if old != new]
        if not moved:
            return
        device = self.state.root.device
        old, new = (torch.tensor(rows, device=device) for rows in zip(*moved, strict=True))
        for name in ROWS_OF:
            value: Tensor | None = getattr(self.state, name)
            if value is None or ROWS_OF[name] == 0:  # lengths and roots are told to each part
                continue
            if name.endswith("_cache"):
                value = value[:, :, :, :slots]
            value[:, new] = value[:, old]

    def block(self, row: int, begin: int, end: int, statistic: Tensor | None) -> Block:
        """A copy of a row's K/V of these tokens."""
        k, v = (
            cache[:, row : row + 1, :, begin:end].clone()
            for cache in (self.state.k_cache, self.state.v_cache)
        )
        return Block(k, v, statistic)

    def restore(self, row: int, begin: int, block: Block) -> None:
        """Writes a block's K/V to a row, from token `begin` on."""
        end = begin + block.k.shape[3]
        self.state.k_cache[:, row : row + 1, :, begin:end] = block.k
        self.state.v_cache[:, row : row + 1, :, begin:end] = block.v


class Order(Generic[T]):
    """Items in groups, one group after another, and each item's place at the last `settle`."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, list[T]] = {}
        self.place: dict[T, int] = {}
        self._changed = False

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def __iter__(self) -> Iterator[T]:
        for group in self._groups.values():
            yield from group

    @property
    def groups(self) -> list[Hashable]:
        """The keys of groups that have items."""
        return list(self._groups)

    def of(self, key: Hashable) -> list[T]:
        """The items of a group, in order."""
        return list(self._groups.get(key, ()))

    def add(self, key: Hashable, item: T) -> None:
        """Puts an item at the end of a group; of each later group, the first one becomes last."""
        self._changed = True
        self._groups.setdefault(key, []).append(item)
        for group in self._after(key):
            group.append(group.pop(0))

    def remove(self, key: Hashable, item: T) -> None:
        """Puts the last one of the group in its place; of each later group, the last one becomes
        first.
        """
        self._changed = True
        later, group = self._after(key), self._groups[key]
        group[group.index(item)] = group[-1]
        group.pop()
        if not group:
            del self._groups[key]
        for other in later:
            other.insert(0, other.pop())

    def settle(self, places: int) -> list[int] | None:
        """Gives each item its place among so many; returns the old place of each, None where
        nothing has changed. A new item's is one where nobody was.
        """
        if not self._changed:
            return None
        items = list(self)
        taken = {self.place[item] for item in items if item in self.place}
        free = iter([place for place in range(places) if place not in taken])
        order = [self.place[item] if item in self.place else next(free) for item in items]
        self.place, self._changed = {item: index for index, item in enumerate(items)}, False
        return order

    def _after(self, key: Hashable) -> list[list[T]]:
        keys = list(self._groups)
        return [self._groups[other] for other in keys[keys.index(key) + 1 :]]
