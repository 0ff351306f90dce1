"""How graphs read weights: through chains of transposes and slices, which are views.

    %1 = aten.slice.Tensor(%gate_up, 0, 0, 96)
    %2 = aten.t(%1)
    %3 = sirius.sparse_linear(%x, %2, …)        # reads gate_up, transposed, through the view %2

If the weight is stored transposed, its readers slice along the other dimension instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sirius_passes.program import call
from sirius_runtime.graph import WEIGHT

aten = torch.ops.aten

HIGH_PLANE = (0, 0, 1)
"""Arguments (dim, start, end) of the slice that gives the high plane of a nested weight."""


@dataclass(frozen=True)
class Reader:
    """A node that reads a weight through `view`. `transposed`: relative to the stored layout."""

    node: fx.Node
    view: fx.Node
    transposed: bool

    @property
    def takes_views(self) -> bool:
        """Whether the node reads either layout equally fast, as a dense linear does."""
        return self.node.target is aten.linear.default and self.node.args[1] is self.view


def weight_name(node: Any) -> str:
    """The name of the weight that `node` is a placeholder or a view of."""
    while WEIGHT not in node.meta:
        node = node.args[0]
    return str(node.meta[WEIGHT])


def readers(weight: fx.Node) -> Iterator[Reader]:
    """The nodes that read a weight's placeholder, through any transposes and slices."""
    yield from _readers(weight, transposed=False)


def _readers(view: fx.Node, transposed: bool) -> Iterator[Reader]:
    for user in view.users:
        if is_transpose(user):
            yield from _readers(user, not transposed)
        elif _is_slice(user, view):
            yield from _readers(user, transposed)
        else:
            yield Reader(user, view, transposed)


def reads_high_plane(weight: fx.Node) -> bool:
    """Whether some node reads only the high plane of a nested weight, given its placeholder."""
    return weight.meta["val"].dtype is torch.uint8 and any(
        user.target is aten.slice.Tensor and user.args[1:] == HIGH_PLANE for user in weight.users
    )


def store_transposed(weight: fx.Node, origin: str) -> None:
    """Transposes a weight's placeholder, and rewrites its readers to see the same values."""
    value = weight.meta["val"]
    with value.fake_mode:
        weight.meta["val"] = torch.empty(transposed_shape(value.shape), dtype=value.dtype)
    _reread(weight, weight, True, origin)


def _reread(old: fx.Node, new: fx.Node, transposed: bool, origin: str) -> None:
    """Makes the readers of the view `old` read `new`, which is the transpose of `old` if
    `transposed`.
    """
    graph = old.graph
    for user in list(old.users):
        if is_transpose(user):
            _reread(user, new, not transposed, origin)
            graph.erase_node(user)
        elif _is_slice(user, old):
            dim, *limits = slice_args(user)
            if transposed:
                dim = _other(dim, user.meta["val"].ndim)
            with graph.inserting_before(user):
                part = call(graph, aten.slice.Tensor, (new, dim, *limits), origin=origin)
            _reread(user, part, transposed, origin)
            graph.erase_node(user)
        elif transposed:
            with graph.inserting_before(user):
                user.replace_input_with(old, call(graph, aten.t.default, (new,), origin=origin))
        else:
            user.replace_input_with(old, new)


def transposed_shape(shape: Any) -> tuple[Any, ...]:
    """A shape with its last two sizes exchanged."""
    *front, rows, columns = shape
    return (*front, columns, rows)


def is_transpose(node: fx.Node) -> bool:
    """Whether a node exchanges the last two dimensions."""
    if node.target is aten.t.default:
        return True
    if node.target is not aten.transpose.int:
        return False
    ndim = node.meta["val"].ndim
    return {int(d) % ndim for d in node.args[1:]} == {ndim - 2, ndim - 1}  # type: ignore[arg-type]


def _is_slice(node: fx.Node, of: fx.Node) -> bool:
    return node.target is aten.slice.Tensor and node.args[0] is of and node.meta["val"].ndim > 1


def slice_args(node: fx.Node) -> tuple[Any, ...]:
    """A slice's dim, counted from the front, then its start, end and step as far as given."""
    dim, *limits = node.args[1:] or (0,)
    return (int(dim) % node.meta["val"].ndim, *limits)  # type: ignore[arg-type]


def _other(dim: int, ndim: int) -> int:
    """The index of a dimension after the last two are exchanged."""
    return {ndim - 2: ndim - 1, ndim - 1: ndim - 2}.get(dim, dim)
