"""The kernels' tile sizes, and into how many parts sums are split. No other module chooses these.

They follow from the bytes that an SM needs in flight (about 32 KiB on an H100: bandwidth times
latency, divided by the number of SMs) and from the registers that the compiler then uses
(`tests/test_triton_compile.py` checks that almost none are spilled). No GPU has run them yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

MOST_TOKENS = 16
"""The most tokens of a row that a kernel takes; for more, cuBLAS's matrix products are better."""

MOST_NEURONS = 1 << 16
"""The most scores among which one program finds the k-th largest."""

MOST_QUERIES = 64
"""The most tokens of a row that the attention kernels take."""

MOST_HEAD = 256
"""The largest head dimension that they take."""

SELECTED = 1024
"""Scores per program of the selection kernel."""

PARTS, FEATURES = 64, 64
"""Partial sums and features that a program of the final addition loads at once."""

_PROGRAMS_PER_SM = 4
_MOST_SPLITS = 64


@dataclass(frozen=True)
class Tile:
    """A tile of `rows` rows and `channels` columns of a weight; a program's warps and stages."""

    rows: int
    channels: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class AttentionTile:
    """The queries and K/V slots of a program's tile; its warps and pipeline stages."""

    queries: int
    slots: int
    warps: int
    stages: int


def padded(tokens: int) -> int:
    """Tokens of a tile: 1, or 16, the least that the tensor cores take."""
    return 1 if tokens == 1 else MOST_TOKENS


def power_of_two(size: int) -> int:
    """The smallest power of two >= `size`."""
    return 1 << max(size - 1, 0).bit_length()


def _within(size: int, most: int, least: int = 16) -> int:
    return max(least, min(most, power_of_two(size)))


def products(
    tokens: int, rows: int, C: int, dtype: torch.dtype, weights: int, device: torch.device
) -> Tile:
    """The tile for products with `rows` rows [C] of `weights` matrices at once."""
    if tokens == 1:
        most, least, wanted = 4, 2, _PROGRAMS_PER_SM
        tile = Tile(most, _within(C, 2048 // weights // (dtype.itemsize // 2)))
    else:
        most, least, wanted = 32, 16, 2
        tile = Tile(most, _within(C, 128), stages=4)
        if dtype is torch.float32:
            return Tile(least, _within(C, 32), stages=3)
    few = -(-rows // most) < wanted * processors(device)
    return replace(tile, rows=least) if few else tile


def nested_rows(tokens: int) -> Tile:
    """The tile for a nested weight by outputs: rows, and bytes of a row that are read at once."""
    return Tile(4, 256) if tokens == 1 else Tile(16, 256, warps=8)


def nested_bytes(tokens: int, O: int) -> Tile:  # noqa: E741
    """The tile for a nested weight by inputs: the rows of 32 inputs, and bytes along them."""
    return Tile(32, _within(O // 2, 128 if tokens == 1 else 64))


def sums(tokens: int, C: int, dtype: torch.dtype) -> Tile:
    """The tile for weighted sums of rows [C]."""
    if tokens == 1:
        return Tile(16, _within(C, 512 // (dtype.itemsize // 2)))
    if dtype is torch.float32:
        return Tile(16, _within(C, 64), stages=3)
    return Tile(32, _within(C, 128), stages=4)


def channels(tokens: int, O: int, dtype: torch.dtype) -> Tile:  # noqa: E741
    """The tile for weighted sums of rows that the program must find, which takes registers."""
    if tokens == 1 or dtype is torch.float32:
        return sums(tokens, O, dtype)
    return Tile(16, _within(O, 256), stages=4)


def linear_splits(steps: int, blocks: int, device: torch.device) -> int:
    """Into how many parts to split the sums of a linear layer, each of `steps` tiles. More than one
    costs a second launch, so it splits only if `blocks` programs would leave SMs idle.
    """
    return 1 if blocks >= processors(device) else splits(steps, blocks, device)


def splits(steps: int, blocks: int, device: torch.device) -> int:
    """Into how many parts to split sums of `steps` tiles; unsplit, `blocks` programs run."""
    wanted = _PROGRAMS_PER_SM * processors(device) // blocks
    return max(1, min(wanted, _MOST_SPLITS, steps))


def channel_share(C: int, blocks: int, device: torch.device) -> int:
    """Input channels per program, if each program finds the kept ones among its channels; `blocks`
    programs cover the outputs.
    """
    share = 128  # more would take too many registers
    return share if blocks * -(-C // share) >= processors(device) else share // 2


def attention(queries: int, D: int, V: int, dtype: torch.dtype) -> AttentionTile:
    """The tile for `queries` queries of one key/value head. Two stages of keys and values must fit
    the SM's shared memory.
    """
    width = (_within(D, MOST_HEAD) + _within(V, MOST_HEAD)) * dtype.itemsize
    rows = _within(queries, 16 if dtype is torch.float32 else 64)
    slots = 64 if rows < 64 else 32  # more would spill registers
    while slots > 16 and 2 * slots * width > 72 << 10:
        slots //= 2
    # float32 products keep their operands in registers; more warps mean fewer per thread.
    return AttentionTile(rows, slots, warps=8 if dtype is torch.float32 else 4, stages=2)


def attention_parts(slots: int, tile: AttentionTile, blocks: int, device: torch.device) -> int:
    """Into how many parts to split the slots, including the block's part: a power of two."""
    wanted = max(2, 2 * processors(device) // blocks)
    most = min(_MOST_SPLITS, power_of_two(-(-slots // tile.slots) + 1))
    return min(1 << wanted.bit_length() - 1, most)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of the GPU's SMs; 4 without a GPU, for tests."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
