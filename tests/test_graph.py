"""Graphs as JSON: what is written is read back, in any dtype, and nothing else is read."""

from __future__ import annotations

import copy
import json
import math
import operator
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from sirius_compile.product import Compiled
from sirius_passes.program import FULL, OBSERVE, PERIOD, PREFILL, SPARSE, Program, subgraphs
from sirius_passes.testing import random_weights, run_graph
from sirius_passes.testing_runs import make_calls
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph import (
    CAPTURE_DTYPE,
    INPUT,
    WEIGHT,
    from_document,
    placeholders,
    to_document,
)
from sirius_runtime.spec import JSON
from tests.support.json_values import json_values, places

aten = torch.ops.aten
CPU = torch.device("cpu")


def through_json(document: JSON) -> JSON:
    return json.loads(json.dumps(document, allow_nan=False))


# a compiled model


@pytest.fixture(scope="module")
def llama(whole: Compiled) -> Program:
    """A tiny Llama, compiled for griffin: graphs with every input and output."""
    return whole.program


SIZE = 4  # of the period
KEPT_NEURONS = torch.arange(1, 96, 2)
GRAPHS = [PREFILL, SPARSE, FULL, OBSERVE]


def inputs_of(program: Program, graph: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A first call's inputs, over zeroed caches."""
    state, call = program.state, make_calls(program.graphs[graph], seed=0)[0]
    shape = state.layers, call.rows, state.kv_heads, 8, state.key_dim
    return call.inputs() | {
        "k_cache": torch.zeros(shape, dtype=dtype),
        "v_cache": torch.zeros(shape, dtype=dtype),
        "neurons": KEPT_NEURONS.expand(state.layers, call.rows, -1),
    }


def period_inputs(rule: int) -> dict[str, Tensor]:
    """Two rows of other lengths, over caches of anything."""
    generator = torch.Generator().manual_seed(rule)
    caches = torch.randn(2, 2, 2, 2, 16, 16, generator=generator).to(CAPTURE_DTYPE)
    numbers = {"threshold": 0.1, "verify_temperature": 0.6, "confidence": 0.0}
    numbers |= {"temperature": 1.0, "top_p": 0.9}
    return {
        "root": torch.tensor([3, 9]),
        "active": torch.tensor([True, True]),
        "most": torch.tensor([SIZE, SIZE - 1]),
        "length": torch.tensor([5, 2]),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "rule": torch.tensor(rule),
        "top_k": torch.tensor(7),
        **{name: torch.tensor(value) for name, value in numbers.items()},
        "noise": torch.rand(2, 2, SIZE, dtype=torch.float64, generator=generator),
        "neurons": KEPT_NEURONS.expand(2, 2, -1),
        "statistic": torch.rand(2, 2, 96, generator=generator),
        "refresh": torch.tensor(True),
    }


@pytest.mark.parametrize("name", [*GRAPHS, PERIOD])
def test_a_graph_comes_back_as_it_was(llama: Program, name: str) -> None:
    module = llama.graphs[name]
    document = to_document(module)
    back = from_document(through_json(document), CAPTURE_DTYPE, CPU)
    assert to_document(back) == document
    parts = [[graph, *subgraphs(graph)] for graph in (module, back)]
    assert len(parts[0]) == (1 if name != PERIOD else 9)
    for pair in zip(*parts, strict=True):
        # A graph within a graph is held under a name that no document chooses.
        texts = [
            [str(n if n.op == "get_attr" else n.format_node()) for n in g.graph.nodes][:-1]
            for g in pair
        ]
        # lists may have been tuples, as the output's is, which is left out
        lists = [[text.replace("(", "[").replace(")", "]") for text in part] for part in texts]
        assert lists[0] == lists[1]
    for kind in (INPUT, WEIGHT):
        assert list(placeholders(back.graph, kind)) == list(placeholders(module.graph, kind))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_came_back_gives_the_same_numbers(llama: Program, name: str) -> None:
    module = llama.graphs[name]
    weights = random_weights(llama, seed=0, dtype=CAPTURE_DTYPE)
    outputs = []
    for graph in (module, from_document(through_json(to_document(module)), CAPTURE_DTYPE, CPU)):
        inputs = inputs_of(llama, name, CAPTURE_DTYPE)
        bound = [n.meta for n in graph.graph.nodes if n.op == "placeholder"]
        outputs.append(
            graph(*(weights[m[WEIGHT]] if WEIGHT in m else inputs[m[INPUT]] for m in bound))
        )
        outputs[-1] = [*outputs[-1], inputs["k_cache"], inputs["v_cache"]]
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)
    assert outputs[0][-1].count_nonzero() > 0


