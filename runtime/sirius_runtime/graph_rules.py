"""The rules of the operators that a graph may call: checks and infers dtypes and sizes.

A rule gets the operator's arguments in the order of its schema, without those of `IGNORED`. It
returns the call's result, or raises `CallError` with the reason. A call that a rule accepts can
fail only because of the values in its tensors (an index out of range), which its kernel checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sirius_runtime.graph_sizes import (
    Expression,
    Size,
    add,
    at_least,
    divide,
    floor_divide,
    multiply,
    named,
    product,
    subtract,
)

MOST_ELEMENTS = 2**33
"""Most elements of one result, with unknown sizes counted as 1. No model needs more."""
_MOST_PARTS = 4096  # of a split; no model needs more
_NO_END = 2**62  # a slice's end from here on means "to the end"


@dataclass(frozen=True)
class Array:
    """A tensor's dtype and shape."""

    dtype: torch.dtype
    shape: tuple[Size, ...]

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True)
class Scalar:
    """A number that is read from a tensor when the graph runs."""

    dtype: torch.dtype


Number: TypeAlias = "bool | int | float | Expression | Scalar"
Operand: TypeAlias = "Array | Number"


class CallError(Exception):
    """Why a call can't run."""


def need(holds: bool, reason: str) -> None:
    if not holds:
        raise CallError(reason)


def axis(dim: Any, rank: int) -> int:
    """The dimension `dim`, which may be negative, as an index from 0. Raises CallError."""
    rank = max(rank, 1)
    need(isinstance(dim, int) and -rank <= dim < rank, f"there is no dimension {dim}")
    return int(dim) % rank


def not_more(small: Size, large: Size) -> bool:
    """Whether `small` is at most `large` for all values."""
    return small == large or at_least(subtract(large, small), 0)


def made(dtype: torch.dtype, shape: Sequence[Size]) -> Array:
    """A result of this dtype and shape; raises CallError where it is too large."""
    known = 1
    for size in shape:
        if isinstance(size, int):
            need(size >= 0, f"size {size} is negative")
            known *= size
    need(known <= MOST_ELEMENTS, f"a tensor of {known} elements is too large for any model")
    return Array(dtype, tuple(shape))


def created(dtype: torch.dtype, shape: Sequence[Size]) -> Array:
    """As `made`, for sizes that the graph computes, which must not be negative."""
    for size in shape:
        need(at_least(size, 0), f"size {size} may be negative")
    return made(dtype, shape)


def broadcast(*shapes: tuple[Size, ...]) -> tuple[Size, ...]:
    result: list[Size] = []
    for place in range(1, max(map(len, shapes), default=0) + 1):
        sizes = {shape[-place] for shape in shapes if len(shape) >= place} - {1}
        need(len(sizes) <= 1, f"sizes {sorted(map(str, sizes))} of dimension -{place} differ")
        result.append(sizes.pop() if sizes else 1)
    return tuple(reversed(result))


# dtypes


def _category(dtype: torch.dtype | None) -> int:
    if dtype is None:
        return -1
    return 2 if dtype.is_floating_point else int(dtype is not torch.bool)


def _own_dtype(value: Number) -> torch.dtype:
    if isinstance(value, Scalar):
        return value.dtype if _category(value.dtype) < 2 else torch.float32
    if isinstance(value, bool):
        return torch.bool
    return torch.float32 if isinstance(value, float) else torch.int64


def promoted(*values: Operand) -> torch.dtype:
    """torch's result_type: tensors with dimensions have priority over tensors without, and these
    over numbers.
    """
    kinds: list[torch.dtype | None] = [None, None, None]
    for value in values:
        array = isinstance(value, Array)
        place = (0 if value.shape else 1) if isinstance(value, Array) else 2
        dtype = value.dtype if isinstance(value, Array) else _own_dtype(value)
        before = kinds[place]
        kinds[place] = dtype if before is None else torch.promote_types(before, dtype)
        assert array or place == 2
    result: torch.dtype | None = None
    for lower in kinds:
        if lower is not None and _category(lower) > _category(result):
            result = lower
    assert result is not None
    return result


def floating(dtype: torch.dtype) -> torch.dtype:
    """The result dtype of a function of real numbers."""
    return dtype if dtype.is_floating_point else torch.float32


