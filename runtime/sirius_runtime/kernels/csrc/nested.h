// Products with nested weights: 8-bit integers stored as two planes of nibbles, of which the high one
// can be read alone.
//
// The format is that of `sirius_runtime/nested.py`. A code is q + 128 = 16 high + low. If only the high
// plane is read, low is taken as 8 and the lower byte of a scale as 0x80; all else is the same.
//
// Activations are quantised to 8-bit integers too, in groups of the 32 inputs that share a scale of the
// weights, so that the sum of 32 products is an exact integer. These sums times both scales are added
// as floats, in an order that depends neither on the number of tokens nor on the other rows of a call.
#pragma once

#include <cmath>

#include "sums.h"

namespace sirius {

constexpr size_t NEST = 32;       // inputs that share a scale
constexpr int OFFSET = 128;       // a code minus its integer

typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint8_t Codes __attribute__((vector_size(W * 4)));

inline Codes all_codes(uint8_t v) { return Codes{} + v; }

// How many bytes of a vector to load, from the first on; a mask on AVX-512.
#if defined(__AVX512BW__)
typedef __mmask64 First;
inline First first_bytes(size_t n) { return n < 64 ? (uint64_t(1) << n) - 1 : ~uint64_t(0); }
#else
typedef size_t First;
inline First first_bytes(size_t n) { return std::min(n, sizeof(Codes)); }
#endif

// The first bytes at p, then zeros; nothing beyond is read.
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

// Adds to each lane of `sum` the four products of its codes (unsigned) and bytes (signed).
inline Ints dot4(Ints sum, Codes codes, Codes bytes) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)bytes);
#elif defined(__AVX512BW__)
  // maddubs would add two products in 16 bits, where they can saturate: widen to 16 bits first.
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

// The codes of the bytes' lower nibbles, and of their upper nibbles.
struct Pair {
  Codes first, second;
};

// Bitwise: `bits` where the mask has ones, else `others`.
inline Codes chosen(Codes mask, Codes bits, Codes others) {
#if defined(__AVX512F__)
  return (Codes)_mm512_ternarylogic_epi64((__m512i)mask, (__m512i)bits, (__m512i)others, 0xca);
#else
  return (bits & mask) | (others & ~mask);
#endif
}

inline Codes left4(Codes v) { return (Codes)((Words)v << 4); }   // bits cross bytes: mask the result
inline Codes right4(Codes v) { return (Codes)((Words)v >> 4); }

template <bool BOTH>
inline Pair codes_of(Codes high, Codes low) {
  const Codes mask = all_codes(0xf0);
  if (BOTH) return {chosen(mask, left4(high), low), chosen(mask, high, right4(low))};
  return {chosen(mask, left4(high), all_codes(8)), chosen(mask, high, all_codes(8))};
}

// The scales from their upper and lower bytes, one per lane. A scale is stored as an fp16 without its
// sign bit, shifted left by one.
inline Floats scales_of(Words upper, Words lower) {
#if defined(__AVX512F__)
  // The multiplication below would take about a hundred cycles for a denormal scale.
  const Words half = (upper << 7) | (lower >> 1);
  return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)half));
#else
  const Words bits = (upper << 20) | (lower << 12);
  return (Floats)bits * bit_cast<float>(uint32_t(239) << 23);  // 2^112: the exponent biases' difference
#endif
}

inline float scale_of(uint8_t upper, uint8_t lower) {
  return bit_cast<float>(uint32_t(upper) << 20 | uint32_t(lower) << 12) *
         bit_cast<float>(uint32_t(239) << 23);
}

// n bytes, one per lane.
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

// Quantises 32 numbers to integers q in -127 … 127 times a scale, as `nested.in_steps`; returns the
// scale, or NaN if any number is NaN or infinite. total: the sum of q.
inline float in_steps(const float* v, int8_t* q, int& total) {
  uint32_t largest;
#if defined(__AVX512F__)
  const __m512 first = _mm512_loadu_ps(v), second = _mm512_loadu_ps(v + 16);
  const __m512i sign = _mm512_set1_epi32(0x7fffffff);
  largest = uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(
      _mm512_and_si512((__m512i)first, sign), _mm512_and_si512((__m512i)second, sign))));
