"""Makes the paths of Sirius from the dense graph, over one weight table.

    Before                 After
    dense                  prefill    dense; logits of one token a row
                           full       dense; logits of every token
                           sparse     a copy, for `sparsify_*` to rewrite

`prefill` returns only the logits after a row's last prompt token. It gathers that token's hidden
state before the head, so a prompt chunk needs no [T, vocabulary] product:

    %1 = aten.linear(%hidden, %head)       %1 = aten.gather(%hidden, 1, last)   # [B, 1, C]
                                           %2 = aten.linear(%1, %head)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import fx

from sirius_passes.manager import Pass
from sirius_passes.program import (
    DENSE,
    FULL,
    PREFILL,
    SPARSE,
    Program,
    Stage,
    add_input,
    call,
    copy_graph,
    outputs,
)
from sirius_runtime.errors import UnsupportedModelError

aten = torch.ops.aten


class PairPaths(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "pair_paths"
    takes: ClassVar[Stage] = Stage.CACHED
    gives: ClassVar[Stage] = Stage.PAIRED

    def run(self, program: Program) -> int:
        if DENSE not in program.graphs:
            return 0
        dense = program.graphs.pop(DENSE)
        program.graphs = {PREFILL: copy_graph(dense), SPARSE: copy_graph(dense), FULL: dense}
        _keep_last_logits(program.graphs[PREFILL])
        return 3


def _keep_last_logits(module: fx.GraphModule) -> None:
    graph = module.graph
    head = _head(graph)
    hidden = head.args[0]
    assert isinstance(hidden, fx.Node)
    last = add_input(graph, "last")
    with graph.inserting_before(head):
        index = call(graph, aten.view.default, (last, [-1, 1, 1]), origin="pair_paths")
        index = call(
            graph,
            aten.expand.default,
            (index, [-1, -1, int(hidden.meta["val"].shape[-1])]),
            origin="pair_paths",
        )
        kept = call(graph, aten.gather.default, (hidden, 1, index), origin="pair_paths")
    head.replace_input_with(hidden, kept)
    _refresh_values(graph, kept)
    module.recompile()


def _head(graph: fx.Graph) -> fx.Node:
    """The linear that makes the logits, found upwards from the output through nodes of one input.

    Raises UnsupportedModelError at a node of several inputs.
    """
    node = outputs(graph)["logits"]
    while node.target is not aten.linear.default:
        inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
        if len(inputs) != 1:
            raise UnsupportedModelError(
                f"the logits are not made by one linear: {node.name} ({node.target}) between the "
                "head and the output has several inputs. Please open an issue with the model's "
                "config.json"
            )
        node = inputs[0]
    return node


def _refresh_values(graph: fx.Graph, start: fx.Node) -> None:
    """Recomputes the fake values of the nodes that depend on `start`, whose shape changed."""
    changed = {start}
    for node in graph.nodes:
        if node.op == "call_function" and changed & set(node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with start.meta["val"].fake_mode:
                node.meta["val"] = node.target(*args, **kwargs)
            changed.add(node)
