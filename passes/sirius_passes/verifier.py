"""The invariants of a program at each stage; the manager checks them after every pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sirius_passes.program import (
    DENSE,
    FULL,
    INPUTS,
    OBSERVE,
    OUTPUTS,
    PERIOD,
    PREFILL,
    RESULTS,
    SPARSE,
    Program,
    Stage,
    calls,
    outputs,
    subgraphs,
)
from sirius_passes.weight_views import readers
from sirius_runtime.errors import ArtifactError, PassError
from sirius_runtime.graph import INPUT, WEIGHT, placeholders, to_document

aten, sirius = torch.ops.aten, torch.ops.sirius

EXPORT_NOISE = (
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
)
"""Operators without effect on inference; `canonicalize` removes them."""

_GRAPHS = {
    Stage.CAPTURED: {DENSE},
    Stage.CANONICAL: {DENSE},
    Stage.CACHED: {DENSE},
    Stage.PAIRED: {PREFILL, SPARSE, FULL},
    Stage.LAID_OUT: {PREFILL, SPARSE, FULL},
    Stage.FINAL: {PREFILL, SPARSE, FULL, PERIOD},
}


def verify(program: Program, after: str) -> None:
    """Raises PassError if an invariant does not hold. `after`: the pass to name in the message."""
    for graph_name, finding in _findings(program):
        raise PassError(
            f"after {after}: graph {graph_name!r} at stage {program.stage.name}: {finding}; "
            "this is a bug of the pass, please report it with the model's config.json"
        )


def _findings(program: Program) -> Iterator[tuple[str, str]]:
    expected = _GRAPHS[program.stage]
    if program.sparsity.method.per_prompt:
        expected = expected | {OBSERVE}
    if set(program.graphs) != expected:
        yield "*", f"the graphs are {sorted(program.graphs)}, expected {sorted(expected)}"
    for name, module in program.graphs.items():
        findings = _period_findings if name == PERIOD else _graph_findings
        for finding in findings(program, module):
            yield name, finding
    if program.stage >= Stage.PAIRED:
        full = set(placeholders(program.graphs[FULL].graph, WEIGHT))
        for name, module in program.graphs.items():
            read = placeholders(module.graph, WEIGHT)
            if extra := set(read) - full:
                yield name, f"reads weights that the full path does not: {sorted(extra)[:3]}"


def _sound_findings(program: Program, module: fx.GraphModule) -> Iterator[str]:
    """Findings that apply to every graph."""
    graph = module.graph
    try:
        graph.lint()
        to_document(module)
    except (RuntimeError, ArtifactError) as error:
        yield str(error)
        return
    for node in graph.nodes:
        if node.op == "placeholder":
            yield from _placeholder_findings(program, node)
    for part in (module, *subgraphs(module)):
        yield from _node_findings(part.graph)
    names = graph.output_node().meta.get(OUTPUTS, ())
    if not names or set(names) - set(RESULTS):
        yield f"the outputs are named {names}, but only {sorted(RESULTS)} are known"


def _node_findings(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        has_value = node.op == "placeholder" or (node.op == "call_function" and node.users)
        if has_value and "val" not in node.meta:
            yield f"node {node.name} has no meta['val']"
        if node.op == "call_function" and not node.users and not node.is_impure():
            yield f"node {node.name} is dead"


def _period_findings(program: Program, module: fx.GraphModule) -> Iterator[str]:
    layers: list[Any] = []
    for part in (module, *subgraphs(module)):
        for node in part.graph.nodes:
            if mutates(node):
                yield f"node {node.name} ({node.target}) mutates; this graph has to be functional"
    yield from _sound_findings(program, module)
    for part in (module, *subgraphs(module)):
        layers += [node.args[11] for node in calls(part.graph, sirius.block_attention.default)]
    tokens = outputs(module.graph).get("tokens")
    drafts = tokens is not None and tokens.meta["val"].shape[1] > 1
    every = set(range(program.state.layers))
    counts = {layers.count(layer) for layer in every}
    if set(layers) != every or len(counts) > 1 or min(counts) < 1 + drafts:
        yield f"sirius.block_attention has layers {layers}, expected each layer equally often"


def _graph_findings(program: Program, module: fx.GraphModule) -> Iterator[str]:
    graph, stage = module.graph, program.stage
    if stage >= Stage.CANONICAL and (noise := calls(graph, *EXPORT_NOISE)):
        yield f"an export operator is left: {noise[0].name} ({noise[0].target})"
    yield from _sound_findings(program, module)
    cached, cacheless = sirius.cached_attention.default, sirius.attention.default
    target, other = (cached, cacheless) if stage >= Stage.CACHED else (cacheless, cached)
    layers = [node.args[9 if target is cached else 3] for node in calls(graph, target)]
    if layers != list(range(program.state.layers)):
        yield f"{target} has layers {layers}, expected 0..{program.state.layers - 1}"
    if stray := calls(graph, other):
        yield f"{stray[0].name}: {other} does not belong at this stage"
    if stage >= Stage.LAID_OUT:
        for name, node in placeholders(graph, WEIGHT).items():
            for reader in readers(node):
                if reader.transposed and not reader.takes_views:
                    yield (
                        f"weight {name} is read transposed by {reader.node.name} "
                        f"({reader.node.target}); it should be stored transposed"
                    )


def _placeholder_findings(program: Program, node: fx.Node) -> Iterator[str]:
    if "val" not in node.meta:
        return  # `_node_findings` reports it
    value = node.meta["val"]
    if WEIGHT in node.meta:
        name = node.meta[WEIGHT]
        if name not in program.weights:
            yield f"placeholder {node.name} is bound to {name!r}, which is not in the weight table"
        elif tuple(value.shape) != program.weights[name].shape:
            yield f"placeholder {node.name} differs in shape from weight {name!r} in the table"
    elif node.meta.get(INPUT) not in INPUTS:
        yield f"placeholder {node.name} is bound to neither a weight nor a known input"


def mutates(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