#else
  largest = 0;
  for (size_t i = 0; i < NEST; i++) largest = std::max(largest, bit_cast<uint32_t>(v[i]) & 0x7fffffff);
#endif
  total = 0;
  const bool finite = largest < 0x7f800000;
  if (!finite || largest < uint32_t(27) << 23) {  // 2^-100
    memset(q, 0, NEST);
    return finite ? 0.0f : std::nanf("");
  }
  const float most = bit_cast<float>(largest), by = 127.0f / most;
#if defined(__AVX512F__)
  const __m512 factor = _mm512_set1_ps(by);
  const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(first, factor));
  const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(second, factor));
  _mm_storeu_si128((__m128i*)q, _mm512_cvtepi32_epi8(a));
  _mm_storeu_si128((__m128i*)(q + 16), _mm512_cvtepi32_epi8(b));
  total = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
#else
  for (size_t i = 0; i < NEST; i++) q[i] = int8_t(__builtin_rintf(v[i] * by));
  for (size_t i = 0; i < NEST; i++) total += q[i];
#endif
  return most / 127.0f;
}

// A stored weight: its planes (low: null if only the high one is read), the stride of rows in bytes
// and, by inputs, the stride of groups of 32 inputs (by outputs 0).
struct Nested {
  const uint8_t *high, *low;
  size_t row, block;
};

// The by-outputs layout

// Groups of a row that are interleaved: word w of each group's bytes, then word w + 1 of each.
constexpr size_t ABREAST = 16;
static_assert(ABREAST % W == 0, "the groups of a vector must be interleaved together");

// The position of byte i of group g in a row of so many groups.
inline size_t byte_of(size_t g, size_t i, size_t groups) {
  const size_t block = g / ABREAST * ABREAST;
  return block * 16 + (i / 4 * std::min(ABREAST, groups - block) + g - block) * 4 + i % 4;
}

// W groups of a token's quantised activations, one per lane: q[w][0] and q[w][1] multiply the lower and
// the upper nibbles of word w of a group's bytes. excess: -OFFSET Σ q, which corrects for codes being
// q + OFFSET. scale: of the group.
struct alignas(W * 4) Step {
  int8_t q[4][2][W * 4];
  int32_t excess[W];
  float scale[W];
};

inline size_t steps_of(size_t C) { return (C / NEST + W - 1) / W; }

// Quantising fewer numbers than this is faster on one thread.
constexpr size_t SHARED = 16384;

// Quantises tokens x_n [C], each at row(n), into `all` [N, steps_of(C)].
template <class T, class Row>
void take_steps(const Row& row, size_t N, size_t C, Step* all, int threads) {
  const size_t steps = steps_of(C), groups = C / NEST;
  parallel(N * steps, N * C < SHARED ? 1 : threads, [&](size_t task) {
    const T* x = row(task / steps);
    const size_t first = task % steps * W, end = std::min(groups, first + W);
    Step& to = all[task];
    if (first + W > groups) memset(&to, 0, sizeof to);
    for (size_t g = first; g < end; g++) {
      const size_t lane = g - first;
      alignas(64) float v[NEST];
      alignas(64) int8_t q[NEST];
      for (size_t i = 0; i < NEST; i += W) store(v + i, load(x + g * NEST + i));
      int total;
      to.scale[lane] = in_steps(v, q, total);
      to.excess[lane] = -OFFSET * total;
      for (size_t i = 0; i < NEST; i += 4) memcpy(to.q[i % 16 / 4][i / 16] + lane * 4, q + i, 4);
    }
  });
}

// Writes the sums of N vectors, each added in the order of `sum`.
template <size_t N>
inline __attribute__((always_inline)) void sum_each(const Floats* v, float* to) {
#if defined(__AVX512F__)
  if (N == 16) {
    // Adds halves while joining vectors, until the 16 vectors have become one vector of their sums.
    __m512 a[16], b[8];
#pragma GCC unroll 16
    for (size_t i = 0; i < 16; i++) a[i] = (__m512)v[i];
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++)
      b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 8], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 8], 0xee));
