// Products of nested weights: 8-bit integers cut into two planes of nibbles, one of which will do.
//
// The format is that of `sirius_runtime/nested.py`. A code is q + 128 = 16 high + low; where the high
// plane alone is read, low is 8, and the lower byte of a scale 0x80. All else is the same for both.
//
// Activations are integers too, in groups of the 32 inputs that share a scale of the weights: a sum of
// 32 products is an integer, exact. What is added up as floats are such sums times the two scales, in
// an order that depends on neither the number of tokens nor on the rows that stand side by side.
#pragma once

#include <cmath>

#include "sums.h"

namespace sirius {

constexpr size_t NEST = 32;       // inputs that share a scale
constexpr size_t LANES = W / 4;   // groups whose nibbles fill a vector of a plane
constexpr int OFFSET = 128;       // of a code from its integer

typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint8_t Codes __attribute__((vector_size(W * 4)));

inline Codes all_codes(uint8_t v) { return Codes{} + v; }

// The first bytes of a vector.
#if defined(__AVX512BW__)
typedef __mmask64 First;
inline First first_bytes(size_t n) { return n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0); }
#else
typedef size_t First;
inline First first_bytes(size_t n) { return std::min(n, sizeof(Codes)); }
#endif

// These bytes, and zeros: nothing beyond is read.
inline Codes load_codes(const uint8_t* p, First here = first_bytes(sizeof(Codes))) {
#if defined(__AVX512BW__)
  return (Codes)_mm512_maskz_loadu_epi8(here, p);
#else
  Codes v = {};
  if (here == sizeof v)
    memcpy(&v, p, sizeof v);
  else
    memcpy(&v, p, here);
  return v;
#endif
}

// Each lane of `sum` and the four products of codes and signed bytes there.
inline Ints dot4(Ints sum, Codes codes, Codes bytes) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)bytes);
#elif defined(__AVX512BW__)
  // Products of two bytes as the instruction for them adds them up could be more than 16 bits hold.
  const __m512i u = (__m512i)codes, s = (__m512i)bytes;
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
  return sum + (Ints)even + (Ints)odd;
#elif defined(__AVX2__)
  const __m256i u = (__m256i)codes, s = (__m256i)bytes;
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return sum + (Ints)even + (Ints)odd;
#else
  for (int i = 0; i < W; i++)
    for (int j = 0; j < 4; j++) sum[i] += int(codes[4 * i + j]) * int(int8_t(bytes[4 * i + j]));
  return sum;
#endif
}

inline Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

// Codes of the low and of the high nibbles of the bytes of a plane.
struct Pair {
  Codes first, second;
};

// bits where the mask has ones, else others.
inline Codes chosen(Codes mask, Codes bits, Codes others) {
#if defined(__AVX512F__)
  return (Codes)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)bits, (__m512i)others, 0xca);
#else
  return (bits & mask) | (others & ~mask);
#endif
}

inline Codes left4(Codes v) { return (Codes)((Words)v << 4); }   // bits cross bytes: masked after
inline Codes right4(Codes v) { return (Codes)((Words)v >> 4); }

template <bool BOTH>
inline Pair codes_of(Codes high, Codes low) {
  const Codes mask = all_codes(0xf0);
  if (BOTH) return {chosen(mask, left4(high), low), chosen(mask, high, right4(low))};
  return {chosen(mask, left4(high), all_codes(8)), chosen(mask, high, all_codes(8))};
}

// Scales of upper and lower bytes in the lanes: fp16 without its sign, shifted to the left by one.
inline Floats scales_of(Words upper, Words lower) {
  const Words bits = (upper << 20) | (lower << 12);
  return (Floats)bits * bit_cast<float>(uint32_t(239) << 23);  // 2^112: of the exponents' biases
}

inline float scale_of(uint8_t upper, uint8_t lower) {
  return bit_cast<float>(uint32_t(upper) << 20 | uint32_t(lower) << 12) *
         bit_cast<float>(uint32_t(239) << 23);
}

// n bytes, a lane each.
inline Words bytes_as_words(const uint8_t* p, size_t n) {
#if defined(__AVX512F__)
  const __mmask16 there = __mmask16(n < 16 ? (1u << n) - 1 : 0xffff);
  return (Words)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(there, p));
