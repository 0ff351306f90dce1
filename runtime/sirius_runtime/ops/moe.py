"""Mixtures of experts, dense and sparse: each token runs a few of many MLPs, and their outputs are
summed by weight.

The weights of all E experts are one tensor, neuron-major: a neuron of an expert is one row of
`gate`, of `up` and of `down`, [E, I, C]. Token n runs k experts, `experts` [N, k], with the weights
`weights` [N, k]; the router that chooses them is not part of the operators. Experts' weight
matrices may be nested, [P, E, …]: see `sirius_runtime.nested`.

In the sparse forms each token chooses its neurons, also among the beams of a tree: the beams are
routed to different experts, so they have no neurons in common that they could share.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sirius_runtime import nested
from sirius_runtime.graph_rules import Array, need
from sirius_runtime.graph_sizes import Size, at_least
from sirius_runtime.nested import is_nested
from sirius_runtime.ops.linear import linear as plain_linear
from sirius_runtime.ops.linear import outputs_of
from sirius_runtime.ops.mlp import ACTIVATIONS, need_mlp
from sirius_runtime.ops.operands import Mlp, grouped
from sirius_runtime.ops.rules import experts_in, need_dtype, need_kept, need_rank, need_shape

CLAMPED_SWIGLU = "clamped_swiglu"
_LIMIT = 7.0


def _clamped_swish(g: Tensor) -> Tensor:
    """quick_gelu of g bounded from above: the gate of gpt-oss."""
    g = g.clamp(max=_LIMIT)
    return g * torch.sigmoid(1.702 * g)


EXPERT_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    CLAMPED_SWIGLU: _clamped_swish,
}
"""Activations of experts. With `clamped_swiglu`, up is clamped to ±7, and 1 is added (gpt-oss)."""

Linear = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""y [N, k, O] from x [N, k, C], experts [N, k], weight [E, O, C] or nested, bias [E, O]."""


def experts_of(weight: Tensor) -> int:
    """The number of experts E of a weight [E, …], or nested [P, E, …]."""
    return weight.shape[1 if is_nested(weight) else 0]


def expert(weight: Tensor, index: int) -> Tensor:
    """The matrix of one expert."""
    return weight[:, index] if is_nested(weight) else weight[index]


def gated(g: Tensor, u: Tensor | None, act: str) -> Tensor:
    """An expert's neurons: the product of its activation g and its up projection u."""
    if u is None:
        return g
    return g * (u.clamp(-_LIMIT, _LIMIT) + 1 if act == CLAMPED_SWIGLU else u)


