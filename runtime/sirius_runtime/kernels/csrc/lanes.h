// Products of keys and queries, with one query per vector lane.
//
//   scores[j][i] = key_j · query_i
//
// Keys are short: with `dots`, the horizontal sums would take longer than the products. Here a key's
// channel is multiplied with that channel of all queries at once, and each lane is a score. A score is
// summed in the order of the channels, so that it is bit-equal whatever the other queries are.
#pragma once

#include "products.h"

namespace sirius {

constexpr size_t KEYS = 8;  // keys at once

// Products in float32.
template <class T>
struct Lanes {
  // Writes the D channels of query i to its lane of `to` [channels(D), lanes], which was zero.
  static size_t channels(size_t D) { return D; }
  static void put_query(const T* from, size_t D, size_t i, size_t lanes, X<T>* to) {
    for (size_t d = 0; d < D; d++) to[d * lanes + i] = to_float(from[d]);
  }

  // Writes the scores of KEYS keys to `to` [KEYS, lanes]. floats [KEYS, D]: a buffer for the keys.
  static void scores(const T* const* keys, const X<T>* queries, size_t D, size_t lanes,
                     float* floats, float* to) {
    const float* own[KEYS];
    for (size_t r = 0; r < KEYS; r++) {
      if constexpr (std::is_same<T, float>::value) {
        own[r] = keys[r];
        continue;
      }
      float* key = floats + r * D;
      own[r] = key;
      size_t d = 0;
      for (; d + W <= D; d += W) store(key + d, load(keys[r] + d));
      for (; d < D; d++) key[d] = to_float(keys[r][d]);
    }
    for (size_t lane = 0; lane < lanes; lane += W) {
      Floats acc[KEYS];
#pragma GCC unroll 8
      for (size_t r = 0; r < KEYS; r++) acc[r] = Floats{};
      for (size_t d = 0; d < D; d++) {
        const Floats query = load(queries + d * lanes + lane);
#pragma GCC unroll 8
        for (size_t r = 0; r < KEYS; r++) acc[r] += own[r][d] * query;
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < KEYS; r++) store(to + r * lanes + lane, acc[r]);
    }
  }

  // Writes the softmax weights [2, lanes] of two keys as accumulate's factors for two rows.
  static constexpr size_t QUERY = 1;  // stride from a query's factor to the next query's
  static void put_shares(const float* shares, size_t lanes, X<T>* to) {
    memcpy(to, shares, 2 * lanes * sizeof(float));
  }
};

#if defined(__AVX512BF16__)
// Two channels at a time, as in Multiply<bf16>. Even and odd pairs are summed separately.
template <>
struct Lanes<bf16> {
  static size_t channels(size_t D) { return round_up(D, 2); }
  static void put_query(const bf16* from, size_t D, size_t i, size_t lanes, bf16* to) {
    for (size_t d = 0; d + 1 < D; d += 2) memcpy(to + d * lanes + 2 * i, from + d, 2 * sizeof(bf16));
    if (D % 2) to[(D - 1) * lanes + 2 * i] = from[D - 1];
  }
  static __m512bh pair(const bf16* p) {
    int both;
    memcpy(&both, p, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static void scores(const bf16* const* keys, const bf16* queries, size_t D, size_t lanes, float*,
                     float* to) {
    for (size_t lane = 0; lane < lanes; lane += 16) {
      const bf16* own = queries + lane * 2;
      __m512 even[KEYS], odd[KEYS];
#pragma GCC unroll 8
      for (size_t r = 0; r < KEYS; r++) even[r] = odd[r] = _mm512_setzero_ps();
      size_t d = 0;
      for (; d + 4 <= D; d += 4) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(own + d * lanes);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(own + (d + 2) * lanes);
#pragma GCC unroll 8
        for (size_t r = 0; r < KEYS; r++) {
          even[r] = _mm512_dpbf16_ps(even[r], first, pair(keys[r] + d));
          odd[r] = _mm512_dpbf16_ps(odd[r], second, pair(keys[r] + d + 2));
        }
      }
      for (; d < D; d += 2) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(own + d * lanes);
#pragma GCC unroll 8
        for (size_t r = 0; r < KEYS; r++) {
          const bf16 last[2] = {keys[r][d], d + 1 < D ? keys[r][d + 1] : bf16{0}};
          even[r] = _mm512_dpbf16_ps(even[r], first, pair(last));
        }
      }
#pragma GCC unroll 8
      for (size_t r = 0; r < KEYS; r++)
        _mm512_storeu_ps(to + r * lanes + lane, _mm512_add_ps(even[r], odd[r]));
    }
  }

  static constexpr size_t QUERY = 2;
  static void put_shares(const float* shares, size_t lanes, bf16* to) {
    alignas(64) static const uint16_t turns[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,
                                                   21, 6, 22, 7, 23, 8,  24, 9,  25, 10, 26,
                                                   11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(turns);
    for (size_t lane = 0; lane < lanes; lane += 16) {
      const __m512 first = _mm512_loadu_ps(shares + lane);
      const __m512 second = _mm512_loadu_ps(shares + lanes + lane);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
      _mm512_storeu_si512(to + lane * 2, _mm512_permutexvar_epi16(order, both));
    }
  }
};
#endif

}  // namespace sirius
