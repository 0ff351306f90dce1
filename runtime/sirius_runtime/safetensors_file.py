"""The layout of a safetensors file: 8 bytes little-endian length, a JSON header, the tensors.

Our tests compare with the safetensors library. It is not used here because it reads and writes
whole files or buffers; artifacts use such files in place, within a ZIP or beside ONNX graphs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

from sirius_runtime.artifact_zip import ALIGNMENT
from sirius_runtime.errors import SiriusError
from sirius_runtime.spec import JSON, ProgramSpec, WeightSpec


class StoredType(NamedTuple):
    """A dtype: its name in torch, and the bytes of an element."""

    name: str
    itemsize: int


STORED_TYPES = {
    "F64": StoredType("float64", 8),
    "F32": StoredType("float32", 4),
    "F16": StoredType("float16", 2),
    "BF16": StoredType("bfloat16", 2),
    "F8_E4M3": StoredType("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": StoredType("float8_e4m3fnuz", 1),
    "F8_E5M2": StoredType("float8_e5m2", 1),
    "F8_E5M2FNUZ": StoredType("float8_e5m2fnuz", 1),
    "I64": StoredType("int64", 8),
    "I32": StoredType("int32", 4),
    "I16": StoredType("int16", 2),
    "I8": StoredType("int8", 1),
    "U64": StoredType("uint64", 8),
    "U32": StoredType("uint32", 4),
    "U16": StoredType("uint16", 2),
    "U8": StoredType("uint8", 1),
    "BOOL": StoredType("bool", 1),
    "C64": StoredType("complex64", 8),
}
"""Dtypes by their names in safetensors files."""

_CODES = {stored.name: code for code, stored in STORED_TYPES.items()}


def size_of(spec: WeightSpec) -> int:
    """Bytes of the stored tensor."""
    if spec.dtype not in _CODES:
        raise SiriusError(f"weight {spec.name!r}: dtype {spec.dtype!r} has no safetensors name")
    return math.prod(spec.shape) * STORED_TYPES[_CODES[spec.dtype]].itemsize


def share_of_bfloat16(program: ProgramSpec) -> float:
    """The bytes of weights that a full step reads, divided by their size in bfloat16."""
    parameters = [weight for weight in program.weights if weight.parameter]
    stored, wide = sum(map(size_of, parameters)), sum(2 * weight.numbers for weight in parameters)
    experts = [weight for weight in parameters if weight.of_experts]
    if experts:  # a step does not read the experts that its token is not routed to
        unread = (stored - program.sparsity.step) / sum(map(size_of, experts))
        wide -= round(unread * sum(2 * weight.numbers for weight in experts))
    return program.sparsity.step / wide


def in_order(specs: Sequence[WeightSpec]) -> list[WeightSpec]:
    """Sorts tensors: first those whose size is a multiple of `ALIGNMENT`; in both groups, larger
    elements first.

    safetensors allows no gaps between tensors. In this order the tensors of the first group start
    at multiples of `ALIGNMENT`, and every tensor at a multiple of its element size.
    """

    def key(spec: WeightSpec) -> tuple[bool, int]:
        return size_of(spec) % ALIGNMENT != 0, -STORED_TYPES[_CODES[spec.dtype]].itemsize

    return sorted(specs, key=key)


def header_of(specs: Sequence[WeightSpec]) -> bytes:
    """The length and the JSON header of a file of these tensors, padded with spaces to a multiple
    of `ALIGNMENT`.
    """
    fields: dict[str, JSON] = {}
    end = 0
    for spec in specs:
        begin, end = end, end + size_of(spec)
        code = _CODES[spec.dtype]
        fields[spec.name] = {"dtype": code, "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
