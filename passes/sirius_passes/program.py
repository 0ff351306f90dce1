"""The Program: named graphs over one weight table, the state they share, and the stage reached.

Invariants of the graphs, at every stage (checked by `verifier.verify`):

* every placeholder is bound: by `meta["weight"]` to an entry of the weight table, or by
  `meta["input"]` to an input of `INPUTS`;
* there are no attributes, and no submodules except those of control flow;
* every node carries `meta["val"]`: fake tensors of one fake mode, symbolic in rows and tokens;
* the output node's `meta["outputs"]` names its values;
* `CAPTURE_DTYPE` as a dtype argument means "the program's dtype".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode

from sirius_runtime.entries import FULL, INPUTS, OBSERVE, PERIOD, PREFILL, RESULTS, SPARSE
from sirius_runtime.graph import CAPTURE_DTYPE, INPUT, WEIGHT, module_of, placeholders
from sirius_runtime.spec import EntrySpec, Method, SparsitySpec, StateSpec, WeightSpec

__all__ = ["FULL", "INPUTS", "OBSERVE", "PERIOD", "PREFILL", "RESULTS", "SPARSE"]

OUTPUTS = "outputs"  # key of the output node's meta: the names of its values
ORIGIN = "origin"  # key of a node's meta: the pass that made the node, and the node it replaced
CALIBRATED = "calibrated"  # key of a node's meta: indices of the arguments set by calibration

DENSE = "dense"
"""The one graph of a captured model; the others are the runtime's entries."""


class Stage(IntEnum):
    """How far a program is compiled; a pass names the stage it takes and the one it gives."""

    CAPTURED = 0
    """One graph, `dense`, as exported: attention without a cache."""
    CANONICAL = 1
    """No export noise; one spelling per linear; MLPs may be operators."""
    CACHED = 2
    """Attention reads and writes a key/value cache; one graph serves prefill, chain and tree."""
    PAIRED = 3
    """`prefill`, `full` and `sparse` over one weight table."""
    LAID_OUT = 4
    """Weights stored in the layouts that their kernels read."""
    FINAL = 5
    """Also `period`: draft, verify, accept and roll back as one graph."""


@dataclass
class Program:
    """A model under compilation; passes rewrite it in place.

    `weights`: the weight table, in the order of the checkpoint's names.
    """

    stage: Stage
    graphs: dict[str, fx.GraphModule]
    weights: dict[str, WeightSpec]
    state: StateSpec
    sparsity: SparsitySpec = field(default_factory=lambda: SparsitySpec(Method.NONE, 1.0))

    def nodes(self) -> int:
        """Number of nodes of all graphs."""
        return sum(len(g.graph.nodes) for g in self.graphs.values())

    def entries(self) -> tuple[EntrySpec, ...]:
        """The interface of each graph: its inputs in placeholder order, its named outputs."""
        return tuple(
            EntrySpec(
                name,
                tuple(INPUTS[i] for i in placeholders(module.graph, INPUT)),
                tuple(RESULTS[o] for o in module.graph.output_node().meta[OUTPUTS]),
            )
            for name, module in self.graphs.items()
        )

    def drop_unused_weights(self) -> None:
        """Removes unused placeholders from the graphs, and weights that no graph reads."""
        used: set[str] = set()
        for module in self.graphs.values():
            for name, node in placeholders(module.graph, WEIGHT).items():
                if node.users:
                    used.add(name)
                else:
                    module.graph.erase_node(node)
            module.recompile()
        self.weights = {name: spec for name, spec in self.weights.items() if name in used}

    def update_weight(self, name: str, **changes: Any) -> None:
        """Replaces fields of a weight's spec."""
        self.weights[name] = replace(self.weights[name], **changes)


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that all values of the graph share; raises ValueError if there is none."""
    for node in graph.nodes:
        if (mode := detect_fake_mode(node.meta.get("val"))) is not None:
            return mode
    raise ValueError("the graph's nodes carry no fake values")


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    origin: str,
) -> fx.Node:
    """Inserts a call at the graph's insertion point. Passes make all their call nodes with it.

    Sets `meta["val"]` by running `target` on the arguments' fake values, and `meta["origin"]`.
    """
    kwargs = kwargs or {}
    node = graph.call_function(target, tuple(args), kwargs)
    values = fx.node.map_arg((tuple(args), kwargs), lambda n: n.meta["val"])
    with fake_mode(graph):
        node.meta["val"] = target(*values[0], **values[1])
    node.meta[ORIGIN] = origin
    return node


def add_input(graph: fx.Graph, name: str) -> fx.Node:
    """Returns the placeholder bound to the input `name`, and adds it after the last input if the
    graph has none.
    """
    inputs = placeholders(graph, INPUT)
    if name in inputs:
        return inputs[name]
    known: dict[str, Any] = {}
    for other, placed in inputs.items():
        known |= dict(zip(map(str, INPUTS[other].shape), placed.meta["val"].shape, strict=True))
    mode = fake_mode(graph)
    assert mode.shape_env is not None
    shape = []
    for letter in map(str, INPUTS[name].shape):
        if letter not in known:
            known[letter] = mode.shape_env.create_unbacked_symint()
        shape.append(known[letter])
    dtype = INPUTS[name].dtype
    with graph.inserting_after(list(inputs.values())[-1]):
        node = graph.placeholder(name)
    with mode:
        node.meta["val"] = torch.empty(
            shape, dtype=CAPTURE_DTYPE if dtype == "model" else getattr(torch, dtype)
        )
    node.meta[INPUT] = name
    node.meta[ORIGIN] = "input"
    return node


def add_weight(graph: fx.Graph, spec: WeightSpec) -> fx.Node:
    """Adds a placeholder for a weight that the graph does not read yet, after the other weights."""
    last = list(placeholders(graph, WEIGHT).values())[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(spec.name.replace(".", "_"))
    with fake_mode(graph):
        node.meta["val"] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
    node.meta[WEIGHT] = spec.name
    node.meta[ORIGIN] = "weight"
    return node


def copy_program(program: Program) -> Program:
    """A copy to try passes on: it has its own graphs and tables, and shares the fake values."""
    graphs = {name: copy_graph(module) for name, module in program.graphs.items()}
    return replace(program, graphs=graphs, weights=dict(program.weights))


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy that shares nothing but the fake values."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    return module_of(torch.nn.Module(), graph)


def calls(graph: fx.Graph, *targets: Callable[..., Any]) -> list[fx.Node]:
    """The graph's calls of any of `targets`, in order."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target in targets]


def subgraphs(module: fx.GraphModule) -> list[fx.GraphModule]:
    """Every graph within `module`: the bodies and branches of its control flow."""
    return [m for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module]


def set_outputs(graph: fx.Graph, values: dict[str, fx.Node]) -> None:
    """Makes `values` the graph's named outputs."""
    output = graph.output_node()
    output.args = (tuple(values.values()),)
    output.meta[OUTPUTS] = tuple(values)


def outputs(graph: fx.Graph) -> dict[str, fx.Node]:
    """The graph's outputs by name."""
    output = graph.output_node()
    return dict(zip(output.meta[OUTPUTS], output.args[0], strict=True))  # type: ignore[arg-type]