#pragma GCC unroll 4
    for (size_t i = 0; i < 4; i++)
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[i], b[i + 4], 0x88), _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd));
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; i++)
      b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[i], a[i + 2], 0x44), _mm512_shuffle_ps(a[i], a[i + 2], 0xee));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(b[0], b[1], 0x88), _mm512_shuffle_ps(b[0], b[1], 0xdd));
    // Lane 4 k + j has the sum of vector [0, 8, 4, 12][k] + [0, 2, 1, 3][j].
    const __m512i places = _mm512_set_epi32(15, 13, 14, 12, 7, 5, 6, 4, 11, 9, 10, 8, 3, 1, 2, 0);
    return _mm512_storeu_ps(to, _mm512_permutexvar_ps(places, all));
  }
#endif
#pragma GCC unroll 16
  for (size_t n = 0; n < N; n++) to[n] = sum(v[n]);
}

constexpr size_t MOST_ROWS = 256;  // rows of a call of nested_dots

// A row of the high plane of a weight by outputs; the low plane's row is `to_low` bytes further on.
struct NestedRow {
  const uint8_t* own;
  size_t to_low;
  const uint8_t* next;  // a row to prefetch
};

// Adds step s of row · x_n to the sums of N tokens (token stride `steps`). WHOLE: the step has W groups,
// and ABREAST groups are interleaved there.
template <bool BOTH, size_t N, bool WHOLE>
inline __attribute__((always_inline)) void nested_step(const NestedRow& row, const Step* x, size_t groups,
                                                       size_t steps, size_t s, Floats* own) {
  const size_t first = s * W, here = WHOLE ? W : std::min<size_t>(W, groups - first);
  const size_t block = first / ABREAST * ABREAST, apart = (WHOLE ? ABREAST : std::min(ABREAST, groups - block)) * 4;
  const size_t at = block * 16 + (first - block) * 4;
  const First bytes = first_bytes(here * 4);
  Pair codes[4];
#pragma GCC unroll 4
  for (size_t w = 0; w < 4; w++) {
    const uint8_t* p = row.own + at + w * apart;
    __builtin_prefetch(row.next + at + w * apart);
    if (BOTH) __builtin_prefetch(row.next + row.to_low + at + w * apart);
    codes[w] = codes_of<BOTH>(load_codes(p, bytes), BOTH ? load_codes(p + row.to_low, bytes) : Codes{});
  }
  const uint8_t* upper = row.own + groups * 16 + first;
  const Floats scales = scales_of(bytes_as_words(upper, here),
                                  BOTH ? bytes_as_words(upper + row.to_low, here) : Words{} + 0x80);
  // SIDE tokens at a time: a dot4 depends on the same token's previous one, but not on another token's.
  constexpr size_t SIDE = N < 4 ? N : 4;
#pragma GCC unroll 4
  for (size_t n = 0; n < N; n += SIDE) {
    const Step* token[SIDE];
    Ints sum[SIDE];
#pragma GCC unroll 4
    for (size_t i = 0; i < SIDE; i++) {
      token[i] = x + (n + i) * steps + s;
      memcpy(&sum[i], token[i]->excess, sizeof sum[i]);
    }
#pragma GCC unroll 4
    for (size_t w = 0; w < 4; w++) {
#pragma GCC unroll 4
      for (size_t i = 0; i < SIDE; i++)
        sum[i] = dot4(sum[i], codes[w].first, load_codes((const uint8_t*)token[i]->q[w][0]));
#pragma GCC unroll 4
      for (size_t i = 0; i < SIDE; i++)
        sum[i] = dot4(sum[i], codes[w].second, load_codes((const uint8_t*)token[i]->q[w][1]));
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < SIDE; i++) own[n + i] += to_floats(sum[i]) * (scales * load(token[i]->scale));
  }
}

