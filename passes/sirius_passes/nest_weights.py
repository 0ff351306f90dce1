"""Stores weights nested: 8 bits in two planes of 4 bits, of which drafts read only the high one.

    Before                                           After
    weight %w: model[192, 768]                       weight %w: uint8[2, 192, 408]
    full
    %1 = aten.linear(%x, %w)                         %1 = sirius.linear(%x, %w)
    sparse
    %1 = aten.linear(%x, %w)                         %1 = aten.slice.Tensor(%w, 0, 0, 1)
                                                     %2 = sirius.linear(%x, %1)

    weight %w: model[768, 192]                       weight %w: uint8[2, 24, 34, 96]
    full
    %1 = aten.t(%w)                                  %1 = sirius.linear(%x, %w)
    %2 = aten.linear(%x, %1)
    sparse
    %1 = sirius.sparse_linear(%x, %w, %b, 0.07)      %1 = aten.slice.Tensor(%w, 0, 0, 1)
                                                     %2 = sirius.sparse_linear(%x, %1, %b, 0.07)

`sirius_runtime.nested` describes the format. The readers of a weight decide its layout: by outputs
for linears, embeddings, and the gate and up of MLPs; by inputs for the down of MLPs,
`sirius::sparse_linear`, and linears that read the transpose. Both paths read the one copy. Slices
of fused projections become slices of the planes. Embeddings always read both planes, and so do all
drafts when `draft_bits` is 8. The experts of a mixture are nested like any MLP. Its router is not:
rounded to 4 bits, it would send a draft to other experts. A weight that can't be nested stays as it
is, and with it the other weights of its MLP; `not_nested` has the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from sirius_passes.manager import Pass
from sirius_passes.program import SPARSE, Program, Stage, call, fake_mode
from sirius_passes.sparsify import set_density
from sirius_passes.weight_views import (
    HIGH_PLANE,
    Reader,
    is_transpose,
    readers,
    slice_args,
    weight_name,
)
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import CAPTURE_DTYPE, WEIGHT, placeholders
from sirius_runtime.nested import GROUP, nested_shape, why_not
from sirius_runtime.operators import MLP_SCHEMA, OPERATORS
from sirius_runtime.safetensors_file import size_of
from sirius_runtime.spec import Layout, WeightSpec

aten, sirius = torch.ops.aten, torch.ops.sirius

_NESTED_SIBLING: dict[Any, Any] = {
    aten.linear.default: sirius.linear.default,
    aten.embedding.default: sirius.embedding.default,
}
_MLPS = {row.overload for row in OPERATORS.values() if f"({MLP_SCHEMA}" in row.schema}
_MIXTURES = {row.overload for row in OPERATORS.values() if row.name.endswith("_moe")}
_EXPERTS, _ROUTING = 1, 2  # indices of a mixture's arguments: chosen experts, routing weights
_LINEARS = (aten.linear.default, sirius.linear.default)
_ROUTES = "it routes tokens to experts"


class NestWeights(Pass):
    """`draft_bits`: the bits of a nested weight that the sparse path reads, 4 or 8.

    After a run, `matrices` is the number of matrices found, and `not_nested` maps each one that was
    not nested to the reason. Raises UnsupportedModelError if no weight can be nested.
    """

    name: ClassVar[str] = "nest_weights"
    takes: ClassVar[Stage] = Stage.LAID_OUT
    gives: ClassVar[Stage] = Stage.LAID_OUT

    def __init__(self, draft_bits: int) -> None:
        self.draft_bits = draft_bits
        self.not_nested: dict[str, str] = {}
        self.matrices = 0

    def run(self, program: Program) -> int:
        found, self.not_nested = _choose(program)
        self.matrices = len(found) + len(self.not_nested)
        if not found and not any(spec.nested for spec in program.weights.values()):
            raise UnsupportedModelError(
                "--weights int8: no weight of this model can be nested; "
                f"{reasons_text(self.not_nested)}. Leave --weights out"
            )
        for name, layout in found.items():
            old = program.weights[name]
            shape = nested_shape(*_matrix(old.shape, layout), layout, old.shape[:-2])
            program.update_weight(name, dtype="uint8", shape=shape, retype=False, nested=layout)
            self._count(program, old)
            for graph_name, module in program.graphs.items():
                node = placeholders(module.graph, WEIGHT).get(name)
                if node is not None:
                    high = graph_name == SPARSE and self.draft_bits == 4
                    _Rewrite(node, shape, layout, self.name).run(high=high)
        if found:
            for module in program.graphs.values():
                module.recompile()
            program.sparsity = replace(program.sparsity, draft_bits=self.draft_bits)
            set_density(program)
        return len(found)

    def _count(self, program: Program, old: WeightSpec) -> None:
        """Updates the bytes that a skipped unit of the weight saves, now that it is nested."""
        new = size_of(program.weights[old.name]) * self.draft_bits // 8
        program.sparsity = replace(
            program.sparsity,
            sites=tuple(
                replace(site, params=site.params * new // size_of(old))
                if site.weight == old.name
                else site
                for site in program.sparsity.sites
            ),
        )


def reasons_text(not_nested: dict[str, str]) -> str:
    """How many matrices were not nested, and why: the three most frequent reasons, each with an
    example.
    """
    reasons = Counter(not_nested.values())
    parts = []
    for reason, count in reasons.most_common(3):
        example = next(name for name, why in not_nested.items() if why == reason)
        parts.append(f"{count} ({example}: {reason})")
    rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(3))
    return ", ".join(parts) + (f" and {rest} more" if rest else "") or "it has no matrices"


def _choose(program: Program) -> tuple[dict[str, Layout], dict[str, str]]:
    """The layouts of the weights that can be nested, and the reasons why others can't be."""
    found: dict[str, Layout] = {}
    left: dict[str, str] = {}
    mlps: list[list[str]] = []
    biases: set[str] = set()
    for module in program.graphs.values():
        for node in module.graph.nodes:
            if first := _first_weight(node):
                tensors = [value and weight_name(value) for value in node.args[first : first + 6]]
                mlps.append([name for name in tensors[:3] if name])
                biases.update(name for name in tensors[3:] if name)
    bound = [placeholders(module.graph, WEIGHT) for module in program.graphs.values()]
    routers = {name for module in program.graphs.values() for name in _routers(module.graph)}
    for name, spec in program.weights.items():
        if spec.nested or not spec.parameter or len(spec.shape) < 2 or name in biases:
            continue
        placed = [nodes[name] for nodes in bound if name in nodes]
        layout, reason = _layout(spec, [reader for node in placed for reader in _uses(node)])
        if name in routers:
            layout, reason = None, _ROUTES
        if layout is None:
            left[name] = reason
        else:
            found[name] = layout
    changed = True
    while changed:
        changed = False
        for names in mlps:
            staying = next((name for name in names if name in left), None)
            for name in names:
                if staying is not None and found.pop(name, None) is not None:
                    left[name] = "another weight of its MLP can't be nested"
                    changed = True
    return found, left


