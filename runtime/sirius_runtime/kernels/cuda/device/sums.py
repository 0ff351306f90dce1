"""Weighted sums of rows, y = Σ z_j · row_j, as partial sums that are added afterwards: the down
projection of an MLP, and linear layers over input channels.
"""

import triton
import triton.language as tl

from sirius_runtime.kernels.cuda.device.arithmetic import dot, narrowed


@triton.jit
def weighted_rows(
    z, weight, rows, count, partials, B, T, K, I, C, stride_z, stride_w, splits,
    HAS_ROWS: tl.constexpr, HAS_COUNT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """partials [splits, B, T, C], float32, from z [B, T, K] and the rows of weight [I, C].

    HAS_ROWS: z_j multiplies row rows[b, j], else row j. HAS_COUNT: only j < count[b]. Grid (B times
    blocks of C, splits); the batch's rows are neighbours in the grid, so that weights that they
    share are still in the L2 cache.
    """
    b = tl.program_id(0) % B
    c = (tl.program_id(0) // B) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    n = K
    if HAS_COUNT:
        n = tl.load(count + b).to(tl.int32)
    share = tl.cdiv(tl.cdiv(n, splits), ROWS) * ROWS
    begin = split * share
    end = tl.minimum(begin + share, n)
    step = tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    within = c < C
    own = z + b * T * stride_z
    listed = rows + b * K
    if TOKENS == 1:
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
    else:
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    # The indices of the next rows are loaded ahead, together with the current rows.
    if HAS_ROWS:
        row = tl.load(listed + begin + step, mask=begin + step < end, other=0).to(tl.int64)
    else:
        row = (begin + step).to(tl.int64)
    for start in range(begin, end, ROWS):
        j = start + step
        live = j < end
        if HAS_ROWS:
            live = live & (row >= 0) & (row < I)
        w = tl.load(
            weight + row[:, None] * stride_w + c[None, :],
            mask=live[:, None] & within[None, :],
            other=0.0,
        )
        ahead = j + ROWS
        if HAS_ROWS:
            row = tl.load(listed + ahead, mask=ahead < end, other=0).to(tl.int64)
        else:
            row = ahead.to(tl.int64)
        if TOKENS == 1:
            value = tl.load(own + j, mask=live, other=0.0).to(tl.float32)
            total += value[:, None] * w.to(tl.float32)
        else:
            value = tl.load(
                own + t[:, None] * stride_z + j[None, :],
                mask=(t < T)[:, None] & live[None, :],
                other=0.0,
            )
            total = dot(value, w, total)
    if TOKENS == 1:
        total = tl.sum(total, 0)[None, :]
    at = ((split * B + b) * T + t).to(tl.int64)
    tl.store(
        partials + at[:, None] * C + c[None, :], total, mask=(t < T)[:, None] & within[None, :]
    )


@triton.jit
def add_up(
    partials, bias, y, N, C, splits,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [N, C] = Σ partials [splits, N, C] + bias; grid (blocks of C, N)."""
    n = tl.program_id(1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    within = c < C
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, splits, PARTS):
        split = start + tl.arange(0, PARTS)
        at = (split * N + n).to(tl.int64)
        part = tl.load(
            partials + at[:, None] * C + c[None, :],
            mask=(split < splits)[:, None] & within[None, :],
            other=0.0,
        )
        total += tl.sum(part, 0)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=within, other=0.0).to(tl.float32)
    at = n.to(tl.int64) * C
    tl.store(y + at + c, narrowed(total, y.dtype.element_ty), mask=within)