@pytest.mark.parametrize("rule", [0, 1, 2])
def test_a_period_that_came_back_gives_the_same_numbers(llama: Program, rule: int) -> None:
    module, inputs = llama.graphs[PERIOD], period_inputs(rule)
    weights = random_weights(llama, seed=0, dtype=CAPTURE_DTYPE)
    outputs = []
    for graph in (module, from_document(through_json(to_document(module)), CAPTURE_DTYPE, CPU)):
        bound = [n.meta for n in graph.graph.nodes if n.op == "placeholder"]
        arguments = [weights[m[WEIGHT]] if WEIGHT in m else inputs[m[INPUT]] for m in bound]
        with torch.no_grad():
            outputs.append(graph(*arguments))
    assert len(outputs[0]) == 10
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", GRAPHS)
def test_one_document_runs_in_every_dtype(llama: Program, name: str) -> None:
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        weights = random_weights(llama, seed=0, dtype=dtype)
        inputs = inputs_of(llama, name, dtype)
        logits[dtype] = run_graph(llama.graphs[name], inputs, weights, dtype)["logits"]
        assert logits[dtype].dtype is dtype
    near = {"rtol": 0.05, "atol": 0.05, "check_dtype": False}
    torch.testing.assert_close(logits[torch.bfloat16], logits[torch.float32], **near)
    assert not torch.equal(logits[torch.bfloat16].float(), logits[torch.float32])


def test_the_program_s_dtype_and_device_are_written_as_such(llama: Program) -> None:
    text = json.dumps(to_document(llama.graphs[FULL]))
    assert '{"dtype": "model"}' in text
    assert '{"dtype": "float32"}' in text  # where the model itself asks for it: rotary angles
    assert "bfloat16" not in text
    assert "cpu" not in text


# graphs made by hand


