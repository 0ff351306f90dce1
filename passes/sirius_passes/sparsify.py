"""Shared by the `sparsify_*` passes: finding MLPs, replacing them, and recording the density."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from sirius_passes.mixtures import mixtures
from sirius_passes.program import DENSE, FULL, SPARSE, Program, call, calls, outputs, set_outputs
from sirius_passes.recognise_mlps import DENSE_MLP
from sirius_passes.weight_views import reads_high_plane, weight_name
from sirius_runtime.errors import CalibrationError, ConfigError, UnsupportedModelError
from sirius_runtime.graph import WEIGHT, placeholders
from sirius_runtime.safetensors_file import size_of
from sirius_runtime.spec import Method, SiteSpec, SparsitySpec

LAYER = 8  # index of the layer among the operators' arguments
KEEP_ALL = -1.0
"""A threshold below every |x|: all units are kept."""


@dataclass(frozen=True)
class Threshold:
    """The threshold of one counted site, and the share of the site's units expected above it."""

    value: float
    keep: float


def mlps(graph: fx.Graph, dense_layers: Collection[int] = ()) -> list[fx.Node]:
    """The dense MLP operators of a graph, except those in `dense_layers`.

    Raises UnsupportedModelError if the graph has no MLP operator at all.
    """
    found = calls(graph, DENSE_MLP)
    if not found:
        raise UnsupportedModelError(
            "the model has no MLP to make sparse: the graph has no sirius.dense_mlp operator. Use "
            "--sparsity none, or open an issue with the model's config.json"
        )
    return [mlp for mlp in found if mlp.args[LAYER] not in dense_layers]


def neurons_of(mlp: fx.Node) -> int:
    """The number of neurons I of an MLP operator's node."""
    gate = mlp.args[1]
    assert isinstance(gate, fx.Node)
    return int(gate.meta["val"].shape[0])


def kept_neurons(neurons: int, keep: float) -> int:
    """`keep` * `neurons`, rounded up, at least 1. Raises ConfigError unless 0 < `keep` <= 1."""
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"the kept share of neurons must be in (0, 1], got {keep}")
    return max(1, math.ceil(neurons * keep - 1e-9))


def replace_mlp(mlp: fx.Node, target: Callable[..., Any], *extra: Any, origin: str) -> fx.Node:
    """Inserts a call of `target` with the MLP's arguments and `extra` before `mlp`.

    `mlp` itself stays in the graph: see `take_over`.
    """
    with mlp.graph.inserting_before(mlp):
        return call(mlp.graph, target, (*mlp.args, *extra), origin=f"{origin}({mlp.name})")


def take_over(node: fx.Node, replacement: fx.Node) -> None:
    """Replaces all uses of `node` by `replacement` and erases `node`."""
    node.replace_all_uses_with(replacement)
    node.graph.erase_node(node)


def both_values(node: fx.Node, pair: fx.Node, origin: str) -> tuple[fx.Node, fx.Node]:
    """The two values that the node `pair` returns, read just before `node`."""
    graph = node.graph
    with graph.inserting_before(node):
        y, value = (call(graph, operator.getitem, (pair, i), origin=origin) for i in range(2))
    return y, value


def one_per_site(
    thresholds: Sequence[Threshold] | None, count: int, keep: float, what: str
) -> Sequence[Threshold]:
    """One threshold for each of `count` sites; None gives thresholds that keep every unit.

    Raises CalibrationError if `thresholds` does not have `count` items.
    """
    if thresholds is None:
        return (Threshold(KEEP_ALL, keep),) * count
    if len(thresholds) != count:
        raise CalibrationError(
            f"there are {len(thresholds)} thresholds for {count} {what}. Calibrate this model again"
        )
    return thresholds


def mlp_site(
    mlp: fx.Node,
    units: int,
    kept: float,
    *,
    gate: bool,
    threshold: float | None = None,
    counted: bool = False,
) -> SiteSpec:
    """The site of an MLP's neurons, of whose `units` a sparse step keeps `kept`.

    `gate`: whether a skipped neuron saves its row of gate too, besides its rows of up and down.
    """
    x, up, layer = mlp.args[0], mlp.args[2], mlp.args[LAYER]
    assert isinstance(x, fx.Node)
    assert isinstance(layer, int)
    rows = gate + (up is not None) + 1
    width = int(x.meta["val"].shape[-1])
    return SiteSpec(layer, weight_name(mlp.args[1]), units, kept, rows * width, threshold, counted)


def add_sites(
    program: Program,
    method: Method,
    keep: float,
    sites: Iterable[SiteSpec],
    dense_layers: Collection[int] = (),
) -> None:
    """Adds `sites` to the sparse path's spec, and recomputes its density.

    The `params` of `sites` count parameters; they are converted to bytes here.
    """
    all_sites = program.sparsity.sites
    for site in sites:
        weight = program.weights[site.weight]
        size = site.params * size_of(weight) // weight.numbers
        all_sites += (replace(site, params=size),)
    program.sparsity = SparsitySpec(method, keep, all_sites, tuple(sorted(dense_layers)))
    set_density(program)


def set_density(program: Program) -> None:
    """Recomputes `step` and `density`: the bytes of stored weights that a full step reads, and the
    share of these that a sparse step reads.
    """
    sizes = step_sizes(program)
    step = read = sum(sizes.values())
    if SPARSE in program.graphs:
        placed = placeholders(program.graphs[SPARSE].graph, WEIGHT)
        read -= sum(sizes[name] // 2 for name, node in placed.items() if reads_high_plane(node))
    skipped = sum((site.units - site.kept) * site.params for site in program.sparsity.sites)
    program.sparsity = replace(program.sparsity, step=step, density=(read - skipped) / step)


def add_counts(module: fx.GraphModule, counts: Sequence[fx.Node], origin: str) -> None:
    """Appends counts [B], one for each counted site, to the graph's output `kept` [sites, B]."""
    if not counts:
        return
    graph, values = module.graph, outputs(module.graph)
    kept = stack(graph, counts, origin)
    if "kept" in values:
        with graph.inserting_before(graph.output_node()):
            both = ([values["kept"], kept],)
            kept = call(graph, torch.ops.aten.cat.default, both, origin=origin)
    set_outputs(graph, values | {"kept": kept})


def parameters(program: Program) -> int:
    """The number of parameters. A tied weight counts once; constants don't count."""
    return sum(spec.numbers for spec in program.weights.values() if spec.parameter)


def step_bytes(program: Program) -> int:
    """The bytes of weights that a full step over one token reads."""
    return sum(step_sizes(program).values())


def step_sizes(program: Program) -> dict[str, int]:
    """The bytes of each weight that a full step over one token reads, by name.

    These are all bytes, except those of experts that the token is not routed to.
    """
    module = program.graphs.get(FULL) or program.graphs[DENSE]
    sizes = {name: size_of(spec) for name, spec in program.weights.items() if spec.parameter}
    for mixture in mixtures(module.graph):
        for name in mixture.weights():
            whole = size_of(program.weights[name])
            sizes[name] = whole // mixture.experts * mixture.per_token
    return sizes


def stack(graph: fx.Graph, values: Sequence[fx.Node], origin: str) -> fx.Node:
    """Stacks `values` along a new first dimension, at the end of the graph."""
    with graph.inserting_before(graph.output_node()):
        return call(graph, torch.ops.aten.stack.default, (list(values),), origin=origin)
