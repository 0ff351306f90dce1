"""Attention of few queries over a long history and a block, split over the occupied slots."""

import triton
import triton.language as tl

from sirius_runtime.kernels.cuda.device.arithmetic import dot, narrowed


@triton.jit
def store_kv(
    k, v, k_cache, v_cache, slots, G, T, D, V, S,
    k_row, k_head, k_token, v_row, v_head, v_token,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes k [B, G, T, D] and v [B, G, T, V] to `slots` [B, T] of the caches [B, G, S, ·]; grid
    (T, G, B). A slot out of range is skipped, because a kernel can't raise.
    """
    t = tl.program_id(0)
    g = tl.program_id(1)
    b = tl.program_id(2)
    slot = tl.load(slots + b * T + t)
    d = tl.arange(0, BLOCK)
    there = (slot >= 0) & (slot < S)
    D_there = tl.where(there, D, 0)
    V_there = tl.where(there, V, 0)
    at = (b * G + g).to(tl.int64) * S + slot
    key = tl.load(k + b * k_row + g * k_head + t * k_token + d, mask=d < D, other=0.0)
    tl.store(k_cache + at * D + d, key, mask=d < D_there)
    value = tl.load(v + b * v_row + g * v_head + t * v_token + d, mask=d < V, other=0.0)
    tl.store(v_cache + at * V + d, value, mask=d < V_there)


@triton.jit
def _tile(
    q, keys, values, slot, end, D, V, scale, softcap, SOFTCAP: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """The scores [queries, slots] and the values [slots, VALUE] of slots below `end`."""
    d = tl.arange(0, KEY)
    f = tl.arange(0, VALUE)
    inside = slot < end
    k = tl.load(
        keys + slot[:, None] * D + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )
    v = tl.load(
        values + slot[:, None] * V + f[None, :],
        mask=inside[:, None] & (f < V)[None, :],
        other=0.0,
    )
    score = dot(q, tl.trans(k), tl.zeros((q.shape[0], slot.shape[0]), tl.float32)) * scale
    if SOFTCAP:  # tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|), which can't overflow
        e = tl.exp(-2.0 * tl.abs(score) / softcap)
        bounded = softcap * (1.0 - e) / (1.0 + e)
        score = tl.where(score < 0.0, -bounded, bounded)
    return score, v


@triton.jit
def _add(score, visible, v, most, mass, total):
    """One step of the online softmax: the new maximum, sum of exponentials and weighted values."""
    score = tl.where(visible, score, float("-inf"))
    new = tl.maximum(most, tl.max(score, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # no slot visible so far
    p = tl.exp(score - shift[:, None])
    kept = tl.exp(most - shift)
    mass = mass * kept + tl.sum(p, 1)
    total = dot(narrowed(p, v.dtype), v, total * kept[:, None])
    return new, mass, total


@triton.jit
def attend(
    q, k_cache, v_cache, k_block, v_block, positions, length, tree_mask,
    totals, mosts, masses,
    G, T, D, V, S, M, q_row, q_head, q_token, mask_row, scale, softcap, window, share, parts,
    APART: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr, SLOTS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Softmax over a part of the slots; grid (parts, blocks of queries, B times G).

    A program's queries are those of the `share` query heads of its key/value head, head by head, T
    tokens each. The last part is the block of M slots: k_block and v_block [B, G, M, ·] if APART,
    else the caches' slots from `length` on. The other parts split the history, from the start of
    the first query's window. Writes `totals` [B, H, T, parts, V] (sums of values weighted by
    exponentials), each part's largest score `mosts` and its sum of exponentials `masses`
    [B, H, T, parts], all float32. `totals` is not written where the mass is 0.
    """
    part = tl.program_id(0)
    pair = tl.program_id(2)
    b = pair // G
    g = pair % G
    lane = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    live = lane < share * T
    head = g * share + lane // T
    t = lane % T
    d = tl.arange(0, KEY)
    query = tl.load(
        q + (b * q_row + head * q_head + t * q_token)[:, None] + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    position = tl.load(positions + b * T + t, mask=live, other=0).to(tl.int32)
    n = tl.minimum(tl.load(length + b).to(tl.int32), S)
    first = 0
    if WINDOW:
        nearest = tl.min(tl.where(live, position, 2147483647), 0)
        first = tl.maximum(nearest - window + 1, 0) // SLOTS * SLOTS
    splits = parts - 1
    each = tl.cdiv(tl.cdiv(tl.maximum(n - first, 0), splits), SLOTS) * SLOTS
    is_block = part == splits
    begin = tl.where(is_block, n, first + part * each)
    end = tl.where(is_block, n, tl.minimum(first + (part + 1) * each, n))

    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, VALUE), tl.float32)
    at = pair.to(tl.int64) * S
    for start in range(begin, end, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        score, v = _tile(
            query, k_cache + at * D, v_cache + at * V, slot, end, D, V, scale, softcap,
            SOFTCAP, KEY, VALUE,
        )  # fmt: skip
        distance = position[:, None] - slot[None, :]
        visible = (slot < end)[None, :] & (distance >= 0)
        if WINDOW:
            visible = visible & (distance < window)
        most, mass, total = _add(score, visible, v, most, mass, total)

    if APART:
        nodes = M
        keys = k_block + pair.to(tl.int64) * M * D
        values = v_block + pair.to(tl.int64) * M * V
    else:
        nodes = tl.minimum(M, S - n)
        keys = k_cache + (at + n) * D
        values = v_cache + (at + n) * V
    nodes = tl.where(is_block, nodes, 0)
    for start in range(0, nodes, SLOTS):
        node = start + tl.arange(0, SLOTS)
        score, v = _tile(
            query, keys, values, node, nodes, D, V, scale, softcap, SOFTCAP, KEY, VALUE
        )
        depth = tl.load(
            tree_mask + b * mask_row + t[:, None] * M + node[None, :],
            mask=live[:, None] & (node < nodes)[None, :],
            other=-1,
        ).to(tl.int32)
        visible = depth >= 0
        if WINDOW:
            visible = visible & (depth < window)
        most, mass, total = _add(score, visible, v, most, mass, total)

    e = tl.arange(0, VALUE)
    row = (((b * G + g) * share * T + lane) * parts + part).to(tl.int64)
    tl.store(mosts + row, most, mask=live)
    tl.store(masses + row, mass, mask=live)
    tl.store(
        totals + row[:, None] * V + e[None, :],
        total,
        mask=(live & (mass > 0.0))[:, None] & (e < V)[None, :],
    )


@triton.jit
def merge(
    totals, mosts, masses, sinks, out, H, T, V,
    HAS_SINKS: tl.constexpr, PARTS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """out [B, H, T, V]: merges the parts in their order; grid (T, H, B). A head's sink is one more
    score of the softmax, without a value. A query that sees no slot gives zeros.
    """
    row = (tl.program_id(2) * H + tl.program_id(1)) * T + tl.program_id(0)
    part = tl.arange(0, PARTS)
    e = tl.arange(0, VALUE)
    at = row.to(tl.int64) * PARTS + part
    most = tl.load(mosts + at)
    mass = tl.load(masses + at)
    highest = tl.max(most, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32)
        highest = tl.maximum(highest, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    scale = tl.exp(most - shift)
    sum_of_all = tl.sum(mass * scale, 0)
    if HAS_SINKS:
        sum_of_all += tl.exp(sink - shift)
    total = tl.load(
        totals + at[:, None] * V + e[None, :],
        mask=(mass > 0.0)[:, None] & (e < V)[None, :],
        other=0.0,
    )
    y = tl.sum(total * scale[:, None], 0) / tl.where(sum_of_all > 0.0, sum_of_all, 1.0)
    tl.store(out + row.to(tl.int64) * V + e, narrowed(y, out.dtype.element_ty), mask=e < V)
