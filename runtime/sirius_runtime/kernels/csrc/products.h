// The two products that all kernels are built from.
//
//   dots:        out[n][j] = row_j · x_n          each weight row is an output
//   accumulate:  y_n += Σ_j z[n][j] row_j         each weight row is an input
//
// Both read each weight once for all tokens n. Both add in an order that depends neither on the number
// of tokens nor on the other rows, so that a token's result is bit-equal in any batch.
#pragma once

#include <algorithm>
#include <cassert>
#include <type_traits>

#include "vectors.h"

namespace sirius {

constexpr size_t ROWS = 4;     // weight rows that dots reads at the same time
constexpr size_t TILE = 4;     // tokens whose sums dots keeps in registers
constexpr size_t GROUP = 8;    // weight rows that dots processes per block of columns
constexpr size_t BATCH = 16;   // tokens that dots processes per block of columns
constexpr size_t LIVE = 8;     // weight rows in one pass of accumulate over y
constexpr size_t PAD = 32;     // activations and y are padded to a multiple of this
constexpr size_t LINE = 64;    // bytes of a cache line
constexpr size_t MOST_TOKENS = 64;  // of a call, or of each row if rows choose their own neurons

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The layout of numbers [N, C] of N tokens: blocks of columns, [N, width] each, with token stride
// `stride`. A block is read repeatedly while weights stream past. Contiguous, it fills L1 evenly; tokens
// whose distance is a large power of two would conflict in a few of its sets.
struct Layout {
  size_t N, C, width, stride;

  size_t size() const { return (C + width - 1) / width * N * stride; }
  // The position of token n's first number in the block that begins at `column`.
  size_t at(size_t n, size_t column) const {
    assert(column % width == 0);
    return (column / width * N + n) * stride;
  }
};

// The layout of activations for `dots`. Up to TILE tokens are one block, since ROWS rows read them once.
inline Layout inputs(size_t N, size_t C) {
  const size_t all = round_up(C, PAD);
  if (N <= TILE) return {N, C, all, all + PAD};
  const size_t width = std::min<size_t>(256, all);
  return {N, C, width, width};
}

// Columns of the widest block of sums. Any other width is WIDEST divided by a power of two, or there is
// only one block: so multiples of WIDEST are block boundaries for any N and O.
constexpr size_t WIDEST = 4096;

// The layout of sums for `accumulate`: 16 KB per block. The padding avoids 4 KiB aliasing, where a
// processor mistakes a load for one of a recent store 4096 bytes away.
inline Layout outputs(size_t N, size_t O) {
  size_t width = WIDEST;
  while (width * N > WIDEST && width > PAD) width /= 2;
  width = std::min(width, round_up(O, PAD));
  return {N, O, width, width + PAD / 2};
}

// Prefetches bytes.
inline void ask_all(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += LINE) __builtin_prefetch((const char*)from + at);
}

// Prefetches the beginning of a row; the processor's own prefetcher gets the rest.
inline void ask(const void* row) { ask_all(row, 4 * LINE); }

// Rows that are read after the current ones, for prefetching. With much arithmetic per weight,
// out-of-order execution does not reach the next loads early enough, so that rows are prefetched in
// pieces.
template <class T>
class Ahead {
 public:
  Ahead() = default;
  // Columns [from, to) of `count` rows.
  Ahead(const T* const* rows, size_t count, size_t from, size_t to)
      : row(rows), end(rows + count), first(from), size((to - from) * sizeof(T)) {}

  bool empty() const { return row == end; }

  // The address of the next `bytes` to prefetch; if there are no more, `otherwise`, whose prefetch costs
  // nothing if it is in the cache.
  const char* take(size_t bytes, const void* otherwise) {
    if (row == end) return (const char*)otherwise;
    const char* piece = (const char*)(*row + first) + taken;
    taken += bytes;
    if (taken >= size) row++, taken = 0;
    return piece;
  }

