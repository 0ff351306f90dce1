// The activation functions of MLPs, on floats.
#pragma once

#include <cmath>

#include "vectors.h"

namespace sirius {

// The codes that Python passes: `ACTIVATIONS` of kernels/arguments.py.
enum Activation { SILU, GELU, GELU_TANH, RELU, QUICK_GELU, RELU2 };

// e^v to about one unit in the last place; v is clamped to where e^v is a normal float.
inline Floats exp(Floats v) {
  v = v < -87.3f ? splat(-87.3f) : v;
  v = v > 88.3f ? splat(88.3f) : v;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the bits
  const Floats shifted = v * 1.44269504f + magic, n = shifted - magic;
  const Floats r = v - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Floats)((Words)p + (((Words)shifted) << 23));
}

// act(v). Intermediate results are rounded to T where torch's calls store them; the result is not.
template <class T>
inline Floats activation(Activation act, Floats v) {
  switch (act) {
    case QUICK_GELU:
      return v * rounded<T>(1.0f / (1.0f + exp(-rounded<T>(1.702f * v))));
    case RELU2:
      return v < 0.0f ? splat(0.0f) : v * v;
    case SILU:
      return v / (1.0f + exp(-v));
    case GELU_TANH: {  // v (1 + tanh u) / 2 = v / (1 + e^-2u), without cancellation
      const Floats u = 1.5957691216f * (v + 0.044715f * v * v * v);
      return v / (1.0f + exp(-u));
    }
    case GELU: {
      Floats result;
      for (int i = 0; i < W; i++)
        result[i] = 0.5f * v[i] * (1.0f + std::erf(v[i] * 0.70710678118f));
      return result;
    }
    default:
      return v < 0.0f ? splat(0.0f) : v;
  }
}

}  // namespace sirius
