"""The coarse-grained sparse path: neurons chosen once per prompt (GRIFFIN; Sirius' CSparse).

    Before                                       After
    sparse                                       sparse, with input neurons [layers, B, K]
    %1 = sirius.dense_mlp(%x, …, 'silu', 0)      %1 = sirius.griffin_mlp(%x, …, 'silu', 0, %neurons)
    prefill                                      prefill, with input valid [B, T]
    %1 = sirius.dense_mlp(%x, …, 'silu', 0)      %1 = sirius.dense_mlp_statistic(%x, …, 0, %valid)
    return logits=%9                             return logits=%8, statistic=%9  # [layers, B, I]
    full                                         full, unchanged, and a copy of it, observe
                                                 %1 = sirius.dense_mlp_activity(%x, …, 'silu', 0)
                                                 return logits=%8, activity=%9  # [layers, B, T, I]

The runtime sums the statistic over prompt chunks and keeps each layer's highest-scoring neurons
(`sirius_runtime.policy.select_neurons`). `observe` verifies like `full`, and also returns its
tokens' contribution to the statistic, so that neurons can be selected again during generation. The
sparse path reads the kept rows of gate, up and down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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
    copy_graph,
    outputs,
    set_outputs,
)
from sirius_passes.sparsify import (
    LAYER,
    add_sites,
    both_values,
    kept_neurons,
    mlp_site,
    mlps,
    neurons_of,
    replace_mlp,
    stack,
    take_over,
)
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.spec import Method, SiteSpec

griffin_mlp = torch.ops.sirius.griffin_mlp.default
dense_mlp_statistic = torch.ops.sirius.dense_mlp_statistic.default
dense_mlp_activity = torch.ops.sirius.dense_mlp_activity.default


class SparsifyGriffin(Pass):
    """Keeps the share `keep` of each MLP's neurons, for the whole of a generation."""

    name: ClassVar[str] = "sparsify_griffin"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(self, keep: float, dense_layers: Collection[int] = ()) -> None:
        self.keep, self.dense_layers = keep, dense_layers

    def run(self, program: Program) -> int:
        every = mlps(program.graphs[SPARSE].graph)
        found = mlps(program.graphs[SPARSE].graph, self.dense_layers)
        in_order = [mlp.args[LAYER] for mlp in every] == list(range(len(every)))
        if not in_order or len(every) < program.state.layers:
            raise UnsupportedModelError(
                "griffin needs one MLP in every layer, but only "
                f"{len(every)} of {program.state.layers} layers have one. Use --sparsity topk, "
                "cats or teal"
            )
        sizes = {neurons_of(mlp) for mlp in every}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"griffin keeps the same number of neurons in every layer, but this model's MLPs "
                f"have {sorted(sizes)} neurons. Use --sparsity cats or topk"
            )
        if not found:
            raise ConfigError(
                f"--dense-layers keeps all {len(every)} layers dense, so griffin has nothing to "
                "skip. Leave some layers sparse, or use --sparsity none"
            )
        self._rewrite_sparse(program, found)
        valid = add_input(program.graphs[PREFILL].graph, "valid")
        _emit(program.graphs[PREFILL], dense_mlp_statistic, "statistic", valid)
        program.graphs[OBSERVE] = copy_graph(program.graphs[FULL])
        _emit(program.graphs[OBSERVE], dense_mlp_activity, "activity")
        return 3 * len(found)

    def _rewrite_sparse(self, program: Program, found: Sequence[fx.Node]) -> None:
        module = program.graphs[SPARSE]
        neurons = add_input(module.graph, "neurons")
        sites = []
        for mlp in found:
            sites.append(prompt_site(mlp, self.keep))
            take_over(mlp, replace_mlp(mlp, griffin_mlp, neurons, origin=self.name))
        add_sites(program, Method.GRIFFIN, self.keep, sites, self.dense_layers)
        module.recompile()


def prompt_site(mlp: fx.Node, keep: float) -> SiteSpec:
    """The site of an MLP's neurons, of which each prompt keeps the share `keep`."""
    neurons = neurons_of(mlp)
    return mlp_site(mlp, neurons, kept_neurons(neurons, keep), gate=True)


def _emit(module: fx.GraphModule, target: Callable[..., Any], output: str, *extra: fx.Node) -> None:
    """Replaces the graph's MLPs by `target`, stacks the second value that each call returns, and
    makes the stack the output named `output`.
    """
    graph, origin = module.graph, SparsifyGriffin.name
    values = []
    for mlp in mlps(graph):
        both = replace_mlp(mlp, target, *extra, origin=origin)
        y, value = both_values(mlp, both, origin)
        take_over(mlp, y)
        values.append(value)
    set_outputs(graph, outputs(graph) | {output: stack(graph, values, origin)})
    module.recompile()
