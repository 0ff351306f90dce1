"""A sparse path for mixtures of experts: a token keeps the experts with the largest weights.

    Before (sparse)                              After (sparse)
    %1 = sirius.dense_moe(%x, %e, %w, …, 0)      %1 = sirius.experts_moe(%x, %e, %w, …, 0, 4, True)

Each token keeps the share `keep` of the experts that its router chose, as if the model were
configured with fewer experts a token. If the router normalises its weights to a fixed sum, the kept
experts' weights are scaled to that sum. MLPs outside mixtures stay dense.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sirius_passes.manager import Pass
from sirius_passes.mixtures import Mixture, check_method, mixtures
from sirius_passes.program import SPARSE, Program, Stage
from sirius_passes.sparsify import add_sites, kept_neurons, replace_mlp, take_over
from sirius_runtime.errors import ConfigError, UnsupportedModelError
from sirius_runtime.graph import CAPTURE_DTYPE
from sirius_runtime.spec import Method, SiteSpec

aten = torch.ops.aten


class SparsifyExperts(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "sparsify_experts"
    takes: ClassVar[Stage] = Stage.PAIRED
    gives: ClassVar[Stage] = Stage.PAIRED

    def __init__(self, keep: float, dense_layers: Collection[int] = ()) -> None:
        self.keep, self.dense_layers = keep, dense_layers

    def run(self, program: Program) -> int:
        module = program.graphs[SPARSE]
        found = mixtures(module.graph, self.dense_layers)
        if not found:
            check_method(program, Method.EXPERTS)
        sites = []
        for mixture in found:
            kept = kept_neurons(mixture.per_token, self.keep)
            if self.keep < 1.0 and kept == mixture.per_token:
                raise ConfigError(
                    f"--keep {self.keep:g} of a token's {kept} experts rounds up to all of them. "
                    "Give a smaller share, or use --sparsity topk"
                )
            size = mixture.expert_parameters(program)
            sites.append(SiteSpec(mixture.layer, mixture.weight, mixture.per_token, kept, size))
            target = torch.ops.sirius.experts_moe.default
            extra = kept, normalises(mixture)
            take_over(mixture.node, replace_mlp(mixture.node, target, *extra, origin=self.name))
        add_sites(program, Method.EXPERTS, self.keep, sites, self.dense_layers)
        module.recompile()
        return len(found)


def normalises(mixture: Mixture) -> bool:
    """Whether a mixture's weights have the same sum for every token.

    Runs the nodes between the router's choice of experts and the weights on sample scores. Raises
    UnsupportedModelError if the weights depend on anything but the chosen experts' scores.
    """
    weights = mixture.node.args[2]
    assert isinstance(weights, fx.Node)
    scores = 0.1 + torch.rand(64, mixture.per_token, generator=torch.Generator().manual_seed(0))
    sums = _run(weights, scores.double(), {}).sum(-1)
    return torch.allclose(sums, sums[:1].expand_as(sums), rtol=1e-6)


def _run(node: fx.Node, scores: Tensor, env: dict[fx.Node, Any]) -> Any:
    """The value of a node, given the `scores` [N, k] of the experts that `topk` chose.

    Raises UnsupportedModelError if the node depends on anything else.
    """
    if node.op != "call_function" or node.target is aten.linear.default:
        raise UnsupportedModelError(
            "--sparsity experts needs routing weights that depend only on the chosen experts' "
            f"scores, but this router also reads {node.name} ({node.target}). Use --sparsity topk"
        )
    if node in env:
        return env[node]
    source = node.args[0] if node.args else None
    if node.args[1:] == (0,) and isinstance(source, fx.Node) and source.target is aten.topk.default:
        env[node] = scores
    elif node.target is aten.type_as.default or node.args[1:] == (CAPTURE_DTYPE,):  # a cast
        env[node] = _run(source, scores, env)  # type: ignore[arg-type]
    else:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _run(n, scores, env))
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return env[node]
