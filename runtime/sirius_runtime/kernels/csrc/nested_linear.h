// Linear layers with nested weights for few tokens, by outputs or by inputs; and unnesting.
#pragma once

#include "linear.h"
#include "nested.h"

namespace sirius {

// A nested weight [O, C] by outputs, bias [O] or null, and the output y [N, O].
template <class T>
struct NestedProduct {
  Nested weight;
  const T* bias;
  T* y;
  size_t O;
};

// Products of x [N, C] with `count` nested weights.
template <class T>
void nested_linears(const T* x, const NestedProduct<T>* all, size_t count, size_t N, size_t C,
                    int threads) {
  thread_local Scratch<Step> activations;
  Step* own = activations.take(N * steps_of(C));
  take_steps<T>([&](size_t n) { return x + n * C; }, N, C, own, threads);
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

// y [N, O] from the live inputs and a weight [C, O] by inputs. z: see nested_add.
template <class T>
void nested_of_inputs(const Nested& weight, const Inputs* inputs, const Factors32* z, const T* bias,
                      T* y, size_t N, size_t C, size_t O, int threads) {
  thread_local Scratch<float> scratch;
  // The tasks do not depend on N: otherwise N would change the order in which a token's sums are added.
  const size_t blocks = C / NEST, slabs = (O + WAITING - 1) / WAITING;
  const size_t slab = round_up((O + slabs - 1) / slabs, COLUMNS);
  const size_t groups = std::max<size_t>(1, parts(blocks, threads) / slabs);
  const Layout layout = NestedSums::layout(N, O);
  float* sums = scratch.take(groups * layout.size());
  parallel(groups * slabs, threads, [&](size_t task) {
    const size_t group = task / slabs, begin = std::min(O, task % slabs * slab), end = std::min(O, begin + slab);
    float* own = sums + group * layout.size();
    for (size_t n = 0; n < N; n++)
      std::fill_n(own + n * layout.stride + begin, round_up(end - begin, COLUMNS), 0.0f);
    const size_t last = blocks * (group + 1) / groups;
    const size_t block = blocks * group / groups;
    nested_add(inputs + block, last - block, weight.low != nullptr, weight.row, z + block, blocks, N, begin,
               end, own, layout.stride);
  });
  finish<NestedSums>(sums, groups, N, O, bias, false, y, threads);
}

// Converts 32 inputs of N tokens (token stride `stride`) to factors z (token stride `token`): all of
// them, or with a threshold those whose mean |x| is above it.
template <class T>
void take_inputs(const T* x, const Nested& weight, const float* threshold, size_t N, size_t stride,
                 size_t block, Inputs& in, Factors32* z, size_t token) {
  in.high = weight.high + block * weight.block;
  in.low = weight.low ? weight.low + block * weight.block : nullptr;
  in.scales = NEST;
  alignas(64) float v[NEST], scores[NEST] = {};
  if (threshold) {
    for (size_t n = 0; n < N; n++) {
      for (size_t i = 0; i < NEST; i += W) store(v + i, load(x + n * stride + i));
      for (size_t i = 0; i < NEST; i++) scores[i] += std::fabs(v[i]);
    }
    for (size_t i = 0; i < NEST; i++) scores[i] /= float(N);
    in.choose(scores, *threshold);
  } else {
    in.choose_all();
  }
  for (size_t n = 0; n < N; n++) {
    for (size_t i = 0; i < NEST; i += W) store(v + i, load(x + n * stride + i));
    take_factors(in, [&](size_t j) { return v[in.live[j]]; }, z[n * token]);
  }
}

// y [B, N, O] from x [B, N, C] and a weight [C, O] by inputs, row by row. If `counts` [B] is not null,
// over only the channels whose mean |x| over the row's tokens is above the threshold.
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
    constexpr size_t BLOCKS = 16;  // a task
    parallel((blocks + BLOCKS - 1) / BLOCKS, N * C < SHARED / 4 ? 1 : threads, [&](size_t task) {
      for (size_t block = task * BLOCKS; block < std::min(blocks, (task + 1) * BLOCKS); block++)
        take_inputs(own + block * NEST, weight, counts ? &threshold : nullptr, N, C, block, inputs[block],
                    z + block, blocks);
    });
    if (counts) {
      counts[b] = 0;
      for (size_t block = 0; block < blocks; block++) counts[b] += int64_t(inputs[block].count);
    }
    nested_of_inputs<T>(weight, inputs, z, bias, y + b * N * O, N, C, O, threads);
  }
}

