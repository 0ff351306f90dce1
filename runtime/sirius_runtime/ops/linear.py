"""Linears, and linears that skip input channels (TEAL, arXiv 2408.14690).

The weight of those that skip is input-major, [C, O]: a channel is one contiguous row, so that
skipping it skips the row. The reference computes every channel and masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime.ops.registry import define


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


def _fake_sparse_linear(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], weight.shape[1]), x.new_empty(x.shape[0], dtype=torch.int64)


def _fake_linear(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_linears(x: Tensor, weights: Sequence[Tensor], _: object) -> list[Tensor]:
    return [_fake_linear(x, weight) for weight in weights]


define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", linear, _fake_linear)
define("linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]", linears, _fake_linears)
define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, float threshold) -> (Tensor, Tensor)",
    sparse_linear,
    _fake_sparse_linear,
)
