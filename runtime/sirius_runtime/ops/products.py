"""Matrix products in PyTorch, faster for 16-bit dtypes for which the CPU has no instructions.

PyTorch emulates such products. It takes a fraction of the time to convert the weights to float32
block by block, each block small enough for the CPU's cache. On a Sapphire Rapids guest without
avx512_bf16, two threads, a weight [8960, 1536] and 360 tokens, in ms:

    bfloat16   torch 186    its transpose 186     by blocks 43    its transpose 53
    float16    torch 419    its transpose 8,114   by blocks 43    its transpose 48
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 20
"""Elements of a weight that are converted at a time: 4 MB of float32."""

_NEEDED = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16"},
}
"""Flags of /proc/cpuinfo; a CPU with one of them has the instructions for the dtype."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of x [..., C], weight [O, C] (which may be a transposed view)
    and bias [O]: [..., O].
    """
    # Fake tensors, as when a compiler traces, are left to torch.
    if type(x) is not Tensor or x.device.type != "cpu" or not emulated(x.dtype):
        return F.linear(x, weight, bias)
    if weight.ndim != 2 or weight.dtype is not x.dtype:
        return F.linear(x, weight, bias)  # raises torch's error
    if _converted is not None:
        key = (weight.data_ptr(), weight.shape, weight.stride())
        if key not in _converted:
            _converted[key] = weight, weight.float()
        own = None if bias is None else bias.float()
        return F.linear(x.float(), _converted[key][1], own).to(x.dtype)
    outputs, wide = weight.shape[0], x.float()
    y = x.new_empty(*x.shape[:-1], outputs)
    rows = max(1, BLOCK // max(1, weight.shape[1]))
    part = weight[:rows].float()
    for start in range(0, outputs, rows):
        end = min(start + rows, outputs)
        if start:  # reuses the memory of the first block
            part = part[: end - start].copy_(weight[start:end])
        own = None if bias is None else bias[start:end].float()
        y[..., start:end] = F.linear(wide, part, own)
    return y


_converted: dict[Any, tuple[Tensor, Tensor]] | None = None  # weights, and their float32 copies


@contextmanager
def converted_once() -> Iterator[None]:
    """Within this context, `product` keeps the float32 copies of weights, on all threads. For a few
    weights that are multiplied many times.
    """
    global _converted
    before, _converted = _converted, {}
    try:
        yield
    finally:
        _converted = before


@functools.cache
def emulated(dtype: torch.dtype) -> bool:
    """Whether torch emulates products of that dtype, because the CPU has no instructions."""
    if dtype not in _NEEDED:
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), None)
    return flags is not None and not _NEEDED[dtype] & set(flags)
