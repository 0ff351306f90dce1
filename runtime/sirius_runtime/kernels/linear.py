"""Linears on the CPU: the kernels at few tokens, else torch's matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import (
    BFLOAT16_LINEAR,
    BFLOAT16_MLP,
    MOST_TOKENS,
    TYPES,
    address,
    check,
    fits,
    is_matrix,
    is_vector,
)
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import linear as reference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear`. A weight that is the transpose of a matrix is read as that matrix."""
    kind = TYPES.get(x.dtype)
    if kind is None or weight.ndim != 2 or x.ndim == 0:
        return reference.linear(x, weight, bias)
    outputs, C = weight.shape
    tokens = x.numel() // C if C else 0
    by_inputs = weight.stride(1) != 1
    if not (
        fits(tokens, 1, x.dtype, BFLOAT16_MLP if by_inputs else BFLOAT16_LINEAR)
        and x.shape[-1] == C
        and is_matrix(weight.t() if by_inputs else weight, x.dtype)
        and is_vector(bias, x.dtype, outputs)
        and (library := kernels()) is not None
    ):
        return reference.linear(x, weight, bias)
    given = x.contiguous()
    y = given.new_empty(*x.shape[:-1], outputs)
    status = library.sirius_linear(
        kind,
        given.data_ptr(),
        weight.data_ptr(),
        weight.stride(1 if by_inputs else 0),
        by_inputs,
        address(bias),
        y.data_ptr(),
        tokens,
        C,
        outputs,
        torch.get_num_threads(),
    )
    check(status, "linear")
    return y


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """As `reference.sparse_linear`."""
    kind = TYPES.get(x.dtype)
    if not (
        kind is not None
        and x.ndim == 3
        and x.shape[1] <= MOST_TOKENS
        and fits(x.shape[1], x.shape[0], x.dtype, x.shape[0] * MOST_TOKENS)
        and is_matrix(weight, x.dtype)
        and x.shape[2] == weight.shape[0]
        and is_vector(bias, x.dtype, weight.shape[1])
        and is_vector(norm, torch.float32, weight.shape[0])
        and (library := kernels()) is not None
    ):
        return reference.sparse_linear(x, weight, bias, norm, threshold)
    B, T, C = x.shape
    outputs = weight.shape[1]
    given = x.contiguous()
    y, counts = given.new_empty(B, T, outputs), given.new_empty(B, dtype=torch.int64)
    status = library.sirius_sparse_linear(
        kind,
        given.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        address(bias),
        address(norm),
        threshold,
        y.data_ptr(),
        counts.data_ptr(),
        B,
        T,
        C,
        outputs,
        torch.get_num_threads(),
    )
    check(status, "sparse_linear")
    return y, counts
