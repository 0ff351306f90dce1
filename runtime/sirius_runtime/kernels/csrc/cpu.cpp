// The C interface of the CPU kernels: pointers, sizes and flags, no type of torch's.
//
// Functions return 0, 1 where memory ran out, or 2 where an index names nothing.
#include <functional>
#include <new>

#include "attention.h"
#include "linear.h"
#include "mlp.h"
#include "pointwise.h"

namespace {

using namespace sirius;

enum Status { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2 };

// Calls f with a value of the type of that number: float32, bfloat16, float16.
template <class Call>
int with_type(int type, const Call& f) {
  try {
    if (type == 0) return f(float());
    if (type == 1) return f(bf16());
    return f(fp16());
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}

}  // namespace

extern "C" {

// Up to MOST_LINEARS weights [O, C] of one x.
int sirius_linears(int type, const void* x, int64_t count, const void* const* weights,
                   const int64_t* strides, const void* const* biases, void* const* ys,
                   const int64_t* O, int64_t N, int64_t C, int threads) {
  constexpr int64_t MOST_LINEARS = 8;
  if (count > MOST_LINEARS) return BAD_INDEX;
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    Product<T> all[MOST_LINEARS];
    for (int64_t i = 0; i < count; i++)
      all[i] = {(const T*)weights[i], size_t(strides[i]), (const T*)biases[i], (T*)ys[i],
                size_t(O[i])};
    linears_by_outputs<T>((const T*)x, all, size_t(count), size_t(N), size_t(C), threads);
    return DONE;
  });
}

// A weight [C, O].
int sirius_linear_by_inputs(int type, const void* x, const void* weight, int64_t stride,
                            const void* bias, void* y, int64_t N, int64_t C, int64_t O,
                            int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    linear_by_inputs<T>((const T*)x, (const T*)weight, size_t(stride), (const T*)bias, (T*)y,
                        size_t(N), size_t(C), size_t(O), threads);
    return DONE;
  });
}

int sirius_sparse_linear(int type, const void* x, const void* weight, int64_t stride,
                         const void* bias, const void* norm, float threshold, void* y, void* counts,
                         int64_t B, int64_t N, int64_t C, int64_t O, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    sparse_linear<T>((const T*)x, (const T*)weight, size_t(stride), (const T*)bias,
                     (const float*)norm, threshold, (T*)y, (int64_t*)counts, size_t(B), size_t(N),
                     size_t(C), size_t(O), threads);
    return DONE;
  });
}

int sirius_mlp(int type, int64_t B, int64_t N, int64_t C, int64_t I, const void* x,
               const void* gate, int64_t gate_stride, const void* up, int64_t up_stride,
               const void* down, int64_t down_stride, const void* gate_bias, const void* up_bias,
               const void* down_bias, int act, const void* neurons, int64_t K, int64_t keep,
               int thresholded, float threshold, void* y, void* counts, void* z, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    Mlp<T> mlp;
    mlp.B = size_t(B), mlp.N = size_t(N), mlp.C = size_t(C), mlp.I = size_t(I);
    mlp.x = (const T*)x;
    mlp.gate = (const T*)gate, mlp.up = (const T*)up, mlp.down = (const T*)down;
    mlp.gate_stride = size_t(gate_stride), mlp.up_stride = size_t(up_stride);
    mlp.down_stride = size_t(down_stride);
    mlp.gate_bias = (const T*)gate_bias, mlp.up_bias = (const T*)up_bias;
    mlp.down_bias = (const T*)down_bias;
    mlp.act = Activation(act);
    mlp.neurons = (const int64_t*)neurons, mlp.K = size_t(K);
    mlp.keep = size_t(keep);
    mlp.thresholded = thresholded != 0, mlp.threshold = threshold;
    mlp.y = (T*)y, mlp.counts = (int64_t*)counts, mlp.z = (T*)z;
    mlp.threads = threads;
    return mlp.run() ? DONE : BAD_INDEX;
  });
}