#else
  uint8_t own[W] = {};
  memcpy(own, p, std::min<size_t>(n, W));
  Words v;
  for (int i = 0; i < W; i++) v[i] = own[i];
  return v;
#endif
}

// Lane i of the result is lane `first + i / 4` of v.
inline Floats spread(Floats v, int first) {
#if defined(__AVX512F__)
  const __m512i lanes = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return (Floats)_mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(first)), (__m512)v);
#elif defined(__AVX2__)
  const __m256i lanes = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  return (Floats)_mm256_permutevar8x32_ps((__m256)v, _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
#else
  Floats own;
  for (int i = 0; i < W; i++) own[i] = v[first + i / 4];
  return own;
#endif
}

// 32 numbers as integers of at most 127 times a scale, which it returns: that of
// `nested.in_steps`. Not a number where one of them is none or infinite. total: the sum of q.
template <class Get>
inline float in_steps(const Get& number, int8_t* q, int& total) {
  float v[NEST];
  uint32_t largest = 0;
  for (size_t i = 0; i < NEST; i++) {
    v[i] = number(i);
    largest = std::max(largest, bit_cast<uint32_t>(v[i]) & 0x7fffffff);
  }
  total = 0;
  const bool finite = largest < 0x7f800000;
  if (!finite || largest < uint32_t(27) << 23) {  // 2^-100
    memset(q, 0, NEST);
    return finite ? 0.0f : std::nanf("");
  }
  const float most = bit_cast<float>(largest), by = 127.0f / most;
  for (size_t i = 0; i < NEST; i++) v[i] *= by;
  for (size_t i = 0; i < NEST; i++) q[i] = int8_t(__builtin_rintf(v[i]));
  for (size_t i = 0; i < NEST; i++) total += q[i];
  return most / 127.0f;
}

// A weight as it is stored: where its planes begin (low: null where the high one alone is read), and
// the bytes from a row to the next one, by inputs also from 32 inputs to the next ones.
struct Nested {
  const uint8_t *high, *low;
  size_t row, block;
};

// By outputs

// A token's W groups of inputs, in the order in which a row's nibbles come: those of the low nibbles
// of a vector, then of the high ones. Scales and, times the scales of the weights, what codes are too
// large by.
struct alignas(W * 4) Step {
  int8_t q[4][2][W * 4];
  float scale[4][W];
  float excess[W];
};

inline size_t steps_of(size_t C) { return (C / NEST + W - 1) / W; }

// Tokens x_n [C], each at row(n): to [N, steps_of(C)].
template <class T, class Row>
void take_steps(const Row& row, size_t N, size_t C, Step* to) {
  const size_t steps = steps_of(C), groups = C / NEST;
  for (size_t n = 0; n < N; n++) {
    const T* x = row(n);
    for (size_t s = 0; s < steps; s++, to++) {
      if ((s + 1) * W > groups) memset(to, 0, sizeof *to);
      for (size_t g = s * W; g < std::min(groups, (s + 1) * W); g++) {
        const size_t in = g % W, part = in / LANES, lane = in % LANES;
        int8_t q[NEST];
        int total;
        const float scale = in_steps([&](size_t i) { return to_float(x[g * NEST + i]); }, q, total);
        memcpy(to->q[part][0] + lane * 16, q, 16);
        memcpy(to->q[part][1] + lane * 16, q + 16, 16);
        for (size_t i = 0; i < 4; i++) to->scale[part][lane * 4 + i] = scale;
        to->excess[in] = float(-OFFSET * total) * scale;
      }
    }
  }
}

