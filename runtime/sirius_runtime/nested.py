"""Nested weights: 8-bit integers whose high 4 bits alone are the weights of a cheaper path.

A weight w is stored as q = round(w / s), an int8. The scale s is shared by a scale group of 32
inputs of one output (as in GGUF's Q8_0, whose tensors are stored without a loss). q is split into
two nibbles, q + 128 = 16 h + l, and s into two bytes. The high plane holds every h and the upper
bytes of the scales; the low plane holds every l and the lower bytes:

    both planes         8.5 bits a weight    s q                      the full path
    the high plane     4.25 bits a weight    s' (16 h + 8 - 128)      the draft

s' is s with the middle value for its lower byte. 16 h + 8 is the middle of the values with the same
h, so that the draft's rounding errors have no bias. Scales are fp16 without the sign bit (they are
not negative): the upper byte holds five bits of exponent and three of mantissa, and s' differs from
s by at most 1/16. `draft_scales` are those with s' = s; Q8_0's tensors keep their own.

There are two layouts, both uint8 with the planes first; P is 2, or 1 for the high plane alone:

    by outputs   [P, O, 17 C / 32]       a row per output: the nibbles of its scale groups, then one
                                         byte of each group's scale
    by inputs    [P, C / 32, 34, O / 2]  a matrix per 32 inputs: a row of nibbles for each input,
                                         then two rows of scales, one byte for each output

A byte of nibbles holds elements i (low nibble) and i + 16 (high nibble) of 32 neighbours in a row.
By outputs, the bytes of up to 16 neighbouring groups are interleaved: bytes 0 to 3 of each group,
then bytes 4 to 7, 8 to 11 and 12 to 15, so that a vector instruction works on 16 groups, one in
each lane. By inputs, the first row of scales has those of the first 16 of every 32 outputs, and the
second row has the others, so that slicing the last dimension selects outputs.

The weights of a mixture's E experts are one tensor, [P, E, …]: `weight[:, e]` is a nested weight.

Products with nested weights round the activations to integers too: see `in_steps`.
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
"""Groups whose bytes are interleaved in a row by outputs."""

_WORD = 4  # successive bytes of one group in the interleaved order
_BLOCK = 1 << 20  # weights that `in_blocks` cuts off at a time
_ROW = 1024  # the fewest outputs of such a block by inputs
_OFFSET = 128
_MIDDLE = 8  # the middle of the 16 values with the same high nibble
_MIDDLE_SCALE = 0x80
_MOST_SCALE = 0xF780  # the largest s', in bits
LARGEST_SCALE = 63488.0
"""The largest s', as a number."""

_TINY = 2.0**-100  # smaller activations are taken as 0: LARGEST / x would overflow float32


def is_nested(weight: Tensor) -> bool:
    return weight.dtype is torch.uint8


