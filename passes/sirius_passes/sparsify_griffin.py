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

With thresholds, `sparse` has `sirius.griffin_cats_mlp(…, %neurons, 0.0713)` instead, which keeps
fewer of the prompt's neurons for each token, and an output `kept` that counts them: the MLPs'
half of `griffin+teal`.

The runtime adds the statistic up over prompt chunks and keeps each layer's highest-scoring neurons
(`sirius_runtime.policy.select_neurons`). `observe` verifies like `full` and also says what its
tokens would add to the statistic, for choosing anew while generating. Reads kept rows of gate, up
and down.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
from torch import fx

from sirius_passes.manager import Pass
from sirius_passes.program import (
    CALIBRATED,
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
    LAYER,
    add_counts,
    add_sites,
    kept_neurons,
    mlp_site,
    mlps,
    neurons_of,
    replace_mlp,
    stack,
    take_over,
)
from sirius_runtime.errors import CalibrationError, UnsupportedModelError
from sirius_runtime.spec import Method

griffin_mlp = torch.ops.sirius.griffin_mlp.default
griffin_cats_mlp = torch.ops.sirius.griffin_cats_mlp.default
dense_mlp_statistic = torch.ops.sirius.dense_mlp_statistic.default
dense_mlp_activity = torch.ops.sirius.dense_mlp_activity.default


class SparsifyGriffin(Pass):
    """Keeps the share `keep` of each MLP's neurons, for the whole of a generation."""

    name: ClassVar[str] = "sparsify_griffin"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(
        self,
        keep: float,
        dense_layers: Collection[int] = (),
        *,
        thresholds: Sequence[float] | None = None,
        method: Method = Method.GRIFFIN,
    ) -> None:
        """thresholds [MLPs]: per token, of the prompt's neurons only those with |act(gate x)| above
        it are kept; they are the (1 - keep) quantiles over calibration tokens.
        """
        self.keep, self.dense_layers, self.method = keep, dense_layers, method
        self.thresholds = None if thresholds is None else tuple(thresholds)

    def run(self, program: Program) -> int:
        every = mlps(program.graphs[SPARSE].graph)
        found = mlps(program.graphs[SPARSE].graph, self.dense_layers)
        in_order = [mlp.args[LAYER] for mlp in every] == list(range(len(every)))
        if not in_order or len(every) < program.state.layers:
            raise UnsupportedModelError(
                f"griffin chooses neurons in every layer, but only {len(every)} of "
                f"{program.state.layers} layers have one MLP of its own. Use --sparsity topk, cats "
                "or teal"
            )
        if self.thresholds is not None and len(found) != len(self.thresholds):
            raise CalibrationError(
                f"{len(self.thresholds)} thresholds for {len(found)} MLPs: calibrate anew"
            )
        sizes = {neurons_of(mlp) for mlp in every}
        if len(sizes) > 1:
            raise UnsupportedModelError(
                f"griffin keeps one number of neurons in all layers, but this model's MLPs have "
                f"{sorted(sizes)} neurons. Use --sparsity cats or topk"
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
        fixed, counted, counts = [], [], []
        for index, mlp in enumerate(found):
            total = neurons_of(mlp)
            kept = kept_neurons(total, self.keep)
            fixed.append(mlp_site(mlp, total, kept, gate=True))
            if self.thresholds is None:
                take_over(mlp, replace_mlp(mlp, griffin_mlp, neurons, origin=self.name))
                continue
            threshold = self.thresholds[index]
            both = replace_mlp(mlp, griffin_cats_mlp, neurons, threshold, origin=self.name)
            both.meta[CALIBRATED] = (len(both.args) - 1,)
            counted.append(
                mlp_site(
                    mlp,
                    kept,
                    kept_neurons(kept, self.keep),
                    gate=False,
                    threshold=threshold,
                    counted=True,
                )
            )
            y, count = _both(mlp, both)
            counts.append(count)
            take_over(mlp, y)
        add_sites(program, self.method, self.keep, fixed + counted, self.dense_layers)
        add_counts(module, counts, self.name)
        module.recompile()


def _emit(module: fx.GraphModule, target: Callable[..., Any], output: str, *extra: fx.Node) -> None:
    """Replaces the graph's MLPs by `target`, whose second value, stacked, becomes an output."""
    graph, origin = module.graph, SparsifyGriffin.name
    values = []
    for mlp in mlps(graph):
        both = replace_mlp(mlp, target, *extra, origin=origin)
        y, value = _both(mlp, both)
        take_over(mlp, y)
        values.append(value)
    set_outputs(graph, outputs(graph) | {output: stack(graph, values, origin)})
    module.recompile()


def _both(mlp: fx.Node, pair: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two values of an operator's node, before `mlp`."""
    graph, origin = mlp.graph, SparsifyGriffin.name
    with graph.inserting_before(mlp):
        y, value = (call(graph, operator.getitem, (pair, i), origin=origin) for i in range(2))
    return y, value
