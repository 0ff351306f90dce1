// Cached tree attention over the occupied slots.
//
// A task computes some tokens' queries for all heads that share a key/value head, one query per lane.
// It loops over blocks of slots with an online softmax (Milakov and Gimelshein, arXiv 1805.02867).
// Blocks begin at fixed slots, and slots that a query does not see add zero to its sums, so that a
// token's result is bit-equal alone and in a chain.
#pragma once

#include <cmath>

#include "activations.h"
#include "lanes.h"
#include "sums.h"

namespace sirius {

template <class T>
struct Attention {
  size_t B, H, G, N, D, V;       // rows, heads, key/value heads, tokens, dimension of keys, of values
  size_t S, M;                   // slots of the cache and of the block
  const T *q, *k, *v;            // [B, H, N, D], [B, G, N, D], [B, G, N, V]
  T *keys, *values;              // the layer's caches: [B, G, S, D], [B, G, S, V]
  T *block_keys, *block_values;  // a separate block [B, G, M, D], [B, G, M, V]; or null
  const int64_t *positions, *length;  // [B, N], [B]
  const int64_t* slots;          // where K/V are written: [B, N] of the caches, or [N] of the block
  const T* sinks;                // [H], or null: a score that every query's softmax includes
  const int64_t* mask;           // [B or 1, N, M]
  size_t mask_stride;            // from a row to the next; 0 if all rows share one mask
  int64_t window;                // 0 for none
  float scale, softcap;          // softcap: 0 for none
  T* out;                        // [B, H, N, V]; or, by tokens, [B, N, H, V]
  bool by_tokens;
  int threads;

  // Writes the tokens' K/V to their slots, then attends. The caller has checked the slots.
  void run() {
    const size_t size = block_keys ? M : S;
    T *const own_keys = block_keys ? block_keys : keys;
    T *const own_values = block_keys ? block_values : values;
    for (size_t bg = 0; bg < B * G; bg++)
      for (size_t n = 0; n < N; n++) {
        const size_t slot = size_t(slots[block_keys ? n : bg / G * N + n]), from = bg * N + n;
        memcpy(own_keys + (bg * size + slot) * D, k + from * D, D * sizeof(T));
        memcpy(own_values + (bg * size + slot) * V, v + from * V, V * sizeof(T));
      }
    attend_all();
  }

 private:
  // Tokens of a task: enough for 16 queries.
  size_t span() const { return std::max<size_t>(1, 16 / (H / G)); }

  void attend_all() {
    const size_t tiles = (N + span() - 1) / span();
    parallel(B * G * tiles, threads, [&](size_t task) {
      attend(task / tiles / G, task / tiles % G, task % tiles * span());
    });
  }

  static constexpr size_t BLOCK = 64;  // slots

  // Sets rows[0 … count) to the keys or values, of `size` numbers each, of the slots from `slot` on:
  // in the cache below `history`, then in the separate block, if any. The last one is repeated up to
  // rows[BLOCK - 1].
  void pick(const T* cache, const T* block, size_t bg, size_t slot, size_t count, size_t history,
            size_t size, const T** rows) const {
    const size_t cached = block && slot + count > history ? std::max(history, slot) - slot : count;
    const T* from = cache + (bg * S + slot) * size;
    for (size_t j = 0; j < cached; j++) rows[j] = from + j * size;
    for (size_t j = cached; j < count; j++)
      rows[j] = block + (bg * M + slot + j - history) * size;
    for (size_t j = count; j < BLOCK; j++) rows[j] = rows[count - 1];
  }

  // A task's buffers. A column of a query's sums is at Multiply<T>::place(column).
  struct Running {
    Scratch<X<T>> queries, shares;
    Scratch<float> keys, scores, hidden, sums, highest, total, factor;
  };

