// The operations between matrix products, such as norms and rotary embeddings: each is one pass, where
// torch has one call per elementary operation. Values are rounded where torch's calls store them.
#pragma once

#include <algorithm>
#include <cmath>

#include "activations.h"
#include "sums.h"

namespace sirius {

constexpr size_t ALONE = 1 << 17;  // fewer numbers than this are faster on one thread

template <class T>
float sum_of_squares(const T* x, size_t C) {
  const size_t whole = C / W * W, rest = C - whole;
  Floats squares[4] = {};
  for (size_t c = 0; c < whole; c += W) {
    const Floats v = load(x + c);
    squares[c / W % 4] += v * v;
  }
  if (rest) {
    const Floats v = load_part(x + whole, rest);
    squares[0] += v * v;
  }
  return sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// y = weight * x / √(mean x² + ε), for N tokens [C]. With an addend, total = x + addend takes x's place.
template <class T>
void rms_norm(const T* x, const T* addend, T* total, const T* weight, float epsilon, T* y, size_t N,
              size_t C, int threads) {
  const size_t whole = C / W * W, rest = C - whole;
  parallel(N, N * C < ALONE ? 1 : threads, [&](size_t n) {
    const T* from = x + n * C;
    if (addend) {
      const T* more = addend + n * C;
      T* both = total + n * C;
      for (size_t c = 0; c < whole; c += W) store(both + c, load(from + c) + load(more + c));
      if (rest)
        store_part(both + whole, load_part(from + whole, rest) + load_part(more + whole, rest), rest);
      from = both;
    }
    const float scale = 1.0f / std::sqrt(sum_of_squares(from, C) / float(C) + epsilon);
    T* to = y + n * C;
    for (size_t c = 0; c < whole; c += W)
      store(to + c, load(weight + c) * rounded<T>(load(from + c) * scale));
    if (rest)
      store_part(to + whole, load_part(weight + whole, rest) *
                                 rounded<T>(load_part(from + whole, rest) * scale), rest);
  });
}

// y = act(g) * u, for n numbers; u may be null, and y may be g. act(g) is rounded to T, as torch stores it.
template <class T>
void gated(Activation act, const T* g, const T* u, T* y, size_t n, int threads) {
  const size_t slab = 1024 * W, slabs = (n + slab - 1) / slab;
  parallel(slabs, n < ALONE ? 1 : threads, [&](size_t task) {
    const size_t begin = task * slab, end = std::min(n, begin + slab);
    for (size_t i = begin; i < end; i += W) {
      const size_t here = std::min(size_t(W), end - i);
      const auto get = [&](const T* p) { return here == size_t(W) ? load(p) : load_part(p, here); };
      Floats v = rounded<T>(activation<T>(act, get(g + i)));
      if (u) v *= get(u + i);
      here == size_t(W) ? store(y + i, v) : store_part(y + i, v, here);
    }
  });
}

// 1 / ‖z‖₂ of a token's I neurons, with the norm clamped to at least 1e-12 as in torch's normalize.
template <class T>
float reciprocal_norm(const T* z, size_t I) {
  return 1.0f / std::max(std::sqrt(sum_of_squares(z, I)), 1e-12f);
}

// y [N, I] = (z / ‖z‖₂)², for N tokens of I neurons.
template <class T>
void activity(const T* z, float* y, size_t N, size_t I, int threads) {
  parallel(N, threads, [&](size_t n) {
    const T* from = z + n * I;
    float* to = y + n * I;
    const float scale = reciprocal_norm(from, I);
    for (size_t i = 0; i < I; i++) {
      const float share = to_float(from[i]) * scale;
      to[i] = share * share;
    }
  });
}

// y [B, I] = the sum of `activity` over each row's valid tokens; valid [B, N].
template <class T>
void statistic(const T* z, const uint8_t* valid, float* y, size_t B, size_t N, size_t I,
               int threads) {
  thread_local Scratch<float> scratch;
  float* scales = scratch.take(B * N);
  parallel(B * N, threads, [&](size_t n) {
    if (valid[n]) scales[n] = reciprocal_norm(z + n * I, I);
  });
  const size_t slab = 32 * W, slabs = (I + slab - 1) / slab;  // stays in the first cache
  parallel(B * slabs, threads, [&](size_t task) {
    const size_t b = task / slabs, begin = task % slabs * slab, here = std::min(slab, I - begin);
    const size_t whole = here / W * W, rest = here - whole;
    alignas(64) float sums[32 * W] = {};
    for (size_t n = b * N; n < (b + 1) * N; n++) {
      if (!valid[n]) continue;
      const T* from = z + n * I + begin;
      const auto add = [&](size_t i, Floats v) {
        v *= scales[n];
        store(sums + i, load(sums + i) + v * v);
      };
      for (size_t i = 0; i < whole; i += W) add(i, load(from + i));
      if (rest) add(whole, load_part(from + whole, rest));
    }
    memcpy(y + b * I + begin, sums, here * sizeof(float));
  });
}

// y [B, H, N, D] = x * cosine + (-x₂, x₁) * sine, where x₁ and x₂ are the halves of x's last
// dimension; x has the strides row, head and token; cosine and sine are [B, N, D].
template <class T>
void rotate(const T* x, int64_t row, int64_t head, int64_t token, const T* cosine, const T* sine,
            T* y, size_t B, size_t H, size_t N, size_t D, int threads) {
  const size_t half = D / 2;
  parallel(B * H, B * H * N * D < ALONE ? 1 : threads, [&](size_t task) {
    const size_t b = task / H, h = task % H;
    T* to = y + task * N * D;
    for (size_t n = 0; n < N; n++, to += D) {
      const T* from = x + int64_t(b) * row + int64_t(h) * head + int64_t(n) * token;
      const T *c = cosine + (b * N + n) * D, *s = sine + (b * N + n) * D;
      const auto turn = [&](size_t at, size_t other, float sign, size_t count) {
        const bool part = count < size_t(W);
        const auto get = [&](const T* p) { return part ? load_part(p, count) : load(p); };
        const Floats straight = rounded<T>(get(from + at) * get(c + at));
        const Floats across = rounded<T>(sign * get(from + other) * get(s + at));
        store_part(to + at, straight + across, part ? count : size_t(W));
      };
      for (size_t d = 0; d < half; d += W) {
        const size_t count = half - d < size_t(W) ? half - d : size_t(W);
        turn(d, half + d, -1.0f, count);
        turn(half + d, d, 1.0f, count);
      }
    }
  });
}

}  // namespace sirius
