"""build_period: adds a graph that drafts in a loop, verifies, accepts and rolls back."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sirius_passes.build_period import BuildPeriod
from sirius_passes.lay_out_weights import LayOutWeights
from sirius_passes.manager import Pass, run_passes
from sirius_passes.printer import target_name
from sirius_passes.program import (
    FULL,
    OBSERVE,
    ORIGIN,
    OUTPUTS,
    PERIOD,
    SPARSE,
    Program,
    Stage,
    call,
    calls,
    fake_mode,
    subgraphs,
)
from sirius_passes.sparsify import Threshold
from sirius_passes.sparsify_cats import SparsifyCats
from sirius_passes.sparsify_griffin import SparsifyGriffin
from sirius_passes.sparsify_griffin_cats import SparsifyGriffinCats
from sirius_passes.sparsify_teal import SparsifyTeal
from sirius_passes.sparsify_topk import SparsifyTopk
from sirius_passes.testing import snapshot
from sirius_passes.verifier import verify
from sirius_runtime.errors import PassError
from sirius_runtime.graph import INPUT, WEIGHT, placeholders
from sirius_runtime.spec import Method
from tests.support.fast import slow_but
from tests.support.graphs import POSITIONS, Attention, Decoder, Mlp, copied, paired, two_layers

aten, sirius = torch.ops.aten, torch.ops.sirius
higher_order = torch.ops.higher_order
CONTROL_FLOW = (higher_order.while_loop, higher_order.cond)

SPARSIFY: dict[str, Pass] = {
    "griffin": SparsifyGriffin(0.5),
    "topk": SparsifyTopk(0.5),
    "cats": SparsifyCats(0.5, (Threshold(0.1, 0.5),) * 2),
    "griffin+teal": SparsifyGriffinCats(0.5, (Threshold(0.1, 0.5),) * 2),
    "teal": SparsifyTeal(0.5, None, method=Method.TEAL),
}


def one_layer() -> Decoder:
    return Decoder(Attention(0), Mlp())


def laid_out(sparsify: Pass, build: Callable[[], nn.Module] = one_layer) -> Program:
    program = paired(build)
    run_passes(program, [sparsify, LayOutWeights()])
    return program


def built(
    width: int,
    size: int = 4,
    *,
    sparsify: Pass = SPARSIFY["topk"],
    build: Callable[[], nn.Module] = one_layer,
) -> Program:
    program = laid_out(sparsify, build)
    run_passes(program, [BuildPeriod(size, width, POSITIONS)])
    return program


shared = functools.cache(built)
"""Like `built`, but built once; tests must not change it."""


WIDTHS = {f"{method}, w={width}": (method, width) for method in SPARSIFY for width in (1, 2)}
FAST, GATE = {"cats, w=1"}, {"griffin, w=2"}
"""Each needs a build of its own: with counts or a statistic, as a chain or as a tree. In the fast
suite trees are run, in `test_period_session`.
"""


@pytest.fixture(scope="module", params=slow_but(WIDTHS, FAST, GATE))
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return WIDTHS[request.param]


@pytest.fixture(scope="module")
def width(case: tuple[str, int]) -> int:
    return case[1]


@pytest.fixture(scope="module")
def program(case: tuple[str, int]) -> Program:
    """Two layers, for each sparse path and width; tests must not change them."""
    method, width = case
    return shared(width, sparsify=SPARSIFY[method], build=two_layers)


def loops(module: fx.GraphModule) -> list[fx.Node]:
    parts = (module, *subgraphs(module))
    return [n for part in parts for n in calls(part.graph, higher_order.while_loop)]


def inner(node: fx.Node) -> fx.GraphModule:
    """The graph that an argument of a control flow operator refers to."""
    assert node.op == "get_attr"
    found = getattr(node.graph.owning_module, str(node.target))
    assert isinstance(found, fx.GraphModule)
    return found


def loop_body(module: fx.GraphModule) -> fx.GraphModule:
    (loop,) = loops(module)
    return inner(loop.args[1])


# what is built


SHOWN = ("sirius.", "aten.linear", "aten.embedding", "aten.item", "while_loop", "cond")


def outline(module: fx.GraphModule, name: str = PERIOD) -> Iterator[str]:
    """Calls of the main operators, in a graph and in its subgraphs."""
    found = Counter(target_name(n) for n in module.graph.nodes if n.op == "call_function")
    kept = [f"{t} {n}" for t, n in sorted(found.items()) if t.startswith(SHOWN)]
    yield f"{name}: {', '.join(kept) or '-'}"
    for child, part in module.named_children():
        assert isinstance(part, fx.GraphModule)
        yield from (f"    {line}" for line in outline(part, child))


def test_before_and_after() -> None:
    program = laid_out(SPARSIFY["topk"])
    before = {name: snapshot(module) for name, module in program.graphs.items()}
    (record,) = run_passes(program, [BuildPeriod(4, 1, POSITIONS)])
    assert (record.rewrites, program.stage) == (1, Stage.FINAL)
    after = {name: snapshot(module) for name, module in program.graphs.items()}
    assert after.pop(PERIOD)
    assert after == before
    assert "\n".join(outline(program.graphs[PERIOD])) == inspect.cleandoc(
        """
        period: aten.embedding 2, aten.item 1, aten.linear 5, cond 1, sirius.block_attention 1, sirius.dense_mlp 1, while_loop 1
            while_loop_cond_graph_0: -
            while_loop_body_graph_0: aten.embedding 2, aten.linear 5, cond 1, sirius.block_attention 1, sirius.topk_mlp 1
                true_graph_0: -
                false_graph_0: -
            true_graph_0: -
            false_graph_0: -
        """  # noqa: E501
    )
    text = snapshot(program.graphs[PERIOD]).splitlines()
    inputs = [line for line in text if line.startswith("input")]
    results = [pair.split("=")[0] for pair in text[-1].removeprefix("return ").split(", ")]
    assert "\n".join([*inputs, " ".join(results)]) == inspect.cleandoc(
        """
        input %root: int64[B]
        input %active: bool[B]
        input %most: int64[B]
        input %length: int64[B]
        input %k_cache: model[1, B, 1, S, 2]
        input %v_cache: model[1, B, 1, S, 2]
        input %rule: int64[]
        input %threshold: float32[]
        input %verify_temperature: float32[]
        input %confidence: float32[]
        input %temperature: float32[]
        input %top_k: int64[]
        input %top_p: float32[]
        input %noise: float64[B, 2, 4]
        tokens advance drafted root length levels k_kept v_kept
        """
    )


@pytest.mark.gate
def test_a_tree_s_first_step_is_not_in_the_loop() -> None:
    assert "\n".join(outline(shared(2).graphs[PERIOD])) == inspect.cleandoc(
        """
        period: aten.embedding 4, aten.item 1, aten.linear 10, cond 1, sirius.block_attention 2, sirius.dense_mlp 1, sirius.topk_mlp 1, while_loop 1
            while_loop_cond_graph_0: -
            while_loop_body_graph_0: aten.embedding 2, aten.linear 5, sirius.block_attention 1, sirius.topk_mlp 1
            true_graph_0: -
            false_graph_0: -
        """  # noqa: E501
    )


def test_run_again_it_makes_no_rewrite(program: Program, width: int) -> None:
    text, period = snapshot(program.graphs[PERIOD]), program.graphs[PERIOD]
    assert BuildPeriod(4, width, POSITIONS).run(program) == 0
    assert program.graphs[PERIOD] is period
    assert snapshot(period) == text


@pytest.mark.slow
@pytest.mark.parametrize("width", slow_but((1, 2), {1}))
def test_two_builds_print_the_same(width: int) -> None:
    period = shared(width).graphs[PERIOD]
    text = snapshot(period)
    assert text == snapshot(built(width).graphs[PERIOD])
    # those within it are printed with it, further in
    assert text.count(" = graph:") == len(subgraphs(period))
    assert text.count("return ") == 1 + len(subgraphs(period))
    assert ("\n        return " in text) == (width == 1)


# what holds of every node


def test_the_verifier_finds_nothing(program: Program) -> None:
    assert program.stage is Stage.FINAL
    verify(program, after="build_period")


def test_each_node_says_where_it_comes_from(program: Program) -> None:
    sources = {
        n.name
        for name in (SPARSE, FULL, OBSERVE)
        if name in program.graphs
        for n in program.graphs[name].graph.nodes
    }
    period = program.graphs[PERIOD]
    origins = {
        n.meta[ORIGIN]
        for part in (period, *subgraphs(period))
        for n in part.graph.nodes
        if n.op == "call_function"
    }
    assert BuildPeriod.name in origins
    assert len(origins & sources) > 10


def test_each_node_s_value_is_that_of_its_call(program: Program) -> None:
    period = program.graphs[PERIOD]
    mode = fake_mode(period.graph)
    checked = 0
    for part in (period, *subgraphs(period)):
        for node in part.graph.nodes:
            if node.op != "call_function" or node.target is aten.item.default:
                continue  # each reading of a number is a new one
            if node.target in CONTROL_FLOW:
                graphs = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
                for graph in map(inner, graphs if node.target is higher_order.cond else graphs[1:]):
                    wanted = [n.meta["val"] for n in graph.graph.output_node().args[0]]
                    assert alike(tuple(node.meta["val"]), tuple(wanted)), node.format_node()
            elif node.target is not aten.sym_constrain_range.default:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                with mode:
                    value = node.target(*args, **kwargs)
                assert alike(node.meta["val"], value), node.format_node()
                checked += 1
    assert checked > 200


def alike(recorded: Any, value: Any) -> bool:
    """Whether two fake values have the same structure, shapes and dtypes."""
    if isinstance(recorded, Tensor):
        return recorded.dtype is value.dtype and alike(tuple(recorded.shape), tuple(value.shape))
    if isinstance(recorded, tuple | list):
        return len(recorded) == len(value) and all(map(alike, recorded, value))
    return bool(statically_known_true(recorded == value))


def test_nothing_mutates(program: Program) -> None:
    period = program.graphs[PERIOD]
    targets = {
        n.target
        for part in (period, *subgraphs(period))
        for n in part.graph.nodes
        if n.op == "call_function"
    }
    schemas = [t._schema for t in targets if isinstance(t, torch._ops.OpOverload)]
    assert len(schemas) > 30
    assert not [str(schema) for schema in schemas if schema.is_mutable]
    assert sirius.cached_attention.default not in targets


# the loop


def test_there_is_one_loop_and_it_is_at_the_top(program: Program) -> None:
    (loop,) = loops(program.graphs[PERIOD])
    assert loop.graph is program.graphs[PERIOD].graph


def test_weights_are_inputs_once(program: Program) -> None:
    period = program.graphs[PERIOD]
    names = [n.meta[WEIGHT] for n in period.graph.nodes if WEIGHT in n.meta]
    assert sorted(names) == sorted(placeholders(program.graphs[FULL].graph, WEIGHT))
    for part in (period, *subgraphs(period)):
        for node in part.graph.nodes:
            if node.op == "get_attr":
                assert inner(node)
            assert part is period or not {WEIGHT, INPUT} & node.meta.keys()


def test_the_loop_carries_the_block_and_reads_the_caches(program: Program, width: int) -> None:
    inputs = placeholders(program.graphs[PERIOD].graph, INPUT)
    (loop,) = loops(program.graphs[PERIOD])
    _, _, carried, read = loop.args
    caches = {inputs["k_cache"], inputs["v_cache"]}
    assert caches <= set(read)
    assert not caches & set(carried)
    layers, rows, heads, slots, dim = inputs["k_cache"].meta["val"].shape
    results = loop_body(program.graphs[PERIOD]).graph.output_node().args[0]
    for values in (carried, results):
        shapes = [tuple(n.meta["val"].shape) for n in values]
        assert not [shape for shape in shapes if str(slots) in map(str, shape)]
        nodes = 3 * width + 1
        assert shapes.count((layers, rows, heads, nodes, dim)) == 2


def test_only_a_chain_chooses_in_the_loop_how_to_draft(program: Program, width: int) -> None:
    body = loop_body(program.graphs[PERIOD])
    assert len(calls(body.graph, higher_order.cond)) == (1 if width == 1 else 0)
    assert len(subgraphs(body)) == (2 if width == 1 else 0)


@pytest.mark.parametrize(
    ("width", "size", "count"),
    slow_but([(1, 1, 0), (1, 2, 1), (2, 2, 0), (2, 3, 1)], (), {(2, 2, 0)}),
)
def test_a_draft_of_one_step_needs_no_loop(width: int, size: int, count: int) -> None:
    assert len(loops(shared(width, size).graphs[PERIOD])) == count


# what the verifier refuses


def insert_in(graph: fx.Graph, target: Callable[..., Any]) -> None:
    """Passes a value of the graph through `target`."""
    node = next(
        n
        for n in graph.nodes
        if n.op == "call_function" and n.users and isinstance(n.meta["val"], Tensor)
    )
    with graph.inserting_after(node):
        new = call(graph, target, (node, 1), origin="test")
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def mutate(part: str, program: Program) -> None:
    period = program.graphs[PERIOD]
    graphs = {
        "top": period,
        "body": loop_body(period),
        "branch": subgraphs(loop_body(period))[0],
    }
    insert_in(graphs[part].graph, aten.mul_.Scalar)


def drop_attention(layer: int, program: Program) -> None:
    body = loop_body(program.graphs[PERIOD]).graph
    attention = calls(body, sirius.block_attention.default)[layer]
    values = attention.args[0], attention.args[5], attention.args[6]
    for user in list(attention.users):
        user.replace_all_uses_with(values[user.args[1]])
    body.eliminate_dead_code()


def name_unknown_output(program: Program) -> None:
    output = program.graphs[PERIOD].graph.output_node()
    output.meta[OUTPUTS] = ("hidden", *output.meta[OUTPUTS][1:])


MUTATES = r"mul_.Scalar\) mutates; this graph has to be functional"
REFUSED = {
    **{
        f"mutate in {p}": (functools.partial(mutate, p), MUTATES) for p in "top body branch".split()
    },
    "no attention of layer 0": (
        functools.partial(drop_attention, 0),
        "block_attention has layers",
    ),
    "no attention of layer 1": (
        functools.partial(drop_attention, 1),
        "block_attention has layers",
    ),
    "unknown output": (name_unknown_output, r"outputs are named \('hidden', 'advance'"),
}


@pytest.mark.parametrize("damage", REFUSED)
def test_the_verifier_refuses(damage: str) -> None:
    do, message = REFUSED[damage]
    program = copied(shared(1, sparsify=SPARSIFY["cats"], build=two_layers))
    do(program)
    with pytest.raises(PassError, match=f"graph 'period' at stage FINAL: .*{message}"):
        verify(program, after="build_period")


@pytest.mark.gate
def test_the_verifier_refuses_a_draft_without_attention() -> None:
    """With one layer, no other layer shows how many attention nodes are expected."""
    program = copied(shared(1))
    drop_attention(0, program)
    with pytest.raises(PassError, match="block_attention has layers"):
        verify(program, after="build_period")
