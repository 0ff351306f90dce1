// MLPs for few tokens: down(act(gate x) * up x), over all neurons or each row's chosen ones.
//
// One thread processes a chunk of neurons through gate, up and down, so that the intermediate values
// stay in its cache. The weights of neurons that are not chosen are never read. A weight may be a copy of
// the rows of the chosen neurons (`ops/chosen.py`); the sums have the same order as over the whole weight.
#pragma once

#include <cmath>

#include "activations.h"
#include "nested.h"

namespace sirius {

// How an MLP reads plain weights, which have the activations' type.
template <class T>
struct PlainWeights {
  static constexpr size_t CHUNK = 64;  // neurons
  typedef X<T> Unit;  // element of the activations in the form that `dots` takes
  typedef PlainSums<T> Order;
  struct Matrix {  // [I, C] with row stride `stride`; or null
    const T* at = nullptr;
    size_t stride = 0;
    bool copied = false;               // whether it has the rows of the chosen neurons only
    const uint32_t* place = nullptr;   // if so: the number of chosen neurons before each
    explicit operator bool() const { return at; }
    const T* row(size_t i) const { return at + (place ? place[i] : i) * stride; }
  };

  static size_t room(size_t N, size_t C) { return inputs(N, C).size(); }
  template <class Row>
  static void take(const Row& row, size_t N, size_t C, Unit* to, int) { take_activations<T>(row, N, C, to); }

  // The rows first + live[j] of a weight: for a product, or to prefetch.
  struct Rows {
    const T* own[CHUNK];
    size_t count = 0;
    Ahead<T> ahead(size_t C) const { return Ahead<T>(own, count, 0, C); }
    Rows() = default;
    Rows(const Matrix& weight, size_t first, const uint16_t* live, size_t live_count) : count(live_count) {
      for (size_t j = 0; j < count; j++) own[j] = weight.row(first + live[j]);
    }
  };

  static void ask_for(const Matrix& weight, size_t first, const uint16_t* live, size_t count) {
    for (size_t j = 0; j < count; j++) ask(weight.row(first + live[j]));
  }

  // out [N, CHUNK] = the products of the tokens with the rows first + live[j]; prefetches `after`.
  static void dots(const Matrix& weight, size_t first, const uint16_t* live, size_t count,
                   const Unit* tokens, size_t N, size_t C, float* out, const Rows& after) {
    const Rows rows(weight, first, live, count);
    sirius::dots<T>(rows.own, count, tokens, N, C, out, CHUNK, after.ahead(C));
  }

  // Adds these neurons' part of the down projection to `sums`: z [N, CHUNK], zero from `count` on.
  static void add(const Matrix& down, size_t first, const uint16_t* live, size_t count, const float* z,
                  size_t N, size_t C, float* sums, const Rows& after) {
    alignas(64) Unit own[MOST_TOKENS * CHUNK];
    for (size_t i = 0; i < N * CHUNK; i++) own[i] = Multiply<T>::from_float(z[i]);
    const Rows rows(down, first, live, count);
    accumulate<T>(rows.own, count, {own, CHUNK, 1}, N, 0, C, sums, C, after.ahead(C));
  }
};

// How an MLP reads nested weights: gate and up by outputs, down by inputs.
template <class T>
struct NestedWeights {
  static constexpr size_t CHUNK = MOST_ROWS;  // large, since each chunk passes over all outputs' sums
  typedef Step Unit;
  typedef NestedSums Order;
  struct Matrix : Nested {
    bool by_inputs = false, copied = false;  // `copied` and `place` as in PlainWeights
    const uint32_t* place = nullptr;
    Matrix() : Nested{} {}
    Matrix(const Nested& own, bool by_inputs, bool copied)
        : Nested(own), by_inputs(by_inputs), copied(copied) {}
    explicit operator bool() const { return high; }
    size_t output(size_t i) const { return place ? place[i] : i; }
    // By inputs: the offset of a group, and the row of a neuron in its group. In a copy, each group has
    // its two rows of scales first.
    size_t group(size_t g) const { return place ? (place[g * NEST] + 2 * g) * row : g * block; }
    size_t input(size_t i) const { return place ? 2 + place[i] - place[i / NEST * NEST] : i % NEST; }
    size_t at(size_t i) const { return by_inputs ? group(i / NEST) + input(i) * row : output(i) * row; }
  };

  static size_t room(size_t N, size_t C) { return N * steps_of(C); }
  template <class Row>
  static void take(const Row& row, size_t N, size_t C, Unit* to, int threads) {
    take_steps<T>(row, N, C, to, threads);
  }

  struct Rows {  // nothing is prefetched
    Rows() = default;
    Rows(const Matrix&, size_t, const uint16_t*, size_t) {}
  };

  static void ask_for(const Matrix& weight, size_t first, const uint16_t* live, size_t count) {
    for (size_t j = 0; j < count; j++) {
      const size_t at = weight.at(first + live[j]);
      ask(weight.high + at);
      if (weight.low) ask(weight.low + at);
    }
  }

