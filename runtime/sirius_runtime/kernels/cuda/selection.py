"""Lists of the neurons to compute, made on the device: the host never reads their number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import as_stored
from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import given
from sirius_runtime.kernels.cuda.device import selection
from sirius_runtime.kernels.cuda.launch import launch

# How many low bits of a float32 are zero after it was rounded to the type.
_LOWEST_BIT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@dataclass(frozen=True)
class Live:
    """The live neurons among K candidates, for B rows. Entries from `count` on are undefined."""

    positions: Tensor
    """[B, K], int32: their indices among the K candidates, ascending."""
    rows: Tensor
    """[B, K], int32: their rows in the weights."""
    count: Tensor
    """[B], int64: their number."""


def above(score: Tensor, threshold: float, listed: Tensor | None, dtype: torch.dtype) -> Live:
    """The neurons with a score [B, K], float32, above `threshold`, which is rounded to `dtype`
    first. listed: the candidates' rows in the weights [B, K]; None for 0 … K - 1.
    """
    return _select(score, None, listed, as_stored(threshold, dtype), 0)


def largest(score: Tensor, keep: int, dtype: torch.dtype) -> Live:
    """The neurons with the `keep` largest scores; of equal scores, the first. score [B, K], float32
    rounded to `dtype`.
    """
    B, K = score.shape
    kth = score.new_empty(B, dtype=torch.int32)
    block = tiles.power_of_two(K)
    launch(
        selection.kth_largest,
        (B,),
        score.device,
        (score, kth, K, keep),
        tiles.Tile(0, 0, warps=max(1, min(32, block // 512))),
        LOWEST_BIT=_LOWEST_BIT[dtype],
        BLOCK=block,
    )
    return _select(score, kth, None, 0.0, keep)


def _select(
    score: Tensor, kth: Tensor | None, listed: Tensor | None, threshold: float, keep: int
) -> Live:
    B, K = score.shape
    positions = score.new_empty(B, K, dtype=torch.int32)
    rows = positions if listed is None else torch.empty_like(positions)
    count = score.new_empty(B, dtype=torch.int64)
    launch(
        selection.select,
        (-(-K // tiles.SELECTED), B),
        score.device,
        (
            *(score, given(kth, positions), given(listed, positions), positions, rows, count),
            *(threshold, K, keep),
        ),
        tiles.Tile(0, 0),
        HAS_LIST=listed is not None,
        TOPK=kth is not None,
        BLOCK=tiles.SELECTED,
    )
    return Live(positions, rows, count)