 private:
  const T *const *row = nullptr, *const *end = nullptr;
  size_t first = 0, size = 0, taken = 0;
};

// How weights of type T are multiplied with activations: as floats, by fused multiply-add.
template <class T>
struct Multiply {
  typedef float X;
  typedef Floats Operand;
  static constexpr size_t STEP = size_t(W);
  static Operand weights(const T* p) { return load(p); }
  static Operand weights_part(const T* p, size_t n) { return load_part(p, n); }
  static Operand activations(const X* p) { return load(p); }
  static Floats mac(Floats sum, Operand w, Operand x) { return sum + w * x; }
  static X from(T v) { return to_float(v); }
  static X from_float(float v) { return v; }
  static size_t place(size_t column) { return column; }

  // Columns: columns [c, c + n), n <= STEP, of R rows. Multipliers: a token's factors for the rows, z
  // with row stride `row`. add: adds the products' sum to y.
  template <size_t R>
  struct Columns {
    Floats w[R];
  };
  template <size_t R>
  static Columns<R> columns(const T* const* rows, size_t c, size_t n) {
    Columns<R> own;
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++)
      own.w[r] = n == STEP ? load(rows[r] + c) : load_part(rows[r] + c, n);
    return own;
  }
  template <size_t R>
  struct Multipliers {
    float z[R];
  };
  template <size_t R>
  static Multipliers<R> multipliers(const X* z, size_t row) {
    Multipliers<R> own;
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) own.z[r] = z[r * row];
    return own;
  }
  template <size_t R>
  static void add(const Columns<R>& own, const Multipliers<R>& by, float* y) {
    Floats sum = load(y);
#pragma GCC unroll 8
    for (size_t r = 0; r < R; r++) sum += own.w[r] * by.z[r];
    store(y, sum);
  }
};

#if defined(__AVX512BF16__)
// bfloat16 is multiplied with bfloat16 in pairs: products are exact, sums are floats.
template <>
struct Multiply<bf16> {
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

  // Rows are interleaved in pairs within each 128 bits: 32 columns become two vectors, and y keeps their
  // order. place: the position of a column in y.
  static size_t place(size_t column) {
    const size_t in = column % 32, lane = in / 8, high = in % 8 / 4;
    return column - in + high * 16 + lane * 4 + in % 4;
  }
  template <size_t R>
  struct Columns {
    __m512bh low[R / 2], high[R / 2];
  };
  template <size_t R>
  static Columns<R> columns(const bf16* const* rows, size_t c, size_t n) {
    Columns<R> own;
#pragma GCC unroll 4
    for (size_t p = 0; p < R / 2; p++) {
      const bf16 *a = rows[2 * p] + c, *b = rows[2 * p + 1] + c;
      const __m512i va = n == STEP ? bits(a) : bits_part(a, n);
      const __m512i vb = n == STEP ? bits(b) : bits_part(b, n);
      own.low[p] = (__m512bh)_mm512_unpacklo_epi16(va, vb);
      own.high[p] = (__m512bh)_mm512_unpackhi_epi16(va, vb);
    }
    return own;
  }
  template <size_t R>
  struct Multipliers {
    __m512bh z[R / 2];
  };
  template <size_t R>
  static Multipliers<R> multipliers(const X* z, size_t row) {
    Multipliers<R> own;
#pragma GCC unroll 4
    for (size_t p = 0; p < R / 2; p++) {
      int pair;
      memcpy(&pair, z + 2 * p * row, sizeof pair);
      own.z[p] = (__m512bh)_mm512_set1_epi32(pair);
    }
    return own;
  }
  template <size_t R>
  static void add(const Columns<R>& own, const Multipliers<R>& by, float* y) {
    __m512 low = _mm512_loadu_ps(y), high = _mm512_loadu_ps(y + 16);
#pragma GCC unroll 4
    for (size_t p = 0; p < R / 2; p++) {
      low = _mm512_dpbf16_ps(low, own.low[p], by.z[p]);
      high = _mm512_dpbf16_ps(high, own.high[p], by.z[p]);
    }
    _mm512_storeu_ps(y, low);
    _mm512_storeu_ps(y + 16, high);
  }
};
#endif

