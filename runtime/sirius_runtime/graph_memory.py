"""The peak memory of a graph's results, computed before any of it runs.

Each result is counted from its call to the last call that reads it, even if it is a view. Sizes
that vary are those of a large call: one row, `PREFILL_CHUNK` tokens, and a cache of twice as many
slots. A graph of this compiler holds a few activations besides the weights. A graph that holds more
than `most_bytes` is refused: an artifact could be made to exhaust memory.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any

from torch import fx

from sirius_runtime.dtypes import dtype_of
from sirius_runtime.graph_rules import Array, need
from sirius_runtime.graph_sizes import Expression, Size
from sirius_runtime.sizes import PREFILL_CHUNK
from sirius_runtime.spec import ProgramSpec

_LETTERS = {
    "B": 1,
    "R": 1,
    "T": PREFILL_CHUNK,
    "M": PREFILL_CHUNK,
    "S": 2 * PREFILL_CHUNK,
}
_UNKNOWN = 2**62  # a size without a known bound
_FREE_BYTES = 2**30
_TIMES = 4  # of the weights


def most_bytes(program: ProgramSpec) -> int:
    """The most bytes that a graph may hold at a time: four times the weights, plus 1 GiB."""
    weights = sum(math.prod(spec.shape) * dtype_of(spec.dtype).itemsize for spec in program.weights)
    return _TIMES * weights + _FREE_BYTES


class Ledger:
    """The bytes that a graph holds as it runs.

    `bounds`: the largest value of sizes that are read off tensors, by their symbols.
    """

    def __init__(self, most: int) -> None:
        self.bounds: dict[str, int] = {}
        self._most, self._held = most, 0

    def hold(self, value: Any) -> int:
        """Adds a call's result; returns its bytes. Raises CallError where the limit is exceeded."""
        size = self._bytes(value)
        self._held += size
        need(
            self._held <= self._most,
            f"it would hold {self._held} bytes at once, in a call over {PREFILL_CHUNK} tokens; at "
            f"most {self._most} are allowed: four times the weights, plus 1 GiB. A period of fewer "
            "nodes (--period, --tree-width) holds less",
        )
        return size

    def drop(self, size: int) -> None:
        self._held -= size

    def _bytes(self, value: Any) -> int:
        if isinstance(value, tuple | list):
            return sum(map(self._bytes, value))
        if not isinstance(value, Array):
            return 0
        count = 1
        for size in value.shape:
            count *= upper(size, {**_LETTERS, **self.bounds})
        return count * value.dtype.itemsize


def last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the calls whose results it is the last to read. A call whose result is never
    read is its own last reader.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            last = max(node.users, key=lambda user: order[user], default=node)
            found.setdefault(last, []).append(node)
    return found


def upper(size: Size, values: Mapping[str, int]) -> int:
    """An upper bound of a size, for these values of its symbols."""
    if not isinstance(size, Expression):
        return max(size, 0)
    return sum(
        factor * math.prod(_upper_of(symbol, values) for symbol in symbols)
        for symbols, factor in size.terms.items()
        if factor > 0
    )


def _upper_of(symbol: str, values: Mapping[str, int]) -> int:
    """As `upper`, for one symbol: a letter, or a term that is named by its parts."""
    if symbol in values:
        return values[symbol]
    try:
        return _most_of(ast.parse(symbol, mode="eval").body, values)
    except (SyntaxError, ValueError):
        return _UNKNOWN


def _most_of(term: ast.expr, values: Mapping[str, int]) -> int:
    match term:
        case ast.Constant(int(number)):
            return max(number, 0)
        case ast.Name(name):
            return values.get(name, _UNKNOWN)
        case ast.UnaryOp(ast.USub()):
            return 0
        case ast.BinOp(left, ast.Add(), right):
            return _most_of(left, values) + _most_of(right, values)
        case ast.BinOp(left, ast.Mult(), right):
            return _most_of(left, values) * _most_of(right, values)
        case ast.BinOp(left, ast.FloorDiv(), _):
            return _most_of(left, values)
        case ast.Call(ast.Name("min"), parts):
            return min(_most_of(part, values) for part in parts)
        case ast.Call(ast.Name("cut"), [size, *_]):
            return _most_of(size, values)
    return _UNKNOWN
