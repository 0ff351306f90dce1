"""The MLP part of `griffin+teal`: of the prompt's neurons, a token keeps those above a threshold.

    Before (sparse)                            After (sparse), with input neurons [layers, B, K]
    %1 = sirius.dense_mlp(%x, …, 'silu', 0)    %1 = sirius.griffin_cats_mlp(%x, …, %neurons, 0.07)
                                               %2 = %1[0], %3 = %1[1]
                                               %9 = aten.stack([%3, …])
                                               return logits=%8, kept=%9

Everything else is as in `sparsify_griffin`. The prompt's neurons are rows of gate, so gate is
stored by rows, and skipping its input channels would take a second copy of it. Instead, a neuron
below the threshold skips its rows of up and down. `kept` [sites, B] counts the neurons that each
token keeps. The sparse path reads the prompt's rows of gate, and the token's rows of up and down.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import fx

from sirius_passes.program import CALIBRATED, SPARSE, Program, add_input
from sirius_passes.sparsify import (
    Threshold,
    add_counts,
    add_sites,
    both_values,
    kept_neurons,
    mlp_site,
    one_per_site,
    replace_mlp,
    take_over,
)
from sirius_passes.sparsify_griffin import SparsifyGriffin, prompt_site
from sirius_runtime.spec import Method

griffin_cats_mlp = torch.ops.sirius.griffin_cats_mlp.default


class SparsifyGriffinCats(SparsifyGriffin):
    """`thresholds`: one for each MLP, a quantile of |act(gate x)| over the prompt's neurons."""

    name: ClassVar[str] = "sparsify_griffin_cats"

    def __init__(
        self,
        keep: float,
        thresholds: Sequence[Threshold] | None,
        dense_layers: Collection[int] = (),
    ) -> None:
        """`thresholds`: None keeps all of the prompt's neurons, as calibration needs."""
        super().__init__(keep, dense_layers)
        self.thresholds = thresholds

    def _rewrite_sparse(self, program: Program, found: Sequence[fx.Node]) -> None:
        module = program.graphs[SPARSE]
        neurons = add_input(module.graph, "neurons")
        fixed, counted, counts = [], [], []
        thresholds = one_per_site(self.thresholds, len(found), self.keep, "MLPs")
        for mlp, threshold in zip(found, thresholds, strict=True):
            both = replace_mlp(mlp, griffin_cats_mlp, neurons, threshold.value, origin=self.name)
            both.meta[CALIBRATED] = (len(both.args) - 1,)
            site = prompt_site(mlp, self.keep)
            of_prompt = int(site.kept)
            kept = kept_neurons(of_prompt, threshold.keep)
            fixed.append(site)
            counted.append(
                mlp_site(mlp, of_prompt, kept, gate=False, threshold=threshold.value, counted=True)
            )
            y, count = both_values(mlp, both, self.name)
            counts.append(count)
            take_over(mlp, y)
        add_sites(program, Method.GRIFFIN_TEAL, self.keep, fixed + counted, self.dense_layers)
        add_counts(module, counts, self.name)
        module.recompile()