// Adds steps [begin, end) of row · x_n to the sums of N tokens.
template <bool BOTH, size_t N>
void nested_tile(const NestedRow& row, const Step* x, size_t C, size_t steps, size_t begin, size_t end,
                 Floats* sums) {
  const size_t groups = C / NEST, whole = std::min(end, groups / ABREAST * (ABREAST / W));
  Floats own[N];
#pragma GCC unroll 16
  for (size_t n = 0; n < N; n++) own[n] = begin ? sums[n] : Floats{};
  size_t s = begin;
  for (; s < whole; s++) nested_step<BOTH, N, true>(row, x, groups, steps, s, own);
  for (; s < end; s++) nested_step<BOTH, N, false>(row, x, groups, steps, s, own);
#pragma GCC unroll 16
  for (size_t n = 0; n < N; n++) sums[n] = own[n];
}

// out[n * out_stride + j] = rows[j] · x_n, for `count` rows and N tokens; x is made by take_steps.
// cached: the rows are in a cache already, so that nothing is prefetched.
template <bool BOTH, size_t N>
void nested_dots(const uint8_t* const* rows, size_t count, size_t to_low, size_t row, bool cached,
                 const Step* x, size_t C, float* out, size_t out_stride) {
  constexpr size_t SOON = 4;    // prefetch so many rows ahead
  constexpr size_t GROUP = 16;  // rows that are multiplied with a part of the steps before the next part
  const size_t steps = steps_of(C);
  const size_t part = N == 1 ? steps : std::max<size_t>(1, (32u << 10) / (N * sizeof(Step)));  // fits L1
  for (size_t top = 0; top < count; top += GROUP) {
    const size_t here = std::min(GROUP, count - top);
    Floats sums[GROUP][N];
    for (size_t begin = 0; begin < steps; begin += part)
      for (size_t r = 0; r < here; r++) {
        const size_t j = top + r, soon = j + SOON;
        const uint8_t* next = cached ? rows[j]
                              : soon < count ? rows[soon]
                                             : rows[count - 1] + (soon - count + 1) * row;
        Floats* own = sums[part < steps ? r : 0];
        nested_tile<BOTH, N>({rows[j], to_low, next}, x, C, steps, begin, std::min(steps, begin + part), own);
        if (begin + part < steps) continue;
        float found[N];
        sum_each<N>(own, found);
        for (size_t n = 0; n < N; n++) out[n * out_stride + j] = found[n];
      }
  }
}

// The same for any number of tokens.
template <bool BOTH>
void nested_dots(const uint8_t* const* rows, size_t count, size_t to_low, size_t row, const Step* x,
                 size_t N, size_t C, float* out, size_t out_stride) {
  constexpr size_t MOST = W == 16 ? 16 : 4;  // tokens whose sums fit the registers beside a row's codes
  for (size_t n = 0; n < N;) {
    const size_t left = N - n, tokens = left >= MOST ? MOST : left >= 8 ? 8 : left >= 4 ? 4 : left;
    const auto dots = tokens == 16  ? nested_dots<BOTH, MOST>
                      : tokens == 8 ? nested_dots<BOTH, MOST / 2>
                      : tokens == 4 ? nested_dots<BOTH, 4>
                      : tokens == 3 ? nested_dots<BOTH, 3>
                      : tokens == 2 ? nested_dots<BOTH, 2>
                                    : nested_dots<BOTH, 1>;
    // Later tokens find the rows in a cache.
    dots(rows, count, to_low, row, n > 0, x + n * steps_of(C), C, out + n * out_stride, out_stride);
    n += tokens;
  }
}

// The same for the rows row_of(j) of a weight.
template <class Row>
void nested_dots(const Nested& weight, const Row& row_of, size_t count, const Step* x, size_t N,
                 size_t C, float* out, size_t out_stride) {
  const uint8_t* rows[MOST_ROWS];
  assert(count <= MOST_ROWS);
  for (size_t j = 0; j < count; j++) rows[j] = weight.high + row_of(j) * weight.row;
  if (weight.low)
    nested_dots<true>(rows, count, size_t(weight.low - weight.high), weight.row, x, N, C, out, out_stride);
  else
    nested_dots<false>(rows, count, 0, weight.row, x, N, C, out, out_stride);
}

