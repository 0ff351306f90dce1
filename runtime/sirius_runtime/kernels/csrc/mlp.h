// MLPs at few tokens: down(act(gate x) * up x), of all neurons or of each row's own.
//
// Neurons are taken in chunks. A chunk's gate, up and down rows are read one after the other by one
// thread, so what lies between is 64 neurons wide and never leaves its cache, and a neuron that a
// row leaves out is never read.
#pragma once

#include <cmath>

#include "activations.h"
#include "sums.h"

namespace sirius {

constexpr size_t CHUNK = 64;       // neurons

template <class T>
struct Mlp {
  size_t B, N, C, I;  // rows, tokens of each, channels, neurons
  const T* x;         // [B, N, C]
  const T *gate, *up, *down;  // [I, C], rows the strides apart; up may be null
  size_t gate_stride, up_stride, down_stride;
  const T *gate_bias, *up_bias, *down_bias;  // each may be null
  Activation act;
  const int64_t* neurons;  // [B, K]: a row's own; or null
  size_t K;
  size_t keep;         // the neurons of largest |act(gate x)|; 0 for no such choice
  bool thresholded;    // only neurons whose mean |act(gate x)| is above the threshold
  float threshold;
  T* y;             // [B, N, C]
  int64_t* counts;  // [B], or null
  T* z;             // [B, N, I], act(gate x) * up x; or null
  int threads;

  // `neurons` are there: who calls has looked.
  void run() {
    thread_local Scratch<X<T>> activation_scratch;
    thread_local Scratch<uint8_t> mask_scratch;
    thread_local Scratch<float> gate_scratch, sum_scratch;
    const size_t row = inputs(N, C).size();
    X<T>* own = activation_scratch.take(B * row);
    for (size_t b = 0; b < B; b++)
      take_activations<T>([&](size_t n) { return x + (b * N + n) * C; }, N, C, own + b * row);
    activations = own;
    if (neurons || keep) {
      uint8_t* mask = mask_scratch.take(B * I);
      std::fill(mask, mask + B * I, uint8_t(0));
      for (size_t k = 0; neurons && k < B * K; k++) mask[k / K * I + size_t(neurons[k])] = 1;
      if (keep) {
        float* g = gate_scratch.take(B * N * I);
        gates(g);
        parallel(B, threads, [&](size_t b) { choose(g + b * N * I, mask + b * I); });
        known = g;
      }
      chosen = mask;
    }
    if (counts) std::fill(counts, counts + B, int64_t(0));
    const size_t chunks = (I + CHUNK - 1) / CHUNK, groups = parts(chunks, threads);
    const size_t size = outputs(N, C).size();
    float* sums = sum_scratch.take(B * groups * size);
    parallel(groups, threads, [&](size_t group) {
      for (size_t b = 0; b < B; b++) std::fill_n(sums + (b * groups + group) * size, size, 0.0f);
      for (size_t i = chunks * group / groups; i < chunks * (group + 1) / groups; i++)
        for (size_t b = 0; b < B; b++) chunk(b, i * CHUNK, sums + (b * groups + group) * size);
    });
    for (size_t b = 0; b < B; b++)
      finish(sums + b * groups * size, groups, N, C, down_bias, false, y + b * N * C, threads);
  }

 private:
  const X<T>* activations = nullptr;  // of each row, as `inputs` lays them out
  const uint8_t* chosen = nullptr;    // [B, I], or null for all
  const float* known = nullptr;       // act(gate x), [B, N, I], or null

  const X<T>* tokens_of(size_t b) const { return activations + b * inputs(N, C).size(); }

  // act(gate x) of `count` neurons and one row's tokens: g [N, CHUNK].
  void gate_of(const X<T>* tokens, const uint16_t* live, size_t count, size_t first, float* g,
               Ahead<T> ahead) {
    product(gate, gate_stride, gate_bias, tokens, live, count, first, g, ahead);
    for (size_t n = 0; n < N; n++) {
      float* at = g + n * CHUNK;
      for (size_t j = 0; j < count; j += W) store(at + j, activation<T>(act, load(at + j)));
      for (size_t j = 0; j < count; j++) at[j] = rounded<T>(at[j]);
    }
  }

  // weight x + bias of neurons first + live[j], as torch stores it: out [N, CHUNK].
  void product(const T* weight, size_t stride, const T* bias, const X<T>* tokens,
               const uint16_t* live, size_t count, size_t first, float* out, Ahead<T> ahead) {
    const T* rows[CHUNK];
    pick(weight, stride, live, count, first, rows);
    dots<T>(rows, count, tokens, N, C, out, CHUNK, ahead);
    for (size_t n = 0; n < N; n++)
      for (size_t j = 0; j < count; j++) {
        float& v = out[n * CHUNK + j];
        v = rounded<T>(bias ? v + to_float(bias[first + live[j]]) : v);
      }
  }

  // The rows of neurons first + live[j], to be read now or later.
  Ahead<T> pick(const T* weight, size_t stride, const uint16_t* live, size_t count, size_t first,
                const T** rows) const {
    for (size_t j = 0; j < count; j++) rows[j] = weight + (first + live[j]) * stride;
    return Ahead<T>(rows, count, 0, C);
  }

