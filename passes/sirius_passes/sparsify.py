"""What the `sparsify_*` passes share: finding the sparse path's MLPs, and the density they
reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sirius_passes.program import SPARSE, Program, call, calls
from sirius_passes.recognise_mlps import GATED_MLP
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.spec import Method, SparsitySpec


def mlps(graph: fx.Graph) -> list[fx.Node]:
    """The dense MLP operators of a graph; raises UnsupportedModelError where there are none."""
    found = calls(graph, GATED_MLP)
    if not found:
        raise UnsupportedModelError(
            "there is no dense MLP operator to make sparse: looked for sirius.gated_mlp, which "
            "recognise_mlps makes"
        )
    return found


def neurons_of(mlp: fx.Node) -> int:
    """The number of neurons I of an MLP operator's node."""
    gate = mlp.args[1]
    assert isinstance(gate, fx.Node)
    return int(gate.meta["val"].shape[0])


def kept_neurons(neurons: int, keep: float) -> int:
    """How many of `neurons` a share of `keep` keeps: rounded up, at least one."""
    if not 0.0 < keep <= 1.0:
        raise ConfigError(f"the kept share of neurons must be in (0, 1], got {keep}")
    return max(1, math.ceil(neurons * keep - 1e-9))


def replace_mlp(mlp: fx.Node, target: Callable[..., Any], *extra: Any, origin: str) -> fx.Node:
    """Puts a call of `target` with the MLP's arguments and `extra` before `mlp`; does not remove
    it.
    """
    with mlp.graph.inserting_before(mlp):
        return call(mlp.graph, target, (*mlp.args, *extra), origin=f"{origin}({mlp.name})")


def take_over(mlp: fx.Node, replacement: fx.Node) -> None:
    """Every reader of `mlp` reads `replacement` instead; `mlp` goes."""
    mlp.replace_all_uses_with(replacement)
    mlp.graph.erase_node(mlp)


def sparsity_spec(
    program: Program,
    method: Method,
    keep: float,
    kept: Sequence[int],
    matrices: int,
    thresholds: Sequence[float] = (),
) -> SparsitySpec:
    """The spec of the sparse path, to be made while its MLPs are still dense.

    `kept` [layers]: neurons that a step reads; `matrices`: how many of gate, up and down skip the
    rows of the others. Density counts every parameter of the model, embeddings and head included.
    """
    found = mlps(program.graphs[SPARSE].graph)
    neurons = tuple(neurons_of(mlp) for mlp in found)
    saved = tuple(matrices * int(mlp.args[0].meta["val"].shape[-1]) for mlp in found)  # type: ignore[union-attr]
    skipped = sum((n - k) * s for n, k, s in zip(neurons, kept, saved, strict=True))
    return SparsitySpec(
        method=method,
        keep=keep,
        neurons=neurons,
        kept=tuple(kept),
        thresholds=tuple(thresholds),
        neuron_params=saved,
        density=1.0 - skipped / parameters(program),
    )


def parameters(program: Program) -> int:
    """The model's parameters, each stored tensor counted once; constants are not parameters."""
    return sum(math.prod(spec.shape) for spec in program.weights.values() if spec.retype)


def stack(graph: fx.Graph, values: Sequence[fx.Node], origin: str) -> fx.Node:
    """Stacks one value a layer into a new first dimension, at the end of the graph."""
    with graph.inserting_before(graph.output_node()):
        return call(graph, torch.ops.aten.stack.default, (list(values),), origin=origin)