// The by-inputs layout

constexpr size_t COLUMNS = 8 * W;  // outputs of a tile: one vector of a row's bytes

// A group of 32 inputs of a weight: the addresses of its planes, the rows of its live inputs, and the
// first row of its scales.
struct Inputs {
  const uint8_t *high, *low;
  size_t count;
  uint8_t live[NEST];
  size_t scales;

  // Makes the inputs whose `numbers` are above the threshold the live ones.
  void choose(const float* numbers, float threshold) {
    count = 0;
    for (size_t i = 0; i < NEST; i += W) {
#if defined(__AVX512F__)
      const __mmask16 above = _mm512_cmp_ps_mask(_mm512_loadu_ps(numbers + i), _mm512_set1_ps(threshold), _CMP_GT_OQ);
      const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m512i kept = _mm512_maskz_compress_epi32(above, _mm512_add_epi32(lanes, _mm512_set1_epi32(int(i))));
      const size_t more = size_t(__builtin_popcount(above));
      _mm_mask_storeu_epi8(live + count, __mmask16((1u << more) - 1), _mm512_cvtepi32_epi8(kept));
      count += more;
#else
      for (size_t j = i; j < i + W; j++)
        if (numbers[j] > threshold) live[count++] = uint8_t(j);
#endif
    }
  }
  void choose_all() {
    count = NEST;
    for (size_t i = 0; i < NEST; i++) live[i] = uint8_t(i);
  }
};

// A token's quantised activations for the live inputs of a group, then zeros; their scale, and
// excess = -OFFSET Σ q.
struct Factors32 {
  int8_t q[NEST];
  float scale;
  int32_t excess;
};

// The layout of the sums of N tokens and O outputs: by tiles, whose outputs are permuted by `place` into
// the order in which the kernel produces them.
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

// Interleaves four rows' bytes, so that the four bytes of a column are adjacent. Each output vector has
// four of every 16 columns.
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

// Widens bytes to one per lane: to[k] has bytes 4 k … 4 k + 3 of every 16.
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

// Quantises a token's activations for the live inputs; number(j) is that of live[j]. A group always is
// 32 inputs of the weight, whichever are live.
template <class Get>
inline void take_factors(const Inputs& inputs, const Get& number, Factors32& to) {
  alignas(64) float own[NEST] = {};
  for (size_t j = 0; j < inputs.count; j++) own[j] = number(j);
  int total;
  to.scale = in_steps(own, to.q, total);
  to.excess = -OFFSET * total;
}

// The q-th four live rows of a group of inputs. Beyond the live rows, the last one is repeated: its
// factor is zero.
template <bool BOTH>
struct FourRows {
  const uint8_t* rows[4];
  size_t to_low;

  FourRows(const Inputs& own, size_t q, size_t row) : to_low(BOTH ? size_t(own.low - own.high) : 0) {
    for (size_t r = 0; r < 4; r++)
      rows[r] = own.high + own.live[std::min(q * 4 + r, own.count - 1)] * row;
  }

  // The codes of a tile's outputs, from byte `at` of a row on: four per lane, one of each row.
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
    const uint8_t* p = own.high + (own.scales + half) * row + at;
    Words upper[4], lower[4];
    as_words(load_codes(p, here), upper);
    if (BOTH) as_words(load_codes(p + to_low, here), lower);
#pragma GCC unroll 4
    for (size_t four = 0; four < 4; four++)
      to[half * 4 + four] = scales_of(upper[four], BOTH ? lower[four] : Words{} + 0x80);
  }
}

// A token's factors for four rows, repeated in each lane.
inline Codes multiplier(const Factors32& by, size_t quad) {
  int32_t four;
  memcpy(&four, by.q + quad * 4, sizeof four);
  return (Codes)(Ints{} + four);
}