  void attend(size_t b, size_t g, size_t first) {
    thread_local Running own;
    const size_t shared = H / G, tokens = std::min(span(), N - first), Q = shared * tokens;
    const size_t lanes = round_up(Q, W);
    X<T>* queries = own.queries.take(Lanes<T>::channels(D) * lanes);
    std::fill_n(queries, Lanes<T>::channels(D) * lanes, Multiply<T>::from_float(0.0f));
    for (size_t i = 0; i < Q; i++)
      Lanes<T>::put_query(q + ((b * H + g * shared + i / tokens) * N + first + i % tokens) * D, D, i,
                          lanes, queries);
    const Layout layout = outputs(Q, V);
    float *sums = own.sums.take(layout.size()), *scores = own.scores.take(BLOCK * lanes);
    float *highest = own.highest.take(lanes), *total = own.total.take(lanes);
    float *factor = own.factor.take(lanes), *hidden = own.hidden.take(BLOCK * lanes);
    float* floats = own.keys.take(KEYS * D);
    X<T>* shares = own.shares.take(BLOCK * lanes * Lanes<T>::QUERY);
    std::fill_n(sums, layout.size(), 0.0f);
    for (size_t i = 0; i < lanes; i++) {
      const bool sink = sinks && i < Q;
      highest[i] = sink ? to_float(sinks[g * shared + i / tokens]) : -INFINITY;
      total[i] = sink ? 1.0f : 0.0f;
    }

    const size_t history = size_t(length[b]), bg = b * G + g;
    const size_t end = block_keys ? history + M : std::min(S, history + M);
    for (size_t slot = start(b, first, tokens, history); slot < end; slot += BLOCK) {
      const size_t count = std::min(BLOCK, end - slot), used = round_up(count, KEYS);
      const bool partly = !all_seen(b, first, tokens, slot, history);
      // A block that no token sees would add zeros.
      bool seen[BLOCK];
      if (partly && !look(b, first, tokens, slot, count, history, lanes, hidden, seen)) continue;
      const T* rows[BLOCK];
      pick(keys, block_keys, bg, slot, count, history, D, rows);
      for (size_t j = 0; j < used; j += KEYS) {
        if (slot + BLOCK + j + KEYS <= history) {  // prefetch the next block's keys and values
          ask_all(keys + (bg * S + slot + BLOCK + j) * D, KEYS * D * sizeof(T));
          ask_all(values + (bg * S + slot + BLOCK + j) * V, KEYS * V * sizeof(T));
        }
        Lanes<T>::scores(rows + j, queries, D, lanes, floats, scores + j * lanes);
      }
      softmax(scores, used, partly ? hidden : nullptr, lanes, highest, total, factor);
      for (size_t i = 0; i < Q; i++)
        for (size_t begin = 0; begin < V && factor[i] != 1.0f; begin += layout.width) {
          float* at = sums + layout.at(i, begin);
          for (size_t c = 0; c < layout.width; c += W) store(at + c, load(at + c) * factor[i]);
        }
      for (size_t j = 0; j < used; j += 2)
        Lanes<T>::put_shares(scores + j * lanes, lanes, shares + j * lanes);
      pick(values, block_values, bg, slot, count, history, V, rows);
      if (partly) {  // a slot that no token sees may hold NaN, and zero times NaN is NaN
        const T* known = rows[std::find(seen, seen + count, true) - seen];
        for (size_t j = 0; j < BLOCK; j++)
          if (!seen[std::min(j, count - 1)]) rows[j] = known;
      }
      accumulate<T>(rows, count, {shares, Lanes<T>::QUERY, lanes}, Q, 0, V, sums, V);
    }
    for (size_t i = 0; i < Q; i++) {
      const size_t head = g * shared + i / tokens, token = first + i % tokens;
      T* to = out + (by_tokens ? (b * N + token) * H + head : (b * H + head) * N + token) * V;
      const float whole = total[i] > 0.0f ? total[i] : 1.0f;
      for (size_t begin = 0; begin < V; begin += layout.width) {
        const float* from = sums + layout.at(i, begin);
        const size_t here = std::min(layout.width, V - begin);
        for (size_t c = 0; c < here; c++) round_into(to + begin + c, from[Multiply<T>::place(c)] / whole);
      }
    }
  }

