"""Removes what export leaves behind, and gives every linear one spelling.

    Before                                         After
    %1 = aten._assert_tensor_metadata(%0, …)
    %2 = aten.alias(%0)
    %3 = aten.to.dtype(%2, float32)  # is float32
    %4 = aten.linear(%3, %qkv_w)                   %1 = aten.slice(%qkv_w, 0, 0, 64)
    %5 = aten.slice(%4, 2, 0, 64)                  %2 = aten.linear(%0, %1)
    %6 = aten.slice(%4, 2, 64, 96)                 %3 = aten.slice(%qkv_w, 0, 64, 96)
                                                   %4 = aten.linear(%0, %3)

    %1 = aten.div_.Tensor(%0, %s)                  %1 = aten.div.Tensor(%0, %s)

    %1 = aten.slice(%0, 3, 0, 8)
    %2 = aten.copy_(%1, %x)                        %1 = aten.slice_scatter(%0, %x, 3, 0, 8)

    %1 = aten.view(%0, [-1, 6])
    %2 = aten.addmm(%b, %1, %w)                    %1 = aten.t(%w)
    %3 = aten.view(%2, [%B, %T, 10])               %2 = aten.linear(%0, %1, %b)

A fused projection (gate_up, qkv) that is only sliced along its features becomes one linear a slice,
over views of the one weight. Later passes then see separate gate, up, q, k and v in every model. A
matrix product of flattened tokens with a weight [in, out] (transformers' Conv1D) becomes a linear
over the weight's transpose.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sirius_passes.manager import Pass
from sirius_passes.program import Program, Stage, call, calls
from sirius_passes.verifier import EXPORT_NOISE, mutates
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import WEIGHT, storable

aten = torch.ops.aten

_IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.scatter_.src: aten.scatter.src,
    aten.scatter_.value: aten.scatter.value,
    aten.sub_.Tensor: aten.sub.Tensor,
}
_VIEWS = (aten.view.default, aten.reshape.default)


class Canonicalize(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "canonicalize"
    takes: ClassVar[Stage] = Stage.CAPTURED
    gives: ClassVar[Stage] = Stage.CANONICAL

    def run(self, program: Program) -> int:
        rewrites = sum(canonicalize(module) for module in program.graphs.values())
        for module in program.graphs.values():
            _refuse_unknown(module.graph)
        return rewrites


def _refuse_unknown(graph: fx.Graph) -> None:
    """Refuses operators that an artifact can't hold, before time is spent on calibration."""
    for node in graph.nodes:
        if node.op == "call_function" and not storable(node.target):
            raise UnsupportedModelError(
                f"the model's graph calls {node.target} (node {node.name}), which is not among the "
                "operators that an artifact may contain (sirius_runtime.graph_operators). Please "
                "open an issue with the model's config.json"
            )


def canonicalize(module: fx.GraphModule) -> int:
    """Canonicalizes one graph in place; returns the number of rewrites."""
    graph = module.graph
    rewrites = sum(_remove_if_noise(node) for node in list(graph.nodes))
    rewrites += sum(_make_functional(node) for node in list(graph.nodes))
    rewrites += sum(_linear_from_addmm(node) for node in calls(graph, aten.addmm.default))
    rewrites += sum(_split_linear(node) for node in calls(graph, aten.linear.default))
    before = len(graph.nodes)
    graph.eliminate_dead_code()
    module.recompile()
    return rewrites + before - len(graph.nodes)


