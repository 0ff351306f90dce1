"""Linear layers for few tokens. Each function returns None if its kernel does not take the
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import nested, tiles
from sirius_runtime.kernels.cuda.arguments import TYPES, given, is_matrix, is_vector
from sirius_runtime.kernels.cuda.device import channels, products
from sirius_runtime.kernels.cuda.launch import launch
from sirius_runtime.kernels.cuda.sums import add_up, sum_of_rows
from sirius_runtime.nested import is_nested

MOST_LINEARS = 4
"""The most weights of one launch."""
_ALIGNED = 8  # elements, at least 16 bytes: the alignment that compiled code expects of a tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """As the reference `sirius_runtime.ops.linear.linear`. A weight that is the transpose of a
    matrix is read as that matrix.
    """
    if is_nested(weight):
        return nested.linear(x, weight, bias)
    if x.dtype not in TYPES or weight.ndim != 2 or x.ndim == 0 or x.numel() == 0:
        return None
    O, C = weight.shape  # noqa: E741
    tokens = x.numel() // x.shape[-1]
    if not (
        x.shape[-1] == C
        and tokens <= tiles.MOST_TOKENS
        and O > 0
        and is_vector(bias, x.dtype, x.device, O)
    ):
        return None
    x_TC = x.reshape(tokens, C).contiguous()
    if is_matrix(weight, x, O, C):
        return _by_outputs(x, x_TC, (weight,), (bias,))[0]
    if is_matrix(weight.t(), x, C, O):
        y = sum_of_rows(x_TC[None], weight.t(), None, None, bias)
        return y.view(*x.shape[:-1], O)
    return None


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...] | None:
    """As the reference `sirius_runtime.ops.linear.linears`: one launch, and a second one to add
    partial sums if the inputs are split.
    """
    if any(map(is_nested, weights)):
        done = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        found = tuple(y for y in done if y is not None)
        return found if len(found) == len(done) else None
    if x.dtype not in TYPES or x.ndim == 0 or x.numel() == 0:
        return None
    C = x.shape[-1]
    tokens = x.numel() // C
    if not (
        1 <= len(weights) == len(biases) <= MOST_LINEARS
        and tokens <= tiles.MOST_TOKENS
        and all(w.ndim == 2 and len(w) > 0 and is_matrix(w, x, len(w), C) for w in weights)
        and all(
            is_vector(bias, x.dtype, x.device, len(weight))
            for weight, bias in zip(weights, biases, strict=True)
        )
    ):
        return None
    return _by_outputs(x, x.reshape(tokens, C).contiguous(), weights, biases)


def _by_outputs(
    x: Tensor, x_TC: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """The outputs as slices of one buffer, each contiguous and aligned like a new tensor."""
    T, C = x_TC.shape
    outputs = [len(weight) for weight in weights]
    tile = tiles.products(T, sum(outputs), C, x.dtype, 1, x.device)
    blocks, steps = sum(-(-n // tile.rows) for n in outputs), -(-C // tile.channels)
    splits = tiles.linear_splits(steps, blocks, x.device)
    steps_per_split = -(-steps // splits)
    splits = -(-steps // steps_per_split)
    before = (-(-T * n // _ALIGNED) * _ALIGNED for n in outputs[:-1])
    starts = list(accumulate(before, initial=0))
    size = starts[-1] + T * outputs[-1]
    y = x.new_empty(size)
    sums = y if splits == 1 else x.new_empty(splits, 1, size, dtype=torch.float32)
    # Unused arguments of the kernel repeat the first weight.
    slots = [*range(len(weights)), *[0] * (MOST_LINEARS - len(weights))]
    launch(
        products.linears,
        (blocks, splits),
        x.device,
        (
            *(x_TC, *(weights[i] for i in slots), *(given(biases[i], x_TC) for i in slots)),
            *(sums, T, C, *(outputs[i] for i in slots)),
            *(C, *(weights[i].stride(0) for i in slots), steps_per_split * tile.channels, size),
        ),
        tile,
        COUNT=len(weights),
        BIASES=sum(1 << i for i, bias in enumerate(biases) if bias is not None),
        ALIGNED=_ALIGNED,
        TOKENS=tiles.padded(T),
        ROWS=tile.rows,
        CHANNELS=tile.channels,
    )
    if splits > 1:
        add_up(sums, None, y)
    return tuple(
        y[start : start + T * n].view(*x.shape[:-1], n)
        for start, n in zip(starts, outputs, strict=True)
    )


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor] | None:
    """As the reference `sirius_runtime.ops.linear.sparse_linear`."""
    if is_nested(weight):
        kept = x.float().abs().mean(1, keepdim=True) > threshold
        y = nested.linear(x * kept, weight, bias)
        return None if y is None else (y, kept.sum((1, 2)))
    if x.dtype not in TYPES or x.ndim != 3 or weight.ndim != 2 or x.numel() == 0:
        return None
    B, T, C = x.shape
    O = weight.shape[1]  # noqa: E741
    if not (
        T <= tiles.MOST_TOKENS
        and O > 0
        and is_matrix(weight, x, C, O)
        and is_vector(bias, x.dtype, x.device, O)
    ):
        return None
    x = x.contiguous()
    tile = tiles.channels(T, O, x.dtype)
    blocks = B * -(-O // tile.channels)
    share = tiles.channel_share(C, blocks, x.device)
    splits = -(-C // share)
    partials = x.new_empty(splits, B * T, O, dtype=torch.float32)
    counts = x.new_empty(splits, B, dtype=torch.int32)
    launch(
        channels.kept_channels,
        (blocks, splits),
        x.device,
        (
            *(x, weight, partials, counts),
            *(threshold, B, T, C, O, weight.stride(0)),
        ),
        tile,
        TOKENS=tiles.padded(T),
        SHARE=share,
        ROWS=tile.rows,
        OUTPUTS=tile.channels,
    )
    return add_up(partials, bias, x.new_empty(B, T, O)), counts.sum(0)
