"""Mixtures of experts on the CPU: the MLP kernels, expert after expert of those that are hit.

Which experts those are the host knows for free there. gpt-oss' activation has no kernel: such
mixtures are the references'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels import mlp
from sirius_runtime.kernels.arguments import ACTIVATIONS
from sirius_runtime.kernels.linear import linear
from sirius_runtime.ops import moe as reference

FEW_TOKENS = 8
"""Tokens up to which `topk_moe` goes through them one by one, each with neurons of its own."""

Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]


def dense_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
) -> Tensor:
    """As `reference.dense_moe`."""
    mlps = gate, up, down, gate_bias, up_bias, down_bias
    if act not in ACTIVATIONS:
        return reference.dense_moe(x, experts, weights, *mlps, act, layer)
    y = x.new_empty(*experts.shape, x.shape[1])
    for expert in experts.unique().tolist():
        token, place = (experts == expert).nonzero(as_tuple=True)
        y[token, place] = mlp.dense_mlp(x[None, token], *_of(expert, mlps), act, layer)[0]
    return _weighted(y, weights)


def topk_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    keep: int,
) -> Tensor:
    """As `reference.topk_moe`. The kept neurons' gates are read twice, at once."""
    mlps = gate, up, down, gate_bias, up_bias, down_bias
    if act not in ACTIVATIONS or x.shape[0] > FEW_TOKENS:
        return reference.topk_moe(x, experts, weights, *mlps, act, layer, keep)
    routed = experts.tolist()
    own = [[_of(expert, mlps) for expert in row] for row in routed]
    g = torch.stack(
        [torch.stack([linear(x[n], w[0], w[3]) for w in row]) for n, row in enumerate(own)]
    )
    kept = reference.largest(reference.EXPERT_ACTIVATIONS[act](g), weights, keep)
    y = x.new_empty(*experts.shape, x.shape[1])
    for n, row in enumerate(own):
        for place, expert in enumerate(row):
            neurons = kept[n, place].nonzero()[None, None, :, 0]
            if neurons.numel():
                y[n, place] = mlp.griffin_mlp(x[None, None, n], *expert, act, 0, neurons)[0, 0]
            else:
                y[n, place] = 0 if expert[5] is None else expert[5]
    return _weighted(y, weights)


def experts_moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    keep: int,
    normalised: bool,
) -> Tensor:
    """As `reference.experts_moe`."""
    experts, weights = reference.heaviest(experts, weights, keep, normalised)
    mlps = gate, up, down, gate_bias, up_bias, down_bias
    return dense_moe(x, experts, weights, *mlps, act, layer)


def _of(expert: int, mlps: Weights) -> Weights:
    """An expert's own weights."""
    gate, up, down, *biases = (None if tensor is None else tensor[expert] for tensor in mlps)
    assert gate is not None
    assert down is not None
    return gate, up, down, *biases  # type: ignore[return-value]


def _weighted(y_NkC: Tensor, weights: Tensor) -> Tensor:
    return (y_NkC * weights[..., None]).sum(1).to(y_NkC.dtype)
