"""Linears, and linears that skip input channels (TEAL, arXiv 2408.14690).

The weight of those that skip is input-major, [C, O]: a channel is one contiguous row, so that
skipping it skips the row. The reference computes every channel and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.graph_rules import Array, made, need
from sirius_runtime.ops.rules import (
    counts,
    need_finite,
    need_model,
    need_rank,
    need_shape,
    need_some,
    tokens,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., C], weight [O, C], bias [O]; returns [..., O].

    Graphs say ``aten.linear``; the eager back end runs this in its place on the CPU, where a kernel
    stands behind it.
    """
    return F.linear(x, weight, bias)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`linear` of each weight and its bias, all of one x.

    No graph says so: device graphs call it for the queries, keys and values of a layer, which are
    then one call of a kernel.
    """
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Per row, only the input channels with |x|, the mean over the call's T tokens, above
    `threshold`.

    x [B, T, C]; weight [C, O]; bias [O]. Returns y [B, T, O] and the number of channels kept, int64
    [B]. The beams of a tree share their channels, because the union of sets of their own would soon
    be all channels.
    """
    kept = x.float().abs().mean(1, keepdim=True) > threshold
    y = (x * kept) @ weight
    return y if bias is None else y + bias, kept.sum((1, 2))


def all_channels(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
    """`sparse_linear` where nothing is skipped."""
    return F.linear(x, weight.mT, bias)


def channel_scores(x: Tensor, *_: object) -> Tensor:
    """What `sparse_linear` compares of each token with its threshold, [B, T, C]."""
    return x.float().abs()


def fake_sparse_linear(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[1]), x.new_empty(x.shape[0], dtype=torch.int64)


def fake_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def fake_linears(x: Tensor, weights: Sequence[Tensor], _: object) -> list[Tensor]:
    return [fake_linear(x, weight) for weight in weights]


def sparse_linear_rule(
    x: Array, weight: Array, bias: Array | None, threshold: float
) -> tuple[Array, Array]:
    B, T = tokens(x)
    need_model(x=x, weight=weight, bias=bias)
    need_rank("weight", weight, 2)
    need_some(x=x, weight=weight)
    C, O = weight.shape  # noqa: E741
    need(x.shape[2] == C, f"x {x} does not go through weight {weight}")
    need_shape("bias", bias, O)
    need_finite(threshold=threshold)
    return made(x.dtype, (B, T, O)), counts(x)