def _first_weight(node: fx.Node) -> int:
    """The index of the gate among the arguments of an MLP or a mixture; 0 for other nodes.

    Up and down follow the gate, and then the three biases.
    """
    return 1 if node.target in _MLPS else 3 if node.target in _MIXTURES else 0


def _routers(graph: fx.Graph) -> Iterator[str]:
    """The weights of routers: linears that compute a mixture's experts and routing weights."""
    seen: set[fx.Node] = set()
    ahead = [
        argument
        for node in graph.nodes
        if node.target in _MIXTURES
        for argument in node.args[_EXPERTS : _ROUTING + 1]
    ]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _LINEARS:
            yield weight_name(node.args[1])
        else:
            ahead += node.all_input_nodes


@dataclass(frozen=True)
class _Use:
    """A reader of a weight, and the views between the placeholder and the reader, in order."""

    reader: Reader
    views: tuple[fx.Node, ...]


def _uses(weight: fx.Node) -> Iterator[_Use]:
    for reader in readers(weight):
        views: list[fx.Node] = []
        view = reader.view
        while view is not weight:
            views.append(view)
            view = view.args[0]  # type: ignore[assignment]
        yield _Use(reader, tuple(reversed(views)))


def _layout(spec: WeightSpec, uses: Sequence[_Use]) -> tuple[Layout | None, str]:
    """The layout that all readers need, and ""; or None and the reason if there is none."""
    if not spec.retype or not dtype_of(spec.dtype).is_floating_point:
        return None, f"it is kept in {spec.dtype} whatever the model's dtype"
    wanted = set()
    for use in uses:
        layout, reason = _wanted(use.reader)
        if layout is None:
            return None, reason
        wanted.add(layout)
    if len(wanted) != 1:
        return None, "its rows are read both as outputs and as inputs"
    (layout,) = wanted
    experts = all(use.reader.node.target in _MIXTURES for use in uses)
    if len(spec.shape) != 2 + experts:
        return None, f"it has {len(spec.shape)} dimensions"
    if odd := why_not(*_matrix(spec.shape, layout), layout):
        return None, odd
    for use in uses:
        for dim, start, end, step in _cuts(use):
            rows = layout is Layout.BY_OUTPUTS and dim == 0
            if dim < 0 or not (rows or (layout is Layout.BY_INPUTS and step == 1)):
                return None, "it is sliced in a way that the nested layout does not support"
            if not rows and (start % GROUP or end % GROUP):
                return None, f"it is sliced at indices that are no multiples of {GROUP}"
    return layout, ""


