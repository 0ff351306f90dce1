"""Linears on the CPU: the kernels at few tokens, else torch's matrix products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import (
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

MOST_LINEARS = 8
"""Weights that one call takes, as in ``csrc/cpu.cpp``."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear`. A weight that is the transpose of a matrix is read as that matrix."""
    if weight.ndim == 2 and weight.stride(1) != 1:
        return _by_inputs(x, weight, bias)
    return linears(x, (weight,), (bias,))[0]


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """As `reference.linears`: what waits for all threads, waits once."""
    kind = TYPES.get(x.dtype)
    C = x.shape[-1] if x.ndim else 0
    tokens = x.numel() // C if C else 0
    if not (
        kind is not None
        and len(weights) <= MOST_LINEARS
        and fits(tokens, 1, x.dtype)
        and all(is_matrix(weight, x.dtype) and weight.shape[1] == C for weight in weights)
        and all(is_vector(b, x.dtype, w.shape[0]) for w, b in zip(weights, biases, strict=True))
        and (library := kernels()) is not None
    ):
        return tuple(map(reference.linear, [x] * len(weights), weights, biases))
    given = x.contiguous()
    outputs = [weight.shape[0] for weight in weights]
    ys = tuple(given.new_empty(*x.shape[:-1], count) for count in outputs)
    pointers, numbers = ctypes.c_void_p * len(ys), ctypes.c_int64 * len(ys)
    status = library.sirius_linears(
        kind,
        given.data_ptr(),
        len(ys),
        pointers(*(weight.data_ptr() for weight in weights)),
        numbers(*(weight.stride(0) for weight in weights)),
        pointers(*map(address, biases)),
        pointers(*(y.data_ptr() for y in ys)),
        numbers(*outputs),
        tokens,
        C,
        torch.get_num_threads(),
    )
    check(status, "linear")
    return ys


def _by_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of the transpose of a matrix."""
    kind = TYPES.get(x.dtype)
    outputs, C = weight.shape
    tokens = x.numel() // C if C else 0
    if not (
        kind is not None
        and x.ndim > 0
        and fits(tokens, 1, x.dtype)
        and x.shape[-1] == C
        and is_matrix(weight.t(), x.dtype)
        and is_vector(bias, x.dtype, outputs)
        and (library := kernels()) is not None
    ):
        return reference.linear(x, weight, bias)
    given = x.contiguous()
    y = given.new_empty(*x.shape[:-1], outputs)
    status = library.sirius_linear_by_inputs(
        kind,
        given.data_ptr(),
        weight.data_ptr(),
        weight.stride(1),
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
