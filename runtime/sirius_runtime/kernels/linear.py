"""Linear layers on the CPU: our kernels for few tokens, else torch's matrix products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from struct import Struct

import torch
import torch.nn.functional as F
from torch import Tensor

from sirius_runtime import nested
from sirius_runtime.kernels.arguments import (
    BFLOAT16_TOKENS,
    MOST_TOKENS,
    TYPES,
    address,
    check,
    fits,
    is_matrix,
    is_nested_by,
    is_vector,
    matrix,
    nested_matrix,
    vector,
)
from sirius_runtime.kernels.native import kernels
from sirius_runtime.nested import Layout, in_blocks, in_steps, is_nested, matrix_shape
from sirius_runtime.ops import linear as reference
from sirius_runtime.ops.products import emulated

MOST_LINEARS = 8
"""The most weights of one call, as in ``csrc/cpu.cpp``."""

# The structs of ``csrc/cpu.cpp``: so many LinearOperands, and SparseOperands.
_LINEARS = [Struct(f"={7 * count}q") for count in range(MOST_LINEARS + 1)]
_SPARSE = Struct("=12q")
_NESTED_LINEARS = [Struct(f"={10 * count}q") for count in range(MOST_LINEARS + 1)]
_NESTED_SPARSE = Struct("=15q")
_UNNEST = Struct("=9q")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear`. A weight that is the transpose of a matrix is read as that matrix."""
    if is_nested(weight):
        return nested_linears(x, (weight,), (bias,))[0]
    if weight.ndim == 2 and weight.stride(1) != 1:
        return _by_inputs(x, weight, bias)
    return linears(x, (weight,), (bias,))[0]


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """As `reference.linears`. One call for all weights synchronises the threads only once."""
    if is_nested(weights[0]):
        return nested_linears(x, weights, biases)
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
    if is_nested(weight):
        return _nested_sparse_linear(x, weight, bias, threshold)
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


# Nested weights


def nested_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`linears` for nested weights."""
    kind = TYPES.get(x.dtype)
    C = x.shape[-1] if x.ndim else 0
    tokens = x.numel() // C if C else 0
    if not (
        kind is not None
        and len(weights) <= MOST_LINEARS
        and fits(tokens, 1, x.dtype)
        and all(is_nested_by(weight, Layout.BY_OUTPUTS) for weight in weights)
        and all(is_vector(bias, x.dtype) for bias in biases)
        and (library := kernels()) is not None
    ):
        return tuple(map(_nested_linear, [x] * len(weights), weights, biases))
    given = x.contiguous()
    ys, operands = [], []
    for weight, bias in zip(weights, biases, strict=True):
        y = given.new_empty(*x.shape[:-1], weight.shape[1])
        ys.append(y)
        operands += [*nested_matrix(weight), *vector(bias), y.data_ptr()]
    status = library.sirius_nested_linears(
        kind,
        given.data_ptr(),
        tokens,
        C,
        _NESTED_LINEARS[len(ys)].pack(*operands),
        len(ys),
        torch.get_num_threads(),
    )
    check(library, status, "linear")
    return tuple(ys)


def _nested_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` with one nested weight in the by-inputs layout, or for many tokens."""
    if x.dtype not in TYPES or not weight.is_cpu or kernels() is None:
        return reference.linear(x, weight, bias)
    if (y := _in_parts(x, weight, bias)) is not None:
        return y
    given = in_steps(x).to(x.dtype)
    y = x.new_empty(*x.shape[:-1], matrix_shape(tuple(weight.shape))[0])
    for outputs, part in in_blocks(weight):
        plain = unnest(part, x.dtype)
        if plain is None:
            return reference.linear(x, weight, bias)
        y[..., outputs] = F.linear(given, plain, None if bias is None else bias[outputs])
    return y


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`linear` by the kernels, as many tokens at a time as they take. None if no kernel takes the
    weight, or if the CPU has instructions for torch's products of x's type.

    For 256 tokens and a weight [8960, 1536], one core of a Sapphire Rapids guest with avx512_vnni
    takes 32 ms this way. Unnesting the weight for torch takes 67 ms in float32, and 250 ms in
    bfloat16, which that guest emulates.
    """
    by_inputs = is_nested_by(weight, Layout.BY_INPUTS)
    C = x.shape[-1] if x.ndim else 0
    tokens = x.numel() // C if C else 0
    if (
        tokens == 0
        or x.dtype not in TYPES
        or kernels() is None
        or not (by_inputs or is_nested_by(weight, Layout.BY_OUTPUTS))
        or not is_vector(bias, x.dtype)
        or not (x.dtype is torch.float32 or emulated(x.dtype) or tokens <= BFLOAT16_TOKENS)
    ):
        return None
    y = x.new_empty(*x.shape[:-1], matrix_shape(tuple(weight.shape))[0])
    parts = zip(*(t.reshape(tokens, -1).split(BFLOAT16_TOKENS) for t in (x, y)), strict=True)
    for given, into in parts:
        if by_inputs:
            done = _nested_by_inputs(given[None], weight, bias, None)
            assert done is not None
            into.copy_(done[0][0])
        else:
            into.copy_(nested_linears(given, (weight,), (bias,))[0])
    return y


def nested_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `nested.product` for any number of tokens, by the kernels if there are any."""

    def numbers(part: Tensor) -> Tensor:
        plain = unnest(part, torch.float32)
        return nested.unnest(part) if plain is None else plain

    y = _in_parts(x, weight, bias)
    return nested.by_numbers(x, weight, bias, numbers) if y is None else y


