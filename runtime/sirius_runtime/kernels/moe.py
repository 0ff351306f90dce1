"""Mixtures of experts on the CPU: the MLP kernels run one routed expert after another.

On the CPU, reading the routing needs no transfer. There is no kernel for gpt-oss's activation: such
mixtures run the references, with the kernels' matrix products if the weights are nested.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import ACTIVATIONS, refuse
from sirius_runtime.kernels.linear import linear
from sirius_runtime.kernels.mlp import dense_mlp, griffin_mlp
from sirius_runtime.nested import is_nested
from sirius_runtime.ops import moe as reference
from sirius_runtime.ops.linear import linear as plain_linear
from sirius_runtime.ops.operands import Mlp, grouped

FEW_TOKENS = 8
"""Up to so many tokens, `topk_moe` runs them one by one, each with its own neurons."""


@grouped
def dense_moe(x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """As `reference.dense_moe`."""
    if mlp.act not in ACTIVATIONS:
        return _plainly(x, experts, weights, mlp, None)
    return _all_of(_hit("dense_moe", x, experts, weights, mlp), x, experts, weights, mlp)


def _all_of(
    hit: list[int], x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor]
) -> Tensor:
    """The weighted sum over each token's experts [N, C]; `hit`: the experts that any token has."""
    y = x.new_empty(*experts.shape, x.shape[1])
    for expert in hit:
        token, place = (experts == expert).nonzero(as_tuple=True)
        y[token, place] = dense_mlp(x[None, token], *_of(expert, mlp))[0]
    return _weighted(y, weights)


@grouped
def topk_moe(x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int) -> Tensor:
    """As `reference.topk_moe`. The kept neurons' gate rows are read twice, the second time from the
    cache.
    """
    if mlp.act not in ACTIVATIONS or x.shape[0] > FEW_TOKENS:
        return _plainly(x, experts, weights, mlp, keep)
    _hit("topk_moe", x, experts, weights, mlp)
    routed = experts.tolist()
    routed_mlps = [[_of(expert, mlp) for expert in row] for row in routed]
    g = torch.stack(
        [
            torch.stack([linear(x[n], w.gate, w.gate_bias) for w in row])
            for n, row in enumerate(routed_mlps)
        ]
    )
    kept = reference.largest(reference.EXPERT_ACTIVATIONS[mlp.act](g), weights, keep)
    y = x.new_empty(*experts.shape, x.shape[1])
    for n, row in enumerate(routed_mlps):
        for place, expert in enumerate(row):
            neurons = kept[n, place].nonzero()[None, None, :, 0]
            if neurons.numel():
                y[n, place] = griffin_mlp(x[None, None, n], *expert, neurons)[0, 0]
            else:
                y[n, place] = 0 if expert.down_bias is None else expert.down_bias
    return _weighted(y, weights)


@grouped
def experts_moe(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int, normalised: bool
) -> Tensor:
    """As `reference.experts_moe`."""
    _hit("experts_moe", x, experts, weights, mlp)
    experts, weights = reference.heaviest(experts, weights, keep, normalised)
    if mlp.act not in ACTIVATIONS:
        return _plainly(x, experts, weights, mlp, None)
    return _all_of(experts.unique().tolist(), x, experts, weights, mlp)


def _plainly(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int | None
) -> Tensor:
    """The reference; if the weights are nested, with the kernels' matrix products."""
    product = linear if is_nested(mlp.gate) else plain_linear
    by = functools.partial(reference.linear_of_hit, product=product)
    return reference.mixture(x, experts, weights, mlp, keep, by)


def _hit(operator: str, x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor]) -> list[int]:
    """The experts that any token is routed to, in ascending order.

    Raises OperandError for shapes that do not fit x's tokens, and OperandIndexError for an expert
    out of range.
    """
    N = x.shape[0]
    if experts.ndim != 2 or experts.shape[0] != N:
        reason = f"experts has the shape {list(experts.shape)}, not [{N}, experts per token]"
        raise refuse(operator, reason)
    if weights.shape != experts.shape:
        reason = f"weights has the shape {list(weights.shape)}, not {list(experts.shape)}"
        raise refuse(operator, reason)
    hit: list[int] = experts.unique().tolist()  # sorted
    count = reference.experts_of(mlp.gate)
    for expert in hit[:1] + hit[-1:]:
        if not 0 <= expert < count:
            reason = f"experts holds {expert}, an index out of range: there are {count}"
            raise refuse(operator, reason, index=True)
    return hit


def _of(expert: int, mlp: Mlp[Tensor]) -> Mlp[Tensor]:
    """The weights of one expert as an MLP."""
    fields: list[Any] = [reference.expert(v, expert) if isinstance(v, Tensor) else v for v in mlp]
    return Mlp(*fields)._replace(layer=0)  # `griffin_mlp` gets a list of neurons for one layer


def _weighted(y_NkC: Tensor, weights: Tensor) -> Tensor:
    return (y_NkC * weights[..., None]).sum(1).to(y_NkC.dtype)
