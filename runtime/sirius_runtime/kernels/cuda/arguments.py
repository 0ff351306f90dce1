"""Which tensors the CUDA kernels take."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"})
"""The activations of ``device/arithmetic.py``; others run in the references."""


def is_matrix(weight: Tensor, x: Tensor, rows: int, columns: int) -> bool:
    """Whether `weight` [rows, columns] has contiguous rows, and the type and device of `x`."""
    return (
        weight.dtype is x.dtype
        and weight.device == x.device
        and weight.shape == (rows, columns)
        and weight.stride(1) == 1
    )


def is_vector(vector: Tensor | None, dtype: torch.dtype, device: torch.device, size: int) -> bool:
    """Whether `vector` is None, or a contiguous [size] of that type and on that device."""
    return vector is None or (
        vector.dtype is dtype
        and vector.device == device
        and vector.shape == (size,)
        and vector.stride(0) == 1
    )


def given(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """`tensor`, or for None the tensor `stand_in`, which the kernel does not read."""
    return stand_in if tensor is None else tensor
