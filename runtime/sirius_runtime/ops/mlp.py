"""MLPs, dense and sparse: ``down(act(gate(x)) * up(x))`` and its contextually sparse forms.

A plain MLP, ``fc2(act(fc1(x)))``, is one without `up`: fc1 is the gate, fc2 is down.

`down` is neuron-major, [I, C]: a neuron is one row of `gate`, of `up` and of `down`, so that
skipping it skips contiguous rows. The references compute every neuron and mask: obviously
right, no faster than dense. Kernels that skip the reads stand beside them, behind the same
operators.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.ops.registry import define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _gate(x: Tensor, gate: Tensor, gate_bias: Tensor | None, act: str) -> Tensor:
    return ACTIVATIONS[act](F.linear(x, gate, gate_bias))


def _times_up(g: Tensor, x: Tensor, up: Tensor | None, up_bias: Tensor | None) -> Tensor:
    return g if up is None else g * F.linear(x, up, up_bias)


def _down(z: Tensor, down: Tensor, down_bias: Tensor | None) -> Tensor:
    return F.linear(z, down.t(), down_bias)


def dense_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
) -> Tensor:
    """The dense MLP. x [B, T, C]; gate, up, down [I, C]; biases [I], [I], [C]; returns [B, T,
    C]. No `up`: a plain MLP.
    """
    z = _times_up(_gate(x, gate, gate_bias, act), x, up, up_bias)
    return _down(z, down, down_bias)


def dense_mlp_statistic(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """The dense MLP, and GRIFFIN's neuron statistic of the tokens where `valid` [B, T] (bool).

    Returns y [B, T, C] and, float32 [B, I], the sum over tokens of (z / ‖z‖₂)² with z = act(gate x)
    · up x (GRIFFIN, arXiv 2404.01365): its square root is the paper's score, and sums of chunks add
    up.
    """
    z = _times_up(_gate(x, gate, gate_bias, act), x, up, up_bias)
    unit = F.normalize(z.float(), dim=-1)
    statistic = (unit.square() * valid[..., None]).sum(1)
    return _down(z, down, down_bias), statistic


def dense_mlp_activity(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """The dense MLP, and the terms of GRIFFIN's statistic token by token.

    Returns y [B, T, C] and (z / ‖z‖₂)², float32 [B, T, I]: summed over the tokens that were kept,
    it is what `dense_mlp_statistic` says of them.
    """
    z = _times_up(_gate(x, gate, gate_bias, act), x, up, up_bias)
    return _down(z, down, down_bias), F.normalize(z.float(), dim=-1).square()


def topk_mlp(
    x: Tensor,
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
    """Per row, only the `keep` neurons of largest |act(gate x)|, summed over the call's T tokens.

    One token is the paper's fine-grained path; the beams of a tree share their neurons, because
    the union of sets of their own would soon be all neurons (Sirius, arXiv 2409.03856).
    """
    g = _gate(x, gate, gate_bias, act)
    score = g.abs().sum(1, keepdim=True)
    kept = torch.zeros_like(score).scatter(-1, score.topk(keep, -1, sorted=False).indices, 1.0)
    return _down(_times_up(g * kept, x, up, up_bias), down, down_bias)


def cats_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Per row, only neurons whose |act(gate x)|, the mean over the call's T tokens, is above
    `threshold` (CATS, arXiv 2404.08763; the beams of a tree share their neurons).

    Returns y [B, T, C] and the number of neurons kept, int64 [B].
    """
    g = _gate(x, gate, gate_bias, act)
    kept = g.abs().mean(1, keepdim=True) > threshold
    y = _down(_times_up(g * kept, x, up, up_bias), down, down_bias)
    return y, kept.sum((1, 2))


def griffin_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    neurons: Tensor,
) -> Tensor:
    """Only the row's own `neurons` [layers, B, K] at `layer`, chosen once per prompt (GRIFFIN)."""
    z = _times_up(_gate(x, gate, gate_bias, act), x, up, up_bias)
    return _down(z * _chosen(z, neurons[layer]), down, down_bias)


def griffin_cats_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    act: str,
    layer: int,
    neurons: Tensor,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """Of the row's own `neurons`, as in `griffin_mlp`, those above `threshold`, as in `cats_mlp`.

    Returns y [B, T, C] and the number of neurons kept, int64 [B].
    """
    g = _gate(x, gate, gate_bias, act)
    kept = (g.abs().mean(1, keepdim=True) > threshold) & _chosen(g, neurons[layer]).bool()
    y = _down(_times_up(g * kept, x, up, up_bias), down, down_bias)
    return y, kept.sum((1, 2))


def _chosen(z: Tensor, neurons: Tensor) -> Tensor:
    """1 for a row's `neurons` [B, K], else 0: [B, 1, I], as `z` [B, T, I]."""
    return z.new_zeros(z.shape[0], z.shape[-1]).scatter(1, neurons, 1.0)[:, None, :]


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _like_and_statistic(x: Tensor, gate: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], gate.shape[0], dtype=torch.float32)


def _like_and_count(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int64)


def _like_and_activity(x: Tensor, gate: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], gate.shape[0], dtype=torch.float32)


_MLP = (
    "Tensor x, Tensor gate, Tensor? up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str act, int layer"
)
define(f"dense_mlp({_MLP}) -> Tensor", dense_mlp, _like)
define(
    f"dense_mlp_statistic({_MLP}, Tensor valid) -> (Tensor, Tensor)",
    dense_mlp_statistic,
    _like_and_statistic,
)
define(f"dense_mlp_activity({_MLP}) -> (Tensor, Tensor)", dense_mlp_activity, _like_and_activity)
define(f"topk_mlp({_MLP}, int keep) -> Tensor", topk_mlp, _like)
define(f"cats_mlp({_MLP}, float threshold) -> (Tensor, Tensor)", cats_mlp, _like_and_count)
define(f"griffin_mlp({_MLP}, Tensor neurons) -> Tensor", griffin_mlp, _like)
define(
    f"griffin_cats_mlp({_MLP}, Tensor neurons, float threshold) -> (Tensor, Tensor)",
    griffin_cats_mlp,
    _like_and_count,
)
