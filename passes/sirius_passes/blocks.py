"""The residual stream: which nodes belong to which decoder layer, read off the graph's shape.

A *cut* is a value that all of the stream passes through: once it is computed, nothing computed from
the tokens before it is read again. The residual sums are cuts, what lies between two of them is
not. Layer l begins after the last cut before its attention; so no names, no class of module, no
order of attention and MLP has to be known.
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


def layer_inputs(graph: fx.Graph) -> list[fx.Node]:
    """The cut that each layer begins after, and last the one that the head begins after.

    Raises UnsupportedModelError where layers share more than one value.
    """
    every = cuts(graph)
    order = {node: index for index, node in enumerate(graph.nodes)}
    places = [order[cut] for cut in every]
    # The head's own results are no layer's.
    ends = [*calls(graph, *_ATTENTION), head_linear(graph)]
    starts: list[fx.Node] = []
    for layer, end in enumerate(ends):
        before = bisect_left(places, order[end])
        if not before or (starts and places[before - 1] <= order[starts[-1]]):
            raise UnsupportedModelError(
                f"no single value leads into layer {layer}: the layers share more than a residual "
                "stream, so their weights can't be told apart. Use --sparsity topk, cats or griffin"
            )
        starts.append(every[before - 1])
    return starts


def layers_of(graph: fx.Graph, nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """The layer of each of `nodes`; those before the first and after the last are left out."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    bounds = [order[cut] for cut in layer_inputs(graph)]
    found = {}
    for node in nodes:
        layer = bisect_left(bounds, order[node]) - 1
        if 0 <= layer < len(bounds) - 1:
            found[node] = layer
    return found


def cuts(graph: fx.Graph) -> list[fx.Node]:
    """The cuts, in order."""
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
    """The linear that makes the logits: the last of the graph."""
    linears = calls(graph, aten.linear.default)
    if not linears:
        raise UnsupportedModelError("the graph has no linear that could make logits")
    return linears[-1]


def _stream(graph: fx.Graph) -> dict[fx.Node, None]:
    """What is computed from the tokens' embeddings on the way to the logits, in order."""
    stream: dict[fx.Node, None] = {}
    logits = graph.output_node().args[0][0]  # type: ignore[index]
    leads = {logits}
    for node in reversed(graph.nodes):
        if node in leads:
            leads.update(node.all_input_nodes)
    for node in graph.nodes:
        if node not in leads:  # counts of what is kept, statistics
            continue
        if node.target is aten.embedding.default and _is_of_tokens(node.args[1]):
            stream[node] = None
            continue
        # A size is read off the stream, and is none of its values.
        is_size = node.target is aten.sym_size.int
        if not is_size and any(source in stream for source in node.all_input_nodes):
            stream[node] = None
    return stream


def _is_of_tokens(indices: Any) -> bool:
    """Whether an embedding's indices are the tokens, reshaped maybe, and not their positions."""
    while indices.op == "call_function" and isinstance(indices.args[0], fx.Node):
        indices = indices.args[0]
    return indices.meta.get(INPUT) == "input_ids"
