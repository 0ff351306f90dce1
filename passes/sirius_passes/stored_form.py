"""From a checkpoint's tensor to what is stored of it: its dtype, its layout, nested or not."""

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
    experts_in,
    in_integers,
    matrix_shape,
    nest_integers,
    nested_shape,
)
from sirius_runtime.spec import Layout, WeightSpec

_BLOCK = 2**19  # numbers that are nested at once: 30 bytes each, which caches hold
_TRIED = 64  # groups
_MOST = LARGEST * torch.finfo(torch.float16).max


def stored_form(spec: WeightSpec, tensor: Tensor) -> Tensor:
    """The stored form of the checkpoint's tensor of that name.

    Raises UnsupportedModelError, naming the weight, for one that is to be nested and whose numbers
    are beyond what a scale in float16 reaches.
    """
    if spec.nested is None:
        tensor = tensor.to(dtype_of(spec.dtype))
        return (tensor.mT if spec.transposed else tensor).contiguous()
    if spec.of_experts:
        stored = torch.empty(spec.shape, dtype=torch.uint8)
        for index, expert in enumerate(tensor):
            own = replace(spec, shape=(spec.shape[0], *spec.shape[2:]))
            stored[:, index] = stored_form(own, expert)
        return stored
    rows_are_inputs = spec.nested is Layout.BY_INPUTS
    matrix = tensor if spec.transposed is rows_are_inputs else tensor.mT
    done = nesting.nest(matrix, spec.nested)
    largest = float(max(-matrix.min(), matrix.max())) if done is None else done.largest
    if largest > _MOST:
        raise UnsupportedModelError(
            f"weight {spec.name} holds {largest:g}, which is beyond the scales of nested weights "
            f"({_MOST:g}); leave --weights int8 out"
        )
    if done is None or (done.rounded and _are_integers(matrix[: _rows(matrix)])):
        return _in_blocks(matrix, spec.nested)
    return done.planes


def is_stored_form(spec: WeightSpec, tensor: Tensor) -> bool:
    """Whether the checkpoint's tensor is stored as it is."""
    return (
        spec.nested is None
        and not spec.transposed
        and tensor.dtype is dtype_of(spec.dtype)
        and tensor.is_contiguous()
    )


def _rows(matrix: Tensor) -> int:
    """Of a block, a multiple of 32."""
    return max(1, _BLOCK // matrix.shape[1] // GROUP) * GROUP


def _in_blocks(matrix: Tensor, layout: Layout) -> Tensor:
    """`matrix` [O, C], nested by torch."""
    (outputs, inputs), block = matrix.shape, _rows(matrix)
    stored = torch.empty(nested_shape(outputs, inputs, layout), dtype=torch.uint8)
    for start in range(0, outputs, block):
        end = min(start + block, outputs)
        planes = nest_integers(*integers_of(matrix[start:end]), layout)
        if layout is Layout.BY_INPUTS:
            stored[..., start // 2 : end // 2] = planes
        else:
            stored[:, start:end] = planes
    return stored


def integers_of(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """q [O, C], int8, and scales [O, C / 32], float16, of a matrix: those that it was multiplied
    out from, where it was, as a Q8_0 tensor in float32.

    A scale is a group's largest magnitude over 127. That gives back the integers of a group whose
    largest is 127, as llama.cpp chooses them. Where it does not, other integers are tried, if they
    are what some of the groups were made of.
    """
    groups, scale = _groups(matrix)
    if _are_integers(matrix):
        rounded = _rounded(groups, scale)
        found = _scales(groups[rounded])
        scale[rounded] = torch.where(found.isnan(), scale[rounded], found)
    return in_integers(groups, scale)


def _are_integers(matrix: Tensor) -> bool:
    """Whether the numbers of the first groups that their largest rounds are integers of a scale."""
    if matrix.dtype is not torch.float32:
        return False
    groups, scale = _groups(matrix)
    tried = groups[_rounded(groups, scale)][:_TRIED]
    return len(tried) > 0 and not bool(_scales(tried).isnan().any())


def _groups(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[O, C / 32, 32], and a 127th of each group's largest magnitude."""
    groups = matrix.float().unflatten(-1, (-1, GROUP))
    return groups, groups.abs().amax(-1) / LARGEST


def _rounded(groups: Tensor, scale: Tensor) -> Tensor:
    """Whether a group's numbers are rounded with these scales."""
    return ~_exact(groups, *in_integers(groups, scale))


def _scales(groups: Tensor) -> Tensor:
    """The scale [N] of which all numbers of a group [N, 32] are multiples; NaN where there is
    none.
    """
    largest = groups.abs().amax(-1)
    found = torch.full_like(largest, torch.nan)
    for integer in range(1, LARGEST + 2):
        q, scale = in_integers(groups[None], (largest / integer)[None])
        found = torch.where(_exact(groups[None], q, scale)[0], scale[0].float(), found)
    return found


def _exact(groups: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Whether integers and scales stand for the very numbers of a group [O, C / 32]."""
    values = q.unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)
    return (values == groups).all(-1)


def checkpoint_shape(spec: WeightSpec) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor."""
    shape = spec.shape
    if spec.nested is not None:
        experts = experts_in(shape, spec.nested)
        outputs, inputs = matrix_shape((shape[0], *shape[1 + len(experts) :]))
        matrix = (inputs, outputs) if spec.nested is Layout.BY_INPUTS else (outputs, inputs)
        shape = (*experts, *matrix)
    return transposed_shape(shape) if spec.transposed else shape