def _need_floats(*arrays: Array | None) -> None:
    """Raises CallError unless all arrays have the same floating point dtype."""
    dtypes = {array.dtype for array in arrays if array is not None}
    need(len(dtypes) == 1, f"dtypes {sorted(map(str, dtypes))} differ")
    need(dtypes.pop().is_floating_point, "floating point numbers are needed")


def _need_index(index: Array) -> None:
    need(index.dtype is torch.int64, f"an index of int64 is needed, found {index}")


# elementwise operators


def real(x: Array, *_: Any) -> Array:
    return Array(floating(x.dtype), x.shape)


def alike(x: Array, *_: Any) -> Array:
    return x


def of_bits(x: Array, *_: Any) -> Array:
    need(not x.dtype.is_floating_point, "integers or bools are needed, found floating point")
    return x


def of_numbers(x: Array, *_: Any) -> Array:
    need(x.dtype is not torch.bool, "numbers are needed, found bool")
    return x


def of_floats(x: Array, *_: Any) -> Array:
    _need_floats(x)
    return x


def to_bool(x: Array, *_: Any) -> Array:
    return Array(torch.bool, x.shape)


def _shape(value: Operand) -> tuple[Size, ...]:
    return value.shape if isinstance(value, Array) else ()


def _both(a: Operand, b: Operand) -> tuple[Size, ...]:
    need(isinstance(a, Array) or isinstance(b, Array), "one of the two operands must be a tensor")
    return broadcast(_shape(a), _shape(b))


def arithmetic(a: Operand, b: Operand, alpha: Number = 1) -> Array:
    need(alpha == 1 and type(alpha) is int, "alpha must be 1")
    return made(promoted(a, b), _both(a, b))


def difference(a: Operand, b: Operand, alpha: Number = 1) -> Array:
    found = arithmetic(a, b, alpha)
    pair = [value.dtype if isinstance(value, Array) else _own_dtype(value) for value in (a, b)]
    need(torch.bool not in pair, "bools can't be subtracted")
    return found


def quotient(a: Operand, b: Operand) -> Array:
    return made(floating(promoted(a, b)), _both(a, b))


def rounded_quotient(a: Operand, b: Operand, mode: str | None = None) -> Array:
    return quotient(a, b) if mode is None else floor_quotient(a, b)


def floor_quotient(a: Operand, b: Operand) -> Array:
    need(b != 0, "a division by 0")
    dtype = promoted(a, b)
    need(dtype is not torch.bool, "bools can't be divided")
    return made(dtype, _both(a, b))


def bits(a: Operand, b: Operand) -> Array:
    dtype = promoted(a, b)
    need(not dtype.is_floating_point, "integers or bools are needed, found floating point")
    return made(dtype, _both(a, b))


def comparison(a: Operand, b: Operand) -> Array:
    return made(torch.bool, _both(a, b))


def power(x: Array, exponent: Number) -> Array:
    dtype = promoted(x, exponent)
    if not dtype.is_floating_point:
        need(isinstance(exponent, int) and exponent >= 0, "an integer's power must be >= 0")
    return Array(dtype, x.shape)


def clamp(x: Array, least: Number | None = None, most: Number | None = None) -> Array:
    bounds = [bound for bound in (least, most) if bound is not None]
    need(bool(bounds), "neither of both bounds is given")
    dtype = promoted(x, *bounds)
    need(dtype is not torch.bool, "bools can't be clamped")
    return Array(dtype, x.shape)


def power_by(x: Array, exponent: Array) -> Array:
    dtype = promoted(x, exponent)
    need(dtype.is_floating_point, "floating point numbers are needed")
    return made(dtype, _both(x, exponent))


def power_of(base: Number, x: Array) -> Array:
    dtype = promoted(x, base)
    need(dtype is not torch.bool, "numbers are needed, found bool")
    return Array(dtype, x.shape)


def clamp_by(x: Array, least: Array | None = None, most: Array | None = None) -> Array:
    bounds = [bound for bound in (least, most) if bound is not None]
    need(bool(bounds), "neither of both bounds is given")
    dtype = promoted(x, *bounds)
    need(dtype is not torch.bool, "bools can't be clamped")
    return made(dtype, broadcast(x.shape, *(bound.shape for bound in bounds)))