@grouped
def dense_moe(x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """The mixture with all neurons of each token's experts. x [N, C]; experts, weights [N, k];
    gate, up, down [E, I, C]; biases [E, I], [E, I], [E, C]; returns [N, C]. No `up`: plain MLPs.
    """
    return mixture(x, experts, weights, mlp, None, _linear_for(x))


@grouped
def topk_moe(x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int) -> Tensor:
    """The mixture over `keep` neurons of each token: those with the largest |act(gate x)| times the
    expert's weight, among all neurons of the token's experts. (The expert's weight scales a
    neuron's part of the output.)
    """
    return mixture(x, experts, weights, mlp, keep, _linear_for(x))


@grouped
def experts_moe(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int, normalised: bool
) -> Tensor:
    """The mixture over the `keep` experts of each token with the largest weights. `normalised`:
    their weights are scaled so that their sum is that of all k weights, for routers that normalise
    their weights.
    """
    experts, weights = heaviest(experts, weights, keep, normalised)
    return mixture(x, experts, weights, mlp, None, _linear_for(x))


@grouped
def decomposed_dense_moe(x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """`dense_moe` in PyTorch's operators, for lowering: runs every expert, without a host read."""
    return mixture(x, experts, weights, mlp, None, _linear_of_all)


@grouped
def decomposed_topk_moe(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int
) -> Tensor:
    """`topk_moe` for lowering, as `decomposed_dense_moe`."""
    return mixture(x, experts, weights, mlp, keep, _linear_of_all)


@grouped
def decomposed_experts_moe(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], keep: int, normalised: bool
) -> Tensor:
    """`experts_moe` for lowering, as `decomposed_dense_moe`."""
    experts, weights = heaviest(experts, weights, keep, normalised)
    return mixture(x, experts, weights, mlp, None, _linear_of_all)


def heaviest(
    experts: Tensor, weights: Tensor, keep: int, normalised: bool
) -> tuple[Tensor, Tensor]:
    """The `keep` experts of each token with the largest weights, and these weights: [N, keep]."""
    kept, index = weights.topk(keep, -1)
    if normalised:
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
    return experts.gather(-1, index), kept


def largest(g: Tensor, weights: Tensor, keep: int) -> Tensor:
    """A mask [N, k, I] for g [N, k, I]: 1 for a token's `keep` neurons with the largest |g| times
    the expert's weight, else 0.
    """
    score = (g.abs() * weights[..., None]).flatten(1)
    chosen = score.topk(keep, -1, sorted=False).indices
    return torch.zeros_like(score).scatter(-1, chosen, 1.0).view_as(g)


def mixture(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    mlp: Mlp[Tensor],
    keep: int | None,
    linear: Linear,
) -> Tensor:
    """The mixture with all neurons, or the `keep` of each token that `largest` chooses. `linear`
    computes the products.
    """
    x_NkC = x[:, None].expand(*experts.shape, x.shape[-1])
    g = EXPERT_ACTIVATIONS[mlp.act](linear(x_NkC, experts, mlp.gate, mlp.gate_bias))
    if keep is not None:
        g = g * largest(g, weights, keep)
    u = None if mlp.up is None else linear(x_NkC, experts, mlp.up, mlp.up_bias)
    z = gated(g, u, mlp.act)
    down = mlp.down if is_nested(mlp.down) else mlp.down.mT
    y = linear(z.to(x.dtype), experts, down, mlp.down_bias)
    return (y * weights[..., None]).sum(1).to(x.dtype)


def _linear_for(x: Tensor) -> Linear:
    """On the CPU, runs only the experts that some token has. On other devices, reading the routing
    would stall the device, so all experts run.
    """
    return linear_of_hit if x.device.type == "cpu" else _linear_of_all


def linear_of_hit(
    x: Tensor,
    experts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = plain_linear,
) -> Tensor:
    """A `Linear` that runs only the experts that some token has."""
    y = x.new_empty(*experts.shape, outputs_of(expert(weight, 0)))
    for e in experts.unique().tolist():
        pair = (experts == e).nonzero(as_tuple=True)
        y[pair] = product(x[pair], expert(weight, e), None if bias is None else bias[e])
    return y


def _linear_of_all(x: Tensor, experts: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `Linear` that runs every expert over all tokens, so that weights are read in place and not
    gathered for each token.
    """
    N, E, k = x.shape[0], experts_of(weight), experts.shape[1]
    x_NEC = x.new_zeros(N, E, x.shape[2])
    x_NEC = x_NEC.scatter(1, experts[..., None].expand(N, k, x.shape[2]), x)
    x_ENC = x_NEC.transpose(0, 1)
    if is_nested(weight):
        y_ENO = torch.stack([nested.product(x_ENC[e], weight[:, e]) for e in range(E)])
    else:
        y_ENO = x_ENC @ weight.mT
    if bias is not None:
        y_ENO = y_ENO + bias[:, None]
    O = y_ENO.shape[2]  # noqa: E741
    return y_ENO.transpose(0, 1).gather(1, experts[..., None].expand(N, k, O))


@grouped
def all_experts(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], *_: object
) -> Tensor:
    """The mixture if nothing were skipped, by the operator `dense_moe`."""
    y: Tensor = torch.ops.sirius.dense_moe(x, experts, weights, *mlp)
    return y


@grouped
def expert_scores(
    x: Tensor, experts: Tensor, weights: Tensor, mlp: Mlp[Tensor], *_: object
) -> Tensor:
    """The values [N, k I] by which `topk_moe` keeps neurons of a token's experts."""
    x_NkC = x[:, None].expand(*experts.shape, x.shape[-1])
    g = EXPERT_ACTIVATIONS[mlp.act](_linear_for(x)(x_NkC, experts, mlp.gate, mlp.gate_bias))
    return (g.abs() * weights[..., None]).flatten(1)


# Rules for the graphs of an artifact


def _need_moe(x: Array, experts: Array, weights: Array, mlp: Mlp[Array]) -> tuple[Size, Size]:
    """The number of experts of a token, and of neurons of an expert; checks the operands."""
    need_rank("x", x, 2)
    need_rank("experts", experts, 2)
    N, k = x.shape[0], experts.shape[1]
    need_shape("experts", experts, N, k)
    need_shape("weights", weights, N, k)
    need_dtype(torch.int64, experts=experts)
    need(weights.dtype.is_floating_point, f"weights must be floating point, found {weights}")
    I = need_mlp(x, mlp, experts=True)  # noqa: E741
    need_kept(k, experts_in(mlp.gate))
    return k, I


@grouped
def dense_moe_rule(x: Array, experts: Array, weights: Array, mlp: Mlp[Array]) -> Array:
    _need_moe(x, experts, weights, mlp)
    return x


@grouped
def topk_moe_rule(x: Array, experts: Array, weights: Array, mlp: Mlp[Array], keep: int) -> Array:
    k, I = _need_moe(x, experts, weights, mlp)  # noqa: E741
    known = isinstance(k, int) and isinstance(I, int)
    need(known and at_least(keep, 1), f"{keep} neurons can't be kept")
    need_kept(keep, k * I)  # type: ignore[operator]
    return x


@grouped
def experts_moe_rule(
    x: Array, experts: Array, weights: Array, mlp: Mlp[Array], keep: int, normalised: bool
) -> Array:
    need_kept(keep, _need_moe(x, experts, weights, mlp)[0])
    return x
