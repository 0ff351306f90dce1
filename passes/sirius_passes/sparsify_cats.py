"""The CATS sparse path: keeps a token's neurons with |act(gate x)| above a calibrated threshold.

    Before (sparse)                              After (sparse)
    %1 = sirius.dense_mlp(%x, …, 'silu', 0)      %1 = sirius.cats_mlp(%x, …, 'silu', 0, 0.0713)
    return logits=%9                             %2 = %1[0], %3 = %1[1]
                                                 %9 = aten.stack([%3, …])
                                                 return logits=%8, kept=%9

One threshold a layer; `kept` [sites, B] counts the kept neurons. Reads all of gate, and the kept
rows of up and down. Source: CATS, arXiv 2404.08763.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.program import CALIBRATED, SPARSE, Program, Stage
from sirius_passes.sparsify import (
    Threshold,
    add_counts,
    add_sites,
    both_values,
    kept_neurons,
    mlp_site,
    mlps,
    neurons_of,
    one_per_site,
    replace_mlp,
    take_over,
)
from sirius_runtime.spec import Method


class SparsifyCats(Pass):
    """`thresholds`: one for each MLP, a quantile of |act(gate x)| over calibration tokens."""

    name: ClassVar[str] = "sparsify_cats"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(
        self,
        keep: float,
        thresholds: Sequence[Threshold] | None,
        dense_layers: Collection[int] = (),
    ) -> None:
        """`thresholds`: None keeps all neurons, as calibration needs."""
        self.keep, self.thresholds, self.dense_layers = keep, thresholds, dense_layers

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        graph = module.graph
        found = mlps(graph, self.dense_layers)
        sites, counts = [], []
        thresholds = one_per_site(self.thresholds, len(found), self.keep, "MLPs")
        for mlp, threshold in zip(found, thresholds, strict=True):
            target = torch.ops.sirius.cats_mlp.default
            both = replace_mlp(mlp, target, threshold.value, origin=self.name)
            both.meta[CALIBRATED] = (len(both.args) - 1,)
            y, count = both_values(mlp, both, self.name)
            neurons = neurons_of(mlp)
            kept = kept_neurons(neurons, threshold.keep)
            sites.append(
                mlp_site(mlp, neurons, kept, gate=False, threshold=threshold.value, counted=True)
            )
            take_over(mlp, y)
            counts.append(count)
        add_sites(program, Method.CATS, self.keep, sites, self.dense_layers)
        add_counts(module, counts, self.name)
        module.recompile()
        return len(found)