template <class T>
using X = typename Multiply<T>::X;

// The sums of ROWS rows and N tokens over columns [begin, end). They start from `kept`, or from zero for
// the first columns, and are written to `kept`, or to `out` for the last columns. x: the first token's
// column `begin`. Each step prefetches LINES lines from `next` on.
template <class T, size_t N, size_t LINES>
inline __attribute__((always_inline)) void dots_tile(const T* const* rows, const X<T>* x,
                                                     size_t x_stride, size_t begin, size_t end,
                                                     size_t C, const char* next,
                                                     Floats (*kept)[ROWS], float (*out)[ROWS]) {
  typedef Multiply<T> M;
  static_assert(ROWS == 4, "sum_four makes four sums");
  // Loops over acc are unrolled and never take its address, so that it stays in registers.
  Floats acc[N][ROWS];
#pragma GCC unroll 4
  for (size_t n = 0; n < N; n++)
#pragma GCC unroll 4
    for (size_t r = 0; r < ROWS; r++) acc[n][r] = begin > 0 ? kept[n][r] : Floats{};
  const auto step = [&](size_t k, auto weights) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (size_t line = 0; line < LINES; line++)
      __builtin_prefetch(next + (k - begin) * sizeof(T) * LINES + line * LINE);
    typename M::Operand own[N];
#pragma GCC unroll 4
    for (size_t n = 0; n < N; n++) own[n] = M::activations(x + n * x_stride + (k - begin));
#pragma GCC unroll 4
    for (size_t r = 0; r < ROWS; r++) {
      const typename M::Operand w = weights(rows[r] + k);
#pragma GCC unroll 4
      for (size_t n = 0; n < N; n++) acc[n][r] = M::mac(acc[n][r], w, own[n]);
    }
  };
  size_t k = begin;
#pragma GCC unroll 4
  for (; k + M::STEP <= end; k += M::STEP) step(k, [](const T* p) { return M::weights(p); });
  if (k < end) step(k, [&](const T* p) { return M::weights_part(p, end - k); });
  if (end < C) {
#pragma GCC unroll 4
    for (size_t n = 0; n < N; n++)
#pragma GCC unroll 4
      for (size_t r = 0; r < ROWS; r++) kept[n][r] = acc[n][r];
  } else {
#pragma GCC unroll 4
    for (size_t n = 0; n < N; n++) sum_four(acc[n], out[n]);
  }
}

// dots_tile for up to BATCH tokens, over a block of columns.
template <class T, size_t LINES>
void dots_block(const T* const* rows, const X<T>* x, const Layout& layout, size_t tokens,
                size_t begin, size_t end, Ahead<T>& ahead, Floats (*kept)[ROWS],
                float (*out)[ROWS]) {
  size_t n = 0;
  const auto tile = [&](auto wide) __attribute__((always_inline)) {
    const char* next = nullptr;
    if (LINES) next = ahead.take(LINES * layout.width * sizeof(T), rows[0] + begin);
    dots_tile<T, decltype(wide)::value, LINES>(rows, x + n * layout.stride, layout.stride, begin, end,
                                               layout.C, next, kept + n, out + n);
  };
  for (; n + TILE <= tokens; n += TILE) tile(std::integral_constant<size_t, TILE>());
  if (tokens - n == 3) tile(std::integral_constant<size_t, 3>());
  if (tokens - n == 2) tile(std::integral_constant<size_t, 2>());
  if (tokens - n == 1) tile(std::integral_constant<size_t, 1>());
}

