"""Converts a checkpoint's tensor to its stored form: dtype, layout, and nesting."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sirius_passes.weight_views import transposed_shape
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.kernels import nesting
from sirius_runtime.nested import (
    GROUP,
    LARGEST,
    LARGEST_SCALE,
    draft_scales,
    experts_in,
    in_integers,
    matrix_shape,
    nest_integers,
    nested_shape,
)
from sirius_runtime.spec import Layout, WeightSpec

_BLOCK = 2**19  # numbers nested at once; at 30 bytes of work space each, they fit in the caches
_TRIED = 64  # groups sampled by `_is_dequantized`
_MOST = LARGEST * LARGEST_SCALE  # the largest number that a nested weight can hold


def stored_form(spec: WeightSpec, tensor: Tensor) -> Tensor:
    """The stored form of the checkpoint's `tensor`, in the dtype and shape of `spec`.

    Raises UnsupportedModelError if the weight is to be nested and holds numbers too large for a
    float16 scale.
    """
    if spec.nested is None:
        tensor = tensor.to(dtype_of(spec.dtype))
        return (tensor.mT if spec.transposed else tensor).contiguous()
    if spec.of_experts:
        stored = torch.empty(spec.shape, dtype=torch.uint8)
        for index, expert in enumerate(tensor):
            of_expert = replace(spec, shape=(spec.shape[0], *spec.shape[2:]))
            stored[:, index] = stored_form(of_expert, expert)
        return stored
    rows_are_inputs = spec.nested is Layout.BY_INPUTS
    matrix = tensor if spec.transposed is rows_are_inputs else tensor.mT
    dequantized = _is_dequantized(matrix[: _rows(matrix)])
    done = nesting.nest(matrix, spec.nested, as_q8_0=dequantized)
    largest = float(max(-matrix.min(), matrix.max())) if done is None else done.largest
    if largest > _MOST:
        raise UnsupportedModelError(
            f"weight {spec.name} holds a number of magnitude {largest:g}, and nested weights hold "
            f"at most {_MOST:g}; leave --weights int8 out"
        )
    if done is None or (dequantized and done.rounded):
        return _in_blocks(matrix, spec.nested, dequantized)
    return done.planes


def is_stored_form(spec: WeightSpec, tensor: Tensor) -> bool:
    """Whether the stored form has the same bytes as the checkpoint's tensor."""
    return (
        spec.nested is None
        and not spec.transposed
        and tensor.dtype is dtype_of(spec.dtype)
        and tensor.is_contiguous()
    )


def _rows(matrix: Tensor) -> int:
    """Rows of `matrix` that `_in_blocks` nests at once: a multiple of 32."""
    return max(1, _BLOCK // matrix.shape[1] // GROUP) * GROUP


def _in_blocks(matrix: Tensor, layout: Layout, dequantized: bool) -> Tensor:
    """Nests `matrix` [O, C] with torch operators, block by block; returns both planes, uint8."""
    (outputs, inputs), block = matrix.shape, _rows(matrix)
    stored = torch.empty(nested_shape(outputs, inputs, layout), dtype=torch.uint8)
    for start in range(0, outputs, block):
        end = min(start + block, outputs)
        planes = nest_integers(*integers_of(matrix[start:end], dequantized), layout)
        if layout is Layout.BY_INPUTS:
            stored[..., start // 2 : end // 2] = planes
        else:
            stored[:, start:end] = planes
    return stored


def integers_of(matrix: Tensor, dequantized: bool) -> tuple[Tensor, Tensor]:
    """Quantizes `matrix` [O, C] to q [O, C], int8, and scales [O, C / 32], float16, which are those
    of `draft_scales`.

    A matrix that was dequantized from GGUF's Q8_0 gets its original q and scales back. A group's
    scale is then its largest magnitude over 127, as llama.cpp chooses it; the group's largest
    integer is then 127. For groups that this scale does not reproduce exactly, other largest
    integers are tried.
    """
    groups = _groups(matrix)
    largest = groups.abs().amax(-1)
    scale = draft_scales(largest).float()
    if dequantized:
        as_q8_0 = largest / LARGEST
        rounded = ~_exact(groups, *in_integers(groups, as_q8_0))
        found = _scales(groups[rounded])
        as_q8_0[rounded] = torch.where(found.isnan(), scale[rounded], found)
        scale = as_q8_0
    return in_integers(groups, scale)


def _is_dequantized(matrix: Tensor) -> bool:
    """Whether `matrix` looks dequantized from 8-bit integers: it is float32, and each of its first
    groups that are not all zeros consists of integer multiples of some scale, but not each of
    integers of 5 bits. Types of fewer bits (Q4_0, Q5_0) are rounded like other numbers: with their
    own scales all integers would be multiples of 8 or 16, which a draft reads with a bias.
    """
    if matrix.dtype is not torch.float32:
        return False
    groups = _groups(matrix)
    tried = groups[groups.any(-1)][:_TRIED]
    few_bits = _scales(tried, largest=16)
    return bool(few_bits.isnan().any()) and not bool(_scales(tried).isnan().any())


def _groups(matrix: Tensor) -> Tensor:
    """The groups of a matrix [O, C]: float32 [O, C / 32, 32]."""
    return matrix.float().unflatten(-1, (-1, GROUP))


def _scales(groups: Tensor, largest: int = LARGEST + 1) -> Tensor:
    """For each group [N, 32], a scale [N] that all its numbers are integer multiples of, else NaN.

    Tries each integer of 1 to `largest` as the quotient of the group's largest magnitude and the
    scale.
    """
    magnitude = groups.abs().amax(-1)
    found = torch.full_like(magnitude, torch.nan)
    for integer in range(1, largest + 1):
        q, scale = in_integers(groups[None], (magnitude / integer)[None])
        found = torch.where(_exact(groups[None], q, scale)[0], scale[0].float(), found)
    return found


def _exact(groups: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Whether q times the scale equals every number of a group exactly: bool [O, C / 32]."""
    values = q.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)
    return (values == groups).all(-1)


def checkpoint_shape(spec: WeightSpec) -> tuple[int, ...]:
    """The shape in the checkpoint of the tensor that `spec` stores."""
    shape = spec.shape
    if spec.nested is not None:
        experts = experts_in(shape, spec.nested)
        outputs, inputs = matrix_shape((shape[0], *shape[1 + len(experts) :]))
        matrix = (inputs, outputs) if spec.nested is Layout.BY_INPUTS else (outputs, inputs)
        shape = (*experts, *matrix)
    return transposed_shape(shape) if spec.transposed else shape