// Converts 16 bytes of both planes to 32 numbers: first the 16 of the lower nibbles, with scales
// `first`, then the 16 of the upper nibbles, with scales `second`.
template <class T>
inline void unnest_bytes(const uint8_t* high, const uint8_t* low, const float* first, const float* second,
                         T* to) {
  float v[NEST];
  for (size_t i = 0; i < 16; i++) {
    v[i] = float(int32_t(high[i] & 15) * 16 + int32_t(low[i] & 15) - OFFSET) * first[i];
    v[16 + i] = float(int32_t(high[i] >> 4) * 16 + int32_t(low[i] >> 4) - OFFSET) * second[i];
  }
  for (size_t i = 0; i < NEST; i++) round_into(to + i, v[i]);
}

// Writes rows ids[0 … count) of a weight by outputs with C inputs, or rows 0 … count if `ids` is null,
// to `to` [count, C].
template <class T>
void unnest_rows(const Nested& weight, const int64_t* ids, size_t count, size_t C, T* to, int threads) {
  parallel((count + 15) / 16, threads, [&](size_t task) {
    const size_t groups = C / NEST, to_low = weight.low ? size_t(weight.low - weight.high) : 0;
    uint8_t high[16], low[16];
    memset(low, 0x88, sizeof low);
    for (size_t i = task * 16; i < std::min(count, task * 16 + 16); i++) {
      const uint8_t* row = weight.high + (ids ? size_t(ids[i]) : i) * weight.row;
      for (size_t g = 0; g < groups; g++) {
        const uint8_t *upper = row + C / 2 + g;
        float scale[16];
        std::fill_n(scale, 16, scale_of(*upper, to_low ? upper[to_low] : 0x80));
        for (size_t b = 0; b < 16; b += 4) {  // the four bytes of a word are adjacent
          const uint8_t* word = row + byte_of(g, b, groups);
          memcpy(high + b, word, 4);
          if (to_low) memcpy(low + b, word + to_low, 4);
        }
        unnest_bytes(high, low, scale, scale, to + i * C + g * NEST);
      }
    }
  });
}

// Writes a weight by inputs to `to` [C, O].
template <class T>
void unnest_inputs(const Nested& weight, size_t C, size_t O, T* to, int threads) {
  parallel(C / NEST, threads, [&](size_t block) {
    thread_local Scratch<float> scratch;
    float* scales = scratch.take(O);  // of the first 16 of every 32 outputs, then of the last 16
    const uint8_t* own = weight.high + block * weight.block;
    const size_t to_low = weight.low ? size_t(weight.low - weight.high) : 0;
    for (size_t half = 0; half < 2; half++)
      for (size_t k = 0; k < O / 2; k++) {
        const uint8_t* upper = own + (NEST + half) * weight.row + k;
        scales[half * O / 2 + k] = scale_of(*upper, to_low ? upper[to_low] : 0x80);
      }
    uint8_t middle[16];
    memset(middle, 0x88, sizeof middle);
    for (size_t r = 0; r < NEST; r++)
      for (size_t k = 0; k < O / 2; k += 16) {
        const uint8_t* high = own + r * weight.row + k;
        unnest_bytes(high, to_low ? high + to_low : middle, scales + k, scales + O / 2 + k,
                     to + (block * NEST + r) * O + 2 * k);
      }
  });
}

}  // namespace sirius
