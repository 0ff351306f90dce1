"""Rewrites a graph that is to run on the CPU so that it calls kernels.

    Before                                          After
    aten.linear(x, w, b)                            linear(x, w, b)
    linear(x, w, …), linear(x, v, …)                linears(x, [w, v], …)
    w * (x32 * rsqrt(mean(x32²) + ε)).to(dtype)     rms_norm(x, w, ε, dtype)
    z = x + y, rms_norm(z, w, …)                    add_norm(x, y, w, …)
    x * cos + cat([-x[h:], x[:h]]) * sin            rotate(x, cos, sin, h)
    silu(g) * u                                     gate(g, u, "silu")
    sirius.cached_attention(q, …)                   cached_attention_by_tokens(q, …)
    sirius.dense_mlp(x, …) and the like             dense_mlp(x, …)

x32 is x.to(float32). Operators become the Python functions that implement them, so that a call does
not pass through torch's dispatcher. A computation that does not match a pattern stays as it is:
slower, not wrong. The result only runs in this process; it is not for compilers or files.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import torch
from torch import fx

from sirius_runtime.control_flow import as_python
from sirius_runtime.graph import write_code
from sirius_runtime.kernels.attention import cached_attention_by_tokens
from sirius_runtime.kernels.linear import MOST_LINEARS, linear, linears
from sirius_runtime.kernels.pointwise import add_norm, gate, rms_norm, rotate
from sirius_runtime.kernels.reinplace import write_in_place
from sirius_runtime.operators import OPERATORS

aten = torch.ops.aten

_MOST_COMPILED = 4
"""The most linears that are joined in a graph for a compiler: one CUDA launch takes so many."""


def with_kernels(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that calls kernels, also in the subgraphs of its control flow."""
    own = copy.deepcopy(module)
    write_in_place(own)
    for part in own.modules():
        if isinstance(part, fx.GraphModule):
            for node in list(part.graph.nodes):
                _rewrite(node)
            _join_linears(part.graph, linear, linears, MOST_LINEARS)
            _join_sums(part.graph)
            as_python(part.graph)
            part.graph.lint()
            part.recompile()
    return write_code(own)