  void chunk(size_t b, size_t first, float* sums) {
    alignas(64) float g[MOST_TOKENS * CHUNK], u[MOST_TOKENS * CHUNK];
    alignas(64) X<T> own[MOST_TOKENS * CHUNK];
    uint16_t live[CHUNK];
    const T* next[CHUNK];  // rows that are read after those of a product
    size_t count = find(b, first, live);
    if (count == 0) return;
    const X<T>* tokens = tokens_of(b);
    for (size_t j = 0; up && j < std::min(count, ROWS); j++) ask(up + (first + live[j]) * up_stride);
    if (known) {
      for (size_t n = 0; n < N; n++)
        for (size_t j = 0; j < count; j++)
          g[n * CHUNK + j] = known[(b * N + n) * I + first + live[j]];
    } else {
      gate_of(tokens, live, count, first, g,
              thresholded ? Ahead<T>()
                          : pick(up ? up : down, up ? up_stride : down_stride, live, count, first, next));
    }
    if (thresholded) count = above(live, count, g);
    if (counts && count)
      __atomic_fetch_add(counts + b, int64_t(count), __ATOMIC_RELAXED);
    if (count == 0) return;
    for (size_t j = 0; j < std::min(count, LIVE); j++) ask(down + (first + live[j]) * down_stride);
    if (up) {
      const Ahead<T> ahead = pick(down, down_stride, live, count, first, next);
      product(up, up_stride, up_bias, tokens, live, count, first, u, ahead);
    }
    for (size_t n = 0; n < N; n++) {
      for (size_t j = 0; j < CHUNK; j++) {
        float v = 0.0f;
        if (j < count) v = up ? rounded<T>(g[n * CHUNK + j] * u[n * CHUNK + j]) : g[n * CHUNK + j];
        u[n * CHUNK + j] = v;
        own[n * CHUNK + j] = Meet<T>::from_float(v);
      }
      for (size_t j = 0; z && j < count; j++)
        round_into(z + (b * N + n) * I + first + live[j], u[n * CHUNK + j]);
    }
    const T* rows[CHUNK];
    pick(down, down_stride, live, count, first, rows);
    Ahead<T> ahead;  // the next chunk's gate, or up where the gate's products are known
    if (B == 1 && first + CHUNK < I) {
      const T* weight = known && up ? up : gate;
      const size_t more = find(b, first + CHUNK, live);
      ahead = pick(weight, weight == gate ? gate_stride : up_stride, live, more, first + CHUNK, next);
    }
    accumulate<T>(rows, count, {own, CHUNK, 1}, N, 0, C, sums, C, ahead);
  }

  // The neurons of the chunk at `first` that a row uses, as far as is known.
  size_t find(size_t b, size_t first, uint16_t* live) const {
    const size_t here = std::min(CHUNK, I - first);
    size_t count = 0;
    for (size_t j = 0; j < here; j++) {
      live[count] = uint16_t(j);
      count += !chosen || chosen[b * I + first + j];
    }
    return count;
  }

  // Leaves the neurons above the threshold in `live` and g; returns how many they are.
  size_t above(uint16_t* live, size_t count, float* g) {
    size_t kept = 0;
    for (size_t j = 0; j < count; j++) {
      float total = 0.0f;
      for (size_t n = 0; n < N; n++) total += std::fabs(g[n * CHUNK + j]);
      if (!(rounded<T>(total / float(N)) > threshold)) continue;
      for (size_t n = 0; n < N; n++) g[n * CHUNK + kept] = g[n * CHUNK + j];
      live[kept++] = live[j];
    }
    return kept;
  }

  // act(gate x) of every neuron: g [B, N, I].
  void gates(float* g) {
    parallel((I + CHUNK - 1) / CHUNK, threads, [&](size_t task) {
      alignas(64) float part[MOST_TOKENS * CHUNK];
      uint16_t all[CHUNK];
      const size_t first = task * CHUNK, here = std::min(CHUNK, I - first);
      for (size_t j = 0; j < here; j++) all[j] = uint16_t(j);
      for (size_t b = 0; b < B; b++) {
        gate_of(tokens_of(b), all, here, first, part, Ahead<T>());
        for (size_t n = 0; n < N; n++)
          std::copy(part + n * CHUNK, part + n * CHUNK + here, g + (b * N + n) * I + first);
      }
    });
  }

  // Marks the `keep` neurons of largest Σ_n |g[n]|, stored as a T; of equals, the first ones.
  void choose(const float* g, uint8_t* mask) {
    thread_local Scratch<uint32_t> score_scratch, rest_scratch;
    uint32_t *scores = score_scratch.take(I), *rest = rest_scratch.take(I);
    constexpr int LOW = 20;  // bits below those that the first pass counts by
    size_t histogram[size_t(1) << (31 - LOW)] = {};
    for (size_t i = 0; i < I; i++) {
      float total = 0.0f;
      for (size_t n = 0; n < N; n++) total += std::fabs(g[n * I + i]);
      scores[i] = bit_cast<uint32_t>(rounded<T>(total)) & 0x7fffffff;  // in the order of the floats
      histogram[scores[i] >> LOW]++;
    }
    size_t bucket = size_t(1) << (31 - LOW), higher = 0;
    while (higher + histogram[bucket - 1] < keep) higher += histogram[--bucket];
    bucket--;
    size_t within = 0;
    for (size_t i = 0; i < I; i++) {
      rest[within] = scores[i];
      within += (scores[i] >> LOW) == bucket;
    }
    const size_t wanted = keep - higher;  // of the bucket, at least one
    std::nth_element(rest, rest + (wanted - 1), rest + within, std::greater<uint32_t>());
    const uint32_t least = rest[wanted - 1];
    size_t equals = keep;
    for (size_t i = 0; i < I; i++) equals -= scores[i] > least;
    for (size_t i = 0; i < I; i++) {
      const bool tie = scores[i] == least && equals > 0;
      equals -= tie;
      mask[i] = scores[i] > least || tie;
    }
  }
};

}  // namespace sirius