// dots for `count` <= GROUP rows and up to BATCH tokens from `first` on; known: how many rows are valid,
// to prefetch. It works by blocks of columns, so that the tokens' activations stay in L1.
template <class T>
void dots_group(const T* const* rows, size_t count, size_t known, const X<T>* x,
                const Layout& layout, size_t first, size_t tokens, float* out, size_t out_stride,
                Ahead<T>& after) {
  Floats kept[GROUP / ROWS][BATCH][ROWS];
  float sums[BATCH][ROWS];
  const bool few = layout.N <= TILE;  // too little arithmetic to hide explicit prefetches
  const size_t tiles = (tokens + TILE - 1) / TILE;
  const auto block = few || first > 0 ? dots_block<T, 0>  // later tokens find the rows in a cache
                     : tiles < ROWS   ? dots_block<T, 2>
                                      : dots_block<T, 1>;  // prefetches as many lines as it reads
  for (size_t begin = 0; begin < layout.C; begin += layout.width) {
    const size_t end = std::min(layout.C, begin + layout.width);
    for (size_t j = 0; j < count; j += ROWS) {
      for (size_t r = j + ROWS; few && r < std::min(known, j + 2 * ROWS); r++) ask(rows[r]);
      const T* own[ROWS];  // with fewer rows, the last one is repeated: it is in the cache
      for (size_t r = 0; r < ROWS; r++) own[r] = rows[std::min(j + r, count - 1)];
      block(own, x + layout.at(first, begin), layout, tokens, begin, end, after, kept[j / ROWS],
            sums);
      if (end < layout.C) continue;
      float* to = out + first * out_stride + j;
      for (size_t n = 0; n < tokens; n++, to += out_stride)
        if (j + ROWS <= count)
          memcpy(to, sums[n], sizeof sums[n]);
        else
          std::copy_n(sums[n], count - j, to);
    }
  }
}

// dots for one token and rows that are contiguous in memory. Reading one row after the other, and
// prefetching the next, is faster than reading ROWS rows at a time. Adds in the order of dots_tile.
template <class T>
void dots_alone(const T* const* rows, size_t count, const X<T>* x, size_t C, float* out) {
  typedef Multiply<T> M;
  for (size_t j = 0; j < count; j += ROWS) {
    Floats acc[ROWS] = {};
    for (size_t r = 0; r < ROWS; r++) {
      const T *row = rows[std::min(j + r, count - 1)], *next = rows[std::min(j + r + 1, count - 1)];
      Floats own = {};
      size_t k = 0;
#pragma GCC unroll 8
      for (; k + M::STEP <= C; k += M::STEP) {
        __builtin_prefetch(next + k);
        own = M::mac(own, M::weights(row + k), M::activations(x + k));
      }
      if (k < C) own = M::mac(own, M::weights_part(row + k, C - k), M::activations(x + k));
      acc[r] = own;
    }
    float sums[ROWS];
    sum_four(acc, sums);
    std::copy_n(sums, std::min(ROWS, count - j), out + j);
  }
}

// out[n * out_stride + j] = rows[j] · x_n, for `count` rows of C weights and N tokens. x has the layout
// `inputs`, padded with zeros. after: rows to prefetch.
template <class T>
void dots(const T* const* rows, size_t count, const X<T>* x, size_t N, size_t C, float* out,
          size_t out_stride, Ahead<T> after = {}) {
  const bool together = size_t(rows[count - 1] - rows[0]) < count * C;  // no rows between are skipped
  if (N == 1 && together) return dots_alone(rows, count, x, C, out);
  const Layout layout = inputs(N, C);
  for (size_t top = 0; top < count; top += GROUP)
    for (size_t first = 0; first < N; first += BATCH)
      dots_group(rows + top, std::min(GROUP, count - top), count - top, x, layout, first,
                 std::min(BATCH, N - first), out + top, out_stride, after);
}

// The factors of rows, for each token. token: stride from a token's factors to the next token's. row:
// stride from a row's factor to the next row's; with bfloat16 pairs, a pair's two factors are adjacent,
// and pairs are 2 · row apart.
template <class T>
struct Factors {
  const X<T>* at;
  size_t token, row;
};

