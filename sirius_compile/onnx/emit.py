"""Building blocks of translations: casts, shapes, and PyTorch's arithmetic on mixed dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sirius_compile.onnx.scope import TYPES, Extent, Scope, Shape, Value, View

Size = int | Value
"""A size: known, or an int64 scalar of the graph."""

MAX = 2**63 - 1
_ORDER = ("bool", "int32", "int64", "bfloat16", "float16", "float32", "float64")
_KINDS = {"bool": 0, "int32": 1, "int64": 1}


def kind(dtype: str) -> int:
    """0 for bool, 1 for integers, 2 for floating point."""
    return _KINDS.get(dtype, 2)


def scalar(s: Scope, value: Any, dtype: str) -> Value:
    """A number as a tensor without dimensions; a tensor is returned as it is."""
    return cast(s, value, dtype) if isinstance(value, Value) else s.constant(value, dtype)


def cast(s: Scope, x: Value, dtype: str) -> Value:
    if x.dtype == dtype:
        return x
    return s.op("Cast", x, shape=x.shape, dtype=dtype, to=TYPES[dtype])


def promoted(*values: Any) -> str:
    """PyTorch's result dtype for tensors and Python numbers.

    Tensors with dimensions take precedence over tensors without, and these over numbers, unless the
    latter have a higher kind (floating point above integers above bool).
    """
    ranked = [v.dtype for v in values if isinstance(v, Value) and v.rank]
    scalars = [v.dtype for v in values if isinstance(v, Value) and not v.rank]
    best = _highest(ranked)
    for lesser in (_highest(scalars), _highest([_number(v) for v in values])):
        if lesser and (best is None or kind(lesser) > kind(best)):
            best = lesser
    assert best is not None
    return best


def _highest(dtypes: Sequence[str | None]) -> str | None:
    return max((d for d in dtypes if d), key=_ORDER.index, default=None)


def _number(value: Any) -> str | None:
    """The dtype of a Python number; None for a tensor."""
    for python, dtype in ((bool, "bool"), (int, "int64"), (float, "float32")):
        if isinstance(value, python):
            return dtype
    return None


def broadcast(*shapes: Shape) -> Shape:
    """The shape of an element-wise result, as far as it is known."""
    rank = max(map(len, shapes))
    result: list[Extent] = []
    for axis in range(-rank, 0):
        extents = {shape[axis] for shape in shapes if len(shape) >= -axis} - {1}
        numbers = [extent for extent in extents if isinstance(extent, int)]
        if numbers or len(extents) == 1:
            result.append(numbers[0] if numbers else extents.pop())
        else:
            result.append(None if extents else 1)
    return tuple(result)


def elementwise(s: Scope, op: str, *values: Any, result: str | None = None) -> Value:
    """`op` on tensors and numbers, cast to their common dtype. `result`: the result's dtype, if it
    differs, as for a comparison.
    """
    dtype = promoted(*values)
    operands = [scalar(s, value, dtype) for value in values]
    shape = broadcast(*(o.shape for o in operands))
    return s.op(op, *operands, shape=shape, dtype=result or dtype)


def where(s: Scope, condition: Value, a: Any, b: Any) -> Value:
    dtype = promoted(a, b)
    x, y = scalar(s, a, dtype), scalar(s, b, dtype)
    if dtype == "bool":  # ONNX Runtime has no such kernel
        neither = s.op("Not", condition, shape=condition.shape)
        either = elementwise(s, "And", condition, x), elementwise(s, "And", neither, y)
        return elementwise(s, "Or", *either)
    shape = broadcast(condition.shape, x.shape, y.shape)
    return s.op("Where", condition, x, y, shape=shape, dtype=dtype)


def axis_of(x: Value, dim: int) -> int:
    return dim % max(x.rank, 1)


def size(s: Scope, x: Value, dim: int) -> Size:
    axis = axis_of(x, dim)
    extent = x.shape[axis]
    if isinstance(extent, int):
        return extent
    if isinstance(extent, str):
        return s.size(extent)
    one = s.op("Shape", x, shape=(1,), dtype="int64", start=axis, end=axis + 1)
    return s.op("Squeeze", one, s.constant([0], "int64"), shape=())


def sizes(s: Scope, extents: Sequence[Size]) -> Value:
    """Sizes as one int64 tensor."""
    if all(isinstance(e, int) for e in extents):
        return s.constant(extents, "int64")
    parts = [
        s.constant([e], "int64")
        if isinstance(e, int)
        else s.op("Unsqueeze", e, s.constant([0], "int64"), shape=(1,))
        for e in extents
    ]
    return s.op("Concat", *parts, shape=(len(parts),), axis=0)


def known(extents: Sequence[Size]) -> Shape:
    """Sizes as a shape, with None for -1 and for unknown sizes."""
    return tuple(e.letter if isinstance(e, Value) else e if e >= 0 else None for e in extents)


def reshape(s: Scope, x: Value, extents: Sequence[Size]) -> Value:
    shape = known(extents)
    if -1 in extents and shape.count(None) == 1 and None not in x.shape:
        missing = _missing(x.shape, shape)
        shape = tuple(missing if e is None else e for e in shape)
    if shape == x.shape and None not in shape:
        return x
    source = s.root.reshaped.get(x.name, x)  # of two reshapes in a row, keep the second
    value = s.op("Reshape", source, sizes(s, extents), shape=shape)
    s.root.reshaped[value.name] = source
    return value


def _missing(whole: Shape, rest: Shape) -> Extent:
    """The one size of `whole` that `rest` lacks; None if there is no single one."""
    letters = [[e for e in shape if isinstance(e, str)] for shape in (whole, rest)]
    numbers = [math.prod(e for e in shape if isinstance(e, int)) for shape in (whole, rest)]
    for letter in letters[1]:
        if letter not in letters[0]:
            return None
        letters[0].remove(letter)
    if not letters[0]:
        return numbers[0] // numbers[1]
    return letters[0][0] if len(letters[0]) == 1 and numbers[0] == numbers[1] else None


def expand(s: Scope, x: Value, extents: Sequence[Size]) -> Value:
    """PyTorch's `expand`: -1 leaves a size as it is."""
    wanted: list[Size] = [1 if isinstance(e, int) and e == -1 else e for e in extents]
    padded = (1,) * (len(wanted) - x.rank) + x.shape
    shape = broadcast(known(wanted), padded)
    if shape == x.shape and None not in shape:
        return x
    if len(wanted) == x.rank and all(isinstance(e, int) and e == 1 for e in wanted):
        return x
    return s.op("Expand", x, sizes(s, wanted), shape=shape)