def where(condition: Array, a: Operand, b: Operand) -> Array:
    need(condition.dtype is torch.bool, f"a condition of bool is needed, found {condition}")
    return made(promoted(a, b), broadcast(condition.shape, _shape(a), _shape(b)))


def masked_fill(x: Array, mask: Array, value: Operand) -> Array:
    need(mask.dtype is torch.bool, f"a mask of bool is needed, found {mask}")
    need(_shape(value) == (), "one value is needed")
    need(promoted(x, value) is x.dtype, f"{value} is not a value of {x.dtype}")
    if not isinstance(value, Array):
        filled(value, x.dtype)
    return made(x.dtype, broadcast(x.shape, mask.shape))


# reductions


def _reduced(x: Array, dims: Any, keep: bool) -> list[Size]:
    rank = len(x.shape)
    every = range(rank) if not dims else [axis(dim, rank) for dim in dims]
    need(len(set(every)) == len(every), f"dimensions {dims} hold one twice")
    kept: list[Size] = []
    for place, size in enumerate(x.shape):
        if place not in every:
            kept.append(size)
        elif keep:
            kept.append(1)
    return kept


def total(
    x: Array, dims: Any = None, keep: bool = False, dtype: torch.dtype | None = None
) -> Array:
    own = x.dtype if x.dtype.is_floating_point else torch.int64
    return made(dtype or own, _reduced(x, dims, keep))


def total_of_all(x: Array, dtype: torch.dtype | None = None) -> Array:
    return total(x, None, False, dtype)


def mean(x: Array, dims: Any = None, keep: bool = False, dtype: torch.dtype | None = None) -> Array:
    need((dtype or x.dtype).is_floating_point, "floating point numbers are needed")
    return made(dtype or x.dtype, _reduced(x, dims, keep))


def extreme(x: Array, dims: Any = (), keep: bool = False) -> Array:
    _need_some(x, list(dims) or range(len(x.shape)))
    return made(x.dtype, _reduced(x, dims, keep))


def extreme_of_all(x: Array) -> Array:
    return extreme(x)


def extreme_and_place(x: Array, dim: Any, keep: bool = False) -> tuple[Array, Array]:
    values = extreme(x, (dim,), keep)
    return values, Array(torch.int64, values.shape)


def place_of_extreme(x: Array, dim: Any = None, keep: bool = False) -> Array:
    need(x.dtype is not torch.bool, "numbers are needed, found bool")
    _need_some(x, range(len(x.shape)) if dim is None else [dim])
    return made(torch.int64, _reduced(x, None if dim is None else [dim], keep))


def _need_some(x: Array, dims: Any) -> None:
    for dim in dims:
        if x.shape:
            size = x.shape[axis(dim, len(x.shape))]
            need(at_least(size, 1), f"dimension {dim} of {x} may be empty")


def any_of_all(x: Array) -> Array:
    return Array(torch.bool, ())


def any_along(x: Array, dim: Any, keep: bool = False) -> Array:
    return made(torch.bool, _reduced(x, [dim], keep))


def running_total(x: Array, dim: Any, dtype: torch.dtype | None = None) -> Array:
    axis(dim, len(x.shape))
    need(dtype is not torch.bool, "bools can't be summed up")
    return Array(dtype or (x.dtype if x.dtype.is_floating_point else torch.int64), x.shape)


def softmax(x: Array, dim: Any, dtype: torch.dtype | None = None) -> Array:
    axis(dim, len(x.shape))
    need((dtype or x.dtype).is_floating_point, "floating point numbers are needed")
    return Array(dtype or x.dtype, x.shape)


def log_sum(x: Array, dims: Any, keep: bool = False) -> Array:
    need(bool(dims), "no dimension is given")
    return made(floating(x.dtype), _reduced(x, dims, keep))


def topk(x: Array, k: Any, dim: Any = -1, *_: bool) -> tuple[Array, Array]:
    need(bool(x.shape) and x.dtype is not torch.bool, "numbers along a dimension are needed")
    place = axis(dim, len(x.shape))
    fits = at_least(k, 0) and not_more(k, x.shape[place])
    need(fits, f"dimension {dim} of {x} may have fewer than {k} elements")
    shape = (*x.shape[:place], k, *x.shape[place + 1 :])
    return made(x.dtype, shape), made(torch.int64, shape)


