// Outputs to which several tasks contribute: each task has its own sums, which are added in a fixed
// order.
#pragma once

#include <algorithm>
#include <new>

#include "products.h"
#include "threads.h"

namespace sirius {

// An uninitialised buffer that is kept between calls, and only grows.
template <class V>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { drop(); }

  V* take(size_t n) {
    if (n > room || EXACT) {
      drop();
      own = static_cast<V*>(::operator new(n * sizeof(V), ALIGNED));
      room = n;
    }
    return own;
  }

 private:
  void drop() {
    if (own) ::operator delete(own, ALIGNED);
    own = nullptr;
    room = 0;
  }

  static constexpr std::align_val_t ALIGNED{64};
#if defined(__SANITIZE_ADDRESS__)
  static constexpr bool EXACT = true;  // allocate anew, so that the sanitizer sees reads past the end
#else
  static constexpr bool EXACT = false;
#endif
  V* own = nullptr;
  size_t room = 0;
};

// Into how many parts to split work: enough that a delayed thread costs little. It does not depend on
// the number of tokens, so that a token's sums are added in the same order for any number.
inline size_t parts(size_t units, int threads) {
  const size_t wanted = size_t(threads) * 8;
  return std::max<size_t>(1, std::min(units, wanted));
}

// The layout in which `accumulate` leaves its sums.
template <class T>
struct PlainSums {
  static constexpr size_t UNIT = PAD;  // `place` permutes columns only within so many
  static Layout layout(size_t N, size_t O) { return outputs(N, O); }
  static size_t place(size_t column) { return Multiply<T>::place(column); }
};

// y[n][o] = Σ_part sums[part][n][o] + bias[o], rounded to T; Order is the layout of the sums. apart:
// the sum is rounded to T before the bias is added, as torch does if adding the bias is its own call.
template <class Order, class T>
void finish(float* sums, size_t count, size_t N, size_t O, const T* bias, bool apart, T* y,
            int threads) {
  const Layout layout = Order::layout(N, O);
  const size_t slab = std::min<size_t>(layout.width, 1024), slabs = (O + slab - 1) / slab;
  if (count * N * O < 200000) threads = 1;  // starting more threads would take longer
  parallel(N * slabs, threads, [&](size_t task) {
    const size_t n = task / slabs, begin = task % slabs * slab, end = std::min(O, begin + slab);
    const size_t block = begin / layout.width * layout.width;
    float* total = sums + layout.at(n, block) + (begin - block);
    for (size_t part = 1; part < count; part++) {
      const float* more = total + part * layout.size();
      for (size_t c = 0; c < round_up(end - begin, Order::UNIT); c += W)
        store(total + c, load(total + c) + load(more + c));
    }
    T* to = y + n * O + begin;
    for (size_t c = 0; c < end - begin; c++) {
      float v = total[Order::place(c)];
      if (bias) v = (apart ? rounded<T>(v) : v) + to_float(bias[begin + c]);
      round_into(to + c, v);
    }
  });
}

}  // namespace sirius