def expand_like(s: Scope, x: Value, other: Value) -> Value:
    extents = s.op("Shape", other, shape=(other.rank,), dtype="int64")
    return s.op("Expand", x, extents, shape=broadcast(x.shape, other.shape))


def unsqueeze(s: Scope, x: Value, *dims: int) -> Value:
    """Inserts dimensions of size 1, at these indices of the result."""
    rank = x.rank + len(dims)
    places = sorted(d % rank for d in dims)
    extents = iter(x.shape)
    shape = tuple(1 if axis in places else next(extents) for axis in range(rank))
    return s.op("Unsqueeze", x, s.constant(places, "int64"), shape=shape)


def squeeze(s: Scope, x: Value, dim: int) -> Value:
    axis = axis_of(x, dim)
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    return s.op("Squeeze", x, s.constant([axis], "int64"), shape=shape)


def permute(s: Scope, x: Value, order: Sequence[int]) -> Value:
    order = [axis_of(x, d) for d in order]
    shape = tuple(x.shape[d] for d in order)
    return s.op("Transpose", x, shape=shape, perm=list(order))


def swap(s: Scope, x: Value, a: int, b: int) -> Value:
    order = list(range(x.rank))
    a, b = axis_of(x, a), axis_of(x, b)
    order[a], order[b] = order[b], order[a]
    value = permute(s, x, order)
    if x.view is not None and x.rank == 2 and a != b:
        value = replace(value, view=x.view._replace(transposed=not x.view.transposed))
    return value


def cut(s: Scope, x: Value, dim: int, start: Size, end: Size, step: int = 1) -> Value:
    """Every `step`th element of [start, end) along a dimension; negative bounds count from the
    end.
    """
    axis = axis_of(x, dim)
    extent = x.shape[axis]
    if isinstance(start, int) and isinstance(end, int):
        if start == 0 and step == 1 and end >= (extent if isinstance(extent, int) else MAX):
            return x
        new = len(range(extent)[start:end:step]) if isinstance(extent, int) else None
    else:
        new = None
    shape = (*x.shape[:axis], new, *x.shape[axis + 1 :])
    at, by = s.constant([axis], "int64"), None if step == 1 else s.constant([step], "int64")
    value = s.op("Slice", x, sizes(s, [start]), sizes(s, [end]), at, by, shape=shape)
    return replace(value, view=_part(x, axis, start, new, step)) if isinstance(new, int) else value


def _part(x: Value, axis: int, start: Size, count: int, step: int) -> View | None:
    """`count` elements of `x` as a view of its weight, if `x` is a whole weight; else None."""
    extent = x.shape[axis]
    if x.view is None or not isinstance(start, int) or not isinstance(extent, int):
        return None
    weight, cut_axis, begin, end, transposed, _ = x.view
    if end - begin < (weight.shape[cut_axis] or 0):  # type: ignore[operator]
        return None
    first = range(extent)[start:].start
    axis = 1 - axis if transposed else axis
    return View(weight, axis, first, first + (count - 1) * step + 1, transposed, step)


