"""The TEAL sparse path: every projection skips input channels below a calibrated threshold.

    Before (sparse)                          After (sparse)
    %1 = aten.linear(%x, %w, %b)             %1 = aten.t(%w)
                                             %2 = sirius.sparse_linear(%x, %1, %b, 0.0713)
                                             %3 = %2[0], %4 = %2[1]
                                             %9 = aten.stack([…, %4, …])
                                             return logits=%8, kept=%9

Applies to every linear of attention and MLPs, but not to the head. Each linear has one threshold,
on |x|; `kept` [sites, B] counts the kept channels. The sparse path reads the kept channels of each
weight, which `lay_out_weights` stores input-major. Source: TEAL, arXiv 2408.14690.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from sirius_passes.blocks import head_linear, layers_of
from sirius_passes.manager import Pass
from sirius_passes.program import (
    CALIBRATED,
    SPARSE,
    Program,
    Stage,
    call,
    calls,
)
from sirius_passes.sparsify import (
    Threshold,
    add_counts,
    add_sites,
    both_values,
    one_per_site,
    take_over,
)
from sirius_passes.weight_views import is_transpose
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import INPUT, WEIGHT, placeholders
from sirius_runtime.spec import Method, SiteSpec

aten = torch.ops.aten
sparse_linear = torch.ops.sirius.sparse_linear.default


class SparsifyTeal(Pass):
    """`thresholds`: one for each linear of the sparse layers, in the graph's order."""

    name: ClassVar[str] = "sparsify_teal"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(
        self,
        keep: float,
        thresholds: Sequence[Threshold] | None,
        dense_layers: Collection[int] = (),
        *,
        method: Method = Method.TEAL,
    ) -> None:
        """`thresholds`: None keeps all channels, as calibration needs."""
        self.keep, self.dense_layers, self.method = keep, dense_layers, method
        self.thresholds = thresholds

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        graph = module.graph
        found = projections(graph, self.dense_layers)
        thresholds = one_per_site(self.thresholds, len(found), self.keep, "linears")
        sites, counts = [], []
        for (linear, layer), threshold in zip(found.items(), thresholds, strict=True):
            x, weight, *bias = linear.args
            assert isinstance(x, fx.Node)
            assert isinstance(weight, fx.Node)
            features, units = (int(extent) for extent in weight.meta["val"].shape)
            source = _source(weight)
            origin = f"{self.name}({linear.name})"
            with graph.inserting_before(linear):
                x, restore = _by_rows(graph, x, features, origin)
                rows = call(graph, aten.t.default, (weight,), origin=origin)
                arguments = (x, rows, bias[0] if bias else None, threshold.value)
                both = call(graph, sparse_linear, arguments, origin=origin)
                both.meta[CALIBRATED] = (len(both.args) - 1,)
            y, count = both_values(linear, both, self.name)
            with graph.inserting_before(linear):
                y = restore(y)
            take_over(linear, y)
            counts.append(count)
            kept = units * threshold.keep
            sites.append(SiteSpec(layer, source, units, kept, features, threshold.value, True))
        add_sites(program, self.method, self.keep, sites, self.dense_layers)
        add_counts(module, counts, self.name)
        module.recompile()
        return len(found)


def projections(graph: fx.Graph, dense_layers: Collection[int] = ()) -> dict[fx.Node, int]:
    """Every linear except the head and those in `dense_layers`, with its layer, in graph order.

    Raises UnsupportedModelError if there are none, or if their layers can't be told apart.
    """
    head = head_linear(graph)
    linears = [n for n in calls(graph, aten.linear.default) if n is not head]
    layers = layers_of(graph, linears)
    if not layers:
        raise UnsupportedModelError(
            "the model has no linear to make sparse: looked for aten.linear between the embeddings "
            "and the head. Use --sparsity none, or open an issue with the model's config.json"
        )
    return {node: layer for node, layer in layers.items() if layer not in dense_layers}


def _by_rows(
    graph: fx.Graph, x: fx.Node, features: int, origin: str
) -> tuple[fx.Node, Callable[[fx.Node], fx.Node]]:
    """A linear's input as [B, T, C], and a function that gives the output the input's rank again.

    Some models flatten rows and tokens ([B*T, C]: OPT), or add a head dimension of 1 ([B, 1, T, C]:
    latent attention). Raises UnsupportedModelError for any other shape.
    """

    def make(target: Callable[..., Any], *args: Any) -> fx.Node:
        return call(graph, target, args, origin=origin)

    shape = x.meta["val"].shape
    if len(shape) == 3:
        return x, lambda y: y
    if len(shape) == 2:
        rows = make(aten.sym_size.int, placeholders(graph, INPUT)["input_ids"], 0)
        by_rows = make(aten.view.default, x, [rows, -1, int(shape[-1])])
        return by_rows, lambda y: make(aten.view.default, y, [-1, features])
    if len(shape) == 4 and shape[1] == 1:
        return make(aten.squeeze.dim, x, 1), lambda y: make(aten.unsqueeze.default, y, 1)
    raise UnsupportedModelError(
        f"the linear after {x.name} reads a tensor of shape {list(shape)}, which is none of "
        "[B, T, C], [B*T, C] and [B, 1, T, C]. Use --sparsity topk, cats or griffin"
    )


def _source(weight: fx.Node) -> str:
    """The name of the stored tensor that a linear's weight [O, C] is a view of.

    Raises UnsupportedModelError if the weight is not a chain of row slices and transposes.
    """
    transposed = False
    node = weight
    while WEIGHT not in node.meta:
        if is_transpose(node):
            transposed = not transposed
        elif node.target is not aten.slice.Tensor or node.args[1] != int(transposed):
            raise UnsupportedModelError(
                f"a linear's weight is computed by {node.name} ({node.target}), so its channels "
                "can't be skipped. Use --sparsity topk, cats or griffin"
            )
        (node,) = node.all_input_nodes
    return str(node.meta[WEIGHT])