def sort(x: Array, dim: Any = -1, descending: bool = False) -> tuple[Array, Array]:
    axis(dim, len(x.shape))
    return x, Array(torch.int64, x.shape)


def stable_sort(
    x: Array, stable: Any, dim: Any = -1, descending: bool = False
) -> tuple[Array, Array]:
    return sort(x, dim, descending)


# shapes


def reshape(x: Array, sizes: Sequence[Size]) -> Array:
    whole, known = product(x.shape), product([s for s in sizes if s != -1])
    shape = list(sizes)
    open_ = [place for place, size in enumerate(sizes) if size == -1]
    need(len(open_) <= 1, "more than one size is -1")
    if open_:
        rest = None if known == 0 else divide(whole, known)
        need(rest is not None, f"{x} can't be reshaped to {list(sizes)}")
        assert rest is not None
        shape[open_[0]] = rest
    else:
        need(known == whole, f"{x} can't be reshaped to {list(sizes)}")
    return created(x.dtype, shape)


def expand(x: Array, sizes: Sequence[Size], implicit: bool = False) -> Array:
    more = len(sizes) - len(x.shape)
    need(more >= 0, f"{x} has more dimensions than {list(sizes)}")
    shape: list[Size] = []
    for place, size in enumerate(sizes):
        own = x.shape[place - more] if place >= more else None
        if size == -1 and own is not None:
            shape.append(own)
        else:
            need(own in (None, 1) or own == size, f"{x} can't be expanded to {list(sizes)}")
            shape.append(size)
    return created(x.dtype, shape)


def flatten(x: Array, start: Any = 0, end: Any = -1) -> Array:
    first, last = axis(start, len(x.shape)), axis(end, len(x.shape))
    need(first <= last, "it ends before it starts")
    if not x.shape:
        return made(x.dtype, (1,))
    middle = product(x.shape[first : last + 1])
    return made(x.dtype, (*x.shape[:first], middle, *x.shape[last + 1 :]))


def unflatten(x: Array, dim: Any, sizes: Sequence[Size]) -> Array:
    place = axis(dim, len(x.shape))
    need(bool(x.shape) and bool(sizes), "a dimension to split and its parts are needed")
    inner = reshape(Array(x.dtype, (x.shape[place],)), sizes).shape
    return made(x.dtype, (*x.shape[:place], *inner, *x.shape[place + 1 :]))


def select(x: Array, dim: Any, index: Any) -> Array:
    need(bool(x.shape), "a tensor without dimensions has no elements to select")
    place = axis(dim, len(x.shape))
    size = x.shape[place]
    if isinstance(index, int):
        there = at_least(subtract(size, index + 1), 0) if index >= 0 else False
        if index < 0:
            there = at_least(add(size, index), 0)
        if index in (0, -1):
            there = there or at_least(size, 1)
    else:
        there = at_least(index, 0) and at_least(subtract(size, add(index, 1)), 0)
    need(there, f"there is no element {index} along dimension {dim} of {x}")
    return made(x.dtype, (*x.shape[:place], *x.shape[place + 1 :]))