def _remove_if_noise(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in EXPORT_NOISE:
        if node.users:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(node)
        return True
    if node.target in (
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.contiguous.default,
    ):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        old, new = source.meta["val"], node.meta["val"]
        # Weights and inputs are on the program's device, so only a change of dtype does anything.
        if old.dtype is new.dtype and (
            node.target is not aten.contiguous.default or old.is_contiguous()
        ):
            node.replace_all_uses_with(source)
            node.graph.erase_node(node)
            return True
    return False


def _make_functional(node: fx.Node) -> bool:
    """Replaces an in-place operator by its functional form: the graph of a period must not mutate.

    Returns whether `node` was in place. Raises UnsupportedModelError if it can't be rewritten.
    """
    if node.op != "call_function" or not mutates(node):
        return False
    if not (_functional_arithmetic(node) or _functional_copy(node)):
        raise UnsupportedModelError(
            f"node {node.name} ({node.target}) of the model's graph writes in place into "
            f"{node.args[0]}, and no functional form of it is known. Please open an issue with "
            "the model's config.json"
        )
    return True


def _functional_arithmetic(node: fx.Node) -> bool:
    """`y.add_(1)` to `y.add(1)`."""
    if node.target not in _IN_PLACE or _is_view(node.args[0]):
        return False
    before, after = _other_users(node, node.args[0])
    if after or any(map(_is_view, before)):
        return False
    node.target = _IN_PLACE[node.target]
    return True


def _functional_copy(node: fx.Node) -> bool:
    """`y[..., :8] = x` to `y = slice_scatter(y, x, …)`."""
    part, source = node.args[:2]
    if node.target is not aten.copy_.default or node.users or not isinstance(part, fx.Node):
        return False
    if part.target is not aten.slice.Tensor or len(part.users) > 1 or _is_view(part.args[0]):
        return False
    before, after = _other_users(node, part.args[0])
    if any(_is_view(user) for user in before if user is not part):
        return False
    if not _same(_sizes(part), _sizes(source)):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        args = (part.args[0], source, *part.args[1:])
        whole = call(graph, aten.slice_scatter.default, args, origin="canonicalize")
    for user in after:
        user.replace_input_with(part.args[0], whole)  # type: ignore[arg-type]
    graph.erase_node(node)
    graph.erase_node(part)
    return True


def _other_users(node: fx.Node, of: object) -> tuple[list[fx.Node], list[fx.Node]]:
    """The users of a value before and after `node`."""
    assert isinstance(of, fx.Node)
    before = [user for user in of.users if user < node]
    return before, [user for user in of.users if user is not node and user not in before]


def _is_view(node: object) -> bool:
    """Whether a node's value may share memory with another value."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return True
    if node.target is operator.getitem:
        return _is_view(node.args[0])
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(value.alias_info is not None for value in schema.returns)


def _linear_from_addmm(product: fx.Node) -> bool:
    """Replaces bias + x @ weight, and the views that flatten x and restore its dimensions."""
    bias, x, weight = product.args
    assert isinstance(x, fx.Node)
    if not (isinstance(weight, fx.Node) and WEIGHT in weight.meta) or product.kwargs:
        return False
    graph = product.graph
    restored: list[fx.Node] = []
    if x.target in _VIEWS and _same(_sizes(x.args[0])[-1:], _sizes(x)[-1:]):
        rows = _sizes(x.args[0])[:-1]
        restored = [u for u in product.users if u.target in _VIEWS and _same(rows, _sizes(u)[:-1])]
    whole = x.args[0] if restored and len(restored) == len(product.users) else x
    with graph.inserting_before(product):
        transposed = call(graph, aten.t.default, (weight,), origin="canonicalize")
        linear = call(graph, aten.linear.default, (whole, transposed, bias), origin="canonicalize")
    for node in (product,) if whole is x else restored:
        node.replace_all_uses_with(linear)
        graph.erase_node(node)
    if whole is not x:
        graph.erase_node(product)
    return True


def _sizes(node: object) -> tuple[Any, ...]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )


def _split_linear(linear: fx.Node) -> bool:
    """Replaces a linear whose result is only sliced along its features by one linear a slice."""
    weight = linear.args[1]
    bias = linear.args[2] if len(linear.args) > 2 else None
    if not (isinstance(weight, fx.Node) and _is_weight(weight) and linear.users):
        return False
    ranges: dict[fx.Node, tuple[int, int]] = {}
    for user in list(linear.users):
        found = _feature_ranges(user, linear)
        if found is None:
            return False
        ranges |= found
    graph = linear.graph
    for user, (start, end) in ranges.items():
        with graph.inserting_before(linear):
            rows = [
                None
                if source is None
                else call(graph, aten.slice.Tensor, (source, 0, start, end), origin="canonicalize")
                for source in (weight, bias)
            ]
            arguments = (linear.args[0], *(r for r in rows if r is not None))
            part = call(graph, aten.linear.default, arguments, origin="canonicalize")
        user.replace_all_uses_with(part)
        graph.erase_node(user)
    for user in list(linear.users):  # a chunk or split whose items were replaced
        graph.erase_node(user)
    graph.erase_node(linear)
    return True


def _is_weight(node: fx.Node) -> bool:
    """Whether a node is a whole weight, as stored or transposed."""
    source = node.args[0] if node.target is aten.t.default else node
    return isinstance(source, fx.Node) and WEIGHT in source.meta


def _feature_ranges(user: fx.Node, linear: fx.Node) -> dict[fx.Node, tuple[int, int]] | None:
    """The range of `linear`'s output features that `user`, or each item of `user`, reads.

    None if `user` is not a plain slice, chunk or split of the features.
    """
    value = linear.meta["val"]
    last, features = value.ndim - 1, int(value.shape[-1])
    if user.target is aten.slice.Tensor:
        dim, start, end, step = (*user.args[1:], *(0, 0, features, 1)[len(user.args) - 1 :])[:4]
        if dim not in (last, -1) or step != 1 or not isinstance(start, int | None):
            return None
        if not isinstance(end, int | None):
            return None
        low, high, _ = slice(start, end).indices(features)
        return {user: (low, high)} if low < high else None
    if user.target in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        dim = user.args[2] if len(user.args) > 2 else user.kwargs.get("dim", 0)
        if dim not in (last, -1):
            return None
        offsets = [0]
        for part in user.meta["val"]:
            offsets.append(offsets[-1] + int(part.shape[-1]))
        items = list(user.users)
        if any(item.target is not operator.getitem for item in items):
            return None
        return {item: (offsets[item.args[1]], offsets[item.args[1] + 1]) for item in items}  # type: ignore[index, operator]
    return None
