"""MLPs, dense and sparse: ``down(act(gate(x)) * up(x))`` and its contextually sparse forms.

A plain MLP, ``fc2(act(fc1(x)))``, has no `up`: fc1 is the gate, fc2 is down.

`down` is neuron-major, [I, C]: a neuron is one contiguous row of `gate`, of `up` and of `down`,
which are not read if it is skipped. Weights may be nested, `down` by inputs, the others by outputs:
see `sirius_runtime.nested`. The references compute every neuron and mask: they are simple and no
faster than a dense MLP. The kernels of the same operators skip the reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.graph_rules import Array, made, need
from sirius_runtime.graph_sizes import Size
from sirius_runtime.nested import Layout, is_nested
from sirius_runtime.ops.linear import linear, outputs_of
from sirius_runtime.ops.operands import Mlp, grouped
from sirius_runtime.ops.rules import (
    counts,
    experts_in,
    need_dtype,
    need_finite,
    need_kept,
    need_layer,
    need_matrix,
    need_model,
    need_rank,
    need_shape,
    need_some,
    tokens,
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activations(x: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """act(gate x), [B, T, I]."""
    return ACTIVATIONS[mlp.act](linear(x, mlp.gate, mlp.gate_bias))


def times_up(g: Tensor, x: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """g · up x [B, T, I], for (possibly masked) activations g [B, T, I]; g alone without up."""
    return g if mlp.up is None else g * linear(x, mlp.up, mlp.up_bias)


def down_of(z: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """down z, [B, T, C]."""
    return linear(z, mlp.down if is_nested(mlp.down) else mlp.down.t(), mlp.down_bias)


@grouped
def dense_mlp(x: Tensor, mlp: Mlp[Tensor]) -> Tensor:
    """x [B, T, C]; gate, up, down [I, C]; biases [I], [I], [C]; returns [B, T, C]."""
    z = times_up(activations(x, mlp), x, mlp)
    return down_of(z, mlp)


@grouped
def dense_mlp_statistic(x: Tensor, mlp: Mlp[Tensor], valid: Tensor) -> tuple[Tensor, Tensor]:
    """The dense MLP, and GRIFFIN's neuron statistic over the tokens with `valid` [B, T] (bool).

    Returns y [B, T, C] and the statistic, float32 [B, I]: the sum over tokens of (z / ‖z‖₂)² with
    z = act(gate x) · up x. Its square root is the score of the paper (GRIFFIN, arXiv 2404.01365);
    the sums of prompt chunks can be added.
    """
    z = times_up(activations(x, mlp), x, mlp)
    unit = F.normalize(z.float(), dim=-1)
    statistic = (unit.square() * valid[..., None]).sum(1)
    return down_of(z, mlp), statistic


@grouped
def dense_mlp_activity(x: Tensor, mlp: Mlp[Tensor]) -> tuple[Tensor, Tensor]:
    """The dense MLP, and each token's term of GRIFFIN's statistic.

    Returns y [B, T, C] and (z / ‖z‖₂)², float32 [B, T, I]. The sum over accepted tokens is the
    statistic that `dense_mlp_statistic` returns for them.
    """
    z = times_up(activations(x, mlp), x, mlp)
    return down_of(z, mlp), F.normalize(z.float(), dim=-1).square()


@grouped
def topk_mlp(x: Tensor, mlp: Mlp[Tensor], keep: int) -> Tensor:
    """The MLP over the `keep` neurons of each row with the largest |act(gate x)|, summed over the
    call's T tokens.

    For one token this is the paper's fine-grained path. The beams of a tree share their neurons:
    with a choice for each beam, the union would soon be all neurons (Sirius, arXiv 2409.03856).
    """
    g = activations(x, mlp)
    score = g.abs().sum(1, keepdim=True)
    kept = torch.zeros_like(score).scatter(-1, score.topk(keep, -1, sorted=False).indices, 1.0)
    return down_of(times_up(g * kept, x, mlp), mlp)


@grouped
def cats_mlp(x: Tensor, mlp: Mlp[Tensor], threshold: float) -> tuple[Tensor, Tensor]:
    """The MLP over the neurons of each row whose |act(gate x)|, averaged over the call's T tokens,
    is above `threshold` (CATS, arXiv 2404.08763). The beams of a tree share their neurons.

    Returns y [B, T, C] and the number of kept neurons, int64 [B].
    """
    g = activations(x, mlp)
    kept = g.abs().mean(1, keepdim=True) > threshold
    y = down_of(times_up(g * kept, x, mlp), mlp)
    return y, kept.sum((1, 2))


@grouped
def griffin_mlp(x: Tensor, mlp: Mlp[Tensor], neurons: Tensor) -> Tensor:
    """The MLP over each row's `neurons` [layers, B, K] of this layer, chosen by the prompt
    (GRIFFIN).
    """
    z = times_up(activations(x, mlp), x, mlp)
    return down_of(z * _chosen(z, neurons[mlp.layer]), mlp)


@grouped
def griffin_cats_mlp(
    x: Tensor, mlp: Mlp[Tensor], neurons: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """The MLP over those of each row's `neurons` (as in `griffin_mlp`) that are above `threshold`
    (as in `cats_mlp`).

    Returns y [B, T, C] and the number of kept neurons, int64 [B].
    """
    g = activations(x, mlp)
    kept = (g.abs().mean(1, keepdim=True) > threshold) & _chosen(g, neurons[mlp.layer]).bool()
    y = down_of(times_up(g * kept, x, mlp), mlp)
    return y, kept.sum((1, 2))


def _chosen(z: Tensor, neurons: Tensor) -> Tensor:
    """A mask [B, 1, I] for `z` [B, T, I]: 1 for a row's `neurons` [B, K], else 0."""
    return z.new_zeros(z.shape[0], z.shape[-1]).scatter(1, neurons, 1.0)[:, None, :]