def gather(s: Scope, x: Value, index: Value, dim: int) -> Value:
    """The slices of `x` along a dimension at the indices `index`, a tensor of any shape."""
    axis = axis_of(x, dim)
    shape = x.shape[:axis] + index.shape + x.shape[axis + 1 :]
    return s.op("Gather", x, index, shape=shape, axis=axis)


def take(s: Scope, x: Value, index: Value, dim: int) -> Value:
    """PyTorch's `gather`, which has an index for each element."""
    return s.op("GatherElements", x, index, shape=index.shape, axis=axis_of(x, dim))


def concat(s: Scope, values: Sequence[Value], dim: int) -> Value:
    dtype = promoted(*values)
    values = [cast(s, v, dtype) for v in values]
    axis = axis_of(values[0], dim)
    extents = [v.shape[axis] for v in values]
    numbers = [e for e in extents if isinstance(e, int)]
    total = sum(numbers) if len(numbers) == len(extents) else None
    rest = broadcast(*((*v.shape[:axis], 1, *v.shape[axis + 1 :]) for v in values))
    shape = (*rest[:axis], total, *rest[axis + 1 :])
    return s.op("Concat", *values, shape=shape, axis=axis)


def stack(s: Scope, values: Sequence[Value], dim: int) -> Value:
    place = dim % (values[0].rank + 1)
    return concat(s, [unsqueeze(s, v, place) for v in values], place)


def arange(s: Scope, extent: Size) -> Value:
    if isinstance(extent, int) and extent <= 128:
        return s.constant(range(extent), "int64")
    end = scalar(s, extent, "int64")
    zero, one = s.constant(0, "int64"), s.constant(1, "int64")
    return s.lettered(s.op("Range", zero, end, one, shape=known([extent])))


def filled(s: Scope, extents: Sequence[Size], value: float, dtype: str) -> Value:
    """A tensor of one value."""
    if dtype == "bool":
        return cast(s, filled(s, extents, value, "int64"), "bool")
    if not extents:
        return s.constant(value, dtype)
    return s.op("Expand", s.constant(value, dtype), sizes(s, extents), shape=known(extents))


def shape_of(s: Scope, x: Value) -> list[Size]:
    return [size(s, x, axis) for axis in range(x.rank)]


def reduced(
    s: Scope, op: str, x: Value, dims: Sequence[int], keepdim: bool, dtype: str | None = None
) -> Value:
    axes = sorted(axis_of(x, d) for d in dims) or list(range(x.rank))
    shape = tuple(1 if a in axes else e for a, e in enumerate(x.shape) if keepdim or a not in axes)
    return s.op(op, x, s.constant(axes, "int64"), shape=shape, dtype=dtype, keepdims=int(keepdim))


def linear(s: Scope, x: Value, weight: Value, bias: Value | None) -> Value:
    """x [..., C] times weight [O, C] transposed: [..., O]."""
    y = flat_matmul(s, x, swap(s, weight, 0, 1))
    return y if bias is None else elementwise(s, "Add", y, bias)


def matmul(s: Scope, a: Value, b: Value) -> Value:
    lead = broadcast(a.shape[:-2], b.shape[:-2]) if max(a.rank, b.rank) > 2 else ()
    return s.op("MatMul", a, b, shape=(*lead, a.shape[-2], b.shape[-1]))


def flat_matmul(s: Scope, x: Value, weight: Value) -> Value:
    """x [..., C] times weight [C, O]: [..., O].

    A weight is read as stored, because a transposed copy would double its memory. For a part of a
    fused weight, the product with the whole weight is computed and sliced; the parts share it.
    """
    view = weight.view
    if view is not None and view.axis == (0 if view.transposed else 1):
        y = _product(s, x, view.weight, view.transposed)
        return cut(s, y, -1, view.start, view.end, view.step)
    if view is not None and view.end - view.start == view.weight.shape[view.axis]:
        return _product(s, x, view.weight, view.transposed)
    return _product(s, x, weight, False)


def _product(s: Scope, x: Value, weight: Value, transposed: bool) -> Value:
    channels, out = weight.shape[::-1] if transposed else weight.shape
    assert isinstance(out, int)
    assert isinstance(channels, int)
    flat = reshape(s, x, [-1, channels])
    shape = (flat.shape[0], out)
    if transposed:
        y = s.op("Gemm", flat, weight, shape=shape, transB=1)
    else:
        y = s.op("MatMul", flat, weight, shape=shape)
    return reshape(s, y, [*(size(s, x, a) for a in range(x.rank - 1)), out])
