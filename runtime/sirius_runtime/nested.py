"""Nested weights: 8-bit integers whose high halves, alone, are the weights of a cheaper path.

A weight w of an output and an input is stored as q = round(w / s), an int8, where s is a scale that
the 32 inputs of a group share (Q8_0 of GGUF, whose tensors are stored without a change). q is cut
into two nibbles, q + 128 = 16 h + l, and s into two bytes. The high plane holds every h and the
upper bytes of the scales, the low plane the rest:

    both planes         8.5 bits a weight    s q                      the full path
    the high plane     4.25 bits a weight    s' (16 h + 8 - 128)      the draft

s' is s with the lower byte at its middle. The draft's values lie in the middle of those that a
nibble stands for, so its errors have no sign of their own. Scales are fp16 without the sign, which
no scale has: the upper byte then holds five bits of exponent and three of mantissa, and s' differs
from s by at most 1/16.

Two layouts, both uint8, the planes first; P is 2, or 1 of the high plane alone:

    by outputs   [P, O, 17 C / 32]       a row an output: the nibbles of its groups, then a byte of
                                         each group's scale
    by inputs    [P, C / 32, 34, O / 2]  32 inputs: a row of nibbles each, then two rows of scales,
                                         of one byte an output

A byte of nibbles holds numbers i (its low nibble) and i + 16 (its high one) of 32 neighbours in
the row. By outputs, the bytes of up to 16 neighbouring groups lie abreast: bytes 0 to 3 of each of
them, then bytes 4 to 7, 8 to 11 and 12 to 15, so that a vector instruction works on 16 groups, a
lane each. By inputs, of 32 neighbouring outputs, the scales of the first 16 are in the first of the
two rows, and of the others in the second: cutting the last dimension cuts outputs.

The experts of a mixture are as many matrices of one tensor, [P, E, …]: `weight[:, e]` is nested as
any other.

Activations meet nested weights as integers too: see `in_steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sirius_runtime.spec import Layout as Layout

GROUP = 32
"""Inputs that share a scale."""

HALF = GROUP // 2
LARGEST = 127
"""The largest magnitude of an activation or of a weight as an integer, as in GGUF's Q8_0."""

ABREAST = 16
"""Groups whose nibbles are side by side in a row by outputs."""

_WORD = 4  # bytes of a group that follow one another there
_BLOCK = 1 << 20  # numbers
_ROW = 1024  # outputs
_OFFSET = 128
_MIDDLE = 8  # of the 16 values that a high nibble stands for
_MIDDLE_SCALE = 0x80
_TINY = 2.0**-100  # activations below are zeros: their inverse is no finite float32


def is_nested(weight: Tensor) -> bool:
    return weight.dtype is torch.uint8


