"""Names the activation that a chain of element-wise nodes computes.

The chain is run on a grid of numbers and compared there with each function of `ACTIVATIONS`, so
every spelling of an activation is recognised. This one is gelu_tanh of %h:

%1 = aten.mul.Tensor(%h, 0.5)
%2 = aten.pow.Tensor_Scalar(%h, 3.0)
%3 = aten.mul.Tensor(%2, 0.044715)
%4 = aten.add.Tensor(%h, %3)
%5 = aten.mul.Tensor(%4, 0.7978845608028654)
%6 = aten.tanh(%5)
%7 = aten.add.Tensor(%6, 1.0)
%8 = aten.mul.Tensor(%1, %7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sirius_runtime.graph import CAPTURE_DTYPE
from sirius_runtime.ops.mlp import ACTIVATIONS

aten = torch.ops.aten

_ELEMENTWISE = {
    aten.add.Tensor,
    aten.clamp.default,
    aten.div.Tensor,
    aten.erf.default,
    aten.exp.default,
    aten.gelu.default,
    aten.mul.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
    aten.relu.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.square.default,
    aten.sub.Tensor,
    aten.tanh.default,
    aten.to.dtype,
}
_LONGEST = 16  # nodes; the longest spelling known, of gelu, has 9
_GRID = torch.linspace(-8, 8, 161, dtype=torch.float64)
_NEAR = 1e-5  # gelu and gelu_tanh are 5e-4 apart; a float32 cast inside a chain costs 1e-6


@dataclass(frozen=True)
class Chain:
    """Element-wise nodes that compute `end` from one other node, `source`."""

    source: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    def name(self) -> str | None:
        """The name of the function in `ACTIVATIONS` that the chain computes, or None."""
        values = self._values()
        for name, function in ACTIVATIONS.items():
            if torch.allclose(values, function(_GRID), rtol=_NEAR, atol=_NEAR):
                return name
        return None

    def _values(self) -> Tensor:
        env: dict[fx.Node, Any] = {self.source: _GRID}
        for node in self.nodes:
            if node.target is aten.to.dtype and node.args[1] is CAPTURE_DTYPE:
                env[node] = env[node.args[0]]  # type: ignore[index]  # to the program's dtype
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return env[self.end].double()


def chain_to(end: object) -> Chain | None:
    """The element-wise nodes that compute `end` from one other node. None if `end` is not
    element-wise, depends on several other nodes, or takes more than `_LONGEST` nodes.
    """
    if not (isinstance(end, fx.Node) and _is_elementwise(end)):
        return None
    order: dict[fx.Node, None] = {}
    sources: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if not _is_elementwise(node):
            sources.add(node)
        elif node not in order:
            order[node] = None
            pending += node.all_input_nodes
        if len(sources) > 1 or len(order) > _LONGEST:
            return None
    if len(sources) != 1:
        return None
    return Chain(sources.pop(), tuple(sorted(order)))


def _is_elementwise(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in _ELEMENTWISE