template <class Part>
inline __attribute__((always_inline)) void add_scaled(const Part* acc, const Floats* scales, float scale,
                                                      float* y) {
#pragma GCC unroll 8
  for (size_t v = 0; v < 8; v++) store(y + v * W, load(y + v * W) + to_floats(acc[v]) * (scale * scales[v]));
}

constexpr size_t ALONG = 4;       // up to so many tokens, add_along reads rows from end to end
constexpr size_t WAITING = 4096;  // integer sums of all tokens that stay in L1
constexpr size_t WIDE = WAITING / ALONG;

// Outputs that are computed at a time for N tokens: longer pieces of rows are read faster from memory.
inline size_t width(size_t N) { return N > ALONG || N == 3 ? WIDE : WAITING / N; }

// Adds the products of a group of inputs to the sums of N <= ALONG tokens, for the outputs [begin, end),
// at most width(N). Rows are read in memory order, eight at a time; the integer sums are kept in `waiting`
// until all rows are added. token, stride: strides of a token's factors and sums. after: the group whose
// rows are read next, to prefetch.
template <bool BOTH>
void add_along(const Inputs& own, const Inputs& after, size_t row, const Factors32* z, size_t token,
               size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  alignas(64) Ints waiting[WAITING / W];
  const size_t apart = width(N) / W;
  const size_t quads = (own.count + 3) / 4, to_low = BOTH ? size_t(own.low - own.high) : 0;
  for (size_t q = 0; q < quads; q += 2) {
    const FourRows<BOTH> first(own, q, row), second(own, std::min(q + 1, quads - 1), row);
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
        Ints* to = waiting + n * apart + (c - begin) / W;
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
      add_scaled(waiting + n * apart + (c - begin) / W, scales, z[n * token].scale, sums + n * stride + (c - begin));
  }
}

// Adds the products of `quads` times four rows to a tile of sums of TOKENS tokens.
template <size_t TOKENS>
inline __attribute__((always_inline)) void add_tile(const Codes (*codes)[8], size_t quads,
                                                    const Floats* scales, const Factors32* z, size_t token,
                                                    float* sums, size_t stride) {
  Ints acc[TOKENS][8];
#pragma GCC unroll 2
  for (size_t n = 0; n < TOKENS; n++)
#pragma GCC unroll 8
    for (size_t v = 0; v < 8; v++) acc[n][v] = Ints{} + z[n * token].excess;
  for (size_t q = 0; q < quads; q++) {
    Codes four[TOKENS];
#pragma GCC unroll 2
    for (size_t n = 0; n < TOKENS; n++) four[n] = multiplier(z[n * token], q);
#pragma GCC unroll 8
    for (size_t v = 0; v < 8; v++)
#pragma GCC unroll 2
      for (size_t n = 0; n < TOKENS; n++) acc[n][v] = dot4(acc[n][v], codes[q][v], four[n]);
  }
#pragma GCC unroll 2
  for (size_t n = 0; n < TOKENS; n++) add_scaled(acc[n], scales, z[n * token].scale, sums + n * stride);
}

// Prefetches bytes [begin, end) of the live rows of `count` groups of inputs, a few lines at a time: a
// processor stalls if too many lines are requested at once.
template <bool BOTH>
struct Prefetcher {
  const Inputs* inputs;
  size_t count, row, begin, end, i = 0, r = 0, at = begin;

  static constexpr size_t LINE = 64;
  size_t lines() const {
    size_t rows = 0;
    for (size_t j = 0; j < count; j++) rows += inputs[j].count ? inputs[j].count + 2 : 0;
    return rows * ((end - begin + LINE - 1) / LINE);
  }
  void ask(size_t lines) {
    while (lines > 0 && i < count) {
      const Inputs& own = inputs[i];
      if (own.count > 0) {
        const uint8_t* p = own.high + (r < own.count ? own.live[r] : own.scales + r - own.count) * row + at;
        __builtin_prefetch(p, 0, 2);
        if (BOTH) __builtin_prefetch(p + (own.low - own.high), 0, 2);
        lines--;
        if ((at += LINE) < end) continue;
        at = begin;
        if (++r < own.count + 2) continue;
      }
      r = 0, i++;
    }
  }
};