def nested_shape(
    outputs: int, inputs: int, layout: Layout, experts: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """Of both planes of a weight [outputs, inputs], or of those of experts: of one number, E."""
    if layout is Layout.BY_OUTPUTS:
        return (2, *experts, outputs, inputs // HALF * (HALF + 1) // 2)
    return (2, *experts, inputs // GROUP, GROUP + 2, outputs // 2)


def experts_in(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """Of the shape of a nested weight: E where it holds experts, else nothing."""
    return shape[1 : len(shape) - (2 if layout is Layout.BY_OUTPUTS else 3)]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs of a nested weight of this shape, which holds no experts."""
    if len(shape) == 3:
        return shape[1], shape[2] // (HALF + 1) * GROUP
    return shape[3] * 2, shape[1] * GROUP


def why_not(outputs: int, inputs: int, layout: Layout) -> str | None:
    """Why a weight of these sizes can't be nested; None where it can."""
    if inputs % GROUP:
        return f"its {inputs} inputs are no multiple of {GROUP}"
    if layout is Layout.BY_INPUTS and outputs % GROUP:
        return f"its {outputs} outputs are no multiple of {GROUP}"
    return None


def nest(weight: Tensor, layout: Layout) -> Tensor:
    """Both planes of weight [O, C], a floating point matrix.

    Scales are the groups' largest magnitudes over 127, in fp16. Where every w is an integer of at
    most 127 times an fp16 number that is its group's scale, nothing is rounded, provided that some
    integer of the group is 127.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    return nest_integers(*in_integers(groups, groups.abs().amax(-1) / LARGEST), layout)


def in_integers(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Groups of weights [O, C / 32, 32] in steps of their scales [O, C / 32]: int8 q [O, C], and
    the scales in fp16.
    """
    scale = scale.half()
    step = scale.float().unsqueeze(-1)
    q = (groups / step.where(step > 0, torch.inf)).round_().clamp_(-LARGEST - 1, LARGEST)
    return q.to(torch.int8).flatten(-2), scale


def nest_integers(q: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """Both planes of int8 q [O, C] and fp16 scales [O, C / 32], none of which is negative."""
    codes = q.view(torch.uint8) ^ _OFFSET
    bits = scale.view(torch.int16) << 1
    planes = zip(_packed(codes, layout), (bits >> 8 & 0xFF, bits & 0xFF), strict=True)
    if layout is Layout.BY_OUTPUTS:
        return torch.stack([torch.cat([rows, scales.byte()], -1) for rows, scales in planes])
    found = []
    for rows, scales in planes:
        halves = scales.byte().mT.unflatten(-1, (-1, 2, HALF))  # [C / 32, O / 32, 2, 16]
        halves = halves.movedim(2, 1).flatten(-2)
        found.append(torch.cat([rows.mT.unflatten(0, (-1, GROUP)), halves], 1))
    return torch.stack(found)


def _packed(codes: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """The high and the low nibbles of codes [O, C], two of neighbours in a stored row a byte:
    [O, C / 2], or by inputs [O / 2, C].
    """
    dim = -1 if layout is Layout.BY_OUTPUTS else 0
    pairs = codes.unflatten(dim, (-1, 2, HALF))
    first, second = (pairs.select(dim - 1 if dim else 1, half) for half in (0, 1))
    high, low = first >> 4 | second & 0xF0, first & 15 | second << 4
    if dim == 0:
        return high.flatten(0, 1), low.flatten(0, 1)
    return _abreast(high.flatten(-2)), _abreast(low.flatten(-2))


def _abreast(rows: Tensor, back: bool = False) -> Tensor:
    """Bytes of rows by outputs [..., C / 2], from group after group to groups abreast, or back."""
    whole = rows.shape[-1] // (HALF * ABREAST) * (HALF * ABREAST)
    found = []
    for part in rows.split([whole, rows.shape[-1] - whole], -1):
        if part.shape[-1]:
            sizes = (min(ABREAST, part.shape[-1] // HALF), HALF // _WORD)
            stored = part.unflatten(-1, (-1, *(reversed(sizes) if back else sizes), _WORD))
            found.append(stored.transpose(-3, -2).flatten(-4))
    return torch.cat(found, -1)


def _stored(nested: Tensor) -> tuple[Tensor, Tensor]:
    """q, int8, and the scales, float32, as they are stored: [O, C / 32, 32] and [O, C / 32, 1], or
    by inputs [C / 32, 32, O] and [C / 32, 1, O]; of both planes or of the high one.
    """
    by_outputs = nested.ndim == 3
    if by_outputs:
        inputs = matrix_shape(tuple(nested.shape))[1]
        packed, scales = nested.split([inputs // 2, inputs // GROUP], -1)
        packed = _abreast(packed, back=True)
    else:
        packed, halves = nested.split([GROUP, 2], 2)
        scales = halves.unflatten(-1, (-1, HALF)).movedim(2, 3).flatten(2)
    upper = scales[0].to(torch.int16) << 8
    bits = upper | (scales[1] if len(scales) == 2 else _MIDDLE_SCALE)
    scale = (bits >> 1 & 0x7FFF).view(torch.float16).float()
    high, low = packed[0], packed[1] if len(packed) == 2 else None
    firsts = high << 4 | (_MIDDLE if low is None else low & 15)
    seconds = high & 0xF0 | (_MIDDLE if low is None else low >> 4)
    halves = [codes.unflatten(-1, (-1, HALF)) for codes in (firsts, seconds)]
    q = (torch.stack(halves, -2) ^ _OFFSET).view(torch.int8)
    return (q.flatten(-2), scale[..., None]) if by_outputs else (q.flatten(-3), scale[:, None])


def _by_outputs(stored: Tensor, by_outputs: bool) -> Tensor:
    """[O, …] of what is stored in either layout."""
    return stored.flatten(-2) if by_outputs else stored.flatten(0, 1).mT


def integers(nested: Tensor) -> tuple[Tensor, Tensor]:
    """q [O, C], int8, and the scales [O, C / 32], float32: of both planes or of the high one."""
    q, scale = (_by_outputs(part, nested.ndim == 3) for part in _stored(nested))
    return q, scale


def unnest(nested: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix [O, C] that nested weights stand for; of the high plane alone, the draft's."""
    q, scale = _stored(nested)
    return _by_outputs(q.float().mul_(scale).to(dtype), nested.ndim == 3)


def in_steps(x: Tensor) -> Tensor:
    """x […, C] as nested weights meet it: in each group of 32, integers of at most 127 times the
    largest magnitude over 127. float32, as llama.cpp's Q8_0 takes activations.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < _TINY, 0.0, largest)
    q = torch.where(largest == 0, 0.0, (groups * (LARGEST / largest)).round())
    return (q * (largest / LARGEST)).flatten(-2)


def cut(weight: Tensor, outputs: slice) -> Tensor:
    """The planes of some outputs, by inputs from and to a multiple of 32: a view."""
    if weight.ndim == 3:
        return weight[:, outputs]
    return weight[..., outputs.start // 2 : outputs.stop // 2]


def in_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cuts a nested weight: some of its outputs, and the planes of these, which caches hold as
    numbers.
    """
    outputs, inputs = matrix_shape(tuple(weight.shape))
    # By inputs, short parts of rows would be read from many places.
    rows = max(GROUP if weight.ndim == 3 else _ROW, _BLOCK // inputs // GROUP * GROUP)
    for start in range(0, outputs, rows):
        own = slice(start, min(start + rows, outputs))
        yield own, cut(weight, own)


Unnest = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def by_numbers(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, unnest: Unnest = unnest
) -> Tensor:
    """`product`, of the weight's numbers, which `unnest` gives."""
    given = in_steps(x)
    parts = [
        torch.nn.functional.linear(
            given, unnest(part), None if bias is None else bias[own].float()
        ).to(x.dtype)
        for own, part in in_blocks(weight)
    ]
    return torch.cat(parts, -1)


_product: Product = by_numbers


@contextmanager
def multiplying(by: Product) -> Iterator[None]:
    """Within it, `product` is another function, on all threads."""
    global _product
    before, _product = _product, by
    try:
        yield
    finally:
        _product = before


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x […, C] through a nested weight, and its bias [O]: […, O], of x's dtype, added up in
    float32.
    """
    return _product(x, weight, bias)
