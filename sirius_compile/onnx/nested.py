"""Nested weights in ONNX graphs: products by `MatMulNBits` of ONNX Runtime's domain.

An 8-bit code is q + 128 = 16 h + l, two nibbles h and l. Activations x are rounded to int8 in
groups of 32 by the operator itself (`accuracy_level` 4). Then

    full     s  q · x              = 16 MatMulNBits(x, high, s, 8) + MatMulNBits(x, low, s, 0)
    draft    s' (16 h + 8 - 128) x = 16 MatMulNBits(x, high, s', 8) + 8 s' · (sums of x by group)

where the last arguments are zero points. The sums must be of the rounded x, so they are computed by
`MatMulNBits` with ones, each group as a row. All graphs read the same planes.

`FUNCTION` defines the operator in standard ONNX operators. A model holds it as a local function:
ONNX Runtime uses its own kernel instead, and a runtime without such a kernel uses the function.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import onnx
from onnx import helper, parser

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.scope import TYPES, Scope, Value
from sirius_runtime.onnx_files import expert_name
from sirius_runtime.onnx_nested import DRAFT_SCALE, GROUP, HIGH, LOW, SCALE, matrix_of, part_name
from sirius_runtime.spec import Layout, WeightSpec

DOMAIN = "com.microsoft"
OPERATOR = "MatMulNBits"
_ROUNDS_ACTIVATIONS = 4  # accuracy_level that rounds activations to int8
_HIGH_PLANE = (0, 0, 1)  # arguments (dim, start, end) of the slice that gives the high plane

FUNCTION = f"""
<domain: "{DOMAIN}", opset_import: ["" : 18]>
{OPERATOR} <K, N, bits, block_size, accuracy_level> (A, B, scales, zero_points) => (Y)
{{
  four = Constant <value = uint8[1] {{4}}> ()
  fifteen = Constant <value = uint8[1] {{15}}> ()
  zero = Constant <value = int64[1] {{0}}> ()
  last = Constant <value = int64[1] {{-1}}> ()
  by_32 = Constant <value = int64[3] {{0, -1, 32}}> ()
  whole = Constant <value = int64[2] {{0, -1}}> ()
  most = Constant <value = float[1] {{127.0}}> ()
  tiny = Constant <value = float[1] {{7.888609e-31}}> ()
  b_even = BitwiseAnd (B, fifteen)
  b_odd = BitShift <direction = "RIGHT"> (B, four)
  b_even_1 = Unsqueeze (b_even, last)
  b_odd_1 = Unsqueeze (b_odd, last)
  b_pairs = Concat <axis = -1> (b_even_1, b_odd_1)
  b_codes = Reshape (b_pairs, by_32)
  z_even = BitwiseAnd (zero_points, fifteen)
  z_odd = BitShift <direction = "RIGHT"> (zero_points, four)
  z_even_1 = Unsqueeze (z_even, last)
  z_odd_1 = Unsqueeze (z_odd, last)
  z_pairs = Concat <axis = -1> (z_even_1, z_odd_1)
  z_all = Reshape (z_pairs, whole)
  groups = Shape <start = 1> (scales)
  one = Constant <value = int64[1] {{1}}> ()
  z_codes = Slice (z_all, zero, groups, one)
  b = Cast <to = 1> (b_codes)
  z = Cast <to = 1> (z_codes)
  z_1 = Unsqueeze (z, last)
  q = Sub (b, z_1)
  s_1 = Unsqueeze (scales, last)
  w_groups = Mul (q, s_1)
  w = Reshape (w_groups, whole)
  w_t = Transpose <perm = [1, 0]> (w)
  x = Reshape (A, by_32)
  magnitude = Abs (x)
  largest_0 = ReduceMax <keepdims = 1> (magnitude, last)
  largest = Max (largest_0, tiny)
  inverse = Div (most, largest)
  scaled = Mul (x, inverse)
  rounded = Round (scaled)
  step = Div (largest, most)
  steps = Mul (rounded, step)
  flat = Reshape (steps, whole)
  Y = MatMul (flat, w_t)
}}
"""


@functools.cache
def function() -> onnx.FunctionProto:
    """`FUNCTION`, parsed."""
    return parser.parse_function(FUNCTION)


@dataclass(frozen=True)
class Nested:
    """A nested weight, or a part of it, as graphs pass it to products.

    `experts`: E, if the weight holds a matrix for each expert. `high`: whether only the high plane
    is read. `start`, `end`, `step`: the slice of its outputs.
    """

    name: str
    layout: Layout
    outputs: int
    inputs: int
    experts: int | None
    high: bool
    start: int
    end: int
    step: int

    @classmethod
    def of(cls, spec: WeightSpec) -> Nested:
        assert spec.nested is not None
        outputs, inputs = matrix_of(spec)
        experts = spec.shape[1] if spec.of_experts else None
        return cls(spec.name, spec.nested, outputs, inputs, experts, False, 0, outputs, 1)

    def sliced(
        self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> Nested:
        """The result of `aten.slice.Tensor` on the planes: the high plane, or some outputs.

        Raises NotImplementedError for any other slice.
        """
        if (dim, start, end) == _HIGH_PLANE:
            return replace(self, high=True)
        matrix_dim = dim - 1 - (self.experts is not None)
        # By inputs, a byte holds two outputs.
        outputs_dim, per_byte = (0, 1) if self.layout is Layout.BY_OUTPUTS else (2, 2)
        whole = (self.start, self.end, self.step) == (0, self.outputs, 1)
        if matrix_dim != outputs_dim or not whole:
            raise NotImplementedError(f"{self.name} is sliced along other dimensions than outputs")
        first, last, step = slice(start, end, step).indices(self.outputs // per_byte)
        return replace(self, start=first * per_byte, end=last * per_byte, step=step)


def product(s: Scope, x: Value, weight: Nested, bias: Value | None = None) -> Value:
    """x […, C] through a nested weight and its bias [O]: […, O], in the dtype of x."""
    dtype, lead = x.dtype, [e.size(s, x, axis) for axis in range(x.rank - 1)]
    flat = e.cast(s, e.reshape(s, x, [-1, weight.inputs]), "float32")
    y = _whole(s, flat, weight)
    y = e.cut(s, y, -1, weight.start, weight.end, weight.step)
    if bias is not None:
        y = e.elementwise(s, "Add", y, e.cast(s, bias, "float32"))
    count = y.shape[-1]
    assert isinstance(count, int)
    return e.reshape(s, e.cast(s, y, dtype), [*lead, count])


def expert_product(s: Scope, x: Value, weight: Nested, expert: int) -> Value:
    """x [P, C], float32, through all outputs of one expert: [P, O]."""
    return _whole(s, x, weight, expert)


def _whole(s: Scope, x: Value, weight: Nested, expert: int | None = None) -> Value:
    """x [T, C] through all outputs, so that the parts of a fused projection share the product."""
    scale = _part(s, weight, DRAFT_SCALE if weight.high else SCALE, expert)
    wide = TYPES["float32"]
    scale = s.op("Cast", scale, shape=scale.shape, dtype="float32", within=True, to=wide)
    high = _matmul(s, x, _part(s, weight, HIGH, expert), scale, 0x88)
    if not weight.high:
        low = _matmul(s, x, _part(s, weight, LOW, expert), scale, 0)
        return e.elementwise(s, "Add", e.elementwise(s, "Mul", high, 16.0), low)
    shape = (x.shape[0], weight.outputs)
    return s.op("Gemm", _sums(s, x), scale, high, shape=shape, alpha=8.0, beta=16.0, transB=1)


def _sums(s: Scope, x: Value) -> Value:
    """The sums of the rounded x [T, C] over each group: [T, C / 32]."""
    inputs = x.shape[1]
    assert isinstance(inputs, int)
    rows = e.reshape(s, x, [-1, GROUP])
    ones = e.unsqueeze(s, s.constant([[0x99] * (GROUP // 2)], "uint8"), 0)
    sums = _matmul(s, rows, ones, _filled(s, (1, 1), "float32", 1), 0x88)
    return e.reshape(s, sums, [-1, inputs // GROUP])


def _matmul(s: Scope, x: Value, planes: Value, scale: Value, zero_points: int) -> Value:
    """x [T, C] times `planes` [O, C / 32, 16] with scales [O, C / 32]: [T, O].

    `zero_points`: a byte with the zero point in both nibbles.
    """
    outputs, groups, _ = planes.shape
    assert isinstance(groups, int)
    assert isinstance(outputs, int)
    zeros = _filled(s, (outputs, (groups + 1) // 2), "uint8", zero_points)
    return s.op(
        OPERATOR,
        x,
        planes,
        scale,
        zeros,
        shape=(x.shape[0], outputs),
        domain=DOMAIN,
        K=groups * GROUP,
        N=outputs,
        bits=4,
        block_size=GROUP,
        accuracy_level=_ROUNDS_ACTIVATIONS,
    )


def _filled(s: Scope, shape: tuple[int, int], dtype: str, value: int) -> Value:
    filling = helper.make_tensor("value", TYPES[dtype], [1], [value])
    return s.op(
        "ConstantOfShape",
        s.constant(shape, "int64"),
        shape=shape,
        dtype=dtype,
        within=True,
        value=filling,
    )


def _part(s: Scope, weight: Nested, part: str, expert: int | None = None) -> Value:
    groups = [weight.outputs, weight.inputs // GROUP]
    name = part_name(weight.name, part)
    if expert is not None:
        name = expert_name(name, expert)
    if part in (HIGH, LOW):
        return s.weight(name, "uint8", [*groups, GROUP // 2])
    return s.weight(name, "float16", groups)


def linear(s: Scope, x: Value, weight: Nested, bias: Value | None = None) -> Value:
    """`sirius::linear`. In graph documents its weight is always nested."""
    return product(s, x, weight, bias)


def embedding(s: Scope, weight: Nested, ids: Value, dtype: str) -> Value:
    """`sirius::embedding`: both planes of the rows at ids [B, T], converted to numbers."""
    codes = [_codes(s, e.gather(s, _part(s, weight, part), ids, 0)) for part in (HIGH, LOW)]
    high, low = (e.cast(s, value, "float32") for value in codes)
    q = e.elementwise(s, "Add", e.elementwise(s, "Mul", high, 16.0), low)
    q = e.elementwise(s, "Sub", q, 128.0)
    scale = e.cast(s, e.gather(s, _part(s, weight, SCALE), ids, 0), "float32")
    rows = e.elementwise(s, "Mul", q, e.unsqueeze(s, scale, -1))
    extents = [e.size(s, ids, axis) for axis in range(ids.rank)]
    return e.cast(s, e.reshape(s, rows, [*extents, weight.inputs]), dtype)


def _codes(s: Scope, packed: Value) -> Value:
    """The 32 nibbles of 16 bytes: uint8 […, 16] to […, 32]."""
    even = s.op("BitwiseAnd", packed, s.constant(15, "uint8"), shape=packed.shape)
    odd = s.op("BitShift", packed, s.constant(4, "uint8"), shape=packed.shape, direction="RIGHT")
    pairs = s.op(
        "Concat",
        *(e.unsqueeze(s, half, packed.rank) for half in (even, odd)),
        shape=(*packed.shape, 2),
        axis=packed.rank,
    )
    extents: list[Any] = [e.size(s, packed, axis) for axis in range(packed.rank - 1)]
    return e.reshape(s, pairs, [*extents, GROUP])
