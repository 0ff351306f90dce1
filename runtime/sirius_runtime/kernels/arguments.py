"""Which tensors the CPU kernels take, and how they are passed. Shape letters as in `ops`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sirius_runtime.errors import BackendError, OperandError, OperandIndexError
from sirius_runtime.nested import Layout, matrix_shape

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The codes of the types in ``csrc/cpu.cpp``."""

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "quick_gelu": 4, "relu2": 5}
"""The codes of the activations in ``csrc/activations.h``; others run in the references."""

MOST_TOKENS = 64
"""The most tokens of a row that a kernel takes; the buffers in ``csrc/mlp.h`` have this size."""

BFLOAT16_TOKENS = 48
"""The most tokens of all rows together in bfloat16, where torch multiplies by oneDNN. On two Zen 5
cores at hidden size 2048, the kernels took 0.5 to 0.7 of oneDNN's time at 16 tokens, the same time
at 48, and up to 1.08 times as long at 64. In float32 they still take half the time at 64."""


def fits(tokens: int, rows: int, dtype: torch.dtype, bfloat16: int = BFLOAT16_TOKENS) -> bool:
    """Whether the kernels take `rows` rows of `tokens` tokens. bfloat16: the most tokens in all in
    bfloat16.

    All kernels have the same limit. So the full and the sparse path, and one token and a period,
    sum in the same order, and equal results are bit-equal.
    """
    most = bfloat16 if dtype is torch.bfloat16 else MOST_TOKENS
    return 1 <= tokens * rows <= most


@functools.cache
def as_stored(threshold: float, dtype: torch.dtype) -> float:
    """`threshold` rounded to that type, as torch rounds a number that it compares with a tensor."""
    return torch.tensor(threshold, dtype=dtype).item()


def is_matrix(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `weight` is a matrix of that type on the CPU whose rows are contiguous."""
    return weight.dtype is dtype and weight.ndim == 2 and weight.stride(1) == 1 and weight.is_cpu


def is_vector(bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether `bias` is none, or a contiguous vector of that type on the CPU."""
    return bias is None or (
        bias.dtype is dtype and bias.ndim == 1 and bias.stride(0) == 1 and bias.is_cpu
    )


# Operands in the form of ``csrc/operands.h``: addresses with the tensors' sizes, which the kernels
# check. None is a null pointer with zero sizes.


def address(tensor: Tensor | None) -> int:
    """The tensor's address; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def matrix(weight: Tensor | None) -> tuple[int, int, int, int]:
    """A ``Matrix``."""
    return (0, 0, 0, 0) if weight is None else (weight.data_ptr(), *weight.shape, weight.stride(0))


def vector(bias: Tensor | None) -> tuple[int, int]:
    """A ``Tensor<1>``."""
    return (0, 0) if bias is None else (bias.data_ptr(), *bias.shape)


def is_nested_by(weight: Tensor, layout: Layout) -> bool:
    """Whether `weight` is a nested weight in that layout, on the CPU, with contiguous rows."""
    rank = 3 if layout is Layout.BY_OUTPUTS else 4
    return (
        weight.dtype is torch.uint8
        and weight.ndim == rank
        and weight.stride(-1) == 1
        and weight.is_cpu
    )


def nested_matrix(weight: Tensor | None) -> tuple[int, ...]:
    """A ``NestedMatrix``."""
    if weight is None:
        return (0,) * 7
    plane, *block, row, _ = weight.stride()
    shape = matrix_shape(tuple(weight.shape))
    return (weight.data_ptr(), weight.shape[0], *shape, plane, row, *(block or (0,)))


def of_ranks(operator: str, names: str, tensors: Sequence[Tensor], ranks: Sequence[int]) -> None:
    """Raises OperandError for the first tensor whose number of dimensions is not its rank in
    `ranks`. names: the tensors' names, separated by spaces. The kernels check only sizes.
    """
    for name, tensor, rank in zip(names.split(), tensors, ranks, strict=True):
        if tensor.ndim != rank:
            raise refuse(operator, f"{name} has {tensor.ndim} dimensions, not {rank}")


def refuse(operator: str, reason: str, *, index: bool = False) -> OperandError:
    """The error for a wrong operand. reason: begins with the operand's name. index: whether the
    fault is an index that the operand holds.
    """
    kind = OperandIndexError if index else OperandError
    return kind(
        f"sirius::{operator}: {reason}. Compile the artifact again, or pass operands that agree"
    )


def check(library: ctypes.CDLL, status: int, operator: str) -> None:
    """Raises the error for a kernel's status, if it is not 0.

    OperandError for sizes that don't agree, OperandIndexError for an index out of range,
    MemoryError, and BackendError for anything else.
    """
    if status:
        raise _error(status, operator, library.sirius_reason().decode(errors="replace"))


def _error(status: int, operator: str, reason: str) -> Exception:
    if status == 1:
        return MemoryError(f"sirius::{operator}: not enough memory for its sums; run fewer rows")
    if status in (2, 3):
        return refuse(operator, reason, index=status == 2)
    return BackendError(
        f"the kernel of sirius::{operator} failed ({reason or 'without a reason'}); set "
        "SIRIUS_KERNELS=0 to run without kernels"
    )