int sirius_attention(int type, int64_t B, int64_t H, int64_t G, int64_t N, int64_t D, int64_t V,
                     int64_t S, int64_t M, const void* q, const void* k, const void* v, void* keys,
                     void* values, void* block_keys, void* block_values, const void* positions,
                     const void* slots, const void* length, const void* mask, int64_t mask_stride,
                     int64_t window, float scale, float softcap, const void* sinks, void* out,
                     int by_tokens, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    Attention<T> own;
    own.B = size_t(B), own.H = size_t(H), own.G = size_t(G), own.N = size_t(N);
    own.D = size_t(D), own.V = size_t(V), own.S = size_t(S), own.M = size_t(M);
    own.q = (const T*)q, own.k = (const T*)k, own.v = (const T*)v;
    own.keys = (T*)keys, own.values = (T*)values;
    own.block_keys = (T*)block_keys, own.block_values = (T*)block_values;
    own.positions = (const int64_t*)positions, own.slots = (const int64_t*)slots;
    own.length = (const int64_t*)length, own.mask = (const int64_t*)mask;
    own.mask_stride = size_t(mask_stride), own.window = window;
    own.scale = scale, own.softcap = softcap, own.sinks = (const T*)sinks;
    own.out = (T*)out, own.by_tokens = by_tokens != 0, own.threads = threads;
    return own.run() ? DONE : BAD_INDEX;
  });
}

int sirius_activity(int type, const void* z, void* y, int64_t N, int64_t I, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    activity<T>((const T*)z, (float*)y, size_t(N), size_t(I), threads);
    return DONE;
  });
}

int sirius_gated(int type, int act, void* g, const void* u, int64_t n, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    gated<T>(Activation(act), (T*)g, (const T*)u, size_t(n), threads);
    return DONE;
  });
}

int sirius_statistic(int type, const void* z, const void* valid, void* y, int64_t B, int64_t N,
                     int64_t I, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    statistic<T>((const T*)z, (const uint8_t*)valid, (float*)y, size_t(B), size_t(N), size_t(I),
                 threads);
    return DONE;
  });
}

int sirius_rms_norm(int type, const void* x, const void* addend, void* total, const void* weight,
                    float epsilon, void* y, int64_t N, int64_t C, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    rms_norm<T>((const T*)x, (const T*)addend, (T*)total, (const T*)weight, epsilon, (T*)y,
                size_t(N), size_t(C), threads);
    return DONE;
  });
}

int sirius_rotate(int type, const void* x, int64_t row, int64_t head, int64_t token,
                  const void* cosine, const void* sine, void* y, int64_t B, int64_t H, int64_t N,
                  int64_t D, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    rotate<T>((const T*)x, row, head, token, (const T*)cosine, (const T*)sine, (T*)y, size_t(B),
              size_t(H), size_t(N), size_t(D), threads);
    return DONE;
  });
}

// Reads `bytes` as fast as the threads can: what the kernels' speed is measured against.
uint64_t sirius_read(const void* from, int64_t bytes, int threads) {
  const size_t tasks = size_t(threads) * 8, words = size_t(bytes) / sizeof(Words) / 8;
  std::atomic<uint64_t> result{0};
  parallel(tasks, threads, [&](size_t task) {
    const char* p = (const char*)from + words * task / tasks * 8 * sizeof(Words);
    const char* end = (const char*)from + words * (task + 1) / tasks * 8 * sizeof(Words);
    Words sums[8] = {};
    for (; p < end; p += 8 * sizeof(Words))
      for (int j = 0; j < 8; j++) {
        Words v;
        memcpy(&v, p + j * sizeof v, sizeof v);
        sums[j] ^= v;
      }
    for (int j = 1; j < 8; j++) sums[0] ^= sums[j];
    for (int i = 0; i < W; i++) result ^= sums[0][i];
  });
  return result;
}

}  // extern "C"