// out[n * out_stride + r] = rows[r] · x_n of R rows, of which `known` are wanted, and N tokens. rows: of
// the high plane, `to_low` bytes before those of the low one; `next` bytes before those that are read
// next, or 0.
template <bool BOTH, size_t R, size_t N>
void nested_tile(const uint8_t* const* rows, size_t to_low, size_t next, const Step* x, size_t C,
                 float* out, size_t out_stride, size_t known) {
  const size_t groups = C / NEST, steps = steps_of(C);
  Floats sums[R][N];
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 8
    for (size_t n = 0; n < N; n++) sums[r][n] = Floats{};
  for (size_t s = 0; s < steps; s++) {
    const size_t here = std::min<size_t>(W, groups - s * W);
    Floats scales[R];
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) {
      const uint8_t* upper = rows[r] + C / 2 + s * W;
      scales[r] = scales_of(bytes_as_words(upper, here),
                            BOTH ? bytes_as_words(upper + to_low, here) : Words{} + 0x80);
#pragma GCC unroll 8
      for (size_t n = 0; n < N; n++) sums[r][n] += scales[r] * load(x[n * steps + s].excess);
    }
    for (size_t part = 0; part * LANES < here; part++) {
      const size_t at = s * W * 16 + part * W * 4;
      const First bytes = first_bytes(C / 2 - at);
      Pair codes[R];
      Floats own[R];
#pragma GCC unroll 8
      for (size_t r = 0; r < R; r++) {
        const uint8_t* p = rows[r] + at;
        __builtin_prefetch(p + next);
        if (BOTH) __builtin_prefetch(p + next + to_low);
        codes[r] = codes_of<BOTH>(load_codes(p, bytes), BOTH ? load_codes(p + to_low, bytes) : Codes{});
        own[r] = spread(scales[r], int(part * LANES));
      }
#pragma GCC unroll 8
      for (size_t n = 0; n < N; n++) {
        const Step& token = x[n * steps + s];
        const Codes a = load_codes((const uint8_t*)token.q[part][0]);
        const Codes b = load_codes((const uint8_t*)token.q[part][1]);
        const Floats scale = load(token.scale[part]);
#pragma GCC unroll 8
        for (size_t r = 0; r < R; r++) {
          const Ints sum = dot4(dot4(Ints{}, codes[r].first, a), codes[r].second, b);
          sums[r][n] += to_floats(sum) * scale * own[r];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (size_t r = 0; r < R; r++)
#pragma GCC unroll 8
    for (size_t n = 0; n < N; n++)
      if (r < known) out[n * out_stride + r] = sum(sums[r][n]);
}

// out[n * out_stride + j] = rows[j] · x_n of `count` rows; x as take_steps has it.
template <bool BOTH>
void nested_dots(const uint8_t* const* rows, size_t count, size_t to_low, size_t row, const Step* x,
                 size_t N, size_t C, float* out, size_t out_stride) {
  const size_t steps = steps_of(C);
  // Tokens by the few whose activations stay in the first cache while all rows come by.
  for (size_t n = 0; n < N;) {
    const size_t tokens = N - n >= 8 ? 8 : std::min<size_t>(4, N - n), together = tokens == 8 ? 2 : 4;
    const auto tile = tokens == 8   ? nested_tile<BOTH, 2, 8>
                      : tokens == 4 ? nested_tile<BOTH, 4, 4>
                      : tokens == 3 ? nested_tile<BOTH, 4, 3>
                      : tokens == 2 ? nested_tile<BOTH, 4, 2>
                                    : nested_tile<BOTH, 4, 1>;
    for (size_t top = 0; top < count; top += together) {
      const uint8_t* own[4];
      for (size_t r = 0; r < 4; r++) own[r] = rows[std::min(top + r, count - 1)];
      // Later tokens find the rows in a cache.
      tile(own, to_low, n == 0 ? together * row : 0, x + n * steps, C, out + n * out_stride + top, out_stride,
           std::min(together, count - top));
    }
    n += tokens;
  }
}

// The same of rows first(j) of a weight.
template <class Row>
void nested_dots(const Nested& weight, const Row& row_of, size_t count, const Step* x, size_t N,
                 size_t C, float* out, size_t out_stride) {
  constexpr size_t MOST = 64;
  const uint8_t* rows[MOST];
  assert(count <= MOST);
  for (size_t j = 0; j < count; j++) rows[j] = weight.high + row_of(j) * weight.row;
  if (weight.low)
    nested_dots<true>(rows, count, size_t(weight.low - weight.high), weight.row, x, N, C, out, out_stride);
  else
    nested_dots<false>(rows, count, 0, weight.row, x, N, C, out, out_stride);
}

// By inputs

constexpr size_t COLUMNS = 8 * W;  // outputs of a tile: a vector of each row's nibbles

// 32 inputs of a weight: those that count, and their rows.
struct Inputs {
  const uint8_t *high, *low;
  size_t count;
  uint8_t live[NEST];
};

// A token's numbers for the live ones of 32 inputs, and noughts; a scale and what codes are too large
// by.
struct Factors32 {
  int8_t q[NEST];
  float scale;
  int32_t excess;
};

// Sums of N tokens and O outputs: by tiles, whose outputs are in the order in which they are made.
struct NestedSums {
  static constexpr size_t UNIT = COLUMNS;
  static Layout layout(size_t N, size_t O) {
    const size_t all = round_up(O, COLUMNS);
    return {N, O, all, all + PAD / 2};
  }
  static size_t place(size_t column) {
    const size_t in = column % COLUMNS, group = in / 32, half = in % 32 / 16, four = in % 16 / 4;
    return column - in + (half * 4 + four) * W + group * 4 + in % 4;
  }
};

// Four rows' bytes, so that those of a column follow one another: of each 16 columns, four in each
// vector.
inline void interleave(const Codes* rows, Codes* to) {
#if defined(__AVX512BW__)
  const __m512i a = (__m512i)rows[0], b = (__m512i)rows[1], c = (__m512i)rows[2], d = (__m512i)rows[3];
  const __m512i ab = _mm512_unpacklo_epi8(a, b), AB = _mm512_unpackhi_epi8(a, b);
  const __m512i cd = _mm512_unpacklo_epi8(c, d), CD = _mm512_unpackhi_epi8(c, d);
  to[0] = (Codes)_mm512_unpacklo_epi16(ab, cd), to[1] = (Codes)_mm512_unpackhi_epi16(ab, cd);
  to[2] = (Codes)_mm512_unpacklo_epi16(AB, CD), to[3] = (Codes)_mm512_unpackhi_epi16(AB, CD);
#elif defined(__AVX2__)
  const __m256i a = (__m256i)rows[0], b = (__m256i)rows[1], c = (__m256i)rows[2], d = (__m256i)rows[3];
  const __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
  const __m256i cd = _mm256_unpacklo_epi8(c, d), CD = _mm256_unpackhi_epi8(c, d);
  to[0] = (Codes)_mm256_unpacklo_epi16(ab, cd), to[1] = (Codes)_mm256_unpackhi_epi16(ab, cd);
  to[2] = (Codes)_mm256_unpacklo_epi16(AB, CD), to[3] = (Codes)_mm256_unpackhi_epi16(AB, CD);
#else
  for (int four = 0; four < 4; four++)
    for (int i = 0; i < 4 * W; i++) to[four][i] = rows[i % 4][i / 16 * 16 + four * 4 + i % 16 / 4];
#endif
}

// Four vectors of 16 bytes a group: those of four neighbours in each, a lane each.
inline void as_words(Codes v, Words* to) {
#if defined(__AVX512BW__)
  const __m512i zero = _mm512_setzero_si512();
  const __m512i low = _mm512_unpacklo_epi8((__m512i)v, zero), high = _mm512_unpackhi_epi8((__m512i)v, zero);
  to[0] = (Words)_mm512_unpacklo_epi16(low, zero), to[1] = (Words)_mm512_unpackhi_epi16(low, zero);
  to[2] = (Words)_mm512_unpacklo_epi16(high, zero), to[3] = (Words)_mm512_unpackhi_epi16(high, zero);
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_unpacklo_epi8((__m256i)v, zero), high = _mm256_unpackhi_epi8((__m256i)v, zero);
  to[0] = (Words)_mm256_unpacklo_epi16(low, zero), to[1] = (Words)_mm256_unpackhi_epi16(low, zero);
  to[2] = (Words)_mm256_unpacklo_epi16(high, zero), to[3] = (Words)_mm256_unpackhi_epi16(high, zero);
#else
  for (int four = 0; four < 4; four++)
    for (int i = 0; i < W; i++) to[four][i] = v[i / 4 * 16 + four * 4 + i % 4];
#endif
}

// The numbers at `live` of 32, and noughts, as a token's factors for these inputs. Groups are those
// of the 32 inputs whatever is live.
template <class Get>
inline void take_factors(const Inputs& inputs, const Get& number, Factors32& to) {
  float own[NEST] = {};
  for (size_t j = 0; j < inputs.count; j++) own[j] = number(j);
  int total;
  to.scale = in_steps([&](size_t i) { return own[i]; }, to.q, total);
  to.excess = -OFFSET * total;
}

// A row of nibbles of a plane and of the other one, `bytes` of them, times nought where it is none of
// the live ones.
template <bool BOTH>
struct Quad {
  const uint8_t* rows[4];
  size_t to_low;

  Quad(const Inputs& own, size_t q, size_t row) : to_low(BOTH ? size_t(own.low - own.high) : 0) {
    for (size_t r = 0; r < 4; r++)
      rows[r] = own.high + own.live[std::min(q * 4 + r, own.count - 1)] * row;
  }

  // The codes of a tile's outputs, from byte `at` of a row on: four a lane, one of each row.
  inline __attribute__((always_inline)) void codes(size_t at, First here, Codes* to) const {
    Codes own[4], upper[4], lower[4] = {};
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++) own[r] = load_codes(rows[r] + at, here);
    interleave(own, upper);
    if (BOTH) {
#pragma GCC unroll 4
      for (size_t r = 0; r < 4; r++) own[r] = load_codes(rows[r] + to_low + at, here);
      interleave(own, lower);
    }
#pragma GCC unroll 4
    for (size_t four = 0; four < 4; four++) {
      const Pair pair = codes_of<BOTH>(upper[four], lower[four]);
      to[four] = pair.first, to[4 + four] = pair.second;
    }
  }
};

// The scales of a tile's outputs.
template <bool BOTH>
inline __attribute__((always_inline)) void scales_at(const Inputs& own, size_t row, size_t at,
                                                     First here, Floats* to) {
  const size_t to_low = BOTH ? size_t(own.low - own.high) : 0;
#pragma GCC unroll 2
  for (size_t half = 0; half < 2; half++) {
    const uint8_t* p = own.high + (NEST + half) * row + at;
    Words upper[4], lower[4];
    as_words(load_codes(p, here), upper);
    if (BOTH) as_words(load_codes(p + to_low, here), lower);
#pragma GCC unroll 4
    for (size_t four = 0; four < 4; four++)
      to[half * 4 + four] = scales_of(upper[four], BOTH ? lower[four] : Words{} + 0x80);
  }
}

// What a token multiplies four rows by, in each lane.
inline Codes multiplier(const Factors32& by, size_t quad) {
  int32_t four;
  memcpy(&four, by.q + quad * 4, sizeof four);
  return (Codes)(Ints{} + four);
}

template <class Part>
inline __attribute__((always_inline)) void add_scaled(const Part* acc, const Floats* scales, float scale,
                                                      float* y) {
#pragma GCC unroll 8
  for (size_t v = 0; v < 8; v++) store(y + v * W, load(y + v * W) + to_floats(acc[v]) * scale * scales[v]);
}

constexpr size_t ALONG = 4;     // tokens for which rows are read from end to end
constexpr size_t WIDE = 1024;  // outputs whose integers wait in the first cache

// Adds to the sums of N tokens, at most ALONG, the outputs [begin, end), at most WIDE, of 32 inputs.
// Rows are read from end to end, eight at a time, as they lie in memory: integers wait until all are
// there. A token's factors are `token` apart, its sums `stride`. after: whose rows are read next.
template <bool BOTH>
void add_along(const Inputs& own, const Inputs& after, size_t row, const Factors32* z, size_t token,
               size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  alignas(64) Ints waiting[ALONG][WIDE / W];
  const size_t quads = (own.count + 3) / 4, to_low = BOTH ? size_t(own.low - own.high) : 0;
  for (size_t q = 0; q < quads; q += 2) {
    const Quad<BOTH> first(own, q, row), second(own, std::min(q + 1, quads - 1), row);
    const uint8_t* next[8];
    const bool more = q + 2 < quads;
    const Inputs& from = more ? own : after;
    for (size_t r = 0; r < 8; r++) {
      const size_t j = more ? (q + 2) * 4 + r : r;
      next[r] = from.high + (from.count ? from.live[std::min(j, from.count - 1)] : 0) * row;
    }
    for (size_t c = begin; c < end; c += COLUMNS) {
#pragma GCC unroll 8
      for (size_t r = 0; r < 8; r++) {
        __builtin_prefetch(next[r] + c / 2);
        if (BOTH) __builtin_prefetch(next[r] + to_low + c / 2);
      }
      const First here = first_bytes((end - c) / 2);
      Codes a[8], b[8];
      first.codes(c / 2, here, a);
      second.codes(c / 2, here, b);
      for (size_t n = 0; n < N; n++) {
        const Factors32& by = z[n * token];
        const Codes upon_a = multiplier(by, q);
        const Codes upon_b = q + 1 < quads ? multiplier(by, q + 1) : Codes{};
        Ints* to = waiting[n] + (c - begin) / W;
#pragma GCC unroll 8
        for (size_t v = 0; v < 8; v++) {
          const Ints sum = q ? to[v] : Ints{} + by.excess;
          to[v] = dot4(dot4(sum, a[v], upon_a), b[v], upon_b);
        }
      }
    }
  }
  for (size_t c = begin; c < end; c += COLUMNS) {
    Floats scales[8];
    scales_at<BOTH>(own, row, c / 2, first_bytes((end - c) / 2), scales);
    for (size_t n = 0; n < N; n++)
      add_scaled(waiting[n] + (c - begin) / W, scales, z[n * token].scale, sums + n * stride + (c - begin));
  }
}

// The same of N tokens, whose sums are `stride` apart and factors `token` apart: tile by tile, since a
// tile's codes are made once for all of them. after: whose rows are read next, from byte `then` on.
template <bool BOTH>
void add_together(const Inputs& own, const Inputs& after, size_t then, size_t row, const Factors32* z,
                  size_t token, size_t N, size_t c, size_t end, float* sums, size_t stride) {
  const size_t quads = (own.count + 3) / 4;
  for (size_t j = 0; j < after.count; j++) {
    const uint8_t* p = after.high + after.live[j] * row + then;
    __builtin_prefetch(p);
    if (BOTH) __builtin_prefetch(p + (after.low - after.high));
  }
  const First here = first_bytes((end - c) / 2);
  alignas(64) Codes codes[NEST / 4][8];
  for (size_t q = 0; q < quads; q++) Quad<BOTH>(own, q, row).codes(c / 2, here, codes[q]);
  Floats scales[8];
  scales_at<BOTH>(own, row, c / 2, here, scales);
  for (size_t n = 0; n < N; n++) {
    const Factors32& by = z[n * token];
    Ints acc[8];
#pragma GCC unroll 8
    for (size_t v = 0; v < 8; v++) acc[v] = Ints{} + by.excess;
    for (size_t q = 0; q < quads; q++) {
      const Codes four = multiplier(by, q);
#pragma GCC unroll 8
      for (size_t v = 0; v < 8; v++) acc[v] = dot4(acc[v], codes[q][v], four);
    }
    add_scaled(acc, scales, by.scale, sums + n * stride);
  }
}

// sums += z through `count` times 32 inputs, of outputs [begin, end); `begin` begins a tile. The sums
// are laid out as NestedSums says; z [N, count], a token's `token` apart.
template <bool BOTH>
void nested_add(const Inputs* inputs, size_t count, size_t row, const Factors32* z, size_t token,
                size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  for (size_t i = 0; N <= ALONG && i < count; i++)
    for (size_t c = begin; inputs[i].count && c < end; c += WIDE)
      add_along<BOTH>(inputs[i], inputs[i + 1 < count ? i + 1 : i], row, z + i, token, N, c,
                      std::min(end, c + WIDE), sums + c, stride);
  if (N <= ALONG) return;
  for (size_t c = begin; c < end; c += COLUMNS)
    for (size_t i = 0; i < count; i++) {
      if (inputs[i].count == 0) continue;
      const bool last = i + 1 == count;
      add_together<BOTH>(inputs[i], inputs[last ? 0 : i + 1], (last ? c + COLUMNS : c) / 2, row, z + i,
                         token, N, c, std::min(end, c + COLUMNS), sums + c, stride);
    }
}

inline void nested_add(const Inputs* inputs, size_t count, bool both, size_t row, const Factors32* z,
                       size_t token, size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  const auto run = both ? nested_add<true> : nested_add<false>;
  run(inputs, count, row, z, token, N, begin, end, sums, stride);
}

}  // namespace sirius
