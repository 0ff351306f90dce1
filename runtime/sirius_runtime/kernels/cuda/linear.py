"""Linears at few tokens. Each function returns None where its kernel does not serve."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import TYPES, given, is_matrix, is_vector
from sirius_runtime.kernels.cuda.device import channels, products
from sirius_runtime.kernels.cuda.launch import launch
from sirius_runtime.kernels.cuda.sums import add_up, sum_of_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """As the reference `sirius_runtime.ops.linear.linear`. A weight that is the transpose of a
    matrix is read as that matrix.
    """
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
        y = _by_outputs(x_TC, weight, bias)
    elif is_matrix(weight.t(), x, C, O):
        y = sum_of_rows(x_TC[None], weight.t(), None, None, bias)
    else:
        return None
    return y.view(*x.shape[:-1], O)


def _by_outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    T, C = x.shape
    O = weight.shape[0]  # noqa: E741
    tile = tiles.products(T, O, C, x.dtype, 1, x.device)
    blocks, steps = -(-O // tile.rows), -(-C // tile.channels)
    splits = tiles.linear_splits(steps, blocks, x.device)
    each = -(-steps // splits)
    splits = -(-steps // each)
    y = x.new_empty(T, O)
    sums = y if splits == 1 else x.new_empty(splits, T, O, dtype=torch.float32)
    launch(
        products.linear,
        (blocks, splits),
        x.device,
        (x, weight, given(bias, x), sums, T, C, O, C, weight.stride(0), each * tile.channels),
        tile,
        HAS_BIAS=bias is not None and splits == 1,
        PARTIAL=splits > 1,
        TOKENS=tiles.padded(T),
        ROWS=tile.rows,
        CHANNELS=tile.channels,
    )
    return y if splits == 1 else add_up(sums, bias, y)


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor] | None:
    """As the reference `sirius_runtime.ops.linear.sparse_linear`."""
    if x.dtype not in TYPES or x.ndim != 3 or weight.ndim != 2 or x.numel() == 0:
        return None
    B, T, C = x.shape
    O = weight.shape[1]  # noqa: E741
    if not (
        T <= tiles.MOST_TOKENS
        and O > 0
        and is_matrix(weight, x, C, O)
        and is_vector(bias, x.dtype, x.device, O)
        and is_vector(norm, torch.float32, x.device, C)
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
            *(x, weight, given(norm, x), partials, counts),
            *(threshold, B, T, C, O, weight.stride(0)),
        ),
        tile,
        HAS_NORM=norm is not None,
        TOKENS=tiles.padded(T),
        SHARE=share,
        ROWS=tile.rows,
        OUTPUTS=tile.channels,
    )
    return add_up(partials, bias, x.new_empty(B, T, O)), counts.sum(0)
