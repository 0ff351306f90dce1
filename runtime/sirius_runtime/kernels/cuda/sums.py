"""Weighted sums of a matrix's rows: partial sums, and their addition in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import given
from sirius_runtime.kernels.cuda.device import sums
from sirius_runtime.kernels.cuda.launch import launch


def sum_of_rows(
    z: Tensor, weight: Tensor, rows: Tensor | None, count: Tensor | None, bias: Tensor | None
) -> Tensor:
    """y [B, T, C] = Σ_j z_j · weight[rows_j] + bias, over j < count.

    z [B, T, K]; weight [I, C]; rows [B, K], or None for the weight's first K rows; count [B],
    int64, or None for K; bias [C].
    """
    B, T, K = z.shape
    I, C = weight.shape  # noqa: E741
    tile = tiles.sums(T, C, z.dtype)
    blocks = B * -(-C // tile.channels)
    splits = tiles.splits(-(-K // tile.rows), blocks, z.device)
    partials = z.new_empty(splits, B * T, C, dtype=torch.float32)
    launch(
        sums.weighted_rows,
        (blocks, splits),
        z.device,
        (
            *(z, weight, given(rows, z), given(count, z), partials),
            *(B, T, K, I, C, K, weight.stride(0), splits),
        ),
        tile,
        HAS_ROWS=rows is not None,
        HAS_COUNT=count is not None,
        TOKENS=tiles.padded(T),
        ROWS=tile.rows,
        CHANNELS=tile.channels,
    )
    return add_up(partials, bias, z.new_empty(B, T, C))


def add_up(partials: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y = Σ partials + bias; partials [splits, N, C], float32; bias [C]; y has N · C elements."""
    splits, N, C = partials.shape
    channels = min(tiles.FEATURES, tiles.power_of_two(C))
    launch(
        sums.add_up,
        (-(-C // channels), N),
        y.device,
        (partials, given(bias, y), y, N, C, splits),
        tiles.Tile(0, 0),
        HAS_BIAS=bias is not None,
        PARTS=min(tiles.PARTS, tiles.power_of_two(splits)),
        CHANNELS=channels,
    )
    return y