def nested_shape(
    outputs: int, inputs: int, layout: Layout, experts: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The shape of both planes of a weight [outputs, inputs]; `experts`: (E,) for E of them."""
    if layout is Layout.BY_OUTPUTS:
        return (2, *experts, outputs, inputs // HALF * (HALF + 1) // 2)
    return (2, *experts, inputs // GROUP, GROUP + 2, outputs // 2)


def experts_in(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """(E,) for the shape of a nested weight of E experts, else ()."""
    return shape[1 : len(shape) - (2 if layout is Layout.BY_OUTPUTS else 3)]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Outputs and inputs of a nested weight of this shape (without experts)."""
    if len(shape) == 3:
        return shape[1], shape[2] // (HALF + 1) * GROUP
    return shape[3] * 2, shape[1] * GROUP


def why_not(outputs: int, inputs: int, layout: Layout) -> str | None:
    """Why a weight of these sizes can't be nested; None where it can."""
    if inputs % GROUP:
        return f"its {inputs} inputs are not a multiple of {GROUP}"
    if layout is Layout.BY_INPUTS and outputs % GROUP:
        return f"its {outputs} outputs are not a multiple of {GROUP}"
    return None


def nest(weight: Tensor, layout: Layout) -> Tensor:
    """Both planes of a floating point weight matrix [O, C], by `draft_scales`."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    return nest_integers(*in_integers(groups, draft_scales(groups.abs().amax(-1))), layout)


def draft_scales(largest: Tensor) -> Tensor:
    """The scales, float16, of groups with these largest magnitudes: the least number s' that is
    largest / 127.5 or more, so that the draft's scale is the full path's; 0 where largest / 127 is
    0 in float16.

    They are up to 1/8 above Q8_0's, largest / 127, which adds 6% to the full path's rounding error
    for numbers of a normal distribution. But with those a draft misses a group's products by a
    share that does not average out: its scale is off, and the largest number, 127 s, is always read
    as 120 s'.
    """
    bits = (largest / LARGEST).half().view(torch.int16).int() << 1
    near = bits & 0xFF00 | _MIDDLE_SCALE
    short = _scale(near).float() * (LARGEST + 0.5) < largest
    near = (near + short * 0x100).clamp(max=_MOST_SCALE)
    return _scale(torch.where(bits > 0, near, 0))


def _scale(bits: Tensor) -> Tensor:
    """The scales, float16, of both their bytes, int32."""
    return (bits >> 1).to(torch.int16).view(torch.float16)


def in_integers(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes groups of weights [O, C / 32, 32] by their scales [O, C / 32]: returns q, int8
    [O, C], and the scales in fp16.
    """
    scale = scale.half()
    step = scale.float().unsqueeze(-1)
    q = (groups / step.where(step > 0, torch.inf)).round_().clamp_(-LARGEST - 1, LARGEST)
    return q.to(torch.int8).flatten(-2), scale


def nest_integers(q: Tensor, scale: Tensor, layout: Layout) -> Tensor:
    """Both planes of int8 q [O, C] and fp16 scales [O, C / 32], which must not be negative."""
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
    """The high and the low nibbles of codes [O, C], two to a byte: [O, C / 2] each, or by inputs
    [O / 2, C].
    """
    dim = -1 if layout is Layout.BY_OUTPUTS else 0
    pairs = codes.unflatten(dim, (-1, 2, HALF))
    first, second = (pairs.select(dim - 1 if dim else 1, half) for half in (0, 1))
    high, low = first >> 4 | second & 0xF0, first & 15 | second << 4
    if dim == 0:
        return high.flatten(0, 1), low.flatten(0, 1)
    return _abreast(high.flatten(-2)), _abreast(low.flatten(-2))


def _abreast(rows: Tensor, back: bool = False) -> Tensor:
    """Interleaves the bytes of groups in rows by outputs [..., C / 2]; `back`: the inverse."""
    whole = rows.shape[-1] // (HALF * ABREAST) * (HALF * ABREAST)
    found = []
    for part in rows.split([whole, rows.shape[-1] - whole], -1):
        if part.shape[-1]:
            sizes = (min(ABREAST, part.shape[-1] // HALF), HALF // _WORD)
            stored = part.unflatten(-1, (-1, *(reversed(sizes) if back else sizes), _WORD))
            found.append(stored.transpose(-3, -2).flatten(-4))
    return torch.cat(found, -1)


def _stored(nested: Tensor) -> tuple[Tensor, Tensor]:
    """q, int8, and the scales, float32, of both planes or of the high one, in the order of storage:
    [O, C / 32, 32] and [O, C / 32, 1], or by inputs [C / 32, 32, O] and [C / 32, 1, O].
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
    """A tensor in the storage order of either layout, as [O, …]."""
    return stored.flatten(-2) if by_outputs else stored.flatten(0, 1).mT


def integers(nested: Tensor) -> tuple[Tensor, Tensor]:
    """q, int8 [O, C], and the scales, float32 [O, C / 32], of both planes or of the high one."""
    q, scale = (_by_outputs(part, nested.ndim == 3) for part in _stored(nested))
    return q, scale


def unnest(nested: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dequantized matrix [O, C]; for the high plane alone, the draft's."""
    q, scale = _stored(nested)
    return _by_outputs(q.float().mul_(scale).to(dtype), nested.ndim == 3)


def in_steps(x: Tensor) -> Tensor:
    """x […, C] rounded as kernels for nested weights round it: in each group of 32, to integers of
    magnitude 127 at most, times the group's largest magnitude / 127. float32. llama.cpp's Q8_0
    quantizes activations in the same way.
    """
    groups = x.float().unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < _TINY, 0.0, largest)
    q = torch.where(largest == 0, 0.0, (groups * (LARGEST / largest)).round())
    return (q * (largest / LARGEST)).flatten(-2)


def cut(weight: Tensor, outputs: slice) -> Tensor:
    """A view of the planes of some outputs; by inputs, the slice must begin and end at multiples of
    32.
    """
    if weight.ndim == 3:
        return weight[:, outputs]
    return weight[..., outputs.start // 2 : outputs.stop // 2]


def in_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Splits a nested weight by outputs: yields slices of outputs, and their planes. A block's
    dequantized numbers fit into a CPU cache.
    """
    outputs, inputs = matrix_shape(tuple(weight.shape))
    # By inputs, a block of few outputs would be read in many short pieces.
    rows = max(GROUP if weight.ndim == 3 else _ROW, _BLOCK // inputs // GROUP * GROUP)
    for start in range(0, outputs, rows):
        own = slice(start, min(start + rows, outputs))
        yield own, cut(weight, own)


Unnest = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def by_numbers(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, unnest: Unnest = unnest
) -> Tensor:
    """`product` by the dequantized weight, which `unnest` returns block by block."""
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
    """Within this context, `product` calls the function `by`, on all threads."""
    global _product
    before, _product = _product, by
    try:
        yield
    finally:
        _product = before


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear of x […, C] with a nested weight and a bias [O]: […, O] in x's dtype, summed in
    float32.
    """
    return _product(x, weight, bias)