  // The first slot that any of the tokens may see, rounded down to a block.
  size_t start(size_t b, size_t first, size_t tokens, size_t history) const {
    if (!window) return 0;
    int64_t least = int64_t(history);
    for (size_t n = first; n < first + tokens; n++)
      least = std::min(least, positions[b * N + n] - window + 1);
    return least <= 0 ? 0 : size_t(least) / BLOCK * BLOCK;
  }

  // Whether each of the tokens sees the whole block of slots from `slot` on.
  bool all_seen(size_t b, size_t first, size_t tokens, size_t slot, size_t history) const {
    if (slot + BLOCK > history) return false;
    for (size_t n = first; n < first + tokens; n++) {
      const int64_t position = positions[b * N + n];
      if (position < int64_t(slot + BLOCK) - 1) return false;
      if (window && position - int64_t(slot) >= window) return false;
    }
    return true;
  }

  // hidden [count padded to KEYS, lanes]: 0 where a query's token sees the slot, else minus infinity.
  // seen [count]: whether any token sees the slot. Returns whether any token sees any of the slots.
  bool look(size_t b, size_t first, size_t tokens, size_t slot, size_t count, size_t history,
            size_t lanes, float* hidden, bool* seen) const {
    std::fill_n(hidden, round_up(count, KEYS) * lanes, -INFINITY);
    std::fill_n(seen, count, false);
    bool any = false;
    for (size_t n = 0; n < tokens; n++) {
      const int64_t position = positions[b * N + first + n];
      const int64_t* depth = mask + b * mask_stride + (first + n) * M;
      for (size_t j = 0; j < count; j++) {
        const size_t at = slot + j;
        const int64_t distance = at < history ? position - int64_t(at) : depth[at - history];
        if (distance < 0 || (window && distance >= window)) continue;
        any = seen[j] = true;
        for (size_t h = 0; h < H / G; h++) hidden[j * lanes + h * tokens + n] = 0.0f;
      }
    }
    return any;
  }

  // Replaces scores [count, lanes] by e^(score - highest), or zero where hidden; updates `highest` and
  // `total`. factor [lanes]: by which the caller must multiply earlier sums.
  void softmax(float* scores, size_t count, const float* hidden, size_t lanes, float* highest,
               float* total, float* factor) const {
    if (softcap != 0.0f)
      for (size_t j = 0; j < count * lanes; j++)
        scores[j] = std::tanh(scores[j] * scale / softcap) * softcap / scale;
    const Floats nothing = splat(-INFINITY);
    for (size_t lane = 0; lane < lanes; lane += W) {
      const Floats before = load(highest + lane);
      Floats top = before;
      for (size_t j = 0; j < count; j++) {
        float* at = scores + j * lanes + lane;
        Floats score = load(at) * scale;
        // A hidden score may be NaN.
        if (hidden) score = load(hidden + j * lanes + lane) == 0.0f ? score : nothing;
        store(at, score);
        top = score > top ? score : top;
      }
      // A query that has not seen any slot yet gets zeros: avoid infinity - infinity.
      const Floats most = top == nothing ? Floats{} : top;
      Floats sum = {};
      for (size_t j = 0; j < count; j++) {
        float* at = scores + j * lanes + lane;
        const Floats score = load(at);
        Floats e = exp(score - most);
        if (hidden) e = score == nothing ? Floats{} : e;
        store(at, e);
        sum += e;
      }
      const Floats moved = before == top ? splat(1.0f) : exp(before - most);
      store(factor + lane, moved);
      store(total + lane, load(total + lane) * moved + sum);
      store(highest + lane, top);
    }
  }
};

}  // namespace sirius