@grouped
def all_neurons(x: Tensor, mlp: Mlp[Tensor], *_: object) -> Tensor:
    """The MLP if no neuron were skipped, by the operator `dense_mlp`."""
    y: Tensor = torch.ops.sirius.dense_mlp(x, *mlp)
    return y


@grouped
def neuron_scores(x: Tensor, mlp: Mlp[Tensor], *_: object) -> Tensor:
    """The values [B, T, I] by which operators keep neurons, for each token."""
    return activations(x, mlp).abs()


@grouped
def chosen_scores(x: Tensor, mlp: Mlp[Tensor], neurons: Tensor, *_: object) -> Tensor:
    """As `neuron_scores`, only for the row's `neurons`: [B, T, K]."""
    chosen = neurons[mlp.layer][:, None].expand(-1, x.shape[1], -1)
    return activations(x, mlp).abs().gather(-1, chosen)


# Fakes


def like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def like_and_statistic(x: Tensor, gate: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], outputs_of(gate), dtype=torch.float32)


def like_and_count(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int64)


def like_and_activity(x: Tensor, gate: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], outputs_of(gate), dtype=torch.float32)


# Rules for the graphs of an artifact


def need_mlp(x: Array, mlp: Mlp[Array], *, experts: bool = False) -> Size:
    """The number of neurons I; checks the weights [I, C], or [E, I, C] of `experts`."""
    weights = {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
    need_model(x=x, gate_bias=mlp.gate_bias, up_bias=mlp.up_bias, down_bias=mlp.down_bias)
    I, C = need_matrix("gate", mlp.gate, Layout.BY_OUTPUTS, x.dtype, experts=experts)  # noqa: E741
    nested = mlp.gate.dtype is torch.uint8
    count = experts_in(mlp.gate) if experts else None
    E = () if count is None else (count,)
    need_some(x=x, gate=mlp.gate)
    need(bool(x.shape) and x.shape[-1] == C, f"x {x} and gate {mlp.gate} can't be multiplied")
    for name, weight in weights.items():
        if weight is None or not nested:
            need_shape(name, weight, *E, I, C)
            need_dtype(x.dtype, **{name: weight})
            continue
        need_dtype(torch.uint8, **{name: weight})  # all of them are nested, or none
        layout = Layout.BY_INPUTS if name == "down" else Layout.BY_OUTPUTS
        own = need_matrix(name, weight, layout, x.dtype, experts=experts)
        wanted = (C, I) if name == "down" else (I, C)
        need(own == wanted, f"{name} {weight} has {own[0]} outputs and {own[1]} inputs")
        if experts:
            need(experts_in(weight) == count, f"{name} {weight} does not have {count} experts")
    need_shape("gate_bias", mlp.gate_bias, *E, I)
    need_shape("up_bias", mlp.up_bias, *E, I)
    need_shape("down_bias", mlp.down_bias, *E, C)
    need(mlp.up is not None or mlp.up_bias is None, "up_bias is given without up")
    need(isinstance(mlp.layer, int) and mlp.layer >= 0, f"there is no layer {mlp.layer}")
    return I


@grouped
def dense_mlp_rule(x: Array, mlp: Mlp[Array]) -> Array:
    need_mlp(x, mlp)
    return x


@grouped
def dense_mlp_statistic_rule(x: Array, mlp: Mlp[Array], valid: Array) -> tuple[Array, Array]:
    I = need_mlp(x, mlp)  # noqa: E741
    B, T = tokens(x)
    need_shape("valid", valid, B, T)
    need_dtype(torch.bool, valid=valid)
    return x, made(torch.float32, (B, I))


@grouped
def dense_mlp_activity_rule(x: Array, mlp: Mlp[Array]) -> tuple[Array, Array]:
    I = need_mlp(x, mlp)  # noqa: E741
    return x, made(torch.float32, (*tokens(x), I))


def keeping_rule(*names: str) -> Callable[..., Any]:
    """The rule of an MLP that keeps some of its neurons. Its last arguments are `names`: the
    prompt's `neurons` [layers, B, K], the number to `keep` or the `threshold`.
    """

    @grouped
    def rule(x: Array, mlp: Mlp[Array], *own: Any) -> Any:
        I, (B, _) = need_mlp(x, mlp), tokens(x)  # noqa: E741
        kept = dict(zip(names, own, strict=True))
        if "neurons" in kept:
            neurons = kept["neurons"]
            need_rank("neurons", neurons, 3)
            layers, _, K = neurons.shape
            need_shape("neurons", neurons, layers, B, K)
            need_dtype(torch.int64, neurons=neurons)
            need_layer(mlp.layer, layers)
        need_kept(kept.get("keep", K if "neurons" in kept else I), I)
        need_finite(threshold=kept.get("threshold"))
        return (x, counts(x)) if "threshold" in kept else x

    return rule