constexpr size_t FEW = 4;  // groups of inputs whose codes fit L2

// Adds the products of `count` <= FEW groups of inputs to the sums of N tokens, for the outputs
// [begin, end), at most WIDE. Codes are unpacked row by row, in memory order, and then used for all
// tokens, tile by tile. after: what to prefetch.
template <bool BOTH>
void add_together(const Inputs* inputs, size_t count, Prefetcher<BOTH> after, size_t row, const Factors32* z,
                  size_t token, size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  alignas(64) Codes codes[FEW][WIDE / COLUMNS][NEST / 4][8];
  const auto quads = [&](size_t i) { return (inputs[i].count + 3) / 4; };
  for (size_t i = 0; i < count; i++)
    for (size_t q = 0; q < quads(i); q++) {
      const FourRows<BOTH> rows(inputs[i], q, row);
      for (size_t c = begin; c < end; c += COLUMNS)
        rows.codes(c / 2, first_bytes((end - c) / 2), codes[i][(c - begin) / COLUMNS][q]);
    }
  constexpr size_t TOKENS = W == 16 ? 2 : 1;  // tokens whose integer sums fit the registers
  const size_t turns = (end - begin + COLUMNS - 1) / COLUMNS * count * ((N + TOKENS - 1) / TOKENS);
  const size_t share = after.lines() / turns + 1;
  for (size_t c = begin; c < end; c += COLUMNS)
    for (size_t i = 0; i < count; i++) {
      if (inputs[i].count == 0) continue;
      Floats scales[8];
      scales_at<BOTH>(inputs[i], row, c / 2, first_bytes((end - c) / 2), scales);
      const auto& own = codes[i][(c - begin) / COLUMNS];
      float* to = sums + (c - begin);
      size_t n = 0;
      for (; n + TOKENS <= N; n += TOKENS) {
        after.ask(share);
        add_tile<TOKENS>(own, quads(i), scales, z + i + n * token, token, to + n * stride, stride);
      }
      for (; n < N; n++) {
        after.ask(share);
        add_tile<1>(own, quads(i), scales, z + i + n * token, token, to + n * stride, stride);
      }
    }
}

// Adds the products of `count` groups of inputs to `sums`, for the outputs [begin, end); `begin` is a
// tile's first output. sums has NestedSums's layout; z [N, count] are the factors, with token stride
// `token`.
template <bool BOTH>
void nested_add(const Inputs* inputs, size_t count, size_t row, const Factors32* z, size_t token,
                size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  const size_t together = N <= ALONG ? 1 : FEW;
  for (size_t i = 0; i < count; i += together)
    for (size_t c = begin; c < end; c += width(N)) {
      const size_t stop = std::min(end, c + width(N));
      if (N <= ALONG) {
        if (inputs[i].count > 0)
          add_along<BOTH>(inputs[i], inputs[i + 1 < count ? i + 1 : i], row, z + i, token, N, c, stop,
                          sums + c, stride);
        continue;
      }
      const size_t here = std::min(FEW, count - i);
      Prefetcher<BOTH> after{inputs + i, here, row, stop / 2, std::min(end, stop + WIDE) / 2};
      if (stop == end)
        after = {inputs + i + here, std::min(FEW, count - i - here), row, begin / 2,
                 std::min(end, begin + WIDE) / 2};
      add_together<BOTH>(inputs + i, here, after, row, z + i, token, N, c, stop, sums + c, stride);
    }
}

inline void nested_add(const Inputs* inputs, size_t count, bool both, size_t row, const Factors32* z,
                       size_t token, size_t N, size_t begin, size_t end, float* sums, size_t stride) {
  const auto run = both ? nested_add<true> : nested_add<false>;
  run(inputs, count, row, z, token, N, begin, end, sums, stride);
}

}  // namespace sirius