def graph_of(build: Callable[[fx.Graph, fx.Node], object]) -> fx.GraphModule:
    """A graph of one input `x`, and `build`'s values as its outputs."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta[INPUT] = "input_ids"
    graph.output([build(graph, x)])
    return fx.GraphModule(nn.Module(), graph)


def reread(module: fx.GraphModule, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    return from_document(through_json(to_document(module)), dtype, CPU)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 1e-45, 3, True])
def test_constants(value: float) -> None:
    module = graph_of(lambda g, x: g.call_function(aten.full_like.default, (x, value)))
    (result,) = reread(module)(torch.zeros(2))
    wanted = torch.full((2,), float(value))
    torch.testing.assert_close(result, wanted, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(result.signbit(), wanted.signbit())


def test_dtypes_devices_and_layouts() -> None:
    options = {
        "dtype": CAPTURE_DTYPE,
        "layout": torch.strided,
        "device": CPU,
        "pin_memory": False,
        "memory_format": torch.contiguous_format,
    }
    module = graph_of(lambda g, x: g.call_function(aten.zeros_like.default, (x,), options))
    for dtype in (torch.float32, torch.float16):
        (node,) = [n for n in reread(module, dtype).graph.nodes if n.op == "call_function"]
        assert node.kwargs == options | {"dtype": dtype}
    on_meta = from_document(to_document(module), torch.float32, torch.device("meta"))
    (node,) = [n for n in on_meta.graph.nodes if n.op == "call_function"]
    assert node.kwargs["device"] == torch.device("meta")


def test_nested_arguments_and_size_arithmetic() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        size = graph.call_function(aten.sym_size.int, (x, 0))
        half = graph.call_function(operator.floordiv, (size, 2))
        parts = graph.call_function(aten.split_with_sizes.default, (x, [half, half]))
        items = [graph.call_function(operator.getitem, (parts, i)) for i in (1, 0)]
        return graph.call_function(aten.cat.default, (items,))

    (result,) = reread(graph_of(build))(torch.arange(6))
    assert result.tolist() == [3, 4, 5, 0, 1, 2]


def test_what_can_t_be_stored_is_refused() -> None:
    def refused(build: Callable[[fx.Graph, fx.Node], object], message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            to_document(graph_of(build))

    prims = torch.ops.prims.neg.default
    refused(lambda g, x: g.call_function(len, (x,)), "a call of <built-in function len> can't")
    refused(lambda g, x: g.call_function(prims, (x,)), "can't be stored: it is not among")
    refused(lambda g, x: g.call_method("neg", (x,)), "a call_method node can't be stored")
    refused(lambda g, x: g.call_function(aten.neg.default, (slice(1),)), "of type slice can't be")
    refused(lambda g, x: g.placeholder("y"), "placeholder y is bound to no weight and no input")
    scan = torch.ops.higher_order.scan
    refused(lambda g, x: g.call_function(scan, (x,)), "a call of scan can't be stored")
    root = nn.Module()
    root.register_buffer("constant", torch.ones(1))
    graph = fx.Graph()
    graph.output((graph.get_attr("constant"),))
    module = fx.GraphModule(root, graph)
    with pytest.raises(ArtifactError, match="node constant: a get_attr node can't be stored"):
        to_document(module)


# documents that are no graphs


def document_of(*calls: dict[str, JSON]) -> JSON:
    """x, `calls` by the names a, b, …, and the last of them as output."""
    named = [
        {"name": name, "op": "call", "args": [{"node": "x"}]} | call
        for name, call in zip("abc", calls, strict=False)
    ]
    last = named[-1]["name"] if named else "x"
    return {
        "nodes": [
            {"name": "x", "op": "input", "bound": "input_ids"},
            *named,
            {"name": "output", "op": "output", "args": [{"node": last}]},
        ]
    }


NEG = {"target": "aten.neg.default"}


def read(document: JSON) -> fx.GraphModule:
    return from_document(through_json(document), torch.float32, CPU)


def test_the_hand_written_document_is_a_graph() -> None:
    (result,) = read(document_of(NEG, NEG | {"args": [{"node": "a"}]}))(torch.ones(1))
    assert result.tolist() == [1.0]


ARGUMENT = {"name": "y", "op": "argument"}


def nested(*nodes: JSON, returned: str = "y") -> JSON:
    """A graph of one argument `y`, within another."""
    output = {"name": "output", "op": "output", "args": [{"node": returned}]}
    return {"nodes": [ARGUMENT, *nodes, output]}


def branching(true: JSON, false: JSON, name: str = "f") -> list[JSON]:
    """Calls: `true` of y where y has anything but zeros, else `false`; the result is `c`."""
    operands = [{"node": "a"}, {"node": "t"}, {"node": name}, [{"node": "y"}]]
    return [
        {"name": "a", "op": "call", "target": "aten.any.default", "args": [{"node": "y"}]},
        {"name": "t", "op": "graph", "graph": true},
        {"name": name, "op": "graph", "graph": false},
        {"name": "b", "op": "call", "target": "control_flow.cond", "args": operands},
        {"name": "c", "op": "call", "target": "python.getitem", "args": [{"node": "b"}, 0]},
    ]


NEGATED = nested(
    {"name": "n", "op": "call", "target": "aten.neg.default", "args": [{"node": "y"}]},
    returned="n",
)
KEPT = nested(
    {"name": "n", "op": "call", "target": "aten.clone.default", "args": [{"node": "y"}]},
    returned="n",
)


def top(nodes: list[JSON]) -> JSON:
    """The same as a whole graph: `y` is an input."""
    document = nested(*nodes, returned="c")
    document["nodes"][0] = {"name": "y", "op": "input", "bound": "input_ids"}
    return document


def deep(levels: int) -> JSON:
    """Negates, by graphs within graphs."""
    inner = NEGATED
    for _ in range(levels - 1):
        inner = nested(*branching(inner, KEPT), returned="c")
    return top(branching(inner, KEPT))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_graphs_within_graphs(levels: int) -> None:
    module = read(deep(levels))
    assert module(torch.tensor([1.0, 2.0]))[0].tolist() == [-1.0, -2.0]
    assert module(torch.zeros(2))[0].tolist() == [0.0, 0.0]
    assert len(subgraphs(module)) == 2 * levels
    assert read(to_document(module))(torch.ones(1))[0].tolist() == [-1.0]


def test_a_loop() -> None:
    less = {"name": "l", "op": "call", "target": "aten.lt.Scalar", "args": [{"node": "y"}, 5]}
    more = {"name": "m", "op": "call", "target": "aten.add.Tensor", "args": [{"node": "y"}, 2]}
    test = nested(less, returned="l")
    test["nodes"][-1]["args"] = {"node": "l"}  # alone, not in a list
    operands = [{"node": "t"}, {"node": "f"}, [{"node": "y"}], []]
    nodes = branching(test, nested(more, returned="m"))[1:]
    nodes[2] |= {"target": "control_flow.while_loop", "args": operands}
    module = read(top(nodes))
    assert [module(torch.tensor(start))[0].item() for start in (0, 4, 9)] == [6, 6, 9]


NAMES = ["forward", "graph", "code", "training", "_modules", "__class__", "__dict__", "state_dict"]


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_any_name_is_refused_or_runs_as_any_other(name: str) -> None:
    try:
        module = read(top(branching(NEGATED, KEPT, name)))
    except ArtifactError:
        return
    assert isinstance(module, fx.GraphModule)
    assert module(torch.ones(1))[0].tolist() == [-1.0]
    assert module(torch.zeros(1))[0].tolist() == [0.0]


WEIGHT_INSIDE = {"name": "w", "op": "weight", "bound": "head.weight"}
INPUT_INSIDE = {"name": "w", "op": "input", "bound": "input_ids"}

NOT_NESTED: dict[str, tuple[JSON, str]] = {
    "deeper than the limit": (deep(5), "graph"),
    "much deeper": (deep(40), "graph"),
    "argument at the top": (nested(), "node 'y' has the unknown op 'argument'"),
    "weight inside": (top(branching(nested(WEIGHT_INSIDE), KEPT)), "the unknown op 'weight'"),
    "input inside": (top(branching(KEPT, nested(INPUT_INSIDE))), "the unknown op 'input'"),
    "argument's name is code": (
        top(branching(nested({"name": "z=print()", "op": "argument"}), KEPT)),
        "'z=print\\(\\)' is not a name",
    ),
    "graph's name is code": (top(branching(KEPT, KEPT, "f.g")), "'f.g' is not a name"),
    "a node of the graph around": (
        top(branching(nested(returned="a"), KEPT)),
        "not a graph document",
    ),
    "no output inside": (top(branching({"nodes": [ARGUMENT]}, KEPT)), "must be the output"),
    "an operator inside": (
        top(
            branching(
                nested(NEG | ARGUMENT | {"op": "call", "target": "aten.x.y", "args": []}), KEPT
            )
        ),
        "operator 'aten.x.y' is unknown here",
    ),
    **{
        f"a graph that is {graph!r}": (top(branching(graph, KEPT)), "not a graph document")
        for graph in (None, [], "t", 1, {}, {"nodes": None}, {"nodes": {"y": ARGUMENT}})
    },
    "no graph": (
        {"nodes": [{"name": "x", "op": "graph"}, *document_of()["nodes"][1:]]},
        "not a graph document",
    ),
}


@pytest.mark.parametrize("case", NOT_NESTED)
def test_what_is_no_graph_within_a_graph_is_refused(case: str) -> None:
    document, message = NOT_NESTED[case]
    with pytest.raises(ArtifactError, match=message):
        read(document)


TARGETS = [
    "control_flow.scan",
    "control_flow.map_impl",
    "control_flow.cond.default",
    "control_flow.__class__",
    "control_flow.",
    "higher_order.cond",
    "aten.no_such_operator.default",
    "aten.neg.no_such_overload",
    "aten.neg",
    "aten.neg.default.default",
    "aten..",
    "aten",
    "",
    "prims.neg.default",
    "torch.neg.default",
    "sirius.no_such_operator.default",
    "aten.from_file.default",
    "aten.from_file.out",
    "aten.save.default",
    "aten.segment_reduce.default",
    "aten._reshape_alias.default",
    "aten.as_strided.default",
    "aten.as_strided_scatter.default",
    "aten.resize_.default",
    "aten.set_.source_Storage",
    "aten.index_put_.default",
    "aten.mul_.Scalar",
    "aten._embedding_bag.default",
    "aten._foreach_add.List",
    "sirius.linears.default",
    "aten.__class__.mro",
    "aten.neg.__class__",
    "aten.neg._op",
    "aten._dir.append",
    "python.eval",
    "python.exec",
    "python.attrgetter",
    "python.methodcaller",
    "python.getitem.default",
    "python.",
]


@pytest.mark.parametrize("target", TARGETS)
def test_an_operator_that_is_not_allowed_is_refused(target: str) -> None:
    with pytest.raises(ArtifactError, match=f"operator {target!r} is unknown here"):
        read(document_of({"target": target}))


def test_the_operators_that_are_refused_by_name_exist() -> None:
    assert torch._C._dispatch_has_kernel("aten::from_file")
    assert aten.save.default._schema.name == "aten::save"


INJECTED = "__import__('sirius_injected')"

NOT_GRAPHS: dict[str, tuple[JSON, str]] = {
    "forward reference": (document_of(NEG | {"args": [{"node": "b"}]}, NEG), "not a graph doc"),
    "reference to itself": (document_of(NEG | {"args": [{"node": "a"}]}), "not a graph document"),
    "unknown op": ({"nodes": [{"name": "x", "op": "get_attr"}]}, "'x' has the unknown op 'get_att"),
    "code in a placeholder's name": (
        {"nodes": [{"name": f"x={INJECTED}", "op": "input", "bound": "x"}]},
        "is not a name",
    ),
    "code in a keyword": (document_of(NEG | {"kwargs": {f"a={INJECTED}, b": 1}}), "is not a name"),
    "code in a call's name": (document_of(NEG | {"name": f"a\n{INJECTED}"}), "is not a name"),
    "Python's keyword": (document_of(NEG | {"name": "lambda"}), "'lambda' is not a name"),
    "name is a number": (document_of(NEG | {"name": 1}), "1 is not a name"),
    "placeholder twice": (
        {"nodes": [{"name": "x", "op": "input", "bound": "x"}] * 2 + document_of()["nodes"][1:]},
        "'x' can't be the name of a node, or two nodes have it",
    ),
    "bound to a list": (
        {"nodes": [{"name": "x", "op": "weight", "bound": ["w"]}]},
        "placeholder x is bound to no name",
    ),
    "no nodes": ({"nodes": []}, "graph"),
    "no output": ({"nodes": document_of(NEG)["nodes"][:-1]}, "must be the output"),
    "output first": ({"nodes": document_of()["nodes"][::-1]}, "not a graph document"),
    "two outputs": (
        {"nodes": document_of()["nodes"] + document_of()["nodes"][1:]},
        "its last node, and no other, must be the output",
    ),
    "unknown dtype": (document_of(NEG | {"args": [{"dtype": "nn"}]}), "unknown dtype 'nn'"),
    "unknown kind": (document_of(NEG | {"args": [{"code": "1"}]}), "not a graph document"),
    "unknown layout": (document_of(NEG | {"args": [{"layout": "torch.x"}]}), "not a graph doc"),
    "two kinds": (document_of(NEG | {"args": [{"node": "x", "float": "1"}]}), "not a graph doc"),
    "no float": (document_of(NEG | {"args": [{"float": "one"}]}), "not a graph document"),
    "float too large": (document_of(NEG | {"args": [{"float": 10**400}]}), "not a graph document"),
    "too deep": (
        document_of(NEG | {"args": [json.loads("[" * 400 + "]" * 400)]}),
        "nested too deep",
    ),
    "target missing": (document_of({}), "not a graph document"),
    "target is a list": (document_of({"target": ["aten"]}), "not a graph document"),
}


@pytest.mark.parametrize("case", NOT_GRAPHS)
def test_what_is_no_graph_is_refused(case: str) -> None:
    document, message = NOT_GRAPHS[case]
    with pytest.raises(ArtifactError, match=message):
        read(document)


many = settings(max_examples=300)


def is_read_or_refused(document: JSON) -> None:
    try:
        module = from_document(document, torch.float32, CPU)
    except ArtifactError:
        return
    assert isinstance(module, fx.GraphModule)


@many
@given(json_values)
def test_any_json_is_refused_without_another_error(document: JSON) -> None:
    with pytest.raises(ArtifactError):
        from_document(document, torch.float32, CPU)


@many
@given(st.fixed_dictionaries({"nodes": st.lists(json_values, max_size=4)}))
def test_any_list_of_nodes_is_refused_without_another_error(document: JSON) -> None:
    with pytest.raises(ArtifactError):
        from_document(document, torch.float32, CPU)


VALID = document_of(
    {"target": "aten.slice.Tensor", "args": [{"node": "x"}, 0, 0, 2]},
    {"target": "aten.to.dtype", "args": [{"node": "a"}, {"dtype": "model"}]},
    {"target": "aten.add.Tensor", "args": [{"node": "a"}, {"node": "b"}], "kwargs": {"alpha": 2}},
)
VALID_NESTED = deep(2)
valid = st.sampled_from([VALID, VALID_NESTED])
words = st.sampled_from(
    ["x", "graph", "argument", "a", "output", "node", "call", "input", "aten.neg.default", "self"]
)


@many
@given(st.data(), json_values | words)
def test_a_document_with_one_value_changed_is_read_or_refused(
    data: st.DataObject, new: JSON
) -> None:
    document = copy.deepcopy(data.draw(valid))
    container, key = data.draw(st.sampled_from(places(document)))
    container[key] = new
    is_read_or_refused(document)


@many
@given(st.data())
def test_a_document_with_one_value_missing_is_read_or_refused(data: st.DataObject) -> None:
    document = copy.deepcopy(data.draw(valid))
    container, key = data.draw(st.sampled_from(places(document)))
    del container[key]
    is_read_or_refused(document)
