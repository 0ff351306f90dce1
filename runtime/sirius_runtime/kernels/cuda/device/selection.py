"""Lists the live neurons by their scores; later kernels read only their weights."""

import triton
import triton.language as tl


@triton.jit
def kth_largest(score, kth, K, keep, LOWEST_BIT: tl.constexpr, BLOCK: tl.constexpr):
    """kth [B], int32: the bits of the `keep`-th largest of score [B, K], which are not negative.

    The bits of non-negative floats sort like the floats, so the answer is found bit by bit. Bits
    below LOWEST_BIT are zero, because the scores were rounded to a type with fewer bits.
    """
    b = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    live = j < K
    bits = tl.load(score + b * K + j, mask=live, other=0.0).to(tl.int32, bitcast=True)
    bits = tl.where(live, bits, -1)
    found = tl.zeros((), tl.int32)
    for step in range(31 - LOWEST_BIT):
        tried = found | (1 << (30 - step))
        reached = tl.sum((bits >= tried).to(tl.int32), 0)
        found = tl.where(reached >= keep, tried, found)
    tl.store(kth + b, found)


@triton.jit
def select(
    score, kth, listed, positions, rows, count, threshold, K, keep,
    HAS_LIST: tl.constexpr, TOPK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """positions [B, K], int32: the indices of the live scores in score [B, K], ascending; rows
    [B, K], int32: their entries in listed [B, K], if there is a list; count [B], int64.

    A score above the threshold is live. TOPK: scores above the `keep`-th largest are live, and the
    first of those equal to it, up to `keep` in all. Grid (blocks of K, B). Each program counts the
    live scores before its block itself, which is faster than waiting for the other programs.
    """
    b = tl.program_id(1)
    begin = tl.program_id(0) * BLOCK
    own = score + b * K
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((), tl.int32)
    equals_before = tl.zeros((), tl.int32)
    spare = tl.zeros((), tl.int32)
    border = tl.zeros((), tl.int32)
    if TOPK:
        border = tl.load(kth + b)
        spare += keep
        for start in range(0, K, BLOCK):
            j = start + lane
            bits = tl.load(own + j, mask=j < K, other=0.0).to(tl.int32, bitcast=True)
            above = ((bits > border) & (j < K)).to(tl.int32)
            equal = ((bits == border) & (j < begin)).to(tl.int32)
            spare -= tl.sum(above, 0)
            before += tl.sum(tl.where(j < begin, above, 0), 0)
            equals_before += tl.sum(equal, 0)
        before += tl.minimum(equals_before, spare)
    else:
        for start in range(0, begin, BLOCK):
            value = tl.load(own + start + lane)
            before += tl.sum((value > threshold).to(tl.int32), 0)
    j = begin + lane
    inside = j < K
    value = tl.load(own + j, mask=inside, other=0.0)
    if TOPK:
        bits = value.to(tl.int32, bitcast=True)
        equal = ((bits == border) & inside).to(tl.int32)
        rank_of_equal = equals_before + tl.cumsum(equal, 0) - 1
        live = inside & ((bits > border) | ((equal > 0) & (rank_of_equal < spare)))
    else:
        live = inside & (value > threshold)
    flags = live.to(tl.int32)
    at = b * K + before + tl.cumsum(flags, 0) - 1
    tl.store(positions + at, j, mask=live)
    if HAS_LIST:
        row = tl.load(listed + b * K + j, mask=live, other=0).to(tl.int32)
        tl.store(rows + at, row, mask=live)
    if begin + BLOCK >= K:
        tl.store(count + b, (before + tl.sum(flags, 0)).to(tl.int64))
