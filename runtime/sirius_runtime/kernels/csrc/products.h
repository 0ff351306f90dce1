// The two products that everything here is made of.
//
//   dots:        out[n][j] = row_j · x_n          each weight row is an output
//   accumulate:  y_n += Σ_j z[n][j] row_j         each weight row is an input
//
// Both read each weight once for all tokens n, and both add up in an order that depends on neither
// the number of tokens nor on which rows stand beside each other: a token's result is the same to
// the bit whatever its neighbours.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace sirius {

constexpr size_t ROWS = 4;    // weight rows that dots reads side by side
constexpr size_t TILE = 4;    // tokens whose sums dots keep in registers
constexpr size_t LIVE = 8;    // weight rows in one pass of accumulate over y
constexpr size_t PAD = 32;    // activations and y are padded to a multiple of this

// One multiple more than is needed: were tokens a power of two apart, they would share the few
// places that a cache has for such addresses.
inline size_t padded(size_t n) { return (n + PAD - 1) / PAD * PAD + PAD; }

// Asks for the beginning of a row that is read next; its rest the processor foresees by itself.
inline void ask(const void* row) {
  for (int line = 0; line < 4; line++) __builtin_prefetch((const char*)row + 64 * line);
}

// How weights of type T meet activations: as floats, by fused multiply and add.
template <class T>
struct Meet {
  typedef float X;
  typedef Floats Operand;
  static constexpr size_t STEP = size_t(W);
  static Operand weights(const T* p) { return load(p); }
  static Operand weights_part(const T* p, size_t n) { return load_part(p, n); }
  static Operand activations(const X* p) { return load(p); }
  static Floats mac(Floats sum, Operand w, Operand x) { return sum + w * x; }
  static X from(T v) { return to_float(v); }
  static X from_float(float v) { return v; }
  static void from_floats(const float* v, X* to) { memcpy(to, v, PAD * sizeof(float)); }
  static size_t place(size_t column) { return column; }

  // One pass over columns [begin, begin + STEP) of `count` <= LIVE rows.
  struct Columns {
    Floats w[LIVE];
  };
  static Columns columns(const T* const* rows, size_t c, size_t n) {
    Columns own;
#pragma GCC unroll 8
    for (size_t r = 0; r < LIVE; r++)
      own.w[r] = n == STEP ? load(rows[r] + c) : load_part(rows[r] + c, n);
    return own;
  }
  static void add(const Columns& own, const X* z, float* y) {
    Floats sum = load(y);
#pragma GCC unroll 8
    for (size_t r = 0; r < LIVE; r++) sum += own.w[r] * z[r];
    store(y, sum);
  }
};

