"""Products of tokens with rows of weights: linear layers, and gate and up of an MLP.

A program takes ROWS rows and loops over their channels. One token is multiplied element by element,
in tiles that are wide along a row, and summed at the end. 2 to 16 tokens use the tensor cores, with
TOKENS = 16.
"""

import triton
import triton.language as tl

from sirius_runtime.kernels.cuda.device.arithmetic import activation, dot, narrowed, rounded


@triton.jit
def _token_times_rows(
    x, rows, live, begin, end, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Products [1, ROWS] of one token; `rows` are pointers to the rows' first elements."""
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(begin, end, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        inside = c < end
        w = tl.load(rows[:, None] + c[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        value = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * value[None, :]
    return tl.sum(total, 1)[None, :]


@triton.jit
def _tokens_times_rows(
    x, T, stride_x, rows, live, begin, end,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Products [TOKENS, ROWS] of T tokens."""
    t = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for start in range(begin, end, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        inside = c < end
        w = tl.load(rows[:, None] + c[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        value = tl.load(
            x + t[:, None] * stride_x + c[None, :],
            mask=(t < T)[:, None] & inside[None, :],
            other=0.0,
        )
        total = dot(value, tl.trans(w), total)
    return total


@triton.jit
def _times_rows(
    x, T, stride_x, rows, live, begin, end,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    if TOKENS == 1:
        total = _token_times_rows(x, rows, live, begin, end, ROWS, CHANNELS)
    else:
        total = _tokens_times_rows(
            x, T, stride_x, rows, live, begin, end, TOKENS, ROWS, CHANNELS
        )  # fmt: skip
    return total


@triton.jit
def _times_two_rows(
    x, T, stride_x, first, second, live, C,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Products with the rows of two weights, in one pass over x."""
    if TOKENS == 1:
        sums = tl.zeros((ROWS, CHANNELS), tl.float32)
        others = tl.zeros((ROWS, CHANNELS), tl.float32)
        for start in range(0, C, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            inside = c < C
            mask = live[:, None] & inside[None, :]
            v = tl.load(first[:, None] + c[None, :], mask=mask, other=0.0)
            w = tl.load(second[:, None] + c[None, :], mask=mask, other=0.0)
            value = tl.load(x + c, mask=inside, other=0.0).to(tl.float32)
            sums += v.to(tl.float32) * value[None, :]
            others += w.to(tl.float32) * value[None, :]
        one = tl.sum(sums, 1)[None, :]
        two = tl.sum(others, 1)[None, :]
    else:
        t = tl.arange(0, TOKENS)
        one = tl.zeros((TOKENS, ROWS), tl.float32)
        two = tl.zeros((TOKENS, ROWS), tl.float32)
        for start in range(0, C, CHANNELS):
            c = start + tl.arange(0, CHANNELS)
            inside = c < C
            mask = live[:, None] & inside[None, :]
            v = tl.load(first[:, None] + c[None, :], mask=mask, other=0.0)
            w = tl.load(second[:, None] + c[None, :], mask=mask, other=0.0)
            value = tl.load(
                x + t[:, None] * stride_x + c[None, :],
                mask=(t < T)[:, None] & inside[None, :],
                other=0.0,
            )
            one = dot(value, tl.trans(v), one)
            two = dot(value, tl.trans(w), two)
    return one, two


@triton.jit
def _past(
    block, index, start, weight, bias, O, stride, T, next_weight, next_bias, next_O, next_stride,
    ROWS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The block's position: in weight `index` or, if it is past that weight's rows, in the next."""
    blocks = tl.cdiv(O, ROWS)
    past = block >= blocks
    return (
        tl.where(past, block - blocks, block),
        tl.where(past, index + 1, index),
        tl.where(past, start + tl.cdiv(T * O, ALIGNED) * ALIGNED, start),
        tl.where(past, next_weight, weight),
        tl.where(past, next_bias, bias),
        tl.where(past, next_O, O),
        tl.where(past, next_stride, stride),
    )


@triton.jit
def linears(
    x, weight, weight_1, weight_2, weight_3, bias, bias_1, bias_2, bias_3, y, T, C,
    O, O_1, O_2, O_3, stride_x, stride, stride_1, stride_2, stride_3, per_split, size,
    COUNT: tl.constexpr, BIASES: tl.constexpr, ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y [T, O] of x [T, C] and weight [O, C], for the first COUNT of the weights; grid (blocks of
    each O, splits of C).

    Each weight's y begins at a multiple of ALIGNED in the `size` elements of a split. With several
    splits, these are float32 sums over `per_split` channels each; the first split adds the biases.
    BIASES: bit i says whether weight i has one.
    """
    split = tl.program_id(1)
    block = tl.program_id(0)
    index, start = 0, 0
    if COUNT > 1:
        block, index, start, weight, bias, O, stride = _past(
            block, index, start, weight, bias, O, stride, T, weight_1, bias_1, O_1, stride_1,
            ROWS, ALIGNED,
        )  # fmt: skip
    if COUNT > 2:
        block, index, start, weight, bias, O, stride = _past(
            block, index, start, weight, bias, O, stride, T, weight_2, bias_2, O_2, stride_2,
            ROWS, ALIGNED,
        )  # fmt: skip
    if COUNT > 3:
        block, index, start, weight, bias, O, stride = _past(
            block, index, start, weight, bias, O, stride, T, weight_3, bias_3, O_3, stride_3,
            ROWS, ALIGNED,
        )  # fmt: skip
    o = block * ROWS + tl.arange(0, ROWS)
    live = o < O
    begin = split * per_split
    end = tl.minimum(begin + per_split, C)
    total = _times_rows(
        x, T, stride_x, weight + o.to(tl.int64) * stride, live, begin, end,
        TOKENS, ROWS, CHANNELS,
    )  # fmt: skip
    if BIASES != 0:
        biased = tl.where(split == 0, O, 0)
        if COUNT > 1:
            biased *= (BIASES >> index) & 1
        total += tl.load(bias + o, mask=o < biased, other=0.0).to(tl.float32)[None, :]
    t = tl.arange(0, TOKENS)
    at = split * size + start + t[:, None] * O + o[None, :]
    tl.store(y + at, narrowed(total, y.dtype.element_ty), mask=(t < T)[:, None] & live[None, :])


@triton.jit
def neurons(
    x, gate, up, gate_bias, up_bias, rows, z, score, T, C, I, K, stride_gate, stride_up,
    HAS_UP: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr, SCORE: tl.constexpr, ACT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """z [B, T, K] = act(gate x) · up x of x [B, T, C]; grid (blocks of K, B).

    HAS_ROWS: for the neurons rows [B, K], else for the first K. SCORE: "mean" or "sum" also writes
    the mean or sum of |z| over the tokens to score [B, K], float32, rounded to z's type.
    """
    DTYPE: tl.constexpr = z.dtype.element_ty
    b = tl.program_id(1)
    j = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = j < K
    if HAS_ROWS:
        row = tl.load(rows + b * K + j, mask=live, other=0).to(tl.int64)
        inside = live & (row >= 0) & (row < I)
    else:
        row = j.to(tl.int64)
        inside = live
    own = x + b * T * C
    if HAS_UP:
        g, u = _times_two_rows(
            own, T, C, gate + row * stride_gate, up + row * stride_up, inside, C,
            TOKENS, ROWS, CHANNELS,
        )  # fmt: skip
    else:
        g = _times_rows(
            own, T, C, gate + row * stride_gate, inside, 0, C, TOKENS, ROWS, CHANNELS
        )  # fmt: skip
    if HAS_GATE_BIAS:
        g += tl.load(gate_bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = activation(rounded(g, DTYPE), ACT, DTYPE)
    if HAS_UP:
        if HAS_UP_BIAS:
            u += tl.load(up_bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
        value = value * rounded(u, DTYPE)
    t = tl.arange(0, TOKENS)
    mask = (t < T)[:, None] & live[None, :]
    # A neuron out of range gives 0, even if the activation of 0 is not 0.
    value = tl.where(inside[None, :], value, 0.0)
    tl.store(z + (b * T + t)[:, None] * K + j[None, :], narrowed(value, DTYPE), mask=mask)
    if SCORE != "":
        total = tl.sum(tl.where(mask, tl.abs(value), 0.0), 0)
        if SCORE == "mean":
            total = total / T
        tl.store(score + b * K + j, rounded(total, DTYPE), mask=live)


@triton.jit
def live_neurons(
    x, up, up_bias, g, positions, rows, count, z, T, C, K, stride_up,
    HAS_UP: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """z [B, T, j] = g [B, T, positions[j]] · up x of neuron rows[j], for j < count [B]; positions
    and rows [B, K]. Grid (blocks of K, B); a program beyond the count reads no weights.
    """
    DTYPE: tl.constexpr = z.dtype.element_ty
    b = tl.program_id(1)
    start = tl.program_id(0) * ROWS
    n = tl.load(count + b).to(tl.int32)
    if start < n:
        j = start + tl.arange(0, ROWS)
        live = j < n
        t = tl.arange(0, TOKENS)
        mask = (t < T)[:, None] & live[None, :]
        position = tl.load(positions + b * K + j, mask=live, other=0)
        value = tl.load(
            g + (b * T + t)[:, None] * K + position[None, :], mask=mask, other=0.0
        ).to(tl.float32)  # fmt: skip
        if HAS_UP:
            row = tl.load(rows + b * K + j, mask=live, other=0).to(tl.int64)
            u = _times_rows(
                x + b * T * C, T, C, up + row * stride_up, live, 0, C, TOKENS, ROWS, CHANNELS
            )  # fmt: skip
            if HAS_UP_BIAS:
                u += tl.load(up_bias + row, mask=live, other=0.0).to(tl.float32)[None, :]
            value = value * rounded(u, DTYPE)
        tl.store(z + (b * T + t)[:, None] * K + j[None, :], narrowed(value, DTYPE), mask=mask)
