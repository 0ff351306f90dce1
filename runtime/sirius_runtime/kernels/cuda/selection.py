"""Lists of live neurons, made on the device: the host never reads their number."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sirius_runtime.kernels.cuda import tiles
from sirius_runtime.kernels.cuda.arguments import given
from sirius_runtime.kernels.cuda.device import selection
from sirius_runtime.kernels.cuda.launch import launch

# Bits that are zero at the end of a float32 that was rounded to the type.
_LOWEST_BIT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@dataclass(frozen=True)
class Live:
    """Of B rows, the live ones of K neurons; below `count`, the rest is undefined."""

    positions: Tensor
    """[B, K], int32: their places among the K, in order."""
    rows: Tensor
    """[B, K], int32: the rows of the weights that are theirs."""
    count: Tensor
    """[B], int64."""


def above(score: Tensor, threshold: float, listed: Tensor | None, dtype: torch.dtype) -> Live:
    """Those of score [B, K], float32, above `threshold` as it is stored in `dtype`; `listed`
    [B, K] are their rows, if not 0 … K - 1.
    """
    return _select(score, None, listed, _as_stored(threshold, dtype), 0)


def largest(score: Tensor, keep: int, dtype: torch.dtype) -> Live:
    """The `keep` largest of score [B, K], float32 that were rounded to `dtype`; of equal ones, the
    first.
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


@functools.cache
def _as_stored(threshold: float, dtype: torch.dtype) -> float:
    """`threshold` in that type, as torch takes a number that is compared with a tensor."""
    return torch.tensor(threshold, dtype=dtype).item()