  static void dots(const Matrix& weight, size_t first, const uint16_t* live, size_t count,
                   const Unit* tokens, size_t N, size_t C, float* out, const Rows&) {
    nested_dots(weight, [&](size_t j) { return weight.output(first + live[j]); }, count, tokens, N, C, out, CHUNK);
  }

  static void add(const Matrix& down, size_t first, const uint16_t* live, size_t count, const float* z,
                  size_t N, size_t C, float* sums, const Rows&) {
    constexpr size_t BLOCKS = CHUNK / NEST;
    Inputs inputs[BLOCKS];
    Factors32 factors[MOST_TOKENS * BLOCKS];
    for (size_t block = 0, j = 0; block < BLOCKS; block++) {
      Inputs& in = inputs[block];
      const size_t at = down.group(first / NEST + block);
      in.high = down.high + at;
      in.low = down.low ? down.low + at : nullptr;
      in.count = 0;
      in.scales = down.place ? 0 : NEST;
      const size_t begin = j;
      for (; j < count && live[j] / NEST == block; j++)
        in.live[in.count++] = uint8_t(down.input(first + live[j]));
      if (in.count == 0) continue;
      for (size_t n = 0; n < N; n++)
        take_factors(in, [&](size_t k) { return z[n * CHUNK + begin + k]; }, factors[n * BLOCKS + block]);
    }
    nested_add(inputs, BLOCKS, down.low != nullptr, down.row, factors, BLOCKS, N, 0, C, sums,
                     NestedSums::layout(N, C).stride);
  }
};

template <class T, class Weights = PlainWeights<T>>
struct Mlp {
  typedef typename Weights::Unit Unit;
  typedef typename Weights::Matrix Matrix;
  typedef typename Weights::Rows Rows;
  static constexpr size_t CHUNK = Weights::CHUNK;

  size_t B, N, C, I;  // rows, tokens of each, channels, neurons
  const T* x;         // [B, N, C]
  Matrix gate, up, down;  // [I, C]; up may be null
  const T *gate_bias, *up_bias, *down_bias;  // each may be null
  Activation act;
  const int64_t* neurons;  // [B, K]: each row's neurons; or null
  size_t K;
  size_t keep;         // use the `keep` neurons of largest |act(gate x)|; 0: no such choice
  bool thresholded;    // use only neurons whose mean |act(gate x)| is above the threshold
  float threshold;
  T* y;             // [B, N, C]
  int64_t* counts;  // [B]: neurons used; or null
  T* z;             // [B, N, I], act(gate x) * up x; or null
  int threads;

  // The caller has checked that `neurons` are in range.
  void run() {
    thread_local Scratch<Unit> activation_scratch;
    thread_local Scratch<uint8_t> mask_scratch;
    thread_local Scratch<uint32_t> place_scratch;
    thread_local Scratch<float> gate_scratch, sum_scratch;
    const size_t row = Weights::room(N, C);
    Unit* own = activation_scratch.take(B * row);
    for (size_t b = 0; b < B; b++)
      Weights::take([&](size_t n) { return x + (b * N + n) * C; }, N, C, own + b * row, threads);
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
      // The rows of a call with copied weights have the same choice. Beyond I: a chunk's last groups.
      const size_t whole = (I + CHUNK - 1) / CHUNK * CHUNK;
      const bool copied = gate.copied || up.copied || down.copied;
      uint32_t* place = place_scratch.take(copied ? whole : 0);
      for (size_t i = 0, before = 0; copied && i < whole; i++) {
        place[i] = uint32_t(before);
        before += i < I && mask[i];
      }
      for (Matrix* one : {&gate, &up, &down})
        if (one->copied) one->place = place;
    }
    if (counts) std::fill(counts, counts + B, int64_t(0));
    const size_t chunks = (I + CHUNK - 1) / CHUNK, groups = parts(chunks, threads);
    const size_t size = Weights::Order::layout(N, C).size();
    float* sums = sum_scratch.take(B * groups * size);
    parallel(groups, threads, [&](size_t group) {
      for (size_t b = 0; b < B; b++) std::fill_n(sums + (b * groups + group) * size, size, 0.0f);
      for (size_t i = chunks * group / groups; i < chunks * (group + 1) / groups; i++)
        for (size_t b = 0; b < B; b++) chunk(b, i * CHUNK, sums + (b * groups + group) * size);
    });
    for (size_t b = 0; b < B; b++)
      finish<typename Weights::Order>(sums + b * groups * size, groups, N, C, down_bias, false,
                                      y + b * N * C, threads);
  }

 private:
  const Unit* activations = nullptr;  // each row's tokens in the form that `dots` takes
  const uint8_t* chosen = nullptr;    // [B, I], or null for all
  const float* known = nullptr;       // act(gate x), [B, N, I], or null

