"""Converts nested weights to the format of ONNX Runtime's 4-bit operator `MatMulNBits`, with NumPy.

A weight of O outputs and C inputs becomes these tensors, each stored once (docs/onnx.md):

    NAME.high, NAME.low            uint8 [O, C / 32, 16]   nibbles; even inputs in the low nibble
    NAME.scale, NAME.draft_scale   float16 [O, C / 32]     s, and s' where drafts read 4 bits

For the experts of a mixture they are [E, …]. Artifacts hold the same bits in the order of
`sirius_runtime.nested`; they are converted when graphs are exported or loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from sirius_runtime.spec import Layout, ProgramSpec, WeightSpec

HIGH, LOW, SCALE, DRAFT_SCALE = "high", "low", "scale", "draft_scale"
GROUP = 32
_HALF = GROUP // 2
_ABREAST = 16  # groups whose bytes are interleaved, as in `sirius_runtime.nested`
_WORD = 4
_MIDDLE = 0x80  # the lower byte of a scale of which only the upper byte is read

Bytes = NDArray[np.uint8]


def part_name(weight: str, part: str) -> str:
    return f"{weight}.{part}"


def matrix_of(spec: WeightSpec) -> tuple[int, int]:
    """Outputs and inputs of a nested weight, or of each of its experts."""
    if spec.nested is Layout.BY_OUTPUTS:
        return spec.shape[-2], spec.shape[-1] // (_HALF + 1) * GROUP
    return spec.shape[-1] * 2, spec.shape[-3] * GROUP


def parts(program: ProgramSpec, spec: WeightSpec) -> Iterator[tuple[str, WeightSpec]]:
    """The tensors that a nested weight becomes: pairs of part and spec."""
    outputs, inputs = matrix_of(spec)
    groups = (*spec.shape[1 : 1 + spec.of_experts], outputs, inputs // GROUP)
    plain = replace(spec, transposed=False, nested=None)
    for part in (HIGH, LOW):
        name = part_name(spec.name, part)
        yield part, replace(plain, name=name, shape=(*groups, _HALF))
    for part in (SCALE, DRAFT_SCALE)[: 1 + (program.sparsity.draft_bits == 4)]:
        name = part_name(spec.name, part)
        yield part, replace(plain, name=name, dtype="float16", shape=groups)


def part_of(spec: WeightSpec, planes: Bytes, part: str) -> NDArray[np.generic]:
    """The tensor of one part of a nested weight, from its planes."""
    if spec.of_experts:
        own = replace(spec, shape=(spec.shape[0], *spec.shape[2:]))
        return np.stack([part_of(own, planes[:, e], part) for e in range(planes.shape[1])])
    if part in (HIGH, LOW):
        plane = planes[int(part == LOW)]
        return _by_outputs(plane) if plane.ndim == 2 else _by_inputs(plane)
    upper, lower = _scales(planes)
    if part == DRAFT_SCALE:
        lower = np.full_like(lower, _MIDDLE)
    bits = upper.astype(np.uint16) << 8 | lower
    return np.ascontiguousarray(bits >> 1).view(np.float16)


def _by_outputs(plane: Bytes) -> Bytes:
    """The nibbles [O, C / 32, 16] of a plane by outputs [O, 17 C / 32]."""
    outputs, groups = len(plane), plane.shape[1] // (_HALF + 1)
    result = np.empty((outputs, groups, _HALF), np.uint8)
    for first in range(0, groups, _ABREAST):
        here = min(_ABREAST, groups - first)
        own = plane[:, first * _HALF : (first + here) * _HALF]
        words = own.reshape(outputs, _HALF // _WORD, here, _WORD)
        # A byte holds inputs i and i + 16 of its group.
        pairs = words.transpose(0, 2, 1, 3).reshape(outputs, here, _HALF // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        result[:, first : first + here, : _HALF // 2] = even & 15 | odd << 4
        result[:, first : first + here, _HALF // 2 :] = even >> 4 | odd & 0xF0
    return result


def _by_inputs(plane: Bytes) -> Bytes:
    """The nibbles [O, C / 32, 16] of a plane by inputs [C / 32, 34, O / 2]."""
    groups, outputs = len(plane), plane.shape[2] * 2
    result = np.empty((outputs, groups, _HALF), np.uint8)
    for group in range(groups):
        # A byte holds outputs o and o + 16 of 32 neighbours.
        own = plane[group, :GROUP].reshape(GROUP, -1, _HALF)
        codes = np.stack([own & 15, own >> 4], 2).reshape(GROUP, outputs)
        result[:, group] = (codes[0::2] | codes[1::2] << 4).T
    return result


def _scales(planes: Bytes) -> tuple[Bytes, Bytes]:
    """The upper and the lower bytes of the scales, from both planes: [O, C / 32] each."""
    if planes.ndim == 3:
        own = planes[..., planes.shape[2] // (_HALF + 1) * _HALF :]
    else:
        halves = planes[:, :, GROUP:]  # [2, C / 32, 2, O / 2]
        split = halves.reshape(*halves.shape[:3], -1, _HALF).transpose(0, 1, 3, 2, 4)
        own = split.reshape(2, len(planes[0]), -1).transpose(0, 2, 1)
    return own[0], own[1]