def _wanted(reader: Reader) -> tuple[Layout | None, str]:
    """The layout of the stored weight that a reader needs, and ""; or None and the reason."""
    node, view = reader.node, reader.view
    places = [index for index, value in enumerate(node.args) if value is view]
    straight = not reader.transposed
    if node.target is aten.linear.default and places == [1]:
        return (Layout.BY_OUTPUTS if straight else Layout.BY_INPUTS), ""
    if node.target is aten.embedding.default and places == [0] and straight:
        return Layout.BY_OUTPUTS, ""
    if node.target is sirius.sparse_linear.default and places == [1] and straight:
        return Layout.BY_INPUTS, ""
    if (gate := _first_weight(node)) and straight and len(places) == 1:
        if places[0] in (gate, gate + 1):
            return Layout.BY_OUTPUTS, ""
        if places[0] == gate + 2:
            return Layout.BY_INPUTS, ""
    return None, f"{node.target} reads it"


def _matrix(shape: Sequence[int], layout: Layout) -> tuple[int, int]:
    """The outputs and inputs of a matrix that is stored in this shape, before nesting."""
    rows, columns = shape[-2:]
    return (rows, columns) if layout is Layout.BY_OUTPUTS else (columns, rows)


def _cuts(use: _Use) -> Iterator[tuple[int, int, int, int]]:
    """The slices between a weight and a reader, as (dim, start, end, step).

    `dim` is of the stored matrix: 0 rows, 1 columns; negative for a dimension before the matrix.
    """
    transposed = False
    for view in use.views:
        if is_transpose(view):
            transposed = not transposed
            continue
        dim, *limits = slice_args(view)
        shape = view.args[0].meta["val"].shape  # type: ignore[union-attr]
        start, end, step = slice(*(*limits, None, None, None)[:3]).indices(int(shape[dim]))
        dim -= len(shape) - 2
        yield (1 - dim if transposed and dim >= 0 else dim), start, end, step


class _Rewrite:
    """Makes one graph read one weight nested, in the nested `shape` and `layout`."""

    def __init__(
        self, weight: fx.Node, shape: tuple[int, ...], layout: Layout, origin: str
    ) -> None:
        self._weight, self._layout, self._origin = weight, layout, origin
        self._graph, self._shape = weight.graph, shape

    def run(self, *, high: bool) -> None:
        uses = list(_uses(self._weight))
        cuts = [list(_cuts(use)) for use in uses]  # before the placeholder's shape changes
        with fake_mode(self._graph):
            self._weight.meta["val"] = torch.empty(self._shape, dtype=torch.uint8)
        for use, slices in zip(uses, cuts, strict=True):
            node = use.reader.node
            with self._graph.inserting_before(node):
                # A token reads one row of an embedding, so reading both planes costs little.
                whole = not high or node.target is aten.embedding.default
                planes = self._weight if whole else self._slice(self._weight, *HIGH_PLANE)
                for dim, start, end, step in slices:
                    planes = self._cut(planes, dim, start, end, step)
                self._read(use.reader, planes)
        for view in reversed(dict.fromkeys(view for use in uses for view in use.views)):
            self._graph.erase_node(view)

    def _cut(self, planes: fx.Node, dim: int, start: int, end: int, step: int) -> fx.Node:
        rank = len(self._shape)
        if self._layout is Layout.BY_OUTPUTS:
            return self._slice(planes, rank - 2, start, end, *([step] if step > 1 else []))
        if dim == 0:
            return self._slice(planes, rank - 3, start // GROUP, end // GROUP)
        return self._slice(planes, rank - 1, start // 2, end // 2)

    def _slice(self, planes: fx.Node, *limits: int) -> fx.Node:
        return call(self._graph, aten.slice.Tensor, (planes, *limits), origin=self._origin)

    def _read(self, reader: Reader, planes: fx.Node) -> None:
        node = reader.node
        target = _NESTED_SIBLING.get(node.target)
        if target is None:
            node.replace_input_with(reader.view, planes)
            return
        if node.target is aten.embedding.default:
            args: tuple[Any, ...] = (planes, node.args[1], CAPTURE_DTYPE)
        else:
            args = (node.args[0], planes, *node.args[2:])
        new = call(self._graph, target, args, origin=f"{self._origin}({node.name})")
        node.replace_all_uses_with(new)
        self._graph.erase_node(node)
