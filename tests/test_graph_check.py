"""Graphs against the manifest, before anything runs: each fault by its node, and none later."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sirius_compile.product import Compiled as Made
from sirius_runtime.entries import INPUTS, PERIOD, PREFILL, RESULTS, SPARSE
from sirius_runtime.errors import ArtifactError
from sirius_runtime.graph import from_document, to_document
from sirius_runtime.graph_check import check_entries, check_graph
from sirius_runtime.graph_sizes import (
    add,
    at_least,
    divide,
    floor_divide,
    multiply,
    product,
    subtract,
    symbol,
)
from sirius_runtime.spec import JSON, EntrySpec, ProgramSpec, TensorSpec
from tests.support.models import EVERY_METHOD, TinyModels

CPU = torch.device("cpu")
CACHED = "sirius.cached_attention.default"
LOOP = "control_flow.while_loop"


@dataclass(frozen=True)
class Compiled:
    """A program's spec and graphs, to spoil."""

    spec: ProgramSpec
    documents: dict[str, JSON]

    def check(
        self,
        entry: str,
        spoil: Callable[[list[Any]], Any] = lambda nodes: None,
        spec: ProgramSpec | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        document, spec = copy.deepcopy(self.documents[entry]), spec or self.spec
        spoil(document["nodes"])
        module = from_document(json.loads(json.dumps(document)), dtype, CPU)
        check_graph(spec, spec.entry(entry), module, dtype)

    def refused(
        self,
        message: str,
        entry: str,
        spoil: Callable[[list[Any]], Any] = lambda nodes: None,
        spec: ProgramSpec | None = None,
    ) -> None:
        with pytest.raises(ArtifactError, match=message):
            self.check(entry, spoil, spec)


def graphs_of(made: Made) -> Compiled:
    graphs = made.program.graphs.items()
    return Compiled(made.spec, {name: to_document(graph) for name, graph in graphs})


@pytest.fixture(scope="module")
def griffin(whole: Made) -> Compiled:
    return graphs_of(whole)


def calls(nodes: list[Any], target: str) -> list[Any]:
    return [node for node in nodes if node.get("target") == target]


def node(name: str) -> JSON:
    return {"node": name}


def placed(nodes: list[Any], bound: str) -> JSON:
    """The placeholder of that input."""
    return node(next(n["name"] for n in nodes if n.get("bound") == bound))


# what our passes make


@pytest.mark.parametrize("method", EVERY_METHOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_compiled_is_accepted(tiny: TinyModels, method: str, dtype: torch.dtype) -> None:
    accepted(graphs_of(tiny("llama", method).compiled), dtype)


@pytest.mark.parametrize("norm", [False, True])
def test_teal_graphs_that_still_have_norms_are_refused(tiny: TinyModels, norm: bool) -> None:
    """`sparse_linear` took norms of the weights, or None, before its threshold."""

    def spoil(nodes: list[Any]) -> None:
        linear = calls(nodes, "sirius.sparse_linear.default")[0]
        linear["args"].insert(3, linear["args"][1] if norm else None)

    again = (
        r"\(sirius.sparse_linear.default\) can't run: argument threshold.*; compile the model again"
    )
    graphs_of(tiny("llama", "teal").compiled).refused(again, "sparse", spoil)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_period_is_accepted(griffin: Compiled, dtype: torch.dtype) -> None:
    assert griffin.spec.entry(PERIOD)
    accepted(griffin, dtype)


def accepted(program: Compiled, dtype: torch.dtype) -> None:
    check_entries(program.spec)
    for entry in program.spec.entries:
        program.check(entry.name, dtype=dtype)


# sizes that kernels would trust


def with_state(program: Compiled, **changes: int) -> ProgramSpec:
    return dataclasses.replace(
        program.spec, state=dataclasses.replace(program.spec.state, **changes)
    )


@pytest.mark.parametrize("entry", [PREFILL, SPARSE, "full", "observe", PERIOD])
@pytest.mark.parametrize(
    "changes",
    [
        {"value_dim": 1},
        {"value_dim": 7},
        {"key_dim": 1},
        {"key_dim": 17},
        {"kv_heads": 1},
        {"kv_heads": 64},
        {"layers": 1},
    ],
)
def test_caches_of_other_sizes_than_the_graphs_write(
    griffin: Compiled, entry: str, changes: dict[str, int]
) -> None:
    griffin.refused("can't run|the manifest says", entry, spec=with_state(griffin, **changes))


def test_more_layers_than_the_graphs_have(griffin: Compiled) -> None:
    spec = with_state(griffin, layers=3)
    griffin.refused("'full' attends in 2 layers, the manifest's state has 3", "full", spec=spec)
    griffin.refused("the manifest says", PREFILL, spec=spec)  # of every layer's statistic


def test_arguments_of_attention_that_do_not_fit(griffin: Compiled) -> None:
    def argument(place: int, value: Any) -> Callable[[list[Any]], None]:
        def spoil(nodes: list[Any]) -> None:
            given = placed(nodes, value) if isinstance(value, str) else value
            calls(nodes, CACHED)[0]["args"][place] = given

        return spoil

    first = "node cached_attention"
    griffin.refused(f"{first}.* layer 2 is not one of 2", "full", argument(9, 2))
    griffin.refused(f"{first}.* layer -1 is not one of 2", "full", argument(9, -1))
    griffin.refused(f"{first}.* a window must be >= 1, found 0", "full", argument(11, 0))
    griffin.refused(f"{first}.* softcap must be > 0, found 0.0", "full", argument(12, 0.0))
    griffin.refused(f"{first}.* scale must be finite", "full", argument(10, {"float": "nan"}))
    griffin.refused(f"{first}.* positions must be .* found", "full", argument(5, "length"))
    griffin.refused(f"{first}.* slots must be", "full", argument(6, "length"))
    griffin.refused(f"{first}.* tree_mask must have 3", "full", argument(8, "slots"))
    griffin.refused(f"{first}.* k must have 4", "full", argument(1, "k_cache"))


def test_neurons_that_do_not_fit(griffin: Compiled) -> None:
    sites = [dataclasses.replace(site, kept=site.units) for site in griffin.spec.sparsity.sites]
    less = [dataclasses.replace(site, units=7, kept=7) for site in griffin.spec.sparsity.sites]
    for spoilt, entry in ((less, PREFILL), (less, "observe"), (sites, PERIOD)):
        sparsity = dataclasses.replace(griffin.spec.sparsity, sites=tuple(spoilt))
        griffin.refused(
            "can't run|the manifest says",
            entry,
            spec=dataclasses.replace(griffin.spec, sparsity=sparsity),
        )


# weights


def test_a_weight_that_the_graph_can_t_read(griffin: Compiled) -> None:
    def with_weight(change: dict[str, Any]) -> ProgramSpec:
        weights = tuple(
            dataclasses.replace(w, **change) if "gate_proj" in w.name else w
            for w in griffin.spec.weights
        )
        return dataclasses.replace(griffin.spec, weights=weights)

    griffin.refused(r"up must be \[95, 64\]", "full", spec=with_weight({"shape": (95, 64)}))
    griffin.refused("gate must have 2", "full", spec=with_weight({"shape": (96,)}))
    griffin.refused("gate .*int64", "full", spec=with_weight({"dtype": "int64", "retype": False}))
    griffin.refused("complex64", "full", spec=with_weight({"dtype": "complex64", "retype": False}))
    griffin.refused("unknown dtype", "full", spec=with_weight({"dtype": "nn", "retype": False}))

    def rename(nodes: list[Any]) -> None:
        next(node for node in nodes if node["op"] == "weight")["bound"] = "ghost"

    griffin.refused("reads weight 'ghost', which is not stored", "full", rename)


# inputs and outputs


def test_inputs_and_outputs_that_are_others(griffin: Compiled) -> None:
    def other_input(nodes: list[Any]) -> None:
        next(node for node in nodes if node["op"] == "input")["bound"] = "ghost"

    def twice(nodes: list[Any]) -> None:
        first, second = [node for node in nodes if node["op"] == "input"][:2]
        second["bound"] = first["bound"]

    def none(nodes: list[Any]) -> None:
        nodes[-1]["args"] = []

    def other(nodes: list[Any]) -> None:
        nodes[-1]["args"] = [placed(nodes, "length")]

    griffin.refused("reads input 'ghost', which is not an input", "full", other_input)
    griffin.refused("reads input 'input_ids' twice", "full", twice)
    griffin.refused("does not return the 1 outputs", "full", none)
    griffin.refused(r"output logits is int64\[B\], the manifest says float32", "full", other)


def test_entries_that_the_runtime_does_not_call_so(griffin: Compiled) -> None:
    def refused(message: str, *entries: EntrySpec) -> None:
        with pytest.raises(ArtifactError, match=message):
            check_entries(dataclasses.replace(griffin.spec, entries=entries))

    every = griffin.spec.entries
    others = [entry for entry in every if entry.name != "full"]
    full = griffin.spec.entry("full")
    refused("no entry 'full'", *others)
    refused("unknown entry 'shell'", *every, EntrySpec("shell", (), ()))
    refused("has the inputs ", *others, dataclasses.replace(full, inputs=full.inputs[1:]))
    refused(
        "has the inputs ", *others, dataclasses.replace(full, inputs=(*full.inputs, INPUTS["most"]))
    )
    refused(
        "has the inputs ",
        *others,
        dataclasses.replace(full, inputs=(*full.inputs, full.inputs[0])),
    )
    refused("has the outputs ", *others, dataclasses.replace(full, outputs=()))
    wrong = (TensorSpec("logits", "int64", RESULTS["logits"].shape),)
    refused("logits is int64", *others, dataclasses.replace(full, outputs=wrong))
    shape = (TensorSpec("logits", "model", ("B", "T")),)
    refused("logits is model", *others, dataclasses.replace(full, outputs=shape))


# control flow


def test_loops_and_branches_that_do_not_fit(griffin: Compiled) -> None:
    def spoil_loop(place: int, value: Any) -> Callable[[list[Any]], None]:
        def spoil(nodes: list[Any]) -> None:
            given = placed(nodes, value) if isinstance(value, str) else value
            calls(nodes, LOOP)[0]["args"][place] = given

        return spoil

    griffin.refused("its branch or body is not a graph", PERIOD, spoil_loop(0, "root"))
    griffin.refused("its branch or body is not a graph", PERIOD, spoil_loop(1, None))
    griffin.refused("takes 49 arguments, 39 are given", PERIOD, spoil_loop(2, []))
    griffin.refused("no operands|no list of operands", PERIOD, spoil_loop(3, 7))
    griffin.refused(
        "four arguments",
        PERIOD,
        lambda nodes: calls(nodes, "control_flow.while_loop")[0]["args"].pop(),
    )

    def flag(nodes: list[Any]) -> None:
        graph = next(node["graph"] for node in nodes if node["op"] == "graph")
        graph["nodes"][-1]["args"] = node(graph["nodes"][0]["name"])

    griffin.refused("is not a bool of one element", PERIOD, flag)


def test_a_loop_that_does_not_end_is_stopped() -> None:
    from sirius_runtime.control_flow import while_loop

    def body(x: torch.Tensor) -> list[torch.Tensor]:
        return [x]

    with pytest.raises(ArtifactError, match="has not ended after 4096 steps"):
        while_loop(lambda x: torch.ones(1, dtype=torch.bool), body, [torch.ones(1)], [])


# sizes


def test_sizes_are_compared_for_all_values() -> None:
    B, T, n = symbol("B"), symbol("T"), symbol("n1")
    assert add(B, T) == add(T, B)
    assert multiply(add(B, 1), add(B, -1)) == subtract(multiply(B, B), 1)
    assert subtract(add(B, 3), B) == 3
    assert product([B, 2, T]) == multiply(T, multiply(B, 2))
    assert divide(multiply(multiply(B, add(n, 1)), 64), multiply(multiply(B, add(n, 1)), 16)) == 4
    assert divide(multiply(B, 6), 4) is None
    assert divide(add(B, 1), B) is None
    assert divide(multiply(B, T), T) == B
    assert floor_divide(multiply(B, 4), 2) == multiply(B, 2)
    assert floor_divide(add(B, 1), 2) == floor_divide(add(1, B), 2) != floor_divide(B, 2)
    assert floor_divide(7, 2) == 3
    assert at_least(B, 1)
    assert at_least(n, 0)
    assert not at_least(n, 1)
    assert at_least(add(n, 1), 1)
    assert not at_least(subtract(B, 2), 0)
    assert at_least(subtract(add(B, T), 2), 0)
    assert not at_least(symbol("?1"), 0)


def grown(grow: Callable[[Any], Any]) -> None:
    size: Any = symbol("B")
    for _ in range(1000):
        size = grow(size)


def test_sizes_that_grow_without_end_are_refused() -> None:
    for grow in (
        lambda size: multiply(size, add(size, symbol("T"))),
        lambda size: floor_divide(add(size, 1), 3),
    ):
        with pytest.raises(ArtifactError, match="more steps than any graph"):
            grown(grow)
