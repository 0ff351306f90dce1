"""Finds the decoder layer of each node from the structure of the graph.

A *cut* is a value that separates the graph: nothing computed from the tokens before it is read
after it. The sums of the residual stream are cuts, the nodes between two of them are not. Layer l
begins after the last cut before its attention. This needs no module names and no module classes,
and works for any order of attention and MLP.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import torch
from torch import fx

from sirius_passes.program import calls
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.graph import INPUT

aten, sirius = torch.ops.aten, torch.ops.sirius

_ATTENTION = (sirius.attention.default, sirius.cached_attention.default)
_EMBEDDINGS = (aten.embedding.default, sirius.embedding.default)


def layer_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The cut before each layer, followed by the cut before the head.

    Raises UnsupportedModelError if no single value separates a layer from the one before it.
    """
    found = cuts(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    cut_indices = [order[cut] for cut in found]
    # The head's linear belongs to no layer.
    ends = [*calls(graph, *_ATTENTION), head_linear(graph)]
    starts: list[fx.Node] = []
    for layer, end in enumerate(ends):
        before = bisect_left(cut_indices, order[end])
        if not before or (starts and cut_indices[before - 1] <= order[starts[-1]]):
            raise UnsupportedModelError(
                f"no single value leads into layer {layer}: the layers share more than a residual "
                "stream, so the layer of each weight is unknown. Use --sparsity topk, cats or "
                "griffin"
            )
        starts.append(found[before - 1])
    return starts


def layers_of(graph: fx.Graph, nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """The layer of each of `nodes`; nodes before the first layer or after the last are left out."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    bounds = [order[cut] for cut in layer_inputs(graph)]
    found = {}
    for node in nodes:
        layer = bisect_left(bounds, order[node]) - 1
        if 0 <= layer < len(bounds) - 1:
            found[node] = layer
    return found


def cuts(graph: fx.Graph) -> list[fx.Node]:
    """The cuts, in the graph's order."""
    stream = _stream(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    last_use = {
        node: max((order[user] for user in node.users if user in stream), default=order[node])
        for node in stream
    }
    found, furthest = [], -1
    for node in stream:
        if furthest <= order[node] and node.op == "call_function":
            found.append(node)
        furthest = max(furthest, last_use[node])
    return found


def head_linear(graph: fx.Graph) -> fx.Node:
    """The linear that makes the logits, which is the last of the graph.

    Raises UnsupportedModelError if the graph has no linear.
    """
    linears = calls(graph, aten.linear.default, sirius.linear.default)
    if not linears:
        raise UnsupportedModelError("the graph has no linear that could make logits")
    return linears[-1]


def _stream(graph: fx.Graph) -> dict[fx.Node, None]:
    """The values that depend on the token embeddings and that the logits need, in order."""
    stream: dict[fx.Node, None] = {}
    logits = graph.output_node().args[0][0]  # type: ignore[index]
    leads = {logits}
    for node in reversed(graph.nodes):
        if node in leads:
            leads.update(node.all_input_nodes)
    for node in graph.nodes:
        if node not in leads:  # feeds another output: counts, statistics
            continue
        if node.target in _EMBEDDINGS and _is_of_tokens(node.args[1]):
            stream[node] = None
            continue
        # A size read from the stream is not itself part of the stream.
        is_size = node.target is aten.sym_size.int
        if not is_size and any(source in stream for source in node.all_input_nodes):
            stream[node] = None
    return stream


def _is_of_tokens(indices: Any) -> bool:
    """Whether an embedding's indices are the tokens (maybe reshaped) rather than positions."""
    while indices.op == "call_function" and isinstance(indices.args[0], fx.Node):
        indices = indices.args[0]
    return indices.meta.get(INPUT) == "input_ids"
