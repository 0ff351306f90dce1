// Linear layers for few tokens, x Wᵀ + bias: weights stored by outputs or by inputs, dense or sparse.
#pragma once

#include <cmath>

#include "sums.h"

namespace sirius {

// A weight [O, C] with row stride `stride`, bias [O] or null, and the output y [N, O].
template <class T>
struct Product {
  const T* weight;
  size_t stride;
  const T* bias;
  T* y;
  size_t O;
};

// Products of x [N, C] with `count` weights.
template <class T>
void linears_by_outputs(const T* x, const Product<T>* all, size_t count, size_t N, size_t C,
                        int threads) {
  thread_local Scratch<X<T>> activations;
  X<T>* own = activations.take(inputs(N, C).size());
  take_activations<T>([&](size_t n) { return x + n * C; }, N, C, own);
  constexpr size_t BLOCK = 32;  // outputs a task
  size_t tasks = 0;
  for (size_t i = 0; i < count; i++) tasks += (all[i].O + BLOCK - 1) / BLOCK;
  parallel(tasks, threads, [&](size_t task) {
    const Product<T>* p = all;
    for (; task >= (p->O + BLOCK - 1) / BLOCK; p++) task -= (p->O + BLOCK - 1) / BLOCK;
    const size_t begin = task * BLOCK, count = std::min(BLOCK, p->O - begin);
    const T* rows[2 * BLOCK];  // also the next task's rows, to prefetch: most likely this thread's next
    const size_t known = std::min(2 * BLOCK, p->O - begin);
    for (size_t j = 0; j < known; j++) rows[j] = p->weight + (begin + j) * p->stride;
    for (size_t n = 0; n < N; n++) __builtin_prefetch(p->y + n * p->O + begin, 1);
    alignas(64) float sums[MOST_TOKENS * BLOCK], offsets[BLOCK] = {};
    dots<T>(rows, count, own, N, C, sums, BLOCK, Ahead<T>(rows + count, known - count, 0, C));
    for (size_t j = 0; p->bias && j < count; j++) offsets[j] = to_float(p->bias[begin + j]);
    for (size_t n = 0; n < N; n++) {
      T* to = p->y + n * p->O + begin;
      size_t j = 0;
      for (; j + W <= count; j += W) store(to + j, load(sums + n * BLOCK + j) + load(offsets + j));
      if (j < count) store_part(to + j, load(sums + n * BLOCK + j) + load(offsets + j), count - j);
    }
  });
}

// The stride from a token's channels to the next token's: padded to LIVE, and no power of two.
inline size_t channels_stride(size_t count) { return round_up(count, LIVE) + PAD; }

// y [N, O] from the channels live[0 … count) of x, whose values are z [N, channels_stride(count)], and
// a weight [C, O] with row stride `stride`. apart: see `finish`.
template <class T>
void linear_of_channels(const X<T>* z, const int32_t* live, size_t count, const T* weight,
                        size_t stride, const T* bias, bool apart, T* y, size_t N, size_t O,
                        int threads) {
  thread_local Scratch<float> scratch;
  // A task's columns are whole blocks of the sums' layout. Their number does not depend on N: otherwise
  // N would change the groups, and with them the order in which a token's sums are added.
  constexpr size_t SLAB = WIDEST, CHUNK = 64;
  const size_t slabs = (O + SLAB - 1) / SLAB, z_stride = channels_stride(count);
  const size_t units = (count + CHUNK - 1) / CHUNK;
  const size_t groups = std::max<size_t>(1, parts(units, threads) / slabs);
  const Layout layout = outputs(N, O);
  float* sums = scratch.take(groups * layout.size());
  parallel(groups * slabs, threads, [&](size_t task) {
    const size_t group = task / slabs, begin = task % slabs * SLAB, end = std::min(O, begin + SLAB);
    float* own = sums + group * layout.size();
    const size_t stop = end == O ? layout.size() : layout.at(0, end);
    std::fill(own + layout.at(0, begin), own + stop, 0.0f);
    for (size_t unit = units * group / groups; unit < units * (group + 1) / groups; unit++) {
      const size_t first = unit * CHUNK, known = std::min(2 * CHUNK, count - first);
      const size_t here = std::min(CHUNK, known);
      const T* rows[2 * CHUNK];  // also the next unit's rows, to prefetch
      for (size_t j = 0; j < known; j++) rows[j] = weight + size_t(live[first + j]) * stride;
      accumulate<T>(rows, here, {z + first, z_stride, 1}, N, begin, end, own, O,
                    Ahead<T>(rows + here, known - here, begin, end));
    }
  });
  finish<PlainSums<T>>(sums, groups, N, O, bias, apart, y, threads);
}

// y [N, O] from x [N, C] and a weight [C, O].
template <class T>
void linear_by_inputs(const T* x, const T* weight, size_t stride, const T* bias, T* y, size_t N,
                      size_t C, size_t O, int threads) {
  thread_local Scratch<X<T>> activations;
  thread_local Scratch<int32_t> channels;
  X<T>* z = activations.take(N * channels_stride(C));
  int32_t* all = channels.take(C);
  const size_t z_stride = channels_stride(C);
  for (size_t c = 0; c < C; c++) all[c] = int32_t(c);
  for (size_t n = 0; n < N; n++)
    for (size_t c = 0; c < z_stride; c++)
      z[n * z_stride + c] = c < C ? Multiply<T>::from(x[n * C + c]) : Multiply<T>::from_float(0.0f);
  linear_of_channels<T>(z, all, C, weight, stride, bias, false, y, N, O, threads);
}

// As `linear_by_inputs` for x [B, N, C], row by row, over only the channels whose mean |x| over the
// row's tokens is above the threshold. counts [B]: how many those are.
template <class T>
void sparse_linear(const T* x, const T* weight, size_t stride, const T* bias, float threshold,
                   T* y, int64_t* counts, size_t B, size_t N, size_t C, size_t O, int threads) {
  thread_local Scratch<X<T>> activations;
  thread_local Scratch<int32_t> channels;
  X<T>* z = activations.take(N * channels_stride(C));
  int32_t* live = channels.take(C);
  for (size_t b = 0; b < B; b++) {
    const T* own = x + b * N * C;
    size_t count = 0;
    for (size_t c = 0; c < C; c++) {
      float score = 0.0f;
      for (size_t n = 0; n < N; n++) score += std::fabs(to_float(own[n * C + c]));
      score /= float(N);
      live[count] = int32_t(c);
      count += score > threshold;
    }
    const size_t z_stride = channels_stride(count);
    for (size_t n = 0; n < N; n++)
      for (size_t j = 0; j < z_stride; j++)
        z[n * z_stride + j] =
            j < count ? Multiply<T>::from(own[n * C + live[j]]) : Multiply<T>::from_float(0.0f);
    counts[b] = int64_t(count);
    linear_of_channels<T>(z, live, count, weight, stride, bias, true, y + b * N * O, N, O, threads);
  }
}

}  // namespace sirius
