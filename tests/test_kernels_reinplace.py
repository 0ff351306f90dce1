"""Periods whose steps write into what the loop carries: the same results, and inputs left alone."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, fx

from sirius_compile import CompileConfig, Compiled, compile_model
from sirius_runtime.backends.rewrite import with_kernels
from sirius_runtime.kernels.attention import block_attention_
from sirius_runtime.kernels.native import references
from sirius_runtime.kernels.reinplace import write_in_place
from tests.support.models import random_decoder
from tests.support.operators import LAYERS, TREE, Block, randn, sirius

aten = torch.ops.aten


def targets(module: fx.GraphModule) -> Counter[object]:
    """Of a graph and those within it."""
    parts = [part for part in module.modules() if isinstance(part, fx.GraphModule)]
    return Counter(node.target for part in parts for node in part.graph.nodes)


def test_no_step_of_a_period_copies_its_block(whole: Compiled) -> None:
    copies_no_block(whole)


@pytest.mark.slow
@pytest.mark.parametrize("period", [2, 5])
def test_no_step_of_a_tree_copies_its_block(period: int) -> None:
    options = CompileConfig(sparsity="griffin", period=period, tree_width=3)
    copies_no_block(compile_model(random_decoder("llama"), options))


def copies_no_block(compiled: Compiled) -> None:
    module = compiled.program.graphs["period"]
    before, after = targets(module), targets(with_kernels(module))
    steps = before[sirius.block_attention.default]
    assert steps >= 2 * compiled.spec.state.layers
    assert after[block_attention_] == steps
    assert after[sirius.block_attention.default] == 0
    assert targets(module) == before  # a copy was rewritten


def steps(layers: int = LAYERS) -> fx.GraphModule:
    """Attention of all layers over one block, its new K and V stacked, as a period has it."""
    graph = fx.Graph()
    names = ["q", "k", "v", "k_cache", "v_cache", "k_block", "v_block"]
    names += ["positions", "nodes", "length", "tree_mask"]
    inputs = [graph.placeholder(name) for name in names]
    results: list[list[fx.Node]] = [[], [], []]
    for layer in range(layers):
        call = graph.call_function(
            sirius.block_attention.default, (*inputs, layer, 0.4, None, None)
        )
        for index, result in enumerate(results):
            result.append(graph.call_function(operator.getitem, (call, index)))
    outs = graph.call_function(aten.stack.default, (results[0],))
    stacks = [graph.call_function(aten.stack.default, (r,)) for r in results[1:]]
    graph.output((outs, *stacks))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize("within", [nullcontext, references], ids=["kernels", "references"])
@pytest.mark.parametrize("nodes", [[0], [3, 4], range(7)], ids=str)
def test_results_are_the_same_and_what_is_given_stays_as_it_was(
    nodes: list[int], within: type[nullcontext[None]]
) -> None:
    given = Block([3, 0, 11], [TREE], torch.float32).apart(nodes)[:11]
    before = [tensor.clone() for tensor in given]
    functional, own = steps(), steps()
    write_in_place(own)
    own.recompile()
    assert targets(own)[block_attention_] == LAYERS
    with within():
        for actual, expected in zip(own(*given), functional(*given), strict=True):
            assert torch.equal(actual, expected)
    assert all(map(torch.equal, given, before))


def some_layers_only(graph: fx.Graph) -> None:
    stack = graph.find_nodes(op="call_function", target=aten.stack.default)[1]
    stack.args = (stack.args[0][:-1],)


def layers_out_of_order(graph: fx.Graph) -> None:
    stack = graph.find_nodes(op="call_function", target=aten.stack.default)[1]
    stack.args = (stack.args[0][::-1],)


def one_that_is_read_elsewhere(graph: fx.Graph) -> None:
    end = graph.output_node()
    call = graph.find_nodes(op="call_function", target=sirius.block_attention.default)[0]
    (value,) = (user for user in call.users if user.args[1] == 2)
    end.args = ((*end.args[0], value),)


def the_old_block_is_read_later(graph: fx.Graph) -> None:
    end = graph.output_node()
    block = graph.find_nodes(op="placeholder")[5]
    end.args = ((*end.args[0], block),)


@pytest.mark.parametrize(
    "change",
    [
        some_layers_only,
        layers_out_of_order,
        one_that_is_read_elsewhere,
        the_old_block_is_read_later,
    ],
)
def test_it_must_not_fire(change: Callable[[fx.Graph], None]) -> None:
    module = steps()
    change(module.graph)
    before = targets(module)
    write_in_place(module)
    assert targets(module) == before


def loop(body: torch.nn.Module) -> fx.GraphModule:
    """Three turns of a body that carries a count and a table."""
    root = torch.nn.Module()
    root.goes, root.body = fx.symbolic_trace(Below()), fx.symbolic_trace(body)
    graph = fx.Graph()
    parts = [graph.get_attr(name) for name in ("goes", "body")]
    carried = tuple(graph.placeholder(name) for name in ("count", "table"))
    graph.output(graph.call_function(torch.ops.higher_order.while_loop, (*parts, carried, ())))
    return fx.GraphModule(root, graph)


class Below(torch.nn.Module):
    def forward(self, count: Tensor, table: Tensor) -> Tensor:
        return count < 3


class Write(torch.nn.Module):
    """Writes the count into its own row."""

    def forward(self, count: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        row = count.float().expand(1, 2)
        return count + 1, aten.index_copy.default(table, 0, count[None], row)


class WriteAndRead(Write):
    """Reads the table that it was given, too."""

    def forward(self, count: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        following, written = super().forward(count, table)
        return following, written + table


@pytest.mark.parametrize(("body", "fires"), [(Write(), True), (WriteAndRead(), False)], ids=str)
def test_a_table_that_a_loop_fills_is_copied_once(body: torch.nn.Module, fires: bool) -> None:
    module = loop(body)
    own = copy.deepcopy(module)
    write_in_place(own)
    own.recompile()
    assert targets(own)[aten.index_copy_.default] == targets(own)[aten.clone.default] == fires
    count, table = torch.tensor(1), randn(4, 2, seed=0)
    kept = table.clone()
    for actual, expected in zip(own(count, table), module(count, table), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(table, kept)