#if defined(__AVX512BF16__)
// bfloat16 meets bfloat16 two at a time: products are exact, sums are floats.
template <>
struct Meet<bf16> {
  typedef bf16 X;
  typedef __m512bh Operand;
  static constexpr size_t STEP = 32;
  static __m512i bits(const bf16* p) { return _mm512_loadu_si512(p); }
  static __m512i bits_part(const bf16* p, size_t n) {
    return _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
  }
  static Operand weights(const bf16* p) { return (__m512bh)bits(p); }
  static Operand weights_part(const bf16* p, size_t n) { return (__m512bh)bits_part(p, n); }
  static Operand activations(const X* p) { return (__m512bh)bits(p); }
  static Floats mac(Floats sum, Operand w, Operand x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, w, x);
  }
  static X from(bf16 v) { return v; }
  static X from_float(float v) {
    bf16 stored;
    round_into(&stored, v);
    return stored;
  }
  static void from_floats(const float* v, X* to) {  // PAD of them
    const __m512bh stored = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(v + 16), _mm512_loadu_ps(v));
    memcpy(to, &stored, sizeof stored);
  }

  // Rows are interleaved in pairs, within each 128 bits: 32 columns become two vectors, which y
  // keeps as they come. `place` says where in y a column is.
  static size_t place(size_t column) {
    const size_t in = column % 32, lane = in / 8, high = in % 8 / 4;
    return column - in + high * 16 + lane * 4 + in % 4;
  }
  struct Columns {
    __m512bh low[LIVE / 2], high[LIVE / 2];
  };
  static Columns columns(const bf16* const* rows, size_t c, size_t n) {
    Columns own;
#pragma GCC unroll 4
    for (size_t p = 0; p < LIVE / 2; p++) {
      const bf16 *a = rows[2 * p] + c, *b = rows[2 * p + 1] + c;
      const __m512i va = n == STEP ? bits(a) : bits_part(a, n);
      const __m512i vb = n == STEP ? bits(b) : bits_part(b, n);
      own.low[p] = (__m512bh)_mm512_unpacklo_epi16(va, vb);
      own.high[p] = (__m512bh)_mm512_unpackhi_epi16(va, vb);
    }
    return own;
  }
  static void add(const Columns& own, const X* z, float* y) {
    __m512 low = _mm512_loadu_ps(y), high = _mm512_loadu_ps(y + 16);
#pragma GCC unroll 4
    for (size_t p = 0; p < LIVE / 2; p++) {
      int pair;
      memcpy(&pair, z + 2 * p, sizeof pair);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      low = _mm512_dpbf16_ps(low, own.low[p], both);
      high = _mm512_dpbf16_ps(high, own.high[p], both);
    }
    _mm512_storeu_ps(y, low);
    _mm512_storeu_ps(y + 16, high);
  }
};
#endif

template <class T>
using X = typename Meet<T>::X;

template <class T, size_t N>
inline void dots_tile(const T* const* rows, const X<T>* x, size_t x_stride, size_t C,
                      float sums[TILE][ROWS]) {
  typedef Meet<T> M;
  static_assert(ROWS == 4, "as many sums as sum_four makes");
  Floats acc[N][ROWS] = {};
  const auto step = [&](size_t k, auto weights) __attribute__((always_inline)) {
    typename M::Operand own[N];
#pragma GCC unroll 4
    for (size_t n = 0; n < N; n++) own[n] = M::activations(x + n * x_stride + k);
#pragma GCC unroll 4
    for (size_t r = 0; r < ROWS; r++) {
      const typename M::Operand w = weights(rows[r] + k);
#pragma GCC unroll 4
      for (size_t n = 0; n < N; n++) acc[n][r] = M::mac(acc[n][r], w, own[n]);
    }
  };
  size_t k = 0;
  for (; k + M::STEP <= C; k += M::STEP) step(k, [](const T* p) { return M::weights(p); });
  if (k < C) step(k, [&](const T* p) { return M::weights_part(p, C - k); });
  for (size_t n = 0; n < N; n++) sum_four(acc[n], sums[n]);
}

// As dots_tile for one token and rows that lie one after the other: read so, each while the next one
// is asked for (`next` holds it), they come faster than side by side. Sums are added up as there.
template <class T>
inline void dots_alone(const T* const* rows, const T* const* next, const X<T>* x, size_t C,
                       float sums[ROWS]) {
  typedef Meet<T> M;
  Floats acc[ROWS] = {};
  for (size_t r = 0; r < ROWS; r++) {
    const T *row = rows[r], *after = next[r];
    Floats own = {};
    size_t k = 0;
    for (; k + M::STEP <= C; k += M::STEP) {
      __builtin_prefetch(after + k);
      own = M::mac(own, M::weights(row + k), M::activations(x + k));
    }
    if (k < C) own = M::mac(own, M::weights_part(row + k, C - k), M::activations(x + k));
    acc[r] = own;
  }
  sum_four(acc, sums);
}