  const Unit* tokens_of(size_t b) const { return activations + b * Weights::room(N, C); }

  // g [N, CHUNK] = act(gate x) of `count` neurons for one row's tokens.
  void gate_of(const Unit* tokens, const uint16_t* live, size_t count, size_t first, float* g,
               const Rows& after) {
    product(gate, gate_bias, tokens, live, count, first, g, after);
    for (size_t n = 0; n < N; n++) {
      float* at = g + n * CHUNK;
      for (size_t j = 0; j < count; j += W) store(at + j, activation<T>(act, load(at + j)));
      for (size_t j = 0; j < count; j++) at[j] = rounded<T>(at[j]);
    }
  }

  // out [N, CHUNK] = weight x + bias of the neurons first + live[j], rounded to T.
  void product(const Matrix& weight, const T* bias, const Unit* tokens, const uint16_t* live,
               size_t count, size_t first, float* out, const Rows& after) {
    Weights::dots(weight, first, live, count, tokens, N, C, out, after);
    for (size_t n = 0; n < N; n++)
      for (size_t j = 0; j < count; j++) {
        float& v = out[n * CHUNK + j];
        v = rounded<T>(bias ? v + to_float(bias[first + live[j]]) : v);
      }
  }

  void chunk(size_t b, size_t first, float* sums) {
    alignas(64) float g[MOST_TOKENS * CHUNK], u[MOST_TOKENS * CHUNK];
    uint16_t live[CHUNK];
    size_t count = find(b, first, live);
    if (count == 0) return;
    const Unit* tokens = tokens_of(b);
    if (up) Weights::ask_for(up, first, live, std::min(count, ROWS));
    if (known) {
      for (size_t n = 0; n < N; n++)
        for (size_t j = 0; j < count; j++)
          g[n * CHUNK + j] = known[(b * N + n) * I + first + live[j]];
    } else {
      gate_of(tokens, live, count, first, g,
              thresholded ? Rows() : Rows(up ? up : down, first, live, count));
    }
    if (thresholded) count = above(live, count, g);
    if (counts && count)
      __atomic_fetch_add(counts + b, int64_t(count), __ATOMIC_RELAXED);
    if (count == 0) return;
    Weights::ask_for(down, first, live, std::min(count, LIVE));
    if (up) product(up, up_bias, tokens, live, count, first, u, Rows(down, first, live, count));
    for (size_t n = 0; n < N; n++) {
      for (size_t j = 0; j < CHUNK; j++) {
        float v = 0.0f;
        if (j < count) v = up ? rounded<T>(g[n * CHUNK + j] * u[n * CHUNK + j]) : g[n * CHUNK + j];
        u[n * CHUNK + j] = v;
      }
      for (size_t j = 0; z && j < count; j++)
        round_into(z + (b * N + n) * I + first + live[j], u[n * CHUNK + j]);
    }
    Rows after;  // to prefetch: the next chunk's gate, or up if act(gate x) is known
    uint16_t later[CHUNK];
    if (B == 1 && first + CHUNK < I)
      after = Rows(known && up ? up : gate, first + CHUNK, later, find(b, first + CHUNK, later));
    Weights::add(down, first, live, count, u, N, C, sums, after);
  }

  // Lists the chunk's neurons that are chosen for row b (before the threshold) in `live`.
  size_t find(size_t b, size_t first, uint16_t* live) const {
    const size_t here = std::min(CHUNK, I - first);
    size_t count = 0;
    for (size_t j = 0; j < here; j++) {
      live[count] = uint16_t(j);
      count += !chosen || chosen[b * I + first + j];
    }
    return count;
  }

  // Keeps only the neurons above the threshold in `live` and g; returns their number.
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

  // g [B, N, I] = act(gate x) of all neurons.
  void gates(float* g) {
    parallel((I + CHUNK - 1) / CHUNK, threads, [&](size_t task) {
      alignas(64) float part[MOST_TOKENS * CHUNK];
      uint16_t all[CHUNK];
      const size_t first = task * CHUNK, here = std::min(CHUNK, I - first);
      for (size_t j = 0; j < here; j++) all[j] = uint16_t(j);
      for (size_t b = 0; b < B; b++) {
        gate_of(tokens_of(b), all, here, first, part, Rows());
        for (size_t n = 0; n < N; n++)
          std::copy(part + n * CHUNK, part + n * CHUNK + here, g + (b * N + n) * I + first);
      }
    });
  }

  // Marks the `keep` neurons of largest Σ_n |g[n]|, rounded to T; of equal ones, the first.
  void choose(const float* g, uint8_t* mask) {
    thread_local Scratch<uint32_t> score_scratch, rest_scratch;
    uint32_t *scores = score_scratch.take(I), *rest = rest_scratch.take(I);
    constexpr int LOW = 20;  // the histogram of the first pass ignores so many low bits
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
    const size_t wanted = keep - higher;  // how many to take from the bucket, at least one
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
