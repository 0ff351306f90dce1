// Nests a matrix, bit-equal to `nested.nest`.
#pragma once

#include "nested.h"

namespace sirius {

// A matrix [outputs, inputs] whose rows in memory are outputs or inputs, with row stride `stride`.
template <class T>
struct Plain {
  const T* at;
  size_t stride;
  bool rows_are_inputs;

  // Reads an output's weights for the 32 inputs from `input` on.
  void take(size_t output, size_t input, float* to) const {
    if (rows_are_inputs)
      for (size_t i = 0; i < NEST; i++) to[i] = to_float(at[(input + i) * stride + output]);
    else
      for (size_t i = 0; i < NEST; i++) to[i] = to_float(at[output * stride + input + i]);
  }
};

// Statistics of nesting: how many groups have a number that is no integer multiple of the scale, and
// the bits of the largest magnitude.
struct Found {
  int64_t rounded = 0;
  uint32_t largest = 0;
};

// Which scale a group gets: that of Q8_0, its largest magnitude over 127; or the next that the high
// plane holds (`nested.draft_scales`).
enum class Scales { Q8_0, DRAFTS };

// The bits of a group's fp16 scale, shifted left by one.
inline uint16_t scale_of(float largest, Scales which) {
  constexpr uint32_t MOST = 0xf780;  // the largest that is finite with a lower byte of 0x80
  fp16 scale;
  round_into(&scale, largest / 127.0f);
  uint32_t bits = uint32_t(scale.bits) << 1;
  if (which == Scales::Q8_0 || bits == 0) return uint16_t(bits);
  bits = (bits & 0xff00) | 0x80;
  if (to_float(fp16{uint16_t(bits >> 1)}) * 127.5f < largest) bits += 0x100;
  return uint16_t(std::min(bits, MOST));
}

// Computes the codes of 32 numbers; returns `scale_of` them.
inline uint16_t take_codes(const float* v, uint8_t* codes, Scales which, Found& found) {
  uint32_t largest = 0;
  for (size_t i = 0; i < NEST; i++) largest = std::max(largest, bit_cast<uint32_t>(v[i]) & 0x7fffffff);
  const uint16_t scale = scale_of(bit_cast<float>(largest), which);
  const float step = to_float(fp16{uint16_t(scale >> 1)}), by = step > 0 ? step : INFINITY;
  int32_t other = 0;
  for (size_t i = 0; i < NEST; i++) {
    const float q = std::max(-128.0f, std::min(127.0f, __builtin_rintf(v[i] / by)));
    other |= int32_t(q * step != v[i]);
    codes[i] = uint8_t(int32_t(q) + OFFSET);
  }
  found.rounded += other;
  found.largest = std::max(found.largest, largest);
  return scale;
}

// Packs a row of `count` codes into nibbles. Only this function knows which two codes share a byte.
template <bool BY_OUTPUTS>
inline void pack(const uint8_t* codes, size_t count, uint8_t* high, uint8_t* low) {
  for (size_t g = 0; g < count / NEST; g++)
    for (size_t i = 0; i < 16; i++) {
      const uint8_t first = codes[g * NEST + i], second = codes[g * NEST + 16 + i];
      const size_t at = BY_OUTPUTS ? byte_of(g, i, count / NEST) : g * 16 + i;
      high[at] = uint8_t(first >> 4 | (second & 0xf0));
      low[at] = uint8_t((first & 15) | second << 4);
    }
}

// Writes both planes [2, O, 17 C / 32].
template <class T>
void nest_by_outputs(const Plain<T>& from, size_t O, size_t C, uint8_t* to, Scales which, Found* found,
                     int threads) {
  constexpr size_t ROWS = 16;  // rows of a task
  const size_t row = C / 2 + C / NEST, plane = O * row;
  parallel((O + ROWS - 1) / ROWS, threads, [&](size_t task) {
    thread_local Scratch<uint8_t> scratch;
    uint8_t* codes = scratch.take(C);
    for (size_t o = task * ROWS; o < std::min(O, (task + 1) * ROWS); o++) {
      uint8_t *high = to + o * row, *low = high + plane;
      for (size_t g = 0; g < C / NEST; g++) {
        float v[NEST];
        from.take(o, g * NEST, v);
        const uint16_t scale = take_codes(v, codes + g * NEST, which, found[task]);
        high[C / 2 + g] = uint8_t(scale >> 8), low[C / 2 + g] = uint8_t(scale);
      }
      pack<true>(codes, C, high, low);
    }
  });
}

// Writes both planes [2, C / 32, 34, O / 2].
template <class T>
void nest_by_inputs(const Plain<T>& from, size_t O, size_t C, uint8_t* to, Scales which, Found* found,
                    int threads) {
  const size_t row = O / 2, block = (NEST + 2) * row, plane = C / NEST * block;
  parallel(C / NEST, threads, [&](size_t task) {
    thread_local Scratch<uint8_t> scratch;
    uint8_t* codes = scratch.take(NEST * O);
    uint8_t *high = to + task * block, *low = high + plane;
    for (size_t o = 0; o < O; o++) {
      float v[NEST];
      uint8_t own[NEST];
      from.take(o, task * NEST, v);
      const uint16_t scale = take_codes(v, own, which, found[task]);
      for (size_t i = 0; i < NEST; i++) codes[i * O + o] = own[i];
      const size_t at = (NEST + o % NEST / 16) * row + o / NEST * 16 + o % 16;
      high[at] = uint8_t(scale >> 8), low[at] = uint8_t(scale);
    }
    for (size_t i = 0; i < NEST; i++) pack<false>(codes + i * O, O, high + i * row, low + i * row);
  });
}

// Nests a matrix into `to`; returns the statistics.
template <class T>
Found nest(const Plain<T>& from, bool by_inputs, size_t O, size_t C, uint8_t* to, Scales which, int threads) {
  thread_local Scratch<Found> scratch;
  const size_t tasks = by_inputs ? C / NEST : O;
  Found *all = scratch.take(tasks), whole;
  std::fill_n(all, tasks, Found());
  (by_inputs ? nest_by_inputs<T> : nest_by_outputs<T>)(from, O, C, to, which, all, threads);
  for (size_t i = 0; i < tasks; i++) {
    whole.rounded += all[i].rounded;
    whole.largest = std::max(whole.largest, all[i].largest);
  }
  return whole;
}

}  // namespace sirius