// out[n * out_stride + j] = rows[j] · x_n, of `count` rows of C weights and N tokens. x_n, at
// x + n * x_stride, is padded with zeros to a multiple of PAD.
template <class T>
void dots(const T* const* rows, size_t count, const X<T>* x, size_t x_stride, size_t N, size_t C,
          float* out, size_t out_stride) {
  float sums[TILE][ROWS];
  const bool alone = N == 1 && size_t(rows[count - 1] - rows[0]) < count * C;  // none is left out
  for (size_t j = 0; j < count; j += ROWS) {
    const T* own[ROWS];  // the last row again where there are fewer: read from the cache
    for (size_t r = 0; r < ROWS; r++) own[r] = rows[j + r < count ? j + r : count - 1];
    if (alone) {
      const T* next[ROWS];
      for (size_t r = 0; r < ROWS; r++) next[r] = rows[std::min(j + r + 1, count - 1)];
      dots_alone<T>(own, next, x, C, sums[0]);
      memcpy(out + j, sums[0], std::min(ROWS, count - j) * sizeof(float));
      continue;
    }
    for (size_t next = j + ROWS; next < std::min(count, j + 2 * ROWS); next++) ask(rows[next]);
    for (size_t n = 0; n < N; n += TILE) {
      const X<T>* tile = x + n * x_stride;
      const size_t wide = N - n < TILE ? N - n : TILE;
      if (wide == 4) dots_tile<T, 4>(own, tile, x_stride, C, sums);
      if (wide == 3) dots_tile<T, 3>(own, tile, x_stride, C, sums);
      if (wide == 2) dots_tile<T, 2>(own, tile, x_stride, C, sums);
      if (wide == 1) dots_tile<T, 1>(own, tile, x_stride, C, sums);
      const size_t here = std::min(ROWS, count - j);
      for (size_t t = 0; t < wide; t++)
        memcpy(out + (n + t) * out_stride + j, sums[t], here * sizeof(float));
    }
  }
}

// y_n += Σ_j z[n * z_stride + j] rows[j][begin : end] of `count` rows; y_n at y + n * y_stride holds
// column c at Meet<T>::place(c). `begin` is a multiple of PAD. A token's z is padded with zeros to a
// multiple of LIVE.
template <class T>
void accumulate(const T* const* rows, size_t count, const X<T>* z, size_t z_stride, size_t N,
                size_t begin, size_t end, float* y, size_t y_stride) {
  typedef Meet<T> M;
  // One token streams whole rows; many take as many columns as leave their y in the first cache.
  const size_t block = N <= 2 ? end - begin : std::max(PAD, 4096 / N / PAD * PAD);
  for (size_t left = begin; left < end; left += block) {
    const size_t right = std::min(end, left + block);
    for (size_t j = 0; j < count; j += LIVE) {
      const T* own[LIVE];
      for (size_t r = 0; r < LIVE; r++) own[r] = rows[j + r < count ? j + r : count - 1];
      for (size_t next = j + LIVE; next < std::min(count, j + 2 * LIVE); next++)
        ask(rows[next] + left);
      for (size_t c = left; c < right; c += M::STEP) {
        const size_t here = std::min(M::STEP, right - c);
        const typename M::Columns columns =
            here == M::STEP ? M::columns(own, c, M::STEP) : M::columns(own, c, here);
        for (size_t n = 0; n < N; n++) M::add(columns, z + n * z_stride + j, y + n * y_stride + c);
      }
    }
  }
}

// Tokens x_n [C] of type T, at x + n * stride, as `dots` takes them: to, of N * padded(C).
template <class T>
void take_activations(const T* x, size_t stride, size_t N, size_t C, X<T>* to) {
  const size_t width = padded(C);
  for (size_t n = 0; n < N; n++) {
    for (size_t c = 0; c < C; c++) to[n * width + c] = Meet<T>::from(x[n * stride + c]);
    for (size_t c = C; c < width; c++) to[n * width + c] = Meet<T>::from_float(0.0f);
  }
}

}  // namespace sirius
