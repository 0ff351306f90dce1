"""Replaces each MLP by one operator, so that later passes see neurons instead of matrices.

    Before                               After
    %1 = aten.linear(%x, %gate)          %1 = aten.t(%down)
    %2 = aten.silu(%1)                   %2 = sirius.dense_mlp(%x, %gate, %up, %1,
    %3 = aten.linear(%x, %up)                                  None, None, None, 'silu', 0)
    %4 = aten.mul(%2, %3)
    %5 = aten.linear(%4, %down)

    %1 = aten.linear(%x, %fc1, %b1)      %1 = aten.t(%fc2)
    %2 = aten.relu(%1)                   %2 = sirius.dense_mlp(%x, %fc1, None, %1,
    %3 = aten.linear(%2, %fc2, %b2)                            %b1, None, %b2, 'relu', 0)

Shapes: x [B, T, C]; gate, up [I, C]; down [C, I] in the checkpoint, neuron-major [I, C] as the
operator takes it (`lay_out_weights` later stores it so and drops the transpose). Biases are
optional, and an activation may be any chain that `activations` recognises. Where the model flattens
its tokens, x [B*T, C], views restore [B, T, C] around the operator. An MLP's layer is that of the
attention before it. Mixtures of experts are already one operator a layer in the captured graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sirius_passes.activations import chain_to
from sirius_passes.manager import Pass
from sirius_passes.program import Program, Stage, call, calls
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import INPUT, placeholders
from sirius_runtime.ops.mlp import ACTIVATIONS

aten, sirius = torch.ops.aten, torch.ops.sirius

DENSE_MLP = sirius.dense_mlp.default
DENSE_MOE = sirius.dense_moe.default  # made by capture


@dataclass(frozen=True)
class Mlp:
    """A match: the nodes of one MLP. `up` is None in a plain MLP; the operator replaces `down`."""

    x: fx.Node
    gate: fx.Node
    up: fx.Node | None
    down: fx.Node
    act: str


class RecogniseMlps(Pass):
    """See the module's docstring.

    Raises UnsupportedModelError if the model has neither an MLP nor a mixture of experts.
    """

    name: ClassVar[str] = "recognise_mlps"
    takes: ClassVar[Stage] = Stage.CANONICAL
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program: Program) -> int:
        count = 0
        for module in program.graphs.values():
            graph = module.graph
            misses = []
            for layer, node in list(_linears(graph)):
                match = match_mlp(node)
                if isinstance(match, Mlp):
                    _replace_by_operator(match, layer)
                    count += 1
                elif match is not None:
                    misses.append(match)
            if not calls(graph, DENSE_MLP, DENSE_MOE):
                raise UnsupportedModelError(
                    "no MLP was found: looked for linears in the form down(act(gate(x)) * up(x)) "
                    "or fc2(act(fc1(x))); "
                    f"nearest miss: {misses[0] if misses else 'no activation feeds a linear'}. "
                    "Compile this model with --sparsity none, or open an issue with its config.json"
                )
            graph.eliminate_dead_code()
            module.recompile()
        return count


def _linears(graph: fx.Graph) -> Iterator[tuple[int, fx.Node]]:
    """Every linear, with the layer of the attention before it."""
    layer: Any = 0
    for node in graph.nodes:
        if _is(node, sirius.attention.default):
            layer = node.args[3]
        elif _is(node, aten.linear.default):
            yield layer, node


def match_mlp(down: fx.Node) -> Mlp | str | None:
    """The MLP that ends in the linear `down`.

    Returns the reason as a string if `down` almost ends an MLP, and None if it ends no MLP.
    """
    product = down.args[0]
    plain = chain_to(product)
    if plain is not None and _is(plain.source, aten.linear.default):
        act = plain.name()
        if act is None:
            return _unknown(down, plain.end)
        return _checked(
            Mlp(_node(plain.source.args[0]), plain.source, None, down, act), plain.nodes
        )
    if not _is(product, aten.mul.Tensor):
        return None
    for activated, up in (product.args, product.args[::-1]):
        chain = chain_to(activated)
        act = chain.name() if chain else None
        if chain is None or act is None:
            continue
        gate = chain.source
        if not (_is(gate, aten.linear.default) and _is(up, aten.linear.default)):
            return f"{down.name}: gate or up is not a linear"
        x = _node(gate.args[0])
        if up.args[0] is not x:
            return f"{down.name}: gate and up read different inputs, {x} and {up.args[0]}"
        return _checked(Mlp(x, gate, up, down, act), (*chain.nodes, product))
    for activated, up in (product.args, product.args[::-1]):
        if _is(up, aten.linear.default) and isinstance(activated, fx.Node):
            return _unknown(down, activated)
    return None


def _checked(match: Mlp, between: Collection[fx.Node]) -> Mlp | str:
    """The match, or the reason why the operator can't replace it.

    `between`: the MLP's nodes between its linears.
    """
    down = match.down
    inside = {match.gate, *between, *([match.up] if match.up else [])}
    for inner in sorted(inside):
        if inner.users.keys() - inside - {down}:
            return f"{down.name}: {inner.name} inside the MLP is read from outside it"
    x, y = match.x.meta["val"], down.meta["val"]
    if x.shape[-1] != y.shape[-1]:
        return f"{down.name}: {y.shape[-1]} features come out, but {x.shape[-1]} go in"
    if x.ndim != 3 and not (x.ndim == 2 and _flattens_tokens(match.x)):
        return f"{down.name}: its input {list(x.shape)} is neither [B, T, C] nor [B*T, C]"
    return match


def _unknown(down: fx.Node, activated: fx.Node) -> str:
    known = ", ".join(ACTIVATIONS)
    return f"{down.name}: {activated.target} is not a known activation ({known})"


def _flattens_tokens(x: fx.Node) -> bool:
    rows, tokens = placeholders(x.graph, INPUT)["input_ids"].meta["val"].shape
    return bool(statically_known_true(x.meta["val"].shape[0] == rows * tokens))


def _is(node: object, target: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _replace_by_operator(match: Mlp, layer: int) -> None:
    graph = match.down.graph

    def weight_and_bias(linear: fx.Node | None) -> tuple[object, object]:
        if linear is None:
            return None, None
        return linear.args[1], linear.args[2] if len(linear.args) > 2 else None

    (gate, gate_bias), (up, up_bias), (down, down_bias) = map(
        weight_and_bias, (match.gate, match.up, match.down)
    )
    origin = f"recognise_mlps({match.down.name})"
    flat = match.x.meta["val"].ndim == 2
    with graph.inserting_before(match.down):
        x = match.x
        if flat:
            ids = placeholders(graph, INPUT)["input_ids"]
            sizes = [call(graph, aten.sym_size.int, (ids, dim), origin=origin) for dim in range(2)]
            x = call(graph, aten.view.default, (x, [*sizes, x.meta["val"].shape[1]]), origin=origin)
        down = call(graph, aten.t.default, (down,), origin=origin)
        node = call(
            graph,
            DENSE_MLP,
            (x, gate, up, down, gate_bias, up_bias, down_bias, match.act, layer),
            origin=origin,
        )
        if flat:
            node = call(
                graph, aten.view.default, (node, [-1, x.meta["val"].shape[2]]), origin=origin
            )
    match.down.replace_all_uses_with(node)
    graph.erase_node(match.down)
