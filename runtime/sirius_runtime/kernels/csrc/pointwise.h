// What stands between the products, at few tokens: norms and rotary embeddings, each one pass where
// torch has a call for every operation. Values are rounded where torch's calls store them.
#pragma once

#include <algorithm>
#include <cmath>

#include "threads.h"
#include "vectors.h"

namespace sirius {

// y = weight * (x / √(mean x² + ε)) of N tokens of C; where there is an addend, of total = x + addend.
template <class T>
void rms_norm(const T* x, const T* addend, T* total, const T* weight, float epsilon, T* y, size_t N,
              size_t C) {
  const size_t whole = C / W * W, rest = C - whole;
  for (size_t n = 0; n < N; n++, x += C, y += C) {
    if (addend) {
      for (size_t c = 0; c < whole; c += W) store(total + c, load(x + c) + load(addend + c));
      if (rest)
        store_part(total + whole, load_part(x + whole, rest) + load_part(addend + whole, rest), rest);
    }
    const T* from = addend ? total : x;
    Floats squares[4] = {};
    for (size_t c = 0; c < whole; c += W) {
      const Floats v = load(from + c);
      squares[c / W % 4] += v * v;
    }
    if (rest) {
      const Floats v = load_part(from + whole, rest);
      squares[0] += v * v;
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(C);
    const float scale = 1.0f / std::sqrt(mean + epsilon);
    for (size_t c = 0; c < whole; c += W)
      store(y + c, load(weight + c) * rounded<T>(load(from + c) * scale));
    if (rest)
      store_part(y + whole, load_part(weight + whole, rest) *
                                rounded<T>(load_part(from + whole, rest) * scale), rest);
    if (addend) addend += C, total += C;
  }
}

// y = (z / ‖z‖₂)² of N tokens of I neurons; as torch's normalize, no norm is less than 1e-12.
template <class T>
void activity(const T* z, float* y, size_t N, size_t I, int threads) {
  parallel(N, threads, [&](size_t n) {
    const T* from = z + n * I;
    float* to = y + n * I;
    const size_t whole = I / W * W, rest = I - whole;
    Floats squares[4] = {};
    for (size_t i = 0; i < whole; i += W) {
      const Floats v = load(from + i);
      squares[i / W % 4] += v * v;
    }
    if (rest) {
      const Floats v = load_part(from + whole, rest);
      squares[0] += v * v;
    }
    const float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    const float scale = 1.0f / std::max(std::sqrt(total), 1e-12f);
    for (size_t i = 0; i < I; i++) {
      const float share = to_float(from[i]) * scale;
      to[i] = share * share;
    }
  });
}

// y [B, H, N, D] = x * cosine + (-x₂, x₁) * sine, where x₁ and x₂ are the halves of x's last
// dimension; x has the strides row, head and token; cosine and sine are [B, N, D].
template <class T>
void rotate(const T* x, int64_t row, int64_t head, int64_t token, const T* cosine, const T* sine,
            T* y, size_t B, size_t H, size_t N, size_t D) {
  const size_t half = D / 2;
  for (size_t b = 0; b < B; b++)
    for (size_t h = 0; h < H; h++)
      for (size_t n = 0; n < N; n++, y += D) {
        const T* from = x + int64_t(b) * row + int64_t(h) * head + int64_t(n) * token;
        const T *c = cosine + (b * N + n) * D, *s = sine + (b * N + n) * D;
        const auto turn = [&](size_t at, size_t other, float sign, size_t count) {
          const bool part = count < size_t(W);
          const auto get = [&](const T* p) { return part ? load_part(p, count) : load(p); };
          const Floats straight = rounded<T>(get(from + at) * get(c + at));
          const Floats across = rounded<T>(sign * get(from + other) * get(s + at));
          store_part(y + at, straight + across, part ? count : size_t(W));
        };
        for (size_t d = 0; d < half; d += W) {
          const size_t count = half - d < size_t(W) ? half - d : size_t(W);
          turn(d, half + d, -1.0f, count);
          turn(half + d, d, 1.0f, count);
        }
      }
}

}  // namespace sirius
