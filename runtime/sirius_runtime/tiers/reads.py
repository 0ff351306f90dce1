"""The blocks of weights that each call of a graph reads."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sirius_runtime.artifact import Slot
from sirius_runtime.control_flow import cond, while_loop
from sirius_runtime.kernels.linear import embedding
from sirius_runtime.spec import ProgramSpec
from sirius_runtime.tiers.placement import Block, Step

aten = torch.ops.aten

_VIEWS = {
    getattr(aten, name)
    for name in (
        *("t", "mT", "numpy_T", "transpose", "permute", "view", "unflatten", "expand"),
        *("slice", "select", "squeeze", "unsqueeze", "split", "split_with_sizes", "chunk"),
        *("unbind", "detach", "alias"),
    )
} | {operator.getitem}
"""Operators that return a view: a call that reads the view reads the argument."""

_MAYBE_VIEWS = {
    *(aten.reshape, aten.contiguous, aten.to, aten.flatten, aten.type_as),
    *(while_loop, cond),
}
"""Operators that may return a view, or pass the argument to a subgraph: its readers are unknown."""

_EMBEDDINGS = (aten.embedding.default, torch.ops.sirius.embedding.default, embedding)
"""Embeddings; their first two arguments are a table and the ids of rows."""


class Weights:
    """The weights of a file, as tensors that view one mapping of it, and their blocks."""

    def __init__(
        self, program: ProgramSpec, tensors: Mapping[str, Tensor], slots: Mapping[str, Slot]
    ) -> None:
        own = [spec for spec in program.weights if tensors[spec.name].numel()]
        in_order = sorted((tensors[spec.name].data_ptr(), spec.name) for spec in own)
        self._addresses = [address for address, _ in in_order]
        self._names = [name for _, name in in_order]
        self._blocks: dict[str, tuple[Block, ...]] = {}
        self._pinned: set[Block] = set()
        for spec in own:
            slot, planes = slots[spec.name], 1 if spec.nested is None else 2
            size = (slot.end - slot.start) // planes
            starts = [slot.start + plane * size for plane in range(planes)]
            blocks = tuple(Block(spec.name, i, at, at + size) for i, at in enumerate(starts))
            self._blocks[spec.name] = blocks
            if len(spec.shape) < 2 or not spec.parameter:  # small ones, and constants
                self._pinned.update(blocks)

    def read_by(self, value: Tensor) -> list[Block]:
        """The blocks that a call reads with `value`, a weight or a slice of one."""
        if not value.numel():
            return []
        blocks, offset = self.at(value)
        if len(blocks) == 1:
            return list(blocks)
        first = offset // (blocks[0].end - blocks[0].start)
        return list(blocks[first : first + value.shape[0]])

    def at(self, value: Tensor) -> tuple[tuple[Block, ...], int]:
        """The blocks of the weight that `value` views, and the view's offset in it, in bytes."""
        index = bisect_right(self._addresses, value.data_ptr()) - 1
        return self._blocks[self._names[index]], value.data_ptr() - self._addresses[index]

    def stays(self, block: Block) -> bool:
        return block in self._pinned


@dataclass(frozen=True)
class Span:
    """A step, and the first and last of the calls that read its blocks."""

    first: fx.Node
    last: fx.Node
    step: Step


@dataclass(frozen=True)
class Gather:
    """A call that reads rows of a table. `argument`: index of the table among the graph's
    arguments.
    """

    call: fx.Node
    argument: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Reads:
    """The reads of a graph: steps in order, row gathers, and the blocks that must be held."""

    spans: tuple[Span, ...]
    gathers: tuple[Gather, ...]
    pinned: frozenset[Block]


def reads_of(graph: fx.Graph, arguments: Sequence[Tensor | None], weights: Weights) -> Reads:
    """The reads of a graph. `arguments`: the weights that its placeholders are bound to, in order;
    None for inputs.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    read: dict[fx.Node, set[Block]] = {}
    gathers: list[Gather] = []
    pinned: set[Block] = set()
    placeholders = graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(placeholders, arguments, strict=True)):
        if value is None:
            continue
        blocks = weights.read_by(value)
        if all(map(weights.stays, blocks)):
            pinned.update(blocks)
            continue
        for reader in _readers(node):
            if reader.op == "output" or _packet(reader) in _MAYBE_VIEWS:
                pinned.update(blocks)
            elif reader.target in _EMBEDDINGS and reader.args[0] is node:
                gathers.append(Gather(reader, index, tuple(blocks)))
            else:
                read.setdefault(reader, set()).update(blocks)
    spans: list[Span] = []
    for node in sorted(read, key=order.__getitem__):
        first, step = node, read[node]
        if spans and step & set(spans[-1].step):  # successive calls that share blocks
            before = spans.pop()
            first, step = before.first, step | set(before.step)
        spans.append(Span(first, node, _in_order(step)))
    return Reads(tuple(spans), tuple(gathers), frozenset(pinned))


def _in_order(blocks: set[Block]) -> Step:
    """The blocks in order, high planes first: kernels need the low planes behind them."""
    return tuple(sorted(blocks, key=lambda block: (block.plane, block.start)))


def _readers(node: fx.Node) -> list[fx.Node]:
    """The calls that read a node's value or a view of it."""
    found = []
    for user in node.users:
        if _packet(user) in _VIEWS:
            found += _readers(user)
        else:
            found.append(user)
    return found


def _packet(node: fx.Node) -> Any:
    """The operator of a call, without its overload."""
    return getattr(node.target, "overloadpacket", node.target)
