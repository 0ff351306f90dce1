// Outputs that several tasks add to: each task has sums of its own, added up in a fixed order.
#pragma once

#include <algorithm>
#include <vector>

#include "products.h"
#include "threads.h"

namespace sirius {

// Memory that is kept between calls: no call allocates what an earlier one could.
template <class V>
struct Scratch {
  V* take(size_t n) {
    if (own.size() < n + 64 / sizeof(V)) own.resize(n + 64 / sizeof(V));
    const uintptr_t at = reinterpret_cast<uintptr_t>(own.data());
    return reinterpret_cast<V*>((at + 63) & ~uintptr_t(63));
  }

 private:
  std::vector<V> own;
};

// How many parts work is cut into: enough that a thread held up costs little. Not a matter of how
// many tokens there are, so that they don't change a token's sums.
inline size_t parts(size_t units, int threads) {
  const size_t wanted = size_t(threads) * 8;
  return std::max<size_t>(1, std::min(units, wanted));
}

// y[n][o] = Σ_part sums[part][n][o] + bias[o], of type T; sums laid out by Meet<T>::place, each
// [N, padded(O)]. `apart`: the sum is rounded to T before the bias is added, as torch does where a
// bias is a sum of its own.
template <class T>
void finish(float* sums, size_t count, size_t N, size_t O, const T* bias, bool apart, T* y,
            int threads) {
  const size_t width = padded(O), slab = 1024, slabs = (O + slab - 1) / slab;
  if (count * N * O < 200000) threads = 1;  // less than a region costs
  parallel(N * slabs, threads, [&](size_t task) {
    const size_t n = task / slabs, begin = task % slabs * slab;
    const size_t end = std::min(O, begin + slab), stop = std::min(width, begin + slab);
    float* total = sums + n * width;
    for (size_t part = 1; part < count; part++) {
      const float* more = total + part * N * width;
      for (size_t c = begin; c < stop; c += W) store(total + c, load(total + c) + load(more + c));
    }
    T* to = y + n * O;
    for (size_t c = begin; c < end; c++) {
      float v = total[Meet<T>::place(c)];
      if (bias) v = (apart ? rounded<T>(v) : v) + to_float(bias[c]);
      round_into(to + c, v);
    }
  });
}

}  // namespace sirius
