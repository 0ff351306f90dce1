"""Checks shared by the rules of the `sirius::` operators, whose kernels get raw pointers and sizes.
See `graph_rules`, and `sirius_runtime.ops` for shape letters. They raise `CallError`.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from sirius_runtime.graph_rules import Array, made, need
from sirius_runtime.graph_sizes import Size, at_least, symbol
from sirius_runtime.nested import GROUP, Layout, matrix_shape, nested_shape

ROWS_OR_ONE = symbol("R")
"""The first extent of an entry's tree mask: 1, or the rows of the batch."""


def need_shape(name: str, array: Array | None, *shape: Size) -> None:
    need(array is None or array.shape == shape, f"{name} must be {list(shape)}, found {array}")


def need_rank(name: str, array: Array, rank: int) -> None:
    need(len(array.shape) == rank, f"{name} must have {rank} dimensions, found {array}")


def need_dtype(dtype: torch.dtype, **arrays: Array | None) -> None:
    for name, array in arrays.items():
        need(array is None or array.dtype is dtype, f"{name} must be of {dtype}, found {array}")


def need_model(**arrays: Array | None) -> None:
    """Checks that all arrays have the same floating point dtype."""
    dtype = next(array.dtype for array in arrays.values() if array is not None)
    need(dtype.is_floating_point, f"floating point numbers are needed, found {dtype}")
    need_dtype(dtype, **arrays)


def need_matrix(
    name: str, weight: Array, layout: Layout, dtype: torch.dtype, *, experts: bool = False
) -> tuple[Size, Size]:
    """Outputs O and inputs C of a weight of that dtype, or of a nested one. A weight that is not
    nested is [O, C] by outputs and [C, O] by inputs. With `experts` it is [E, …], or nested
    [P, E, …].
    """
    if weight.dtype is not torch.uint8:
        need_dtype(dtype, **{name: weight})
        need_rank(name, weight, 3 if experts else 2)
        rows, columns = weight.shape[-2:]
        return (columns, rows) if layout is Layout.BY_INPUTS else (rows, columns)
    sizes = tuple(size for size in weight.shape if isinstance(size, int))
    need_rank(name, weight, (3 if layout is Layout.BY_OUTPUTS else 4) + experts)
    need(
        len(sizes) == len(weight.shape),
        f"{name} {weight} is nested, so its sizes must be constants",
    )
    if experts:
        need(sizes[1] >= 1, f"{name} {weight} holds no experts")
        sizes = (sizes[0], *sizes[2:])
    need(sizes[0] in (1, 2), f"{name} {weight} has {sizes[0]} planes, not 1 or 2")
    outputs, inputs = matrix_shape(sizes)
    same = nested_shape(outputs, inputs, layout)[1:] == sizes[1:] and inputs >= GROUP
    need(same and outputs >= 1, f"{name} {weight} is not nested by {layout}")
    if layout is Layout.BY_INPUTS:
        need(
            outputs % GROUP == 0,
            f"{name} {weight}: its {outputs} outputs are not a multiple of {GROUP}",
        )
    return outputs, inputs


def experts_in(weight: Array) -> Size:
    """The number of experts E of a weight [E, …], or nested [P, E, …]."""
    return weight.shape[1 if weight.dtype is torch.uint8 else 0]


def need_some(**arrays: Array | None) -> None:
    """Checks that no dimension may be 0: kernels divide by some of them."""
    for name, array in arrays.items():
        if array is not None:
            need(all(at_least(size, 1) for size in array.shape), f"{name} {array} may be empty")


def need_layer(layer: Any, layers: Size) -> None:
    there = isinstance(layer, int) and isinstance(layers, int) and 0 <= layer < layers
    need(there, f"layer {layer} is not one of {layers}")


def need_finite(**numbers: float | None) -> None:
    for name, value in numbers.items():
        need(value is None or math.isfinite(value), f"{name} must be finite, found {value}")


def need_kept(keep: Any, units: Size) -> None:
    there = isinstance(keep, int) and isinstance(units, int) and 1 <= keep <= units
    need(there, f"the number of kept units must be in 1..{units}, found {keep}")


def tokens(x: Array) -> tuple[Size, Size]:
    need_rank("x", x, 3)
    return x.shape[0], x.shape[1]


def counts(x: Array) -> Array:
    return made(torch.int64, (x.shape[0],))
