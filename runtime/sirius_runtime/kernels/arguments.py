"""What tensors the CPU kernels take, and how they are handed over. Shape letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the types in ``csrc/cpu.cpp``."""

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "quick_gelu": 4, "relu2": 5}
"""Numbers of the activations in ``csrc/activations.h``; others are left to the references."""

MOST_TOKENS = 64
"""Tokens that a kernel takes; its buffers in ``csrc/mlp.h`` have room for no more of a row."""

BFLOAT16_TOKENS = 48
"""As MOST_TOKENS, of all rows together, in bfloat16, which torch multiplies by oneDNN: on two Zen 5
cores at hidden size 2048 the kernels took half to 0.7 of its time at 16 tokens, as long at 48, and
up to 1.08 times as long at 64. In float32 they take half at 64 still."""


def fits(tokens: int, rows: int, dtype: torch.dtype, bfloat16: int = BFLOAT16_TOKENS) -> bool:
    """Whether a call of `rows` rows of `tokens` is one for kernels, which in bfloat16 take
    `bfloat16` tokens in all.

    The limit is the same for every kernel: so the full path and the sparse path, one token and a
    period, are added up in the same order, and what is equal is so to the bit.
    """
    most = bfloat16 if dtype is torch.bfloat16 else MOST_TOKENS
    return 1 <= tokens * rows <= most


def is_matrix(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `weight` is a matrix of that type on the CPU whose rows are contiguous."""
    return (
        weight.dtype is dtype
        and weight.ndim == 2
        and weight.stride(1) == 1
        and weight.device.type == "cpu"
    )


def is_vector(bias: Tensor | None, dtype: torch.dtype, size: int) -> bool:
    """Whether `bias` is none, or a contiguous vector of that type and size."""
    return bias is None or (bias.dtype is dtype and bias.shape == (size,) and bias.stride(0) == 1)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check(status: int, operator: str) -> None:
    """Raises for what a kernel returned."""
    if status == 1:
        raise MemoryError(f"sirius::{operator}: no memory for its sums; run fewer rows at once")
    if status == 2:
        raise IndexError(f"sirius::{operator}: neurons or slots hold an index out of range")
