"""From a checkpoint's tensor to what is stored of it: its dtype, its layout, nested or not."""

from __future__ import annotations

import torch
from torch import Tensor

from sirius_passes.weight_views import transposed_shape
from sirius_runtime.dtypes import dtype_of
from sirius_runtime.errors import UnsupportedModelError
from sirius_runtime.nested import GROUP, LARGEST, Layout, matrix_shape, nest
from sirius_runtime.spec import WeightSpec

_BLOCK = 2**22  # numbers that are nested at once: it takes some 30 bytes for each
_MOST = LARGEST * torch.finfo(torch.float16).max


def stored_form(spec: WeightSpec, tensor: Tensor) -> Tensor:
    """The stored form of the checkpoint's tensor of that name.

    Raises UnsupportedModelError, naming the weight, for one that is to be nested and whose numbers
    are beyond what a scale in float16 reaches.
    """
    if spec.nested is None:
        tensor = tensor.to(dtype_of(spec.dtype))
        return (tensor.mT if spec.transposed else tensor).contiguous()
    rows_are_inputs = spec.nested is Layout.BY_INPUTS
    matrix = tensor if spec.transposed is rows_are_inputs else tensor.mT
    largest = float(max(-matrix.min(), matrix.max()))
    if largest > _MOST:
        raise UnsupportedModelError(
            f"weight {spec.name} holds {largest:g}, which is beyond the scales of nested weights "
            f"({_MOST:g}); leave --weights int8 out"
        )
    stored = torch.empty(spec.shape, dtype=torch.uint8)
    outputs, inputs = matrix.shape
    block = max(1, _BLOCK // inputs // GROUP) * GROUP
    for start in range(0, outputs, block):
        end = min(start + block, outputs)
        planes = nest(matrix[start:end], spec.nested)
        if rows_are_inputs:
            stored[..., start // 2 : end // 2] = planes
        else:
            stored[:, start:end] = planes
    return stored


def checkpoint_shape(spec: WeightSpec) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor."""
    shape = spec.shape
    if spec.nested is not None:
        outputs, inputs = matrix_shape(shape)
        shape = (inputs, outputs) if spec.nested is Layout.BY_INPUTS else (outputs, inputs)
    return transposed_shape(shape) if spec.transposed else shape
