"""Linears on the CPU: the kernels at few tokens, else torch's matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import (
    MOST_TOKENS,
    TYPES,
    check,
    fits,
    is_matrix,
    is_vector,
    matrix,
    vector,
)
from sirius_runtime.kernels.native import kernels
from sirius_runtime.ops import linear as reference

MOST_LINEARS = 8
"""Weights that one call takes, as in ``csrc/cpu.cpp``."""

# The structs of ``csrc/cpu.cpp``: LinearOperands, as many of them, and SparseOperands.
_LINEARS = [Struct(f"={7 * count}q") for count in range(MOST_LINEARS + 1)]
_SPARSE = Struct("=12q")


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
        and all(is_matrix(weight, x.dtype) for weight in weights)
        and all(is_vector(bias, x.dtype) for bias in biases)
        and (library := kernels()) is not None
    ):
        return tuple(map(reference.linear, [x] * len(weights), weights, biases))
    given = x.contiguous()
    ys, operands = [], []
    for weight, bias in zip(weights, biases, strict=True):
        y = given.new_empty(*x.shape[:-1], weight.shape[0])
        ys.append(y)
        operands += [*matrix(weight), *vector(bias), y.data_ptr()]
    status = library.sirius_linears(
        kind,
        given.data_ptr(),
        tokens,
        C,
        _LINEARS[len(ys)].pack(*operands),
        len(ys),
        torch.get_num_threads(),
    )
    check(library, status, "linear")
    return tuple(ys)


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
        and is_matrix(stored := weight.t(), x.dtype)
        and is_vector(bias, x.dtype)
        and (library := kernels()) is not None
    ):
        return reference.linear(x, weight, bias)
    given = x.contiguous()
    y = given.new_empty(*x.shape[:-1], outputs)
    status = library.sirius_linear_by_inputs(
        kind,
        given.data_ptr(),
        tokens,
        C,
        _LINEARS[1].pack(*matrix(stored), *vector(bias), y.data_ptr()),
        torch.get_num_threads(),
    )
    check(library, status, "linear")
    return y


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """As `reference.sparse_linear`."""
    kind = TYPES.get(x.dtype)
    if not (
        kind is not None
        and x.ndim == 3
        and x.shape[1] <= MOST_TOKENS
        and fits(x.shape[1], x.shape[0], x.dtype, x.shape[0] * MOST_TOKENS)
        and is_matrix(weight, x.dtype)
        and is_vector(bias, x.dtype)
        and (library := kernels()) is not None
    ):
        return reference.sparse_linear(x, weight, bias, threshold)
    B, T, _ = x.shape
    given = x.contiguous()
    y, counts = given.new_empty(B, T, weight.shape[1]), given.new_empty(B, dtype=torch.int64)
    status = library.sirius_sparse_linear(
        kind,
        _SPARSE.pack(
            given.data_ptr(), *given.shape, *matrix(weight), *vector(bias),
            y.data_ptr(), counts.data_ptr(),
        ),
        threshold,
        torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, "sparse_linear")
    return y, counts
