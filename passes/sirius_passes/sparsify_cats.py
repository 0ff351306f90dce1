"""The thresholded sparse path: per token, the neurons with |act(gate x)| above a calibrated
threshold.

    Before (sparse)                              After (sparse)
    %1 = sirius.dense_mlp(%x, …, 'silu', 0)      %1 = sirius.cats_mlp(%x, …, 'silu', 0, 0.0713)
    return logits=%9                             %2 = %1[0], %3 = %1[1]
                                                 %9 = aten.stack([%3, …])
                                                 return logits=%8, kept=%9

`kept` [sites, B] counts the neurons that were kept. Reads all of gate, and the kept rows of up
and down. One threshold a layer (CATS, arXiv 2404.08763).
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.program import CALIBRATED, SPARSE, Program, Stage, call
from sirius_passes.sparsify import (
    add_counts,
    add_sites,
    kept_neurons,
    mlp_site,
    mlps,
    neurons_of,
    replace_mlp,
    take_over,
)
from sirius_runtime.errors import CalibrationError
from sirius_runtime.spec import Method


class SparsifyCats(Pass):
    """Thresholds [MLPs] are the (1 - keep) quantiles of |act(gate x)| over calibration tokens."""

    name: ClassVar[str] = "sparsify_cats"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(
        self, keep: float, thresholds: Sequence[float], dense_layers: Collection[int] = ()
    ) -> None:
        self.keep, self.dense_layers = keep, dense_layers
        self.thresholds = tuple(thresholds)

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        graph = module.graph
        found = mlps(graph, self.dense_layers)
        if len(found) != len(self.thresholds):
            raise CalibrationError(
                f"{len(self.thresholds)} thresholds for {len(found)} MLPs: calibrate anew"
            )
        sites, counts = [], []
        for mlp, threshold in zip(found, self.thresholds, strict=True):
            target = torch.ops.sirius.cats_mlp.default
            both = replace_mlp(mlp, target, float(threshold), origin=self.name)
            both.meta[CALIBRATED] = (len(both.args) - 1,)
            with graph.inserting_before(mlp):
                y, count = (
                    call(graph, operator.getitem, (both, i), origin=self.name) for i in range(2)
                )
            neurons = neurons_of(mlp)
            kept = kept_neurons(neurons, self.keep)
            sites.append(
                mlp_site(mlp, neurons, kept, gate=False, threshold=threshold, counted=True)
            )
            take_over(mlp, y)
            counts.append(count)
        add_sites(program, Method.CATS, self.keep, sites, self.dense_layers)
        add_counts(module, counts, self.name)
        module.recompile()
        return len(found)