def _nested_sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float
) -> tuple[Tensor, Tensor]:
    done = _nested_by_inputs(x, weight, bias, threshold)
    if done is not None:
        return done
    kept = x.float().abs().mean(1, keepdim=True) > threshold
    return _nested_linear(x * kept, weight, bias), kept.sum((1, 2))


def _nested_by_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float | None
) -> tuple[Tensor, Tensor] | None:
    """`sparse_linear` of x [B, T, C]; with threshold None, over all channels and without counts.
    None if no kernel takes this.
    """
    kind = TYPES.get(x.dtype)
    if not (
        kind is not None
        and x.ndim == 3
        and x.shape[1] <= MOST_TOKENS
        and fits(x.shape[1], x.shape[0], x.dtype, x.shape[0] * MOST_TOKENS)
        and is_nested_by(weight, Layout.BY_INPUTS)
        and is_vector(bias, x.dtype)
        and (library := kernels()) is not None
    ):
        return None
    B, T, _ = x.shape
    given = x.contiguous()
    outputs = matrix_shape(tuple(weight.shape))[0]
    y, counts = given.new_empty(B, T, outputs), given.new_empty(B, dtype=torch.int64)
    status = library.sirius_nested_by_inputs(
        kind,
        _NESTED_SPARSE.pack(
            given.data_ptr(), *given.shape, *nested_matrix(weight), *vector(bias),
            y.data_ptr(), address(None if threshold is None else counts),
        ),
        threshold or 0.0,
        torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, "sparse_linear")
    return y, counts


def embedding(weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """As `reference.embedding`. Raises IndexError for an id out of range."""
    flat = ids.flatten()
    rows = None
    if ids.dtype is torch.int64 and ids.is_cpu and is_nested_by(weight, Layout.BY_OUTPUTS):
        rows = unnest(weight, dtype, flat)
    if rows is None:
        return reference.embedding(weight, ids, dtype)
    return rows.view(*ids.shape, rows.shape[1])


def unnest(
    weight: Tensor,
    dtype: torch.dtype,
    rows: Tensor | None = None,
    library: ctypes.CDLL | None = None,
) -> Tensor | None:
    """As `nested.unnest`: the weight [O, C] in that dtype, or only its `rows` [N] (by-outputs
    layout only). None if no kernel takes it. library: the kernels, by default those in use.
    """
    by_inputs = is_nested_by(weight, Layout.BY_INPUTS)
    kind, library = TYPES.get(dtype), library or kernels()
    if kind is None or library is None:
        return None
    if not (by_inputs or is_nested_by(weight, Layout.BY_OUTPUTS)):
        return None
    outputs, inputs = matrix_shape(tuple(weight.shape))
    if rows is not None:
        rows, outputs = rows.contiguous(), rows.numel()
    plain = torch.empty((inputs, outputs) if by_inputs else (outputs, inputs), dtype=dtype)
    status = library.sirius_unnest(
        kind,
        _UNNEST.pack(*nested_matrix(weight), *vector(rows)),
        plain.data_ptr(),
        torch.get_num_threads(),
    )
    check(library, status, "embedding")
    return plain.t() if by_inputs else plain