def slice_(x: Array, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Array:
    need(bool(x.shape), "a tensor without dimensions can't be sliced")
    place = axis(dim, len(x.shape))
    size = x.shape[place]
    start, end = 0 if start is None else start, _NO_END if end is None else end
    need(isinstance(step, int) and step >= 1, "a step must be >= 1")
    length: Size
    if isinstance(end, int) and end >= _NO_END:
        end = size
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        length = len(range(*slice(start, end, step).indices(size)))
    elif step == 1 and start == 0 and end == size:
        length = size
    elif step == 1 and start == 0:
        length = named(f"min({end},{size})")
    else:
        length = named(f"cut({size},{start},{end},{step})")
    return made(x.dtype, (*x.shape[:place], length, *x.shape[place + 1 :]))


def slice_scatter(
    x: Array, source: Array, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Array:
    need(
        source == slice_(x, dim, start, end, step),
        f"{source} does not have the shape and dtype of that slice of {x}",
    )
    return x


def split_with_sizes(x: Array, sizes: Sequence[Size], dim: Any = 0) -> tuple[Array, ...]:
    need(bool(x.shape), "a tensor without dimensions can't be split")
    place = axis(dim, len(x.shape))
    whole: Size = 0
    for size in sizes:
        whole = add(whole, size)
    need(whole == x.shape[place], f"{list(sizes)} do not add up to dimension {dim} of {x}")
    return tuple(
        created(x.dtype, (*x.shape[:place], size, *x.shape[place + 1 :])) for size in sizes
    )


def split(x: Array, size: Any, dim: Any = 0) -> tuple[Array, ...]:
    need(bool(x.shape), "a tensor without dimensions can't be split")
    whole = x.shape[axis(dim, len(x.shape))]
    need(isinstance(whole, int) and isinstance(size, int) and size >= 1, "its sizes are unknown")
    assert isinstance(whole, int)
    need(whole / size <= _MOST_PARTS, f"it returns more than {_MOST_PARTS} parts")
    sizes = [min(size, whole - start) for start in range(0, whole, size)] or [0]
    return split_with_sizes(x, sizes, dim)


def chunk(x: Array, count: Any, dim: Any = 0) -> tuple[Array, ...]:
    need(bool(x.shape), "a tensor without dimensions can't be split")
    whole = x.shape[axis(dim, len(x.shape))]
    need(isinstance(whole, int) and isinstance(count, int) and count >= 1, "its size is unknown")
    assert isinstance(whole, int)
    return split(x, max(1, -(-whole // count)), dim)


def unbind(x: Array, dim: Any = 0) -> tuple[Array, ...]:
    need(bool(x.shape), "a tensor without dimensions can't be split")
    place = axis(dim, len(x.shape))
    count = x.shape[place]
    need(
        isinstance(count, int) and count <= _MOST_PARTS, f"it returns more than {_MOST_PARTS} parts"
    )
    assert isinstance(count, int)
    return (made(x.dtype, (*x.shape[:place], *x.shape[place + 1 :])),) * count


def transpose(x: Array, first: Any, second: Any) -> Array:
    a, b = axis(first, len(x.shape)), axis(second, len(x.shape))
    shape = list(x.shape)
    if shape:
        shape[a], shape[b] = shape[b], shape[a]
    return Array(x.dtype, tuple(shape))


def t(x: Array) -> Array:
    need(len(x.shape) <= 2, f"{x} is no matrix")
    return Array(x.dtype, x.shape[::-1])


def matrix_transposed(x: Array) -> Array:
    need(len(x.shape) == 2, f"{x} is no matrix")
    return t(x)


def matrices_transposed(x: Array) -> Array:
    need(len(x.shape) >= 2, f"{x} is no matrix")
    return transpose(x, -2, -1)


def permute(x: Array, dims: Sequence[Any]) -> Array:
    every = [axis(dim, len(x.shape)) for dim in dims]
    need(sorted(every) == list(range(len(x.shape))), f"{list(dims)} are not the dimensions of {x}")
    return Array(x.dtype, tuple(x.shape[place] for place in every))


def unsqueeze(x: Array, dim: Any) -> Array:
    place = axis(dim, len(x.shape) + 1)
    return Array(x.dtype, (*x.shape[:place], 1, *x.shape[place:]))


def squeeze(x: Array, dim: Any) -> Array:
    place = axis(dim, len(x.shape))
    if not x.shape:
        return x
    size = x.shape[place]
    need(isinstance(size, int), f"whether dimension {dim} of {x} is 1 is unknown")
    shape = (*x.shape[:place], *x.shape[place + 1 :]) if size == 1 else x.shape
    return Array(x.dtype, shape)


def squeeze_all(x: Array) -> Array:
    need(all(isinstance(size, int) for size in x.shape), f"{x} has dimensions of unknown size")
    return Array(x.dtype, tuple(size for size in x.shape if size != 1))


def cat(arrays: Sequence[Array], dim: Any = 0) -> Array:
    first = arrays[0]
    place = axis(dim, len(first.shape))
    need(all(array.shape for array in arrays), "tensors without dimensions can't be joined")
    whole: Size = 0
    dtype = first.dtype
    for array in arrays:
        alike_ = len(array.shape) == len(first.shape) and all(
            own == size
            for where_, (own, size) in enumerate(zip(array.shape, first.shape, strict=True))
            if where_ != place
        )
        need(alike_, f"{array} and {first} can't be joined along dimension {dim}")
        whole = add(whole, array.shape[place])
        dtype = torch.promote_types(dtype, array.dtype)
    return made(dtype, (*first.shape[:place], whole, *first.shape[place + 1 :]))


def stack(arrays: Sequence[Array], dim: Any = 0) -> Array:
    first = arrays[0]
    for array in arrays:
        need(array.shape == first.shape, f"{array} and {first} can't be stacked")
    place = axis(dim, len(first.shape) + 1)
    dtype = first.dtype
    for array in arrays:
        dtype = torch.promote_types(dtype, array.dtype)
    return made(dtype, (*first.shape[:place], len(arrays), *first.shape[place:]))


def repeat(x: Array, times: Sequence[Size]) -> Array:
    more = len(times) - len(x.shape)
    need(more >= 0, f"{x} has more dimensions than {list(times)}")
    padded: tuple[Size, ...] = (1,) * more + x.shape
    return created(x.dtype, [multiply(a, b) for a, b in zip(padded, times, strict=True)])


def repeat_interleave(x: Array, times: Any, dim: Any = None, size: Any = None) -> Array:
    need(size is None and at_least(times, 0), "repetitions must be >= 0")
    if dim is None:
        return created(x.dtype, [multiply(product(x.shape), times)])
    need(bool(x.shape), "a tensor without dimensions has none to repeat")
    place = axis(dim, len(x.shape))
    size = multiply(x.shape[place], times)
    return created(x.dtype, (*x.shape[:place], size, *x.shape[place + 1 :]))


def one_hot(x: Array, classes: Any = -1) -> Array:
    _need_index(x)
    need(isinstance(classes, int) and classes >= 1, "the number of classes is unknown")
    return created(torch.int64, (*x.shape, classes))


# indices


def embedding(weight: Array, index: Array, *_: Any) -> Array:
    _need_index(index)
    need(len(weight.shape) == 2, f"a weight of two dimensions is needed, found {weight}")
    return made(weight.dtype, (*index.shape, weight.shape[1]))


def index_select(x: Array, dim: Any, index: Array) -> Array:
    _need_index(index)
    need(bool(x.shape) and len(index.shape) == 1, f"{index} is not a list of indices of {x}")
    place = axis(dim, len(x.shape))
    return made(x.dtype, (*x.shape[:place], index.shape[0], *x.shape[place + 1 :]))


def gather(x: Array, dim: Any, index: Array, *_: bool) -> Array:
    _need_index(index)
    _need_within(x, axis(dim, len(x.shape)), index)
    return made(x.dtype, index.shape)


def _need_within(x: Array, place: int, index: Array) -> None:
    need(
        bool(x.shape) and len(index.shape) == len(x.shape), f"{index} and {x} have different ranks"
    )
    for other, (few, many) in enumerate(zip(index.shape, x.shape, strict=True)):
        need(other == place or not_more(few, many), f"{index} is larger than {x}")


def scatter(x: Array, dim: Any, index: Array, source: Operand, *_: Any) -> Array:
    _need_index(index)
    _need_within(x, axis(dim, len(x.shape)), index)
    if isinstance(source, Array):
        need(source.dtype is x.dtype, f"{source} is not of the dtype of {x}")
        need(len(source.shape) == len(index.shape), f"{source} has another rank than {index}")
        for few, many in zip(index.shape, source.shape, strict=True):
            need(not_more(few, many), f"{index} is larger than its source {source}")
    else:
        need(promoted(x, source) is x.dtype, f"{source} is not a value of {x.dtype}")
        filled(source, x.dtype)
    return x


def index_copy(x: Array, dim: Any, index: Array, source: Array) -> Array:
    _need_index(index)
    need(bool(x.shape) and len(index.shape) == 1, f"{index} is not a list of indices of {x}")
    place = axis(dim, len(x.shape))
    wanted = (*x.shape[:place], index.shape[0], *x.shape[place + 1 :])
    need(source == Array(x.dtype, wanted), f"{source} does not fit into {x} at {index}")
    return x


def index_add(x: Array, dim: Any, index: Array, source: Array, alpha: Number = 1) -> Array:
    need(alpha == 1 and type(alpha) is int, "alpha must be 1")
    return index_copy(x, dim, index, source)


def index(x: Array, indices: Sequence[Array | None]) -> Array:
    need(len(indices) <= len(x.shape), f"{x} has fewer dimensions than indices")
    given = [place for place, one in enumerate(indices) if one is not None]
    need(bool(given), "no index is given")
    for one in indices:
        if one is not None:
            _need_index(one)
    shape = broadcast(*(one.shape for one in indices if one is not None))
    rest = [size for place, size in enumerate(x.shape) if place not in given]
    together = given[-1] - given[0] == len(given) - 1
    at = given[0] if together else 0
    return made(x.dtype, (*rest[:at], *shape, *rest[at:]))


# creation


def filled(value: Number, dtype: torch.dtype) -> torch.dtype:
    """`dtype`; raises CallError where it can't represent `value`."""
    if dtype is torch.bool or isinstance(value, Expression | Scalar):
        return dtype
    if dtype.is_floating_point:
        limit = torch.finfo(dtype).max
        need(not math.isfinite(value) or -limit <= value <= limit, f"{value} does not fit {dtype}")
    else:
        range_ = torch.iinfo(dtype)
        there = math.isfinite(value) and range_.min <= value <= range_.max
        need(there, f"{value} does not fit {dtype}")
    return dtype


def arange(end: Number, dtype: torch.dtype | None = None) -> Array:
    return arange_from(0, end, dtype)


def arange_by(start: Number, end: Number, step: Number, dtype: torch.dtype | None = None) -> Array:
    numbers = [n for n in (start, end, step) if isinstance(n, int) and not isinstance(n, bool)]
    need(len(numbers) == 3 and numbers[2] != 0, "integers and a step other than 0 are needed")
    need((numbers[1] - numbers[0]) * numbers[2] >= 0, "its step leads away from its end")
    need(dtype is not torch.bool, "the dtype can't be bool")
    first, last, by = numbers  # len(range(…)) holds no number beyond 2^63
    return created(dtype or torch.int64, (-((first - last) // by),))


def arange_from(start: Number, end: Number, dtype: torch.dtype | None = None) -> Array:
    for value in (start, end):
        whole = isinstance(value, int | Expression) and not isinstance(value, bool)
        need(whole, "integers are needed")
    need(dtype is not torch.bool, "the dtype can't be bool")
    assert isinstance(start, int | Expression)
    assert isinstance(end, int | Expression)
    return created(dtype or torch.int64, (subtract(end, start),))


def eye(count: Any, dtype: torch.dtype | None = None) -> Array:
    return created(dtype or torch.float32, (count, count))


def zeros(sizes: Sequence[Size], dtype: torch.dtype | None = None) -> Array:
    return created(dtype or torch.float32, sizes)


def full(sizes: Sequence[Size], value: Number, dtype: torch.dtype | None = None) -> Array:
    return created(filled(value, dtype or _own_dtype(value)), sizes)


def scalar_tensor(value: Number, dtype: torch.dtype | None = None) -> Array:
    return Array(filled(value, dtype or torch.float32), ())


def new_zeros(x: Array, sizes: Sequence[Size], dtype: torch.dtype | None = None) -> Array:
    return created(dtype or x.dtype, sizes)


def new_full(
    x: Array, sizes: Sequence[Size], value: Number, dtype: torch.dtype | None = None
) -> Array:
    return created(filled(value, dtype or x.dtype), sizes)


def zeros_like(x: Array, dtype: torch.dtype | None = None) -> Array:
    return Array(dtype or x.dtype, x.shape)


def full_like(x: Array, value: Number, dtype: torch.dtype | None = None) -> Array:
    return Array(filled(value, dtype or x.dtype), x.shape)


def to_dtype(x: Array, dtype: torch.dtype) -> Array:
    return Array(dtype, x.shape)


def type_as(x: Array, other: Array) -> Array:
    return Array(other.dtype, x.shape)


# products


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    _need_floats(x, weight, bias)
    need(bool(x.shape) and len(weight.shape) == 2, f"{x} and {weight} can't be multiplied")
    O, C = weight.shape  # noqa: E741
    need(x.shape[-1] == C, f"{x} and {weight} can't be multiplied")
    need(bias is None or bias.shape == (O,), f"bias {bias} does not fit {weight}")
    return made(x.dtype, (*x.shape[:-1], O))


def matmul(a: Array, b: Array) -> Array:
    _need_floats(a, b)
    need(len(a.shape) >= 2 and len(b.shape) >= 2, f"{a} and {b} are no matrices")
    need(a.shape[-1] == b.shape[-2], f"{a} and {b} can't be multiplied")
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    return made(a.dtype, (*batch, a.shape[-2], b.shape[-1]))


def mm(a: Array, b: Array) -> Array:
    need(len(a.shape) == len(b.shape) == 2, f"{a} and {b} are no matrices")
    return matmul(a, b)


def bmm(a: Array, b: Array) -> Array:
    need(len(a.shape) == len(b.shape) == 3, f"{a} and {b} are no batches of matrices")
    need(a.shape[0] == b.shape[0], f"{a} and {b} are batches of different sizes")
    return matmul(a, b)


def addmm(x: Array, a: Array, b: Array, beta: Number = 1, alpha: Number = 1) -> Array:
    need(beta == 1 and alpha == 1, "alpha and beta must be 1")
    found = mm(a, b)
    _need_floats(x, a)
    need(broadcast(x.shape, found.shape) == found.shape, f"{x} can't be added to {found}")
    return found


def einsum(equation: str, arrays: Sequence[Array], path: Any = None) -> Array:
    _need_floats(*arrays)
    left, _, right = equation.partition("->")
    terms = left.split(",")
    need(path is None and len(terms) == len(arrays), f"{equation} takes {len(terms)} tensors")
    sizes: dict[str, Size] = {}
    for term, array in zip(terms, arrays, strict=True):
        need(len(term) == len(array.shape), f"{array} does not have the dimensions {term!r}")
        for letter, size in zip(term, array.shape, strict=True):
            need(sizes.setdefault(letter, size) == size, f"size {letter!r} differs in {array}")
    return made(arrays[0].dtype, [sizes[letter] for letter in right])


def layer_norm(
    x: Array,
    shape: Sequence[Size],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *_: bool,
) -> Array:
    _need_floats(x, weight, bias)
    own = tuple(shape)
    need(bool(own) and x.shape[-len(own) :] == own, f"{x} does not end in {list(own)}")
    for part in (weight, bias):
        need(part is None or part.shape == own, f"{part} is not of shape {list(own)}")
    return x


def rms_norm(
    x: Array, shape: Sequence[Size], weight: Array | None = None, eps: float | None = None
) -> Array:
    return layer_norm(x, shape, weight)


# sizes and numbers


def size_of(x: Array, dim: Any) -> Size:
    need(bool(x.shape), "a tensor without dimensions has no sizes")
    return x.shape[axis(dim, len(x.shape))]


def one_value(x: Array) -> Scalar:
    need(all(size == 1 for size in x.shape), f"a tensor of one element is needed, found {x}")
    return Scalar(x.dtype)


def constrained(size: Number, least: int | None = None, most: int | None = None) -> None:
    """Returns nothing: torch checks the range of `size` when the graph runs."""


def _need_sizes(*values: Any) -> None:
    for value in values:
        whole = isinstance(value, int | Expression) and not isinstance(value, bool)
        need(whole, f"{value!r} is not a size")
        need(not isinstance(value, int) or abs(value) < _NO_END, f"{value} is too large a size")


def item_of(values: Any, place: Any) -> Any:
    there = isinstance(values, tuple) and type(place) is int and 0 <= place < len(values)
    need(there, f"there is no value {place!r} of {values!r:.80}")
    return values[place]


def size_add(a: Size, b: Size) -> Size:
    _need_sizes(a, b)
    return add(a, b)


def size_sub(a: Size, b: Size) -> Size:
    _need_sizes(a, b)
    return subtract(a, b)


def size_mul(a: Size, b: Size) -> Size:
    _need_sizes(a, b)
    return multiply(a, b)


def size_floordiv(a: Size, b: Size) -> Size:
    _need_sizes(a, b)
    need(at_least(b, 1), "a division by 0")
    return floor_divide(a, b)


def size_mod(a: Size, b: Size) -> Size:
    _need_sizes(a, b)
    need(at_least(b, 1) and at_least(a, 0), "a division by 0")
    return subtract(a, multiply(floor_divide(a, b), b))


def size_neg(a: Size) -> Size:
    _need_sizes(a)
    return multiply(a, -1)
