"""Input sparsity: per token, the input channels of every projection that are large enough (TEAL).

    Before (sparse)                          After (sparse)
    %1 = aten.linear(%x, %w, %b)             %1 = aten.t(%w)
                                             %2 = sirius.sparse_linear(%x, %1, %b, 0.0713)
                                             %3 = %2[0], %4 = %2[1]
                                             %9 = aten.stack([…, %4, …])
                                             return logits=%8, kept=%9

Every linear of attention and MLPs, not the head. One threshold a linear, on |x|. `kept` [sites,
B] counts the channels that were kept. Reads the kept channels of each weight; `lay_out_weights`
stores it input-major (arXiv 2408.14690).
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
    """`thresholds`: one a linear of the layers that are not dense, in the graph's order."""

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
        """thresholds: None to keep all channels: to calibrate."""
        self.keep, self.dense_layers, self.method = keep, dense_layers, method
        self.thresholds = thresholds

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        graph = module.graph
        found = projections(graph, self.dense_layers)
        thresholds = one_per_site(self.thresholds, len(found), self.keep, "linears")
        sites, counts = [], []
        for (linear, layer), own in zip(found.items(), thresholds, strict=True):
            x, weight, *bias = linear.args
            assert isinstance(x, fx.Node)
            assert isinstance(weight, fx.Node)
            features, units = (int(extent) for extent in weight.meta["val"].shape)
            source = _source(weight)
            origin = f"{self.name}({linear.name})"
            with graph.inserting_before(linear):
                x, restore = _by_rows(graph, x, features, origin)
                rows = call(graph, aten.t.default, (weight,), origin=origin)
                arguments = (x, rows, bias[0] if bias else None, own.value)
                both = call(graph, sparse_linear, arguments, origin=origin)
                both.meta[CALIBRATED] = (len(both.args) - 1,)
            y, count = both_values(linear, both, self.name)
            with graph.inserting_before(linear):
                y = restore(y)
            take_over(linear, y)
            counts.append(count)
            kept = units * own.keep
            sites.append(SiteSpec(layer, source, units, kept, features, own.value, True))
        add_sites(program, self.method, self.keep, sites, self.dense_layers)
        add_counts(module, counts, self.name)
        module.recompile()
        return len(found)


def projections(graph: fx.Graph, dense_layers: Collection[int] = ()) -> dict[fx.Node, int]:
    """The linears of the layers, all but the head, and the layer of each, in order.

    Raises UnsupportedModelError where there are none, or where layers can't be told apart.
    """
    head = head_linear(graph)
    linears = [n for n in calls(graph, aten.linear.default) if n is not head]
    layers = layers_of(graph, linears)
    if not layers:
        raise UnsupportedModelError(
            "there is no linear to make sparse: looked for aten.linear between the embeddings and "
            "the head"
        )
    return {node: layer for node, layer in layers.items() if layer not in dense_layers}


def _by_rows(
    graph: fx.Graph, x: fx.Node, features: int, origin: str
) -> tuple[fx.Node, Callable[[fx.Node], fx.Node]]:
    """A linear's input as [B, T, C], and what gives the output the form that the input had.

    Tokens of all rows may come as one ([B T, C]: OPT), or with a head's dimension of 1 ([B, 1, T,
    C]: latent attention).
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
        f"the linear after {x.name} reads {list(shape)}, which says of no number whose token it "
        "is. Use --sparsity topk, cats or griffin"
    )


def _source(weight: fx.Node) -> str:
    """The stored tensor that a linear's weight [O, C] is of, read through slices and transposes."""
    transposed = False
    node = weight
    while WEIGHT not in node.meta:
        if is_transpose(node):
            transposed = not transposed
        elif node.target is not aten.slice.Tensor or node.args[1] != int(transposed):
            raise UnsupportedModelError(
                f"a linear's weight is computed, by {node.name} ({node.target}); its channels "
                "can't be skipped. Use --sparsity topk, cats or griffin"
            )
        (node,) = node.all_input_nodes
    return str(node.meta[WEIGHT])