// Adds rows to y over columns [begin, end), in passes of LIVE rows. y: the first token's sums of column
// `begin`, with token stride `stride`. ASKS: prefetch `ahead`.
template <bool ASKS, class T>
inline void accumulate_block(const T* const* rows, size_t count, Factors<T> z, size_t N,
                             size_t begin, size_t end, float* y, size_t stride, Ahead<T>& ahead) {
  typedef Multiply<T> M;
  for (size_t j = 0; j < count; j += LIVE, z.at += LIVE * z.row) {
    const T* own[LIVE];
    for (size_t r = 0; r < LIVE; r++) own[r] = rows[std::min(j + r, count - 1)];
    for (size_t c = begin; c < end; c += M::STEP) {
      const size_t here = std::min(M::STEP, end - c);
      const auto columns = here == M::STEP ? M::template columns<LIVE>(own, c, M::STEP)
                                           : M::template columns<LIVE>(own, c, here);
      if (ASKS) ask_all(ahead.take(LIVE * LINE, own[0] + c), LIVE * LINE);
      for (size_t n = 0; n < N; n++)
        M::add(columns, M::template multipliers<LIVE>(z.at + n * z.token, z.row),
               y + n * stride + (c - begin));
    }
  }
}

// The same for one token, with as few instructions per cache line as possible, so that out-of-order
// execution reaches many lines ahead.
template <class T>
inline void accumulate_alone(const T* const* rows, size_t count, Factors<T> z, size_t begin,
                             size_t end, float* y) {
  typedef Multiply<T> M;
  for (size_t j = 0; j < count; j += LIVE, z.at += LIVE * z.row) {
    const T* own[LIVE];
    for (size_t r = 0; r < LIVE; r++) own[r] = rows[std::min(j + r, count - 1)];
    const auto multipliers = M::template multipliers<LIVE>(z.at, z.row);
    size_t c = begin;
    for (; c + M::STEP <= end; c += M::STEP)
      M::add(M::template columns<LIVE>(own, c, M::STEP), multipliers, y + (c - begin));
    if (c < end) M::add(M::template columns<LIVE>(own, c, end - c), multipliers, y + (c - begin));
  }
}

// y_n += Σ_j z[n][j] rows[j][begin : end], for `count` rows. y_n [O] has the layout `outputs`, with a
// block's column c at Multiply<T>::place(c); `begin` is a block's first column. z is padded with zeros to a
// multiple of LIVE rows. after: rows to prefetch.
template <class T>
void accumulate(const T* const* rows, size_t count, Factors<T> z, size_t N, size_t begin, size_t end,
                float* y, size_t O, Ahead<T> after = {}) {
  const Layout layout = outputs(N, O);
  for (size_t left = begin; left < end; left += layout.width) {
    const size_t right = std::min(end, left + layout.width);
    float* block = y + layout.at(0, left);
    if (N == 1)
      accumulate_alone(rows, count, z, left, right, block);
    else if (N <= TILE || after.empty())
      accumulate_block<false>(rows, count, z, N, left, right, block, layout.stride, after);
    else
      accumulate_block<true>(rows, count, z, N, left, right, block, layout.stride, after);
  }
}

// Copies tokens x_n [C] of type T, each at row(n), to the layout inputs(N, C) that `dots` takes.
template <class T, class Row>
void take_activations(const Row& row, size_t N, size_t C, X<T>* to) {
  const Layout layout = inputs(N, C);
  for (size_t n = 0; n < N; n++) {
    const T* from = row(n);
    for (size_t begin = 0; begin < C; begin += layout.width) {
      const size_t here = std::min(layout.width, C - begin);
      X<T>* own = to + layout.at(n, begin);
      for (size_t c = 0; c < here; c++) own[c] = Multiply<T>::from(from[begin + c]);
      for (size_t c = here; c < layout.stride; c++) own[c] = Multiply<T>::from_float(0.0f);
    }
  }
}

}  // namespace sirius
