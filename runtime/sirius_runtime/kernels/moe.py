"""Mixtures of experts on the CPU: the MLP kernels, expert after expert of those that are hit.

Which experts those are the host knows for free there. gpt-oss' activation has no kernel: such
mixtures are the references'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels import mlp
from sirius_runtime.kernels.arguments import ACTIVATIONS, refuse
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
    return _all_of(_hit("dense_moe", x, experts, weights, gate), x, experts, weights, mlps, act)


def _all_of(
    hit: list[int], x: Tensor, experts: Tensor, weights: Tensor, mlps: Weights, act: str
) -> Tensor:
    """All of each token's experts; `hit`: which those are."""
    y = x.new_empty(*experts.shape, x.shape[1])
    for expert in hit:
        token, place = (experts == expert).nonzero(as_tuple=True)
        y[token, place] = mlp.dense_mlp(x[None, token], *_of(expert, mlps), act, 0)[0]
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
    _hit("topk_moe", x, experts, weights, gate)
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
    mlps = gate, up, down, gate_bias, up_bias, down_bias
    if act not in ACTIVATIONS:
        return reference.experts_moe(x, experts, weights, *mlps, act, layer, keep, normalised)
    _hit("experts_moe", x, experts, weights, gate)
    experts, weights = reference.heaviest(experts, weights, keep, normalised)
    return _all_of(experts.unique().tolist(), x, experts, weights, mlps, act)


def _hit(operator: str, x: Tensor, experts: Tensor, weights: Tensor, gate: Tensor) -> list[int]:
    """The experts that tokens have, in order.

    Raises OperandError where they are not those of x's tokens, or are not there.
    """
    N = x.shape[0]
    if experts.ndim != 2 or experts.shape[0] != N:
        reason = f"experts has the shape {list(experts.shape)}, not [{N}, experts a token]"
        raise refuse(operator, reason)
    if weights.shape != experts.shape:
        reason = f"weights has the shape {list(weights.shape)}, not {list(experts.shape)}"
        raise refuse(operator, reason)
    hit: list[int] = experts.unique().tolist()  # sorted
    for expert in hit[:1] + hit[-1:]:
        if not 0 <= expert < gate.shape[0]:
            reason = f"experts holds {expert}, an index out of range: there are {gate.shape[0]}"
            raise refuse(operator, reason, index=True)
    return hit


def _of(expert: int, mlps: Weights) -> Weights:
    """An expert's own weights."""
    gate, up, down, *biases = (None if tensor is None else tensor[expert] for tensor in mlps)
    assert gate is not None
    assert down is not None
    return gate, up, down, *biases  # type: ignore[return-value]


def _weighted(y_NkC: Tensor, weights: Tensor) -> Tensor:
    return (y_NkC * weights[..., None]).sum(1).to(y_NkC.dtype)
