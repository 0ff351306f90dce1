"""What tensors the CPU kernels take, and how they are handed over. Shape letters as in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of the types in ``csrc/cpu.cpp``."""

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""Numbers of the activations in ``csrc/activations.h``; others are left to the references."""

MOST_TOKENS = 64
"""Tokens of a row that a kernel takes; its buffers in ``csrc/mlp.h`` have room for no more."""


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
    return bias is None or (
        bias.dtype is dtype and bias.shape == (size,) and bias.stride(0) == 1
    )


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def check(status: int, operator: str) -> None:
    """Raises for what a kernel returned."""
    if status == 1:
        raise MemoryError(f"sirius::{operator}: no memory for its sums; run fewer rows at once")
    if status == 2:
        raise IndexError(f"sirius::{operator}: `neurons` names one that the MLP does not have")
