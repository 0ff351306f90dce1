"""The coarse-grained sparse path: neurons chosen once per prompt (GRIFFIN; Sirius' CSparse).

    Before                                       After
    sparse                                       sparse, with input neurons [layers, B, K]
    %1 = sirius.gated_mlp(%x, …, 'silu', 0)      %1 = sirius.griffin_mlp(%x, …, 'silu', 0, %neurons)
    prefill                                      prefill, with input valid [B, T]
    %1 = sirius.gated_mlp(%x, …, 'silu', 0)      %1 = sirius.gated_mlp_statistic(%x, …, 0, %valid)
    return logits=%9                             return logits=%8, statistic=%9  # [layers, B, I]
    full                                         full, unchanged, and a copy of it, observe
                                                 %1 = sirius.gated_mlp_activity(%x, …, 'silu', 0)
                                                 return logits=%8, activity=%9  # [layers, B, T, I]

The runtime adds the statistic up over prompt chunks and keeps each layer's highest-scoring neurons
(`sirius_runtime.policy.select_neurons`). `observe` verifies like `full` and also says what its
tokens would add to the statistic, for choosing anew while generating. Reads kept rows of gate, up
and down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from sirius_passes.manager import Pass
from sirius_passes.program import (
    FULL,
    OBSERVE,
    PREFILL,
    SPARSE,
    Program,
    Stage,
    add_input,
    call,
    copy_graph,
    outputs,
    set_outputs,
)
from sirius_passes.sparsify import (
    kept_neurons,
    mlps,
    neurons_of,
    replace_mlp,
    sparsity_spec,
    stack,
    take_over,
)
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.spec import Method

gated_mlp_statistic = torch.ops.sirius.gated_mlp_statistic.default
gated_mlp_activity = torch.ops.sirius.gated_mlp_activity.default


class SparsifyGriffin(Pass):
    """Keeps the share `keep` of each MLP's neurons, for the whole of a generation."""

    name: ClassVar[str] = "sparsify_griffin"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(self, keep: float) -> None:
        self.keep = keep

    def run(self, program: Program) -> int:
        found = mlps(program.graphs[SPARSE].graph)
        sizes = {neurons_of(mlp) for mlp in found}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"griffin keeps one number of neurons in all layers, but this model's MLPs have "
                f"{sorted(sizes)} neurons. Use --sparsity cats or topk"
            )
        kept = [kept_neurons(neurons_of(mlp), self.keep) for mlp in found]
        program.sparsity = sparsity_spec(program, Method.GRIFFIN, self.keep, kept, matrices=3)
        self._rewrite_sparse(program)
        valid = add_input(program.graphs[PREFILL].graph, "valid")
        _emit(program.graphs[PREFILL], gated_mlp_statistic, "statistic", valid)
        program.graphs[OBSERVE] = copy_graph(program.graphs[FULL])
        _emit(program.graphs[OBSERVE], gated_mlp_activity, "activity")
        return 3 * len(found)

    def _rewrite_sparse(self, program: Program) -> None:
        module = program.graphs[SPARSE]
        neurons = add_input(module.graph, "neurons")
        for mlp in mlps(module.graph):
            target = torch.ops.sirius.griffin_mlp.default
            take_over(mlp, replace_mlp(mlp, target, neurons, origin=self.name))
        module.recompile()


def _emit(module: fx.GraphModule, target: Callable[..., Any], output: str, *extra: fx.Node) -> None:
    """Replaces the graph's MLPs by `target`, whose second value, stacked, becomes an output."""
    graph, origin = module.graph, SparsifyGriffin.name
    values = []
    for mlp in mlps(graph):
        both = replace_mlp(mlp, target, *extra, origin=origin)
        with graph.inserting_before(mlp):
            y, value = (call(graph, operator.getitem, (both, i), origin=origin) for i in range(2))
        take_over(mlp, y)
        values.append(value)
    set_outputs(graph, outputs(graph) | {output: stack(graph, values, origin)})
    module.recompile()
