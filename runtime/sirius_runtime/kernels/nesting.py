"""Nests weights on the CPU by a kernel, bit-equal to `nested.nest`."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from sirius_runtime.kernels.arguments import TYPES, check, is_matrix, matrix
from sirius_runtime.kernels.native import kernels
from sirius_runtime.nested import Layout, nested_shape

# The structs of ``csrc``: the operands of ``sirius_nest``, and Found.
_NEST = Struct("=9q")
_FOUND = Struct("=qfxxxx")


class Nesting(NamedTuple):
    """Both planes, the matrix's largest magnitude, and the number of groups that were rounded."""

    planes: Tensor
    largest: float
    rounded: int


def nest(weight: Tensor, layout: Layout, *, as_q8_0: bool = False) -> Nesting | None:
    """Nests weight [O, C], a matrix or the transpose of one; None if no kernel takes it.
    `as_q8_0`: a group's scale is its largest magnitude over 127.

    Raises OperandError for sizes that can't be nested.
    """
    if weight.ndim != 2:
        return None
    rows_are_inputs = weight.stride(1) != 1
    stored = weight.t() if rows_are_inputs else weight
    kind = TYPES.get(weight.dtype)
    if kind is None or not is_matrix(stored, weight.dtype) or (library := kernels()) is None:
        return None
    outputs, inputs = weight.shape
    planes = torch.empty(nested_shape(outputs, inputs, layout), dtype=torch.uint8)
    found = torch.empty(_FOUND.size, dtype=torch.uint8)
    status = library.sirius_nest(
        kind,
        _NEST.pack(
            *matrix(stored), rows_are_inputs, layout is Layout.BY_INPUTS, as_q8_0,
            planes.data_ptr(), found.data_ptr(),
        ),
        torch.get_num_threads(),
    )  # fmt: skip
    check(library, status, "nest")
    rounded, largest = _FOUND.unpack(found.numpy().tobytes())
    return Nesting(planes, largest, rounded)
