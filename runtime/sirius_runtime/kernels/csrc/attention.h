// Cached tree attention of few tokens, over the slots in use and no others.
//
// A task has some tokens' queries of the heads that share a key/value head, and goes through the
// slots in blocks, with the running maximum and sum of a softmax (Milakov and Gimelshein, arXiv
// 1805.02867). Blocks begin at fixed slots and what a query does not see adds zero to its sums, so
// that a token's result is the same to the bit alone and in a chain.
#pragma once

#include <cmath>

#include "activations.h"
#include "sums.h"

namespace sirius {

template <class T>
struct Attention {
  size_t B, H, G, N, D, V;       // rows, heads, key/value heads, tokens, sizes of keys and values
  size_t S, M;                   // slots of the cache and of the block
  const T *q, *k, *v;            // [B, H, N, D], [B, G, N, D], [B, G, N, V]
  T *keys, *values;              // the layer's caches: [B, G, S, D], [B, G, S, V]
  T *block_keys, *block_values;  // the block, where it stands apart: [B, G, M, D], …; else null
  const int64_t *positions, *length;  // [B, N], [B]
  const int64_t* slots;          // [B, N] of the caches; or [N] of a block that stands apart
  const T* sinks;                // [H], or null: scores of a token without a value, seen by all
  const int64_t* mask;           // [B or 1, N, M]
  size_t mask_stride;            // of a row; 0 where all share one
  int64_t window;                // 0 for none
  float scale, softcap;          // softcap: 0 for none
  T* out;                        // [B, H, N, V]
  int threads;

  // Writes the tokens' K/V to their slots, then attends. Returns false for a slot that is not there.
  bool run() {
    const size_t size = block_keys ? M : S;
    T *const own_keys = block_keys ? block_keys : keys;
    T *const own_values = block_keys ? block_values : values;
    for (size_t i = 0; i < (block_keys ? N : B * N); i++)
      if (slots[i] < 0 || slots[i] >= int64_t(size)) return false;
    for (size_t bg = 0; bg < B * G; bg++)
      for (size_t n = 0; n < N; n++) {
        const size_t slot = size_t(slots[block_keys ? n : bg / G * N + n]), from = bg * N + n;
        memcpy(own_keys + (bg * size + slot) * D, k + from * D, D * sizeof(T));
        memcpy(own_values + (bg * size + slot) * V, v + from * V, V * sizeof(T));
      }
    attend_all();
    return true;
  }

 private:
  void attend_all() {
    const size_t tiles = (N + TILE - 1) / TILE;
    parallel(B * G * tiles, threads, [&](size_t task) {
      attend(task / tiles / G, task / tiles % G, task % tiles * TILE);
    });
  }

  // Where the key or the value of a slot is: `size` numbers.
  const T* row(const T* cache, const T* block, size_t bg, size_t slot, size_t history,
               size_t size) const {
    if (block && slot >= history) return block + (bg * M + slot - history) * size;
    return cache + (bg * S + slot) * size;
  }

  static constexpr size_t BLOCK = 64;  // slots

  // What a task holds between blocks of slots; a query's sums lie as Meet<T>::place says.
  struct Running {
    Scratch<X<T>> queries, shares;
    Scratch<float> scores, sums, highest, total;
  };

