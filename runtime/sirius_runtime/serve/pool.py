"""The rows of the K/V cache, allocated once, and the assignment of answers to rows.

A batch must occupy neighbouring rows, because operators take a slice of one cache tensor. Answers
of a batch are kept side by side; when one comes or goes, few rows are moved.
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
    """The state of all rows; its memory is allocated when it is made."""

    def __init__(self, backend: Backend, rows: int, slots: int) -> None:
        """slots: cache slots of each row."""
        program = backend.program
        self.state = state = TensorState(backend, rows, slots)
        for cache in (state.k_cache, state.v_cache):
            cache.fill_(0)  # touch all pages now: there may be no memory for them later
        if program.sparsity.method.per_prompt:
            layers, sparsity = program.state.layers, program.sparsity
            device = backend.device
            state.statistic = torch.zeros(layers, rows, sparsity.neurons, device=device)
            state.neurons = torch.zeros(
                layers, rows, sparsity.kept_neurons, dtype=torch.int64, device=device
            )

    @property
    def nbytes(self) -> int:
        """Size of the K/V caches."""
        return self.state.k_cache.nbytes + self.state.v_cache.nbytes

    def part(self, begin: int, lengths: list[int], roots: list[int]) -> TensorState:
        """The state of neighbouring rows from `begin` on. lengths: tokens in each row's cache;
        roots: each row's last token, whose K/V is not in the cache yet.
        """
        part = self.state.part(begin, begin + len(lengths))
        device = part.root.device
        part.length = torch.tensor(lengths, device=device)
        part.root = torch.tensor(roots, device=device)
        part.active = torch.ones(len(lengths), dtype=torch.bool, device=device)
        return part

    def keep_statistic(self, begin: int, part: TensorState) -> None:
        """Copies griffin's statistic of a part back to the pool."""
        state = self.state
        assert state.statistic is not None
        assert part.statistic is not None
        state.statistic[:, begin : begin + part.rows] = part.statistic

    def arrange(self, order: list[int], slots: int) -> None:
        """Moves row `order[i]` to row i; of the caches only the first `slots` slots."""
        moved = [(old, new) for new, old in enumerate(order) if old != new]
        if not moved:
            return
        device = self.state.root.device
        old, new = (torch.tensor(rows, device=device) for rows in zip(*moved, strict=True))
        for name in ROWS_OF:
            value: Tensor | None = getattr(self.state, name)
            if value is None or ROWS_OF[name] == 0:  # lengths and roots are given to `part`
                continue
            if name.endswith("_cache"):
                value = value[:, :, :, :slots]
            value[:, new] = value[:, old]

    def block(self, row: int, begin: int, end: int, statistic: Tensor | None) -> Block:
        """A copy of a row's K/V of tokens begin..end."""
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
    """Items in groups, one group after another. place: each item's position since `settle`."""

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
        """The keys of the groups that have items."""
        return list(self._groups)

    def of(self, key: Hashable) -> list[T]:
        """The items of a group, in order."""
        return list(self._groups.get(key, ()))

    def add(self, key: Hashable, item: T) -> None:
        """Appends an item to a group. The first item of each later group moves to its end, so that
        one item per group changes its position.
        """
        self._changed = True
        self._groups.setdefault(key, []).append(item)
        for group in self._after(key):
            group.append(group.pop(0))

    def remove(self, key: Hashable, item: T) -> None:
        """Removes an item; the group's last item takes its position. The last item of each later
        group moves to its front.
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
        """Assigns each item its position, of `places`. Returns the old position of each, or None if
        nothing has changed. A new item's old position is one that was free.
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
