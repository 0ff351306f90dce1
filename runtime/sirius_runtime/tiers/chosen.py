"""Finds the blocks of which drafts read only the rows of the neurons that the prompt chose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, fx

from sirius_runtime.operators import OPERATORS
from sirius_runtime.ops.chosen import chosen_shape
from sirius_runtime.tiers.placement import PAGE, Block
from sirius_runtime.tiers.reads import Weights

_MLPS = [row for row in OPERATORS.values() if row.keeps[:1] == ("neurons",)]
CHOOSING = {function: row for row in _MLPS for function in (row.cpu, row.overload)}
"""The functions of MLPs that run over the prompt's neurons, and their operators."""

_WEIGHTS, _LAYER = (1, 2, 3), 8  # indices of gate, up, down and the layer among their arguments


class Rows(NamedTuple):
    """A weight, or a slice of one, of which drafts read the prompt's rows. argument: its index
    among the graph's arguments; shape: of the copy of the rows, of `size` bytes.
    """

    argument: int
    weight: Tensor
    block: Block
    layer: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.weight.itemsize


def rows_of(
    graph: fx.Graph, arguments: Sequence[Tensor | None], weights: Weights, kept: int
) -> list[Rows]:
    """The weights, each in one block, that only MLPs over the prompt's neurons read, of which
    `kept` are chosen. arguments: as in `reads_of`.
    """
    found, others = [], set()
    placeholders = graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(placeholders, arguments, strict=True)):
        if value is None or not node.users:
            continue
        blocks, call = weights.read_by(value), next(iter(node.users))
        own = call.target in CHOOSING and any(call.args[i] is node for i in _WEIGHTS)
        if own and len(blocks) == len(node.users) == 1:
            layer, shape = call.args[_LAYER], chosen_shape(value.shape, kept)
            assert isinstance(layer, int)
            found.append(Rows(index, value, blocks[0], layer, shape))
        else:
            others.update(blocks)
    return [rows for rows in found if rows.block not in others]


def rooms(rows: Sequence[Rows]) -> dict[Block, int]:
    """Bytes of memory for the rows of each block, in whole pages."""
    sizes = Counter[Block]()
    for one in rows:
        sizes[one.block] += one.size
    return {block: -(-size // PAGE) * PAGE for block, size in sizes.items()}
