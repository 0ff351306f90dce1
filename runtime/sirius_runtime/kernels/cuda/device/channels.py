"""Linear layers over the kept input channels (TEAL); the weight is stored input-major."""

import triton
import triton.language as tl

from sirius_runtime.kernels.cuda.device.arithmetic import dot


@triton.jit
def kept_channels(
    x, weight, partials, counts, threshold, B, T, C, O, stride_w,
    TOKENS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """partials [splits, B, T, O], float32, from x [B, T, C] and the rows of weight [C, O] whose
    channels are kept: those whose mean |x| over the tokens is above threshold. counts [splits, B],
    int32: how many. Grid (B times blocks of O, splits); a split has SHARE channels.

    Each program finds its kept channels itself: a list in memory would cost one more launch, which
    takes as long as reading the weights of a small layer.
    """
    b = tl.program_id(0) % B
    block = tl.program_id(0) // B
    split = tl.program_id(1)
    c = split * SHARE + tl.arange(0, SHARE)
    present = c < C
    own = x + b * T * C
    score = tl.zeros((SHARE,), tl.float32)
    for token in range(T):
        value = tl.load(own + token * C + c, mask=present, other=0.0)
        score += tl.abs(value.to(tl.float32))
    if TOKENS > 1:
        score = score / T
    kept = present & (score > threshold)
    rank = tl.cumsum(kept.to(tl.int32), 0) - 1
    n = tl.sum(kept.to(tl.int32), 0)
    if block == 0:
        tl.store(counts + split * B + b, n)

    o = block * OUTPUTS + tl.arange(0, OUTPUTS)
    within = o < O
    t = tl.arange(0, TOKENS)
    step = tl.arange(0, ROWS)
    if TOKENS == 1:
        total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    else:
        total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, n, ROWS):
        j = start + step
        live = j < n
        # The j-th kept channel: at most one kept channel has rank j.
        is_jth = kept[:, None] & (rank[:, None] == j[None, :])
        row = tl.sum(tl.where(is_jth, c[:, None], 0), 0)
        w = tl.load(
            weight + row.to(tl.int64)[:, None] * stride_w + o[None, :],
            mask=live[:, None] & within[None, :],
            other=0.0,
        )
        if TOKENS == 1:
            value = tl.load(own + row, mask=live, other=0.0).to(tl.float32)
            total += value[:, None] * w.to(tl.float32)
        else:
            value = tl.load(
                own + t[:, None] * C + row[None, :],
                mask=(t < T)[:, None] & live[None, :],
                other=0.0,
            )
            total = dot(value, w, total)
    if TOKENS == 1:
        total = tl.sum(total, 0)[None, :]
    at = ((split * B + b) * T + t).to(tl.int64)
    tl.store(
        partials + at[:, None] * O + o[None, :], total, mask=(t < T)[:, None] & within[None, :]
    )
