"""The translation of PyTorch's operators to ONNX: a closed table, one function an operator.

Each function takes the scope and the operator's arguments, with tensors as `Value`s. An operator
that is not in the table, or an argument that its function does not take, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from sirius_compile.onnx import emit as e
from sirius_compile.onnx.attention import index_copy
from sirius_compile.onnx.mlp import activation, topk
from sirius_compile.onnx.scope import Extent, Scope, Value

Builder = Callable[..., Any]


def _unary(op: str) -> Builder:
    return lambda s, x: s.op(op, x, shape=x.shape)


def _binary(op: str) -> Builder:
    return lambda s, a, b: e.elementwise(s, op, a, b)


def _compare(op: str) -> Builder:
    return lambda s, a, b: e.elementwise(s, op, a, b, result="bool")


def _not_equal(s: Scope, a: Any, b: Any) -> Value:
    equal = e.elementwise(s, "Equal", a, b, result="bool")
    return s.op("Not", equal, shape=equal.shape)


def _not(s: Scope, x: Value) -> Value:
    if x.dtype != "bool":
        raise NotImplementedError("only bool may be inverted")
    return s.op("Not", x, shape=x.shape)


def _div(s: Scope, a: Any, b: Any) -> Value:
    if e.kind(e.promoted(a, b)) < 2:
        a = e.scalar(s, a, "float32")
    return e.elementwise(s, "Div", a, b)


def _floor_divide(s: Scope, a: Any, b: Any) -> Value:
    if e.kind(e.promoted(a, b)) == 2:
        quotient = e.elementwise(s, "Div", a, b)
        return s.op("Floor", quotient, shape=quotient.shape)
    # ONNX's integer Div rounds to zero; the remainder of its Mod has the divisor's sign.
    whole = e.elementwise(s, "Sub", a, e.elementwise(s, "Mod", a, b))
    return e.elementwise(s, "Div", whole, b)


def _clamp(s: Scope, x: Value, min: float | None = None, max: float | None = None) -> Value:
    for op, bound in (("Max", min), ("Min", max)):
        if bound is not None:
            x = s.op(op, x, s.constant(bound, x.dtype), shape=x.shape)
    return x


def _clamp_to(s: Scope, x: Value, min: Value | None = None, max: Value | None = None) -> Value:
    for op, bound in (("Max", min), ("Min", max)):
        if bound is not None:
            x = e.elementwise(s, op, x, bound)
    return x


def _pow(s: Scope, x: Value, exponent: float) -> Value:
    if exponent == 2:
        return e.elementwise(s, "Mul", x, x)
    return e.elementwise(s, "Pow", x, exponent)


def _rsqrt(s: Scope, x: Value) -> Value:
    root = s.op("Sqrt", x, shape=x.shape)
    return s.op("Reciprocal", root, shape=x.shape)


def _softmax(op: str) -> Builder:
    def build(s: Scope, x: Value, dim: int, dtype: str | None = None) -> Value:
        x = e.cast(s, x, dtype or x.dtype)
        return s.op(op, x, shape=x.shape, axis=e.axis_of(x, dim))

    return build


def _reduce(op: str) -> Builder:
    def build(s: Scope, x: Value, dim: Sequence[int], keepdim: bool = False) -> Value:
        return e.reduced(s, op, x, dim, keepdim)

    return build


def _sum(
    s: Scope, x: Value, dim: Sequence[int] = (), keepdim: bool = False, dtype: str | None = None
) -> Value:
    default = x.dtype if e.kind(x.dtype) == 2 else "int64"
    return e.reduced(s, "ReduceSum", e.cast(s, x, dtype or default), dim, keepdim)


def _cumsum(s: Scope, x: Value, dim: int, dtype: str | None = None) -> Value:
    default = x.dtype if e.kind(x.dtype) == 2 else "int64"
    x = e.cast(s, x, dtype or default)
    return s.op("CumSum", x, s.constant(e.axis_of(x, dim), "int64"), shape=x.shape)


def _any(s: Scope, x: Value) -> Value:
    most = e.reduced(s, "ReduceMax", e.cast(s, x, "int32"), [], False)
    return e.cast(s, most, "bool")


def _max(s: Scope, x: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    return e.reduced(s, "ReduceMax", x, [dim], keepdim), _argmax(s, x, dim, keepdim)


def _argmax(s: Scope, x: Value, dim: int, keepdim: bool = False) -> Value:
    axis = e.axis_of(x, dim)
    shape = (*x.shape[:axis], *((1,) if keepdim else ()), *x.shape[axis + 1 :])
    return s.op("ArgMax", x, shape=shape, dtype="int64", axis=axis, keepdims=int(keepdim))


def _arange(s: Scope, end: e.Size, pin_memory: bool = False) -> Value:
    return e.arange(s, end)


def _arange_by(
    s: Scope, start: int, end: int, step: int = 1, dtype: str = "int64", pin_memory: bool = False
) -> Value:
    places = e.arange(s, len(range(start, end, step)))
    spaced = e.elementwise(s, "Add", e.elementwise(s, "Mul", places, step), start)
    return e.cast(s, spaced, dtype)


def _eye(s: Scope, n: int, dtype: str = "float32", pin_memory: bool = False) -> Value:
    index = e.arange(s, n)
    same = e.elementwise(s, "Equal", index, e.unsqueeze(s, index, 1), result="bool")
    return e.cast(s, same, dtype)


def _new_zeros(
    s: Scope, x: Value, size: Sequence[e.Size], dtype: str | None = None, pin_memory: bool = False
) -> Value:
    return e.filled(s, size, 0, dtype or x.dtype)


def _zeros(
    s: Scope, size: Sequence[e.Size], dtype: str = "float32", pin_memory: bool = False
) -> Value:
    return e.filled(s, size, 0, dtype)


def _like(value: int) -> Builder:
    def build(s: Scope, x: Value, dtype: str | None = None, pin_memory: bool = False) -> Value:
        return e.filled(s, e.shape_of(s, x), value, dtype or x.dtype)

    return build


def _where(s: Scope, condition: Value, a: Any, b: Any) -> Value:
    return e.where(s, condition, a, b)


def _masked_fill(s: Scope, x: Value, mask: Value, value: Any) -> Value:
    return e.where(s, mask, e.scalar(s, value, x.dtype), x)


def _flatten(s: Scope, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    start, end = e.axis_of(x, start_dim), e.axis_of(x, end_dim)
    lead = [e.size(s, x, axis) for axis in range(start)]
    rest = [e.size(s, x, axis) for axis in range(end + 1, x.rank)]
    return e.reshape(s, x, [*lead, -1, *rest])


def _slice(
    s: Scope,
    x: Value,
    dim: int = 0,
    start: e.Size | None = None,
    end: e.Size | None = None,
    step: int = 1,
) -> Value:
    return e.cut(s, x, dim, 0 if start is None else start, e.MAX if end is None else end, step)


def _select(s: Scope, x: Value, dim: int, index: e.Size) -> Value:
    return e.gather(s, x, e.scalar(s, index, "int64"), dim)


def _index(s: Scope, x: Value, indices: Sequence[Value | None]) -> Value:
    places = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(places) != 1 or places[0][1].dtype == "bool":
        raise NotImplementedError("only one dimension may be indexed, by integers")
    ((dim, index),) = places
    return e.gather(s, x, index, dim)


def _index_select(s: Scope, x: Value, dim: int, index: Value) -> Value:
    return e.gather(s, x, index, dim)


def _gather(s: Scope, x: Value, dim: int, index: Value) -> Value:
    return e.take(s, x, index, dim)


def _scatter(s: Scope, x: Value, dim: int, index: Value, src: Value) -> Value:
    axis = e.axis_of(x, dim)
    return s.op("ScatterElements", x, index, src, shape=x.shape, axis=axis)


def _scatter_number(s: Scope, x: Value, dim: int, index: Value, value: float) -> Value:
    return _scatter(s, x, dim, index, e.filled(s, e.shape_of(s, index), value, x.dtype))


def _slice_scatter(
    s: Scope, x: Value, src: Value, dim: int = 0, start: int | None = None, end: int | None = None
) -> Value:
    parts = [e.cut(s, x, dim, 0, start)] if start else []
    parts.append(src)
    extent = x.shape[e.axis_of(x, dim)]
    if end is not None and not (isinstance(extent, int) and end >= extent):
        parts.append(e.cut(s, x, dim, end, e.MAX))
    return e.concat(s, parts, dim)


def _scatter_add(s: Scope, x: Value, dim: int, index: Value, src: Value) -> Value:
    axis = e.axis_of(x, dim)
    return s.op("ScatterElements", x, index, src, shape=x.shape, axis=axis, reduction="add")


def _sort(
    s: Scope, x: Value, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, Value]:
    if e.axis_of(x, dim) != x.rank - 1:
        raise NotImplementedError("only the last dimension may be sorted")
    extent = x.shape[-1]
    if not isinstance(extent, int):
        raise NotImplementedError("the size of the sorted dimension must be known")
    return topk(s, x, extent, largest=descending)


def _topk(
    s: Scope, x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Value, Value]:
    if e.axis_of(x, dim) != x.rank - 1:
        raise NotImplementedError("topk works along the last dimension only")
    return topk(s, x, k, largest=largest)


def _embedding(s: Scope, weight: Value, indices: Value, padding_idx: int = -1) -> Value:
    return e.gather(s, weight, indices, 0)  # padding_idx affects gradients only


def _linear(s: Scope, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return e.linear(s, x, weight, bias)


def _addmm(s: Scope, bias: Value, x: Value, weight: Value) -> Value:
    return e.elementwise(s, "Add", e.flat_matmul(s, x, weight), bias)


def _layer_norm(
    s: Scope,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:
    axis = -len(normalized_shape)
    if weight is None:
        weight = e.filled(s, list(normalized_shape), 1.0, x.dtype)
    return s.op("LayerNormalization", x, weight, bias, shape=x.shape, axis=axis, epsilon=eps)


def _einsum(s: Scope, equation: str, operands: Sequence[Value]) -> Value:
    sources, _, result = equation.partition("->")
    extents: dict[str, Extent] = {}
    for letters, operand in zip(sources.split(","), operands, strict=True):
        extents |= dict(zip(letters, operand.shape, strict=True))
    shape = tuple(extents[letter] for letter in result)
    return s.op("Einsum", *operands, shape=shape, equation=equation)


def _squeeze(s: Scope, x: Value) -> Value:
    if not all(isinstance(extent, int) for extent in x.shape):
        raise NotImplementedError("squeeze needs known sizes")
    for axis in reversed([axis for axis, extent in enumerate(x.shape) if extent == 1]):
        x = e.squeeze(s, x, axis)
    return x


def _split(s: Scope, x: Value, size: int, dim: int = 0) -> tuple[Value, ...]:
    extent = x.shape[e.axis_of(x, dim)]
    if not isinstance(extent, int):
        raise NotImplementedError("the size of the split dimension must be known")
    return tuple(e.cut(s, x, dim, i, min(i + size, extent)) for i in range(0, extent, size))


def _split_with_sizes(s: Scope, x: Value, sizes: Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    ends = list(accumulate(sizes))
    return tuple(e.cut(s, x, dim, end - n, end) for n, end in zip(sizes, ends, strict=True))


def _chunk(s: Scope, x: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    extent = x.shape[e.axis_of(x, dim)]
    if not isinstance(extent, int):
        raise NotImplementedError("the size of the split dimension must be known")
    return _split(s, x, -(-extent // chunks), dim)


def _repeat_interleave(s: Scope, x: Value, repeats: int, dim: int) -> Value:
    axis = e.axis_of(x, dim)
    extents = e.shape_of(s, x)
    y = e.unsqueeze(s, x, axis + 1)
    y = e.expand(s, y, [*extents[: axis + 1], repeats, *extents[axis + 1 :]])
    known = extents[axis]
    long = known * repeats if isinstance(known, int) else -1
    return e.reshape(s, y, [*extents[:axis], long, *extents[axis + 1 :]])


def _gelu(s: Scope, x: Value, approximate: str = "none") -> Value:
    return activation(s, x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _to_dtype(s: Scope, x: Value, dtype: str) -> Value:
    return e.cast(s, x, dtype)


def _to_device(s: Scope, x: Value, device: None, dtype: str) -> Value:
    return e.cast(s, x, dtype)


ATEN: dict[str, Builder] = {
    "__and__.Tensor": _binary("And"),
    "__or__.Tensor": _binary("Or"),
    "abs.default": _unary("Abs"),
    "add.Tensor": _binary("Add"),
    "addmm.default": _addmm,
    "amax.default": _reduce("ReduceMax"),
    "any.default": _any,
    "arange.default": _arange,
    "arange.start_step": _arange_by,
    "argmax.default": _argmax,
    "bitwise_not.default": _not,
    "cat.default": lambda s, tensors, dim=0: e.concat(s, tensors, dim),
    "chunk.default": _chunk,
    "clamp.Tensor": _clamp_to,
    "clamp.default": _clamp,
    "clone.default": lambda s, x: x,
    "concat.default": lambda s, tensors, dim=0: e.concat(s, tensors, dim),
    "contiguous.default": lambda s, x: x,
    "cos.default": _unary("Cos"),
    "cumsum.default": _cumsum,
    "div.Tensor": _div,
    "einsum.default": _einsum,
    "embedding.default": _embedding,
    "eq.Scalar": _compare("Equal"),
    "eq.Tensor": _compare("Equal"),
    "exp.default": _unary("Exp"),
    "expand.default": lambda s, x, extents: e.expand(s, x, extents),
    "eye.default": _eye,
    "flatten.using_ints": _flatten,
    "floor_divide.default": _floor_divide,
    "gather.default": _gather,
    "ge.Scalar": _compare("GreaterOrEqual"),
    "ge.Tensor": _compare("GreaterOrEqual"),
    "gelu.default": _gelu,
    "gt.Scalar": _compare("Greater"),
    "gt.Tensor": _compare("Greater"),
    "index.Tensor": _index,
    "index_copy.default": index_copy,
    "index_select.default": _index_select,
    "item.default": lambda s, x: x,
    "layer_norm.default": _layer_norm,
    "le.Scalar": _compare("LessOrEqual"),
    "le.Tensor": _compare("LessOrEqual"),
    "linear.default": _linear,
    "log.default": _unary("Log"),
    "log_softmax.int": _softmax("LogSoftmax"),
    "logical_and.default": _binary("And"),
    "logical_not.default": _unary("Not"),
    "logsumexp.default": _reduce("ReduceLogSumExp"),
    "lt.Scalar": _compare("Less"),
    "lt.Tensor": _compare("Less"),
    "masked_fill.Scalar": _masked_fill,
    "masked_fill.Tensor": _masked_fill,
    "max.dim": _max,
    "maximum.default": _binary("Max"),
    "mean.dim": _reduce("ReduceMean"),
    "minimum.default": _binary("Min"),
    "mul.Scalar": _binary("Mul"),
    "mul.Tensor": _binary("Mul"),
    "ne.Scalar": _not_equal,
    "ne.Tensor": _not_equal,
    "neg.default": _unary("Neg"),
    "new_empty.default": _new_zeros,
    "new_zeros.default": _new_zeros,
    "ones_like.default": _like(1),
    "permute.default": lambda s, x, order: e.permute(s, x, order),
    "pow.Scalar": lambda s, base, x: e.elementwise(s, "Pow", base, x),
    "pow.Tensor_Scalar": _pow,
    "reciprocal.default": _unary("Reciprocal"),
    "relu.default": _unary("Relu"),
    "repeat_interleave.self_int": _repeat_interleave,
    "reshape.default": lambda s, x, extents: e.reshape(s, x, extents),
    "rsqrt.default": _rsqrt,
    "scatter.src": _scatter,
    "scatter.value": _scatter_number,
    "scatter_add.default": _scatter_add,
    "select.int": _select,
    "sigmoid.default": _unary("Sigmoid"),
    "silu.default": lambda s, x: activation(s, x, "silu"),
    "sin.default": _unary("Sin"),
    "slice.Tensor": _slice,
    "slice_scatter.default": _slice_scatter,
    "softmax.int": _softmax("Softmax"),
    "sort.default": _sort,
    "sort.stable": _sort,
    "split.Tensor": _split,
    "split_with_sizes.default": _split_with_sizes,
    "sqrt.default": _unary("Sqrt"),
    "square.default": lambda s, x: e.elementwise(s, "Mul", x, x),
    "squeeze.default": _squeeze,
    "squeeze.dim": lambda s, x, dim: e.squeeze(s, x, dim),
    "stack.default": lambda s, tensors, dim=0: e.stack(s, tensors, dim),
    "sub.Tensor": _binary("Sub"),
    "sum.dim_IntList": _sum,
    "sym_constrain_range.default": lambda s, x, min=None, max=None: None,
    "sym_size.int": lambda s, x, dim: e.size(s, x, dim),
    "t.default": lambda s, x: e.swap(s, x, 0, 1),
    "tanh.default": _unary("Tanh"),
    "to.device": _to_device,
    "to.dtype": _to_dtype,
    "topk.default": _topk,
    "transpose.int": lambda s, x, a, b: e.swap(s, x, a, b),
    "type_as.default": lambda s, x, other: e.cast(s, x, other.dtype),
    "unsqueeze.default": lambda s, x, dim: e.unsqueeze(s, x, dim),
    "view.default": lambda s, x, extents: e.reshape(s, x, extents),
    "where.ScalarOther": _where,
    "where.ScalarSelf": _where,
    "where.self": _where,
    "zeros.default": _zeros,
    "zeros_like.default": _like(0),
}
