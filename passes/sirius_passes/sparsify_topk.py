"""The fine-grained sparse path: per token, the neurons of largest |act(gate x)| (Sirius' FSparse).

    Before (sparse)                              After (sparse)
    %1 = sirius.dense_mlp(%x, …, 'silu', 0)      %1 = sirius.topk_mlp(%x, …, 'silu', 0, 384)
    %2 = sirius.dense_moe(%x, %e, %w, …, 1)      %2 = sirius.topk_moe(%x, %e, %w, …, 1, 768)

Reads all of gate, and the kept rows of up and down. In a mixture, the neurons of all of a token's
experts compete as one set, so an expert with a large routing weight keeps more of its neurons.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch

from sirius_passes.manager import Pass
from sirius_passes.mixtures import mixtures
from sirius_passes.program import SPARSE, Program, Stage, calls
from sirius_passes.recognise_mlps import DENSE_MLP
from sirius_passes.sparsify import (
    add_sites,
    kept_neurons,
    mlp_site,
    mlps,
    neurons_of,
    replace_mlp,
    take_over,
)
from sirius_runtime.spec import Method, SiteSpec


class SparsifyTopk(Pass):
    """Keeps the share `keep` of each MLP's neurons, selected for each token."""

    name: ClassVar[str] = "sparsify_topk"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(self, keep: float, dense_layers: Collection[int] = ()) -> None:
        self.keep, self.dense_layers = keep, dense_layers

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        graph = module.graph
        moes = mixtures(graph, self.dense_layers)
        # `mlps` refuses a graph without MLPs, which is fine for a model of mixtures.
        found = mlps(graph, self.dense_layers) if calls(graph, DENSE_MLP) or not moes else []
        sites = []
        for mlp in found:
            neurons = neurons_of(mlp)
            kept = kept_neurons(neurons, self.keep)
            sites.append(mlp_site(mlp, neurons, kept, gate=False))
            target = torch.ops.sirius.topk_mlp.default
            take_over(mlp, replace_mlp(mlp, target, kept, origin=self.name))
        for moe in moes:
            neurons = moe.per_token * moe.neurons
            kept = kept_neurons(neurons, self.keep)
            site = SiteSpec(moe.layer, moe.weight, neurons, kept, moe.neuron_parameters)
            sites.append(site)
            target = torch.ops.sirius.topk_moe.default
            take_over(moe.node, replace_mlp(moe.node, target, kept, origin=self.name))
        add_sites(program, Method.TOPK, self.keep, sites, self.dense_layers)
        module.recompile()
        return len(sites)