  void attend(size_t b, size_t g, size_t first) {
    thread_local Running own;
    const size_t shared = H / G, tokens = std::min(TILE, N - first), Q = shared * tokens;
    const Layout layout = outputs(Q, V);
    X<T>* queries = own.queries.take(inputs(Q, D).size());
    const auto query = [&](size_t i) {
      return q + ((b * H + g * shared + i / tokens) * N + first + i % tokens) * D;
    };
    take_activations<T>(query, Q, D, queries);
    float *sums = own.sums.take(layout.size()), *scores = own.scores.take(Q * BLOCK);
    float *highest = own.highest.take(Q), *total = own.total.take(Q);
    X<T>* shares = own.shares.take(Q * BLOCK);
    std::fill_n(sums, layout.size(), 0.0f);
    for (size_t i = 0; i < Q; i++) {
      highest[i] = sinks ? to_float(sinks[g * shared + i / tokens]) : -INFINITY;
      total[i] = sinks ? 1.0f : 0.0f;
    }

    const size_t history = size_t(length[b]), bg = b * G + g;
    const size_t end = block_keys ? history + M : std::min(S, history + M);
    for (size_t slot = start(b, first, tokens, history); slot < end; slot += BLOCK) {
      const size_t count = std::min(BLOCK, end - slot);
      const T* rows[BLOCK];
      for (size_t j = 0; j < count; j++) rows[j] = row(keys, block_keys, bg, slot + j, history, D);
      dots<T>(rows, count, queries, Q, D, scores, BLOCK);
      float hidden[TILE][BLOCK];
      for (size_t n = 0; n < tokens; n++) look(b, first + n, slot, count, history, hidden[n]);
      for (size_t i = 0; i < Q; i++) {
        float* at = scores + i * BLOCK;
        const float factor = softmax(at, hidden[i % tokens], &highest[i], &total[i]);
        for (size_t begin = 0; begin < V && factor != 1.0f; begin += layout.width) {
          float* at = sums + layout.at(i, begin);
          for (size_t c = 0; c < layout.width; c += W) store(at + c, load(at + c) * factor);
        }
        for (size_t j = 0; j < BLOCK; j += PAD)
          Meet<T>::from_floats(at + j, shares + i * BLOCK + j);
      }
      for (size_t j = 0; j < count; j++)
        rows[j] = row(values, block_values, bg, slot + j, history, V);
      accumulate<T>(rows, count, shares, BLOCK, Q, 0, V, sums, V);
    }
    for (size_t i = 0; i < Q; i++) {
      T* to = out + ((b * H + g * shared + i / tokens) * N + first + i % tokens) * V;
      const float whole = total[i] > 0.0f ? total[i] : 1.0f;
      for (size_t c = 0; c < V; c++) {
        const size_t block = c / layout.width * layout.width;
        const float sum = sums[layout.at(i, block) + Meet<T>::place(c - block)];
        round_into(to + c, sum / whole);
      }
    }
  }

  // The first slot that one of the tokens may see, rounded down to a block.
  size_t start(size_t b, size_t first, size_t tokens, size_t history) const {
    if (!window) return 0;
    int64_t least = int64_t(history);
    for (size_t n = first; n < first + tokens; n++)
      least = std::min(least, positions[b * N + n] - window + 1);
    return least <= 0 ? 0 : size_t(least) / BLOCK * BLOCK;
  }

  // Of the slots from `slot` on: 0 for those that token n of row b sees, else minus infinity.
  void look(size_t b, size_t n, size_t slot, size_t count, size_t history, float* hidden) const {
    const int64_t position = positions[b * N + n];
    const int64_t* depth = mask + b * mask_stride + n * M;
    for (size_t j = 0; j < BLOCK; j++) {
      const size_t at = slot + j;
      int64_t distance = -1;
      if (j < count) distance = at < history ? position - int64_t(at) : depth[at - history];
      hidden[j] = distance >= 0 && (!window || distance < window) ? 0.0f : -INFINITY;
    }
  }

  // Turns BLOCK scores into e^(score - highest), zero where hidden; moves `highest` and `total` on.
  // Returns the factor that earlier sums are to be multiplied by.
  float softmax(float* scores, const float* hidden, float* highest, float* total) const {
    if (softcap != 0.0f)
      for (size_t j = 0; j < BLOCK; j++)
        scores[j] = std::tanh(scores[j] * scale / softcap) * softcap / scale;
    Floats top = splat(-INFINITY);
    for (size_t j = 0; j < BLOCK; j += W) {
      // A slot beyond `count` holds what an earlier block left there: no number, maybe.
      const Floats own = load(hidden + j);
      const Floats score = own == 0.0f ? load(scores + j) * scale : own;
      store(scores + j, score);
      top = score > top ? score : top;
    }
    float most = *highest;
    for (int i = 0; i < W; i++) most = std::max(most, float(top[i]));
    if (most == -INFINITY) {  // nothing seen yet
      std::fill(scores, scores + BLOCK, 0.0f);
      return 1.0f;
    }
    const float factor = *highest == most ? 1.0f : std::exp(*highest - most);
    *highest = most;
    Floats sum = {};
    for (size_t j = 0; j < BLOCK; j += W) {
      const Floats given = load(scores + j);
      const Floats e = given == -INFINITY ? Floats{} : exp(given - most);
      store(scores + j, e);
      sum += e;
    }
    *total = *total * factor + sirius::sum(sum);
    return factor;
  }
};

}  // namespace sirius