def with_linears(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph in which linears become `sirius.linear` (`sirius.linears` where several
    share an input). A compiler calls these operators and fuses the rest.
    """
    own = copy.deepcopy(module)
    for node in own.graph.find_nodes(op="call_function", target=aten.linear.default):
        node.target = torch.ops.sirius.linear.default
    sirius = torch.ops.sirius
    _join_linears(own.graph, sirius.linear.default, sirius.linears.default, _MOST_COMPILED)
    own.graph.lint()
    own.recompile()
    return write_code(own)


@functools.cache
def _functions() -> dict[Any, Any]:
    """The function that replaces each operator."""
    own: dict[Any, Any] = {row.overload: row.cpu for row in OPERATORS.values() if row.cpu}
    own[torch.ops.sirius.cached_attention.default] = cached_attention_by_tokens
    own[aten.linear.default] = linear
    return own


def _rewrite(node: fx.Node) -> None:
    if node.op == "call_function" and node.target in _functions():
        node.target = _functions()[node.target]
        return
    patterns = ((rms_norm, _norm(node)), (rotate, _rotation(node)), (gate, _gate(node)))
    for function, arguments in patterns:
        if arguments is not None:
            with node.graph.inserting_before(node):
                new = node.graph.call_function(function, arguments)
            node.replace_all_uses_with(new)
            _erase_unused(node)
            return


def _join_linears(graph: fx.Graph, single: Any, joined: Any, most: int) -> None:
    """Joins the linears that share an input into one call, if their weights are inputs of the
    graph. A group of more than `most` is not joined.
    """
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=single):
        if all(value.op == "placeholder" for value in node.all_input_nodes[1:]):
            groups.setdefault(node.args[0], []).append(node)
    for x, nodes in groups.items():
        if not 2 <= len(nodes) <= most:
            continue
        weights, biases = zip(*((*node.args[1:], None)[:2] for node in nodes), strict=True)
        with graph.inserting_before(nodes[0]):
            joint = graph.call_function(joined, (x, weights, biases))
            for index, node in enumerate(nodes):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (joint, index)))
        for node in nodes:
            graph.erase_node(node)


def _join_sums(graph: fx.Graph) -> None:
    """Joins a sum and its norm into one call."""
    for norm in graph.find_nodes(op="call_function", target=rms_norm):
        total = norm.args[0]
        if not (_calls(total, aten.add.Tensor) and len(total.args) == 2):
            continue
        weight = norm.args[1]
        given = isinstance(weight, fx.Node) and weight.op in ("placeholder", "get_attr")
        if not (given and all(isinstance(value, fx.Node) for value in total.args)):
            continue
        with graph.inserting_before(total):
            joint = graph.call_function(add_norm, (*total.args, *norm.args[1:]))
            for index, node in enumerate((total, norm)):
                node.replace_all_uses_with(graph.call_function(operator.getitem, (joint, index)))
        graph.erase_node(norm)
        graph.erase_node(total)


def _is(node: Any, target: Any, *rest: Any) -> bool:
    """Whether a value is a call of `target` whose arguments after the first are `rest`."""
    return (
        isinstance(node, fx.Node)
        and node.target is target
        and not node.kwargs
        and node.args[1:] == rest
    )


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target and not node.kwargs


def _norm(node: Any) -> tuple[Any, ...] | None:
    """The arguments of `rms_norm` (x, weight, ε, dtype), if `node` is the last call of a norm."""
    if not _calls(node, aten.mul.Tensor):
        return None
    weight, stored = node.args
    given = isinstance(weight, fx.Node) and _calls(stored, aten.to.dtype)
    if not (given and len(stored.args) == 2):
        return None
    scaled, dtype = stored.args
    if not _calls(scaled, aten.mul.Tensor):
        return None
    wide, root = scaled.args
    if not (_is(wide, aten.to.dtype, torch.float32) and _is(root, aten.rsqrt.default)):
        return None
    shifted = root.args[0]
    if not (_calls(shifted, aten.add.Tensor) and isinstance(shifted.args[1], float)):
        return None
    mean, epsilon = shifted.args
    if not _is(mean, aten.mean.dim, [-1], True):
        return None
    square = mean.args[0]
    if not (_is(square, aten.pow.Tensor_Scalar, 2) and square.args[0] is wide):
        return None
    return wide.args[0], weight, epsilon, dtype


def _rotation(node: Any) -> tuple[Any, ...] | None:
    """The arguments of `rotate` (x, cos, sin, half of x's last dimension), if `node` is the last
    call of a rotation.
    """
    if not _calls(node, aten.add.Tensor):
        return None
    straight, across = node.args
    if not (_calls(straight, aten.mul.Tensor) and _calls(across, aten.mul.Tensor)):
        return None
    (x, cosine), (turned, sine) = straight.args, across.args
    if not all(isinstance(value, fx.Node) for value in (x, cosine, sine)):
        return None
    if not (_is(turned, aten.cat.default, -1) and len(turned.args[0]) == 2):
        return None
    negative, first = turned.args[0]
    if not (_is(negative, aten.neg.default) and _calls(first, aten.slice.Tensor)):
        return None
    second = negative.args[0]
    half = first.args[3] if len(first.args) == 4 else None
    if not (
        isinstance(half, int)
        and _is(first, aten.slice.Tensor, 3, 0, half)
        and _calls(second, aten.slice.Tensor)
        and second.args[1:3] == (3, half)
        and first.args[0] is second.args[0] is x
    ):
        return None
    return x, cosine, sine, half


def _gate(node: Any) -> tuple[Any, ...] | None:
    """The arguments of `gate` (g, u, the activation's name), if `node` is the product of an
    activation and u.
    """
    if not (_calls(node, aten.mul.Tensor) and len(node.all_input_nodes) == 2):
        return None
    for active, u in (node.args, node.args[::-1]):
        if _is(active, aten.silu.default) and len(active.users) == 1:
            return active.args[0], u, "silu"
    return None


def _erase_unused(node: fx.Node) -> None:
    """Erases a call that has no users, then the calls that only it used."""
    if node.users or node.op != "call_function":
        return
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for value in inputs:
        _erase_unused(value)
