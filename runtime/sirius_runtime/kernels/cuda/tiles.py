"""Sizes of the kernels' tiles, and how many programs share a sum: chosen here and nowhere else.

They are computed from the bytes that an SM needs in flight (some 32 KiB on an H100: bandwidth times
latency, divided by its SMs) and from the registers that the compiler then uses
(`tests/test_triton_compile.py` checks that almost none are spilled). No GPU has run them yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

MOST_TOKENS = 16
"""Tokens of a row that a kernel takes; more are work for real matrix products."""

MOST_NEURONS = 1 << 16
"""Scores that one program holds when it looks for the k-th largest."""

MOST_QUERIES = 64
"""Tokens of a row that the attention kernels take."""

MOST_HEAD = 256
"""Head dimension that they take."""

SELECTED = 1024
"""Scores that a program of the selection takes."""

PARTS, FEATURES = 64, 64
"""Partial sums, and features of each, that a program of the last addition takes at once."""

_PROGRAMS_PER_SM = 4
_MOST_SPLITS = 64


@dataclass(frozen=True)
class Tile:
    """`rows` of a weight by `channels` along them; warps and pipeline stages of a program."""

    rows: int
    channels: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class AttentionTile:
    """Queries and slots of a program's tile; its warps and pipeline stages."""

    queries: int
    slots: int
    warps: int
    stages: int


def padded(tokens: int) -> int:
    """Tokens of a tile: one alone, or as many as the tensor cores take at least."""
    return 1 if tokens == 1 else MOST_TOKENS


def power_of_two(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def _within(size: int, most: int, least: int = 16) -> int:
    return max(least, min(most, power_of_two(size)))


def products(
    tokens: int, rows: int, C: int, dtype: torch.dtype, weights: int, device: torch.device
) -> Tile:
    """For `rows` rows that tokens are multiplied with, of `weights` matrices at once."""
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
    """For rows of a nested weight by outputs, of which a program takes 256 bytes at a time."""
    return Tile(4, 256) if tokens == 1 else Tile(16, 256, warps=8)


def nested_bytes(tokens: int, O: int) -> Tile:  # noqa: E741
    """For the bytes of 32 inputs of a nested weight by inputs."""
    return Tile(32, _within(O // 2, 128 if tokens == 1 else 64))


def sums(tokens: int, C: int, dtype: torch.dtype) -> Tile:
    """For rows that are weighted and added up, C wide."""
    if tokens == 1:
        return Tile(16, _within(C, 512 // (dtype.itemsize // 2)))
    if dtype is torch.float32:
        return Tile(16, _within(C, 64), stages=3)
    return Tile(32, _within(C, 128), stages=4)


def channels(tokens: int, O: int, dtype: torch.dtype) -> Tile:  # noqa: E741
    """For rows that a program has to find first; finding them takes registers for each."""
    if tokens == 1 or dtype is torch.float32:
        return sums(tokens, O, dtype)
    return Tile(16, _within(O, 256), stages=4)


def linear_splits(steps: int, blocks: int, device: torch.device) -> int:
    """Parts of the products of a linear, of `steps` tiles each: more than one costs a launch, so
    only where `blocks` programs would leave SMs idle.
    """
    return 1 if blocks >= processors(device) else splits(steps, blocks, device)


def splits(steps: int, blocks: int, device: torch.device) -> int:
    """Parts of a sum of `steps` tiles, where `blocks` programs would do it in one part."""
    wanted = _PROGRAMS_PER_SM * processors(device) // blocks
    return max(1, min(wanted, _MOST_SPLITS, steps))


def channel_share(C: int, blocks: int, device: torch.device) -> int:
    """Input channels of a program that finds those that are kept among them by itself; `blocks`
    programs share their outputs.
    """
    share = 128  # more take many registers
    return share if blocks * -(-C // share) >= processors(device) else share // 2


def attention(queries: int, D: int, V: int, dtype: torch.dtype) -> AttentionTile:
    """For `queries` of one key/value head; two stages of keys and values have to fit an SM."""
    width = (_within(D, MOST_HEAD) + _within(V, MOST_HEAD)) * dtype.itemsize
    rows = _within(queries, 16 if dtype is torch.float32 else 64)
    slots = 64 if rows < 64 else 32  # else registers don't suffice
    while slots > 16 and 2 * slots * width > 72 << 10:
        slots //= 2
    # Products of float32 keep what they read in registers, which are a thread's share of it.
    return AttentionTile(rows, slots, warps=8 if dtype is torch.float32 else 4, stages=2)


def attention_parts(slots: int, tile: AttentionTile, blocks: int, device: torch.device) -> int:
    """Parts that the slots are split into, the block's own among them: a power of two."""
    wanted = max(2, 2 * processors(device) // blocks)
    most = min(_MOST_SPLITS, power_of_two(-(-slots // tile.slots) + 1))
    return min(1 << wanted.bit_length() - 1, most)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of the GPU's SMs; without a GPU, that of a small one."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
