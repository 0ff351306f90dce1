// Linears of nested weights at few tokens, by outputs or by inputs, and what they stand for.
#pragma once

#include "linear.h"
#include "nested.h"

namespace sirius {

// A weight [O, C] by outputs, and where its product y [N, O] goes; bias [O] or null.
template <class T>
struct NestedProduct {
  Nested weight;
  const T* bias;
  T* y;
  size_t O;
};

// Products of the same x [N, C].
template <class T>
void nested_linears(const T* x, const NestedProduct<T>* all, size_t count, size_t N, size_t C,
                    int threads) {
  thread_local Scratch<Step> activations;
  Step* own = activations.take(N * steps_of(C));
  take_steps<T>([&](size_t n) { return x + n * C; }, N, C, own);
  constexpr size_t BLOCK = 32;  // outputs a task
  size_t tasks = 0;
  for (size_t i = 0; i < count; i++) tasks += (all[i].O + BLOCK - 1) / BLOCK;
  parallel(tasks, threads, [&](size_t task) {
    const NestedProduct<T>* p = all;
    for (; task >= (p->O + BLOCK - 1) / BLOCK; p++) task -= (p->O + BLOCK - 1) / BLOCK;
    const size_t begin = task * BLOCK, here = std::min(BLOCK, p->O - begin);
    alignas(64) float sums[MOST_TOKENS * BLOCK];
    nested_dots(p->weight, [&](size_t j) { return begin + j; }, here, own, N, C, sums, BLOCK);
    for (size_t n = 0; n < N; n++)
      for (size_t j = 0; j < here; j++)
        round_into(p->y + n * p->O + begin + j,
                   sums[n * BLOCK + j] + (p->bias ? to_float(p->bias[begin + j]) : 0.0f));
  });
}

// y [N, O] of the inputs that count, and a weight [C, O] by inputs. z: see nested_add.
template <class T>
void nested_of_inputs(const Nested& weight, const Inputs* inputs, const Factors32* z, const T* bias,
                      T* y, size_t N, size_t C, size_t O, int threads) {
  thread_local Scratch<float> scratch;
  // As many tasks whatever N: else tokens would change the order in which a token's sums are added up.
  constexpr size_t SLAB = 1024, FEW = 4;
  const size_t blocks = C / NEST, slabs = (O + SLAB - 1) / SLAB;
  const size_t groups = std::max<size_t>(1, parts(blocks, threads) / slabs);
  const Layout layout = NestedSums::layout(N, O);
  float* sums = scratch.take(groups * layout.size());
  parallel(groups * slabs, threads, [&](size_t task) {
    const size_t group = task / slabs, begin = task % slabs * SLAB, end = std::min(O, begin + SLAB);
    float* own = sums + group * layout.size();
    for (size_t n = 0; n < N; n++)
      std::fill_n(own + n * layout.stride + begin, round_up(end - begin, COLUMNS), 0.0f);
    const size_t last = blocks * (group + 1) / groups;
    for (size_t block = blocks * group / groups; block < last; block += FEW)
      nested_add(inputs + block, std::min(FEW, last - block), weight.low != nullptr, weight.row, z + block,
                 blocks, N, begin, end, own, layout.stride);
  });
  finish<NestedSums>(sums, groups, N, O, bias, false, y, threads);
}

// x [B, N, C] through a weight [C, O] by inputs, row by row. Where `counts` [B] are asked for, only the
// channels whose mean |x| over the row's tokens is above the threshold.
template <class T>
void nested_by_inputs(const T* x, const Nested& weight, const T* bias, float threshold, T* y,
                      int64_t* counts, size_t B, size_t N, size_t C, size_t O, int threads) {
  thread_local Scratch<Inputs> input_scratch;
  thread_local Scratch<Factors32> factor_scratch;
  const size_t blocks = C / NEST;
  Inputs* inputs = input_scratch.take(blocks);
  Factors32* z = factor_scratch.take(N * blocks);
  for (size_t b = 0; b < B; b++) {
    const T* own = x + b * N * C;
    size_t kept = 0;
    for (size_t block = 0; block < blocks; block++) {
      Inputs& in = inputs[block];
      in.high = weight.high + block * weight.block;
      in.low = weight.low ? weight.low + block * weight.block : nullptr;
      in.count = 0;
      for (size_t i = 0; i < NEST; i++) {
        float score = 0.0f;
        for (size_t n = 0; counts && n < N; n++)
          score += std::fabs(to_float(own[n * C + block * NEST + i]));
        in.live[in.count] = uint8_t(i);
        in.count += !counts || score / float(N) > threshold;
      }
      kept += in.count;
      for (size_t n = 0; n < N; n++)
        take_factors(in, [&](size_t j) { return to_float(own[n * C + block * NEST + in.live[j]]); },
                     z[n * blocks + block]);
    }
    if (counts) counts[b] = int64_t(kept);
    nested_of_inputs<T>(weight, inputs, z, bias, y + b * N * O, N, C, O, threads);
  }
}

// Rows ids[0 … count) of a weight of C inputs by outputs, or where `ids` is null all that there are:
// to [count, C].
template <class T>
void unnest_rows(const Nested& weight, const int64_t* ids, size_t count, size_t C, T* to, int threads) {
  parallel((count + 15) / 16, threads, [&](size_t task) {
    for (size_t i = task * 16; i < std::min(count, task * 16 + 16); i++) {
      const uint8_t* row = weight.high + (ids ? size_t(ids[i]) : i) * weight.row;
      const size_t to_low = weight.low ? size_t(weight.low - weight.high) : 0;
      for (size_t g = 0; g < C / NEST; g++) {
        const uint8_t upper = row[C / 2 + g], lower = to_low ? row[to_low + C / 2 + g] : 0x80;
        const float scale = scale_of(upper, lower);
        for (size_t i2 = 0; i2 < 16; i2++) {
          const uint8_t high = row[g * 16 + i2], low = to_low ? row[to_low + g * 16 + i2] : 0x88;
          T* at = to + i * C + g * NEST + i2;
          round_into(at, float((high & 15) * 16 + (low & 15) - OFFSET) * scale);
          round_into(at + 16, float((high >> 4) * 16 + (low >> 4) - OFFSET) * scale);
        }
      }
    }
  });
}

// A weight [C, O] by inputs: to [C, O].
template <class T>
void unnest_inputs(const Nested& weight, size_t C, size_t O, T* to, int threads) {
  parallel(C / NEST, threads, [&](size_t block) {
    const uint8_t* own = weight.high + block * weight.block;
    const size_t to_low = weight.low ? size_t(weight.low - weight.high) : 0;
    for (size_t r = 0; r < NEST; r++)
      for (size_t k = 0; k < O / 2; k++) {
        const uint8_t high = own[r * weight.row + k], low = to_low ? own[to_low + r * weight.row + k] : 0x88;
        T* at = to + (block * NEST + r) * O + k / 16 * NEST + k % 16;
        for (size_t half = 0; half < 2; half++) {
          const uint8_t* scale = own + (NEST + half) * weight.row + k;
          round_into(at + half * 16,
                     float((high >> 4 * half & 15) * 16 + (low >> 4 * half & 15) - OFFSET) *
                         scale_of(scale[0], to_low ? scale[to_low] : 0x80));
        }
      }
  });
}

}  // namespace sirius
