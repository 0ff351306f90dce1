"""Raises each gated MLP to one operator, so that later passes see neurons instead of matrices.

    Before                               After
    %1 = aten.linear(%x, %gate)          %1 = aten.t(%down)
    %2 = aten.silu(%1)                   %2 = sirius.dense_mlp(%x, %gate, %up, %1,
    %3 = aten.linear(%x, %up)                                  None, None, None, 'silu', 0)
    %4 = aten.mul(%2, %3)
    %5 = aten.linear(%4, %down)

Shapes: x [B, T, C]; gate, up [I, C]; down [C, I] in the checkpoint, neuron-major [I, C] as the
operator takes it (`lay_out_weights` later stores it so and drops the transpose). Biases may be
present.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import fx

from sirius_passes.manager import Pass
from sirius_passes.program import Program, Stage, call, calls
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.ops.mlp import ACTIVATIONS

aten, sirius = torch.ops.aten, torch.ops.sirius

DENSE_MLP = sirius.dense_mlp.default


@dataclass(frozen=True)
class GatedMlp:
    """A match: the nodes of one gated MLP; `down` is the linear that the operator replaces."""

    x: fx.Node
    gate: fx.Node
    up: fx.Node
    down: fx.Node
    act: str


class RecogniseMlps(Pass):
    """See the module's docstring. A model without a single gated MLP is refused."""

    name: ClassVar[str] = "recognise_mlps"
    takes: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program: Program) -> int:
        count = 0
        for module in program.graphs.values():
            layer = len(calls(module.graph, DENSE_MLP))
            misses = []
            for node in calls(module.graph, aten.linear.default):
                match = match_dense_mlp(node)
                if isinstance(match, GatedMlp):
                    _raise(match, layer)
                    layer, count = layer + 1, count + 1
                elif match is not None:
                    misses.append(match)
            if layer == 0:
                raise UnsupportedModelError(
                    "no gated MLP was found: looked for down(act(gate(x)) * up(x)) of linears; "
                    f"nearest miss: {misses[0] if misses else 'no activation feeds a linear'}. "
                    "Compile this model with --sparsity none, or open an issue with its config.json"
                )
            module.graph.eliminate_dead_code()
            module.recompile()
        return count


def match_dense_mlp(down: fx.Node) -> GatedMlp | str | None:
    """The gated MLP that ends in the linear `down`; a reason where it nearly is one; else None."""
    product = down.args[0]
    if not _is(product, aten.mul.Tensor):
        act = _activation(product)
        return f"{down.name}: a plain MLP, fc2({act}(fc1(x)))" if act else None
    for activated, up in (product.args, product.args[::-1]):
        act = _activation(activated)
        if act is None:
            continue
        assert isinstance(activated, fx.Node)
        gate = activated.args[0]
        if not (_is(gate, aten.linear.default) and _is(up, aten.linear.default)):
            return f"{down.name}: gate or up is not a linear"
        x = gate.args[0]
        if up.args[0] is not x:
            return f"{down.name}: gate and up read different inputs, {x} and {up.args[0]}"
        for inner in (product, activated, gate, up):
            if len(inner.users) != 1:
                return f"{down.name}: {inner.name} inside the MLP is read from outside it"
        assert isinstance(x, fx.Node)
        return GatedMlp(x, gate, up, down, act)
    for activated, up in (product.args, product.args[::-1]):
        if _is(up, aten.linear.default) and isinstance(activated, fx.Node):
            known = ", ".join(ACTIVATIONS)
            return f"{down.name}: {activated.target} is none of the known activations ({known})"
    return None


def _is(node: object, target: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _activation(node: object) -> str | None:
    """The name in `ACTIVATIONS` of the activation that `node` is, or None."""
    if _is(node, aten.silu.default):
        return "silu"
    if _is(node, aten.relu.default):
        return "relu"
    if _is(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return None


def _raise(match: GatedMlp, layer: int) -> None:
    graph = match.down.graph

    def weight_and_bias(linear: fx.Node) -> tuple[object, object]:
        return linear.args[1], linear.args[2] if len(linear.args) > 2 else None

    (gate, gate_bias), (up, up_bias), (down, down_bias) = map(
        weight_and_bias, (match.gate, match.up, match.down)
    )
    origin = f"recognise_mlps({match.down.name})"
    with graph.inserting_before(match.down):
        down = call(graph, aten.t.default, (down,), origin=origin)
        node = call(
            graph,
            DENSE_MLP,
            (match.x, gate, up, down, gate_bias, up_bias, down_bias, match.act, layer),
            origin=origin,
        )
    match.down.replace_all_uses_with(node)
    graph.erase_node(match.down)
