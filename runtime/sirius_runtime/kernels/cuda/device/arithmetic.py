"""Products, rounding and activations inside kernels."""

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16 as integers, and truncates where a GPU
# rounds. For the interpreter, operands are converted to float32 and results are rounded here.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """total + a @ b in float32; float32 operands are not reduced to TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrowed(value, DTYPE: tl.constexpr):
    """`value`, float32, converted to DTYPE: rounded to nearest, ties to even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """`value`, float32, rounded to DTYPE and converted back to float32."""
    return narrowed(value, DTYPE).to(tl.float32)


@triton.jit
def activation(value, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """The activation named ACT, float32, rounded to DTYPE where torch's calls store an intermediate
    result.
    """
    if ACT == "silu":
        result = value / (1.0 + tl.exp(-value))
    elif ACT == "gelu":
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # v (1 + tanh u) / 2 = v / (1 + e^-2u), without cancellation
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        result = value / (1.0 + tl.exp(-inner))
    elif ACT == "quick_gelu":
        scaled = rounded(1.702 * value, DTYPE)
        result = value * rounded(1.0 / (1.0 + tl.exp(-scaled)), DTYPE)
    elif ACT == "relu":
        result = tl.where(value < 0.0, 0.0, value)
    else:
        tl.static_assert(ACT == "relu2")
        result = tl.where(value < 0.0, 0.0, value * value)
    return rounded(result, DTYPE)
