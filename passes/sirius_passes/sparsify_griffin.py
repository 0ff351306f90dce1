"""The coarse-grained sparse path: neurons chosen once per prompt (GRIFFIN; Sirius' CSparse).

    Before                                       After
    sparse                                       sparse, with input neurons [layers, B, K]
    %1 = sirius.gated_mlp(%x, …, 'silu', 0)      %1 = sirius.griffin_mlp(%x, …, 'silu', 0, %neurons)
    prefill                                      prefill, with input valid [B, T]
    %1 = sirius.gated_mlp(%x, …, 'silu', 0)      %1 = sirius.gated_mlp_statistic(%x, …, 0, %valid)
    return logits=%9                             return logits=%8, statistic=%9  # [layers, B, I]

The runtime adds the statistic up over prompt chunks and keeps each layer's highest-scoring neurons
(`sirius_runtime.policy.select_neurons`). Reads kept rows of gate, up and down.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.program import (
    PREFILL,
    SPARSE,
    Program,
    Stage,
    add_input,
    call,
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
        self._rewrite_prefill(program)
        return 2 * len(found)

    def _rewrite_sparse(self, program: Program) -> None:
        module = program.graphs[SPARSE]
        neurons = add_input(module.graph, "neurons")
        for mlp in mlps(module.graph):
            target = torch.ops.sirius.griffin_mlp.default
            take_over(mlp, replace_mlp(mlp, target, neurons, origin=self.name))
        module.recompile()

    def _rewrite_prefill(self, program: Program) -> None:
        module = program.graphs[PREFILL]
        graph = module.graph
        valid = add_input(graph, "valid")
        statistics = []
        for mlp in mlps(graph):
            target = torch.ops.sirius.gated_mlp_statistic.default
            both = replace_mlp(mlp, target, valid, origin=self.name)
            with graph.inserting_before(mlp):
                y, statistic = (
                    call(graph, operator.getitem, (both, i), origin=self.name) for i in range(2)
                )
            take_over(mlp, y)
            statistics.append(statistic)
        set_outputs(graph, outputs(graph) | {"statistic": stack(graph, statistics, self.name)})
        module.recompile()
