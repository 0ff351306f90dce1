"""The fine-grained sparse path: per token, the neurons of largest |act(gate x)| (Sirius' FSparse).

    Before (sparse)                              After (sparse)
    %1 = sirius.gated_mlp(%x, …, 'silu', 0)      %1 = sirius.topk_mlp(%x, …, 'silu', 0, 384)

Reads all of gate, and the kept rows of up and down.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.program import SPARSE, Program, Stage
from sirius_passes.sparsify import (
    kept_neurons,
    mlps,
    neurons_of,
    replace_mlp,
    sparsity_spec,
    take_over,
)
from sirius_runtime.spec import Method


class SparsifyTopk(Pass):
    """Keeps the share `keep` of each MLP's neurons, chosen anew for every token."""

    name: ClassVar[str] = "sparsify_topk"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(self, keep: float) -> None:
        self.keep = keep

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        found = mlps(module.graph)
        kept = [kept_neurons(neurons_of(mlp), self.keep) for mlp in found]
        program.sparsity = sparsity_spec(program, Method.TOPK, self.keep, kept, matrices=2)
        for mlp, count in zip(found, kept, strict=True):
            target = torch.ops.sirius.topk_mlp.default
            take_over(mlp, replace_mlp(mlp, target, count, origin=self.name))
        module.recompile()
        return len(found)
