"""Products of tokens with nested weights (`sirius_runtime.nested`): both planes, or the high one.

Activations are float32, already rounded to 8-bit steps of a scale per group of 32. A program reads
the bytes of its rows once for all tokens, and does not read skipped rows.
"""

import triton
import triton.language as tl


@triton.jit
def _numbers(high, low, BOTH: tl.constexpr):
    """The integers of the bytes' lower and of their upper nibbles, as float32: 16 h + l - 128 with
    both planes, 16 h + 8 - 128 with the high one.
    """
    first = (high & 15).to(tl.int32) * 16
    second = (high >> 4).to(tl.int32) * 16
    if BOTH:
        first += (low & 15).to(tl.int32)
        second += (low >> 4).to(tl.int32)
    else:
        first += 8
        second += 8
    return (first - 128).to(tl.float32), (second - 128).to(tl.float32)


@triton.jit
def _scales(upper, lower, BOTH: tl.constexpr):
    """The scales, fp16 numbers without a sign bit, from their upper and lower bytes, as float32.
    With the high plane only, the lower byte is taken as 0x80.
    """
    bits = upper.to(tl.int32) << 8
    if BOTH:
        bits |= lower.to(tl.int32)
    else:
        bits |= 0x80
    return (bits >> 1).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def by_outputs(
    x, weight, live, y, T, C, O, plane, stride,
    HAS_LIVE: tl.constexpr, BOTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y [T, O], float32, of x [T, C] and the planes of weight [O, C]; grid (blocks of O).

    HAS_LIVE: rows where live [O] is 0 are not read, and give 0. In a row, 16 groups of 32 inputs
    are interleaved: word w of each group's bytes, then word w + 1 of each.
    """
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = o < O
    if HAS_LIVE:
        wanted = wanted & (tl.load(live + o, mask=wanted, other=0) != 0)
    rows = weight + o.to(tl.int64) * stride
    t = tl.arange(0, TOKENS)
    lane = tl.arange(0, 256)
    groups = C // 32
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for block in range(0, groups, 16):
        abreast = tl.minimum(groups - block, 16)
        inside = lane < abreast * 16
        word = lane // (abreast * 4)
        group = block + lane % (abreast * 4) // 4
        c = group * 32 + word * 4 + lane % 4
        mask = wanted[:, None] & inside[None, :]
        at = rows[:, None] + (block * 16 + lane)[None, :]
        scale_at = rows[:, None] + (C // 2 + group)[None, :]
        high = tl.load(at, mask=mask, other=0)
        upper = tl.load(scale_at, mask=mask, other=0)
        if BOTH:
            low = tl.load(at + plane, mask=mask, other=0)
            lower = tl.load(scale_at + plane, mask=mask, other=0)
        else:
            low, lower = high, upper
        first, second = _numbers(high, low, BOTH)
        scale = tl.where(mask, _scales(upper, lower, BOTH), 0.0)
        first *= scale
        second *= scale
        here = (t < T)[:, None] & inside[None, :]
        one = tl.load(x + t[:, None] * C + c[None, :], mask=here, other=0.0)
        other = tl.load(x + t[:, None] * C + (c + 16)[None, :], mask=here, other=0.0)
        if TOKENS == 1:
            total += tl.sum(first * one + second * other, 1)[None, :]
        else:
            total = tl.dot(one, tl.trans(first), total, input_precision="ieee")
            total = tl.dot(other, tl.trans(second), total, input_precision="ieee")
    tl.store(y + t[:, None] * O + o[None, :], total, mask=(t < T)[:, None] & (o < O)[None, :])


@triton.jit
def by_inputs(
    x, weight, partials, T, C, O, plane, block, row, per_split,
    BOTH: tl.constexpr, TOKENS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """partials [splits, T, O], float32, of x [T, C] and the planes of weight [C, O]; grid (blocks
    of O / 2 bytes, splits of `per_split` groups of 32 inputs).

    The row of an input that is 0 for all tokens is not read. A byte holds outputs k and k + 16 of
    32 neighbouring outputs.
    """
    k = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    split = tl.program_id(1)
    within = k < O // 2
    r = tl.arange(0, 32)
    t = tl.arange(0, TOKENS)
    groups = C // 32
    firsts = tl.zeros((TOKENS, BYTES), tl.float32)
    seconds = tl.zeros((TOKENS, BYTES), tl.float32)
    for group in range(split * per_split, tl.minimum(split * per_split + per_split, groups)):
        own = tl.load(
            x + t[:, None] * C + (group * 32 + r)[None, :], mask=(t < T)[:, None], other=0.0
        )
        alive = tl.max(tl.abs(own), 0) > 0.0
        base = weight + (tl.zeros((), tl.int64) + group) * block + k
        mask = alive[:, None] & within[None, :]
        at = base[None, :] + r[:, None] * row
        high = tl.load(at, mask=mask, other=0)
        one = tl.load(base + 32 * row, mask=within, other=0)
        two = tl.load(base + 33 * row, mask=within, other=0)
        if BOTH:
            low = tl.load(at + plane, mask=mask, other=0)
            one_low = tl.load(base + plane + 32 * row, mask=within, other=0)
            two_low = tl.load(base + plane + 33 * row, mask=within, other=0)
        else:
            low, one_low, two_low = high, one, two
        first, second = _numbers(high, low, BOTH)
        if TOKENS == 1:
            value = tl.sum(own, 0)[:, None]  # of the one token
            sums = tl.sum(first * value, 0)[None, :]
            others = tl.sum(second * value, 0)[None, :]
        else:
            sums = tl.dot(own, first, input_precision="ieee")
            others = tl.dot(own, second, input_precision="ieee")
        firsts += sums * _scales(one, one_low, BOTH)[None, :]
        seconds += others * _scales(two, two_low, BOTH)[None, :]
    o = k // 16 * 32 + k % 16
    to = partials + ((split * T + t) * O)[:, None] + o[None, :]
    mask = (t < T)[:, None] & within[None, :]
    tl.store(to, firsts, mask=mask)
    tl.store(to + 16, seconds, mask=mask)
