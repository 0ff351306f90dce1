// The C interface of the CPU kernels: pointers, sizes and flags, without torch's types.
//
// Functions return a Status; if it is not DONE, sirius_reason says why. Every size and index is checked
// here, so that the kernels need not.
#include <new>

#include "attention.h"
#include "linear.h"
#include "mlp.h"
#include "nest.h"
#include "nested_linear.h"
#include "operands.h"
#include "pointwise.h"

namespace {

using namespace sirius;

// Calls f with a value of the type of that code: 0 float32, 1 bfloat16, 2 float16. Catches everything.
template <class Call>
int with_type(int type, const Call& f) {
  reason()[0] = 0;
  try {
    if (type == 0) return f(float()), DONE;
    if (type == 1) return f(bf16()), DONE;
    return f(fp16()), DONE;
  } catch (const Refusal& refusal) {
    return refusal.status;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::exception& error) {
    snprintf(reason(), MOST_WORDS, "%s", error.what());
  } catch (...) {
  }
  return FAILED;
}

// Checks the tokens of a call whose buffers have room for MOST_TOKENS.
void few(const char* operand, int64_t tokens) { between(operand, "tokens", tokens, 1, MOST_TOKENS); }

struct LinearOperands {
  Matrix weight;
  Tensor<1> bias;
  void* y;
};

struct SparseOperands {
  Tensor<3> x;
  Matrix weight;
  Tensor<1> bias;
  void *y, *counts;
};

struct NestedLinearOperands {
  NestedMatrix weight;
  Tensor<1> bias;
  void* y;
};

struct NestedSparseOperands {
  Tensor<3> x;
  NestedMatrix weight;
  Tensor<1> bias;
  void *y, *counts;
};

template <class Weight>
struct MlpOperands {
  Tensor<3> x;
  Weight gate, up, down;
  Tensor<1> gate_bias, up_bias, down_bias;
  Tensor<2> neurons;
  void *y, *counts, *z;
  int64_t total;  // I, where weights may be copies of the chosen neurons' rows; else 0

  int64_t kept() const { return neurons.size[1]; }
};

struct AttentionOperands {
  Tensor<4> q, k, v;
  Tensor<5> keys, values;              // the caches of all layers
  Tensor<4> block_keys, block_values;  // this layer's separate block, or null
  Tensor<2> positions, slots;
  Tensor<1> length;
  Tensor<3> mask;
  Tensor<1> sinks;
  void* out;
};

int64_t neurons_of(const Matrix& gate) { return gate.rows; }
int64_t neurons_of(const NestedMatrix& gate) { return gate.outputs; }

// Whether a weight is a copy of the chosen neurons' rows. Nested by inputs, it then has no groups.
bool copied(const MlpOperands<Matrix>& own, const Matrix& weight) { return own.total && weight.rows != own.total; }
bool copied(const MlpOperands<NestedMatrix>& own, const NestedMatrix& weight) {
  return own.total && (&weight == &own.down ? weight.block == 0 : weight.outputs != own.total);
}

void check_weights(const MlpOperands<Matrix>& own, int64_t I, int64_t C) {
  const auto rows = [&](const Matrix& weight) { return copied(own, weight) ? own.kept() : I; };
  shaped("gate", own.gate, {"neurons", "channels"}, rows(own.gate), C);
  if (own.up.at) shaped("up", own.up, {"neurons", "channels"}, rows(own.up), C);
  shaped("down", own.down, {"neurons", "channels"}, rows(own.down), C);
}

void check_weights(const MlpOperands<NestedMatrix>& own, int64_t I, int64_t C) {
  const auto rows = [&](const NestedMatrix& weight) { return copied(own, weight) ? own.kept() : I; };
  shaped("gate", own.gate, false, rows(own.gate), C);
  if (own.up.at) shaped("up", own.up, false, rows(own.up), C);
  if (copied(own, own.down)) {
    nestable("down", C, I, true);
    shaped("down", own.down, false, C, I);
  } else {
    shaped("down", own.down, true, C, I);
  }
  if (own.up.at) same("up", "planes", own.up.planes, own.gate.planes);
  same("down", "planes", own.down.planes, own.gate.planes);
}

template <class Weight>
void check(const MlpOperands<Weight>& own, int64_t keep) {
  const int64_t B = own.x.size[0], C = own.x.size[2], I = own.total ? own.total : neurons_of(own.gate);
  present("x", own.x.at);
  some("x", "rows", B), few("x", own.x.size[1]), some("x", "channels", C);
  between("x", "tokens of all rows", B * own.x.size[1], 1, INT32_MAX);
  some("gate", "neurons", I);
  check_weights(own, I, C);
  optional("gate_bias", own.gate_bias, "neurons", I);
  optional("up_bias", own.up_bias, "neurons", I);
  optional("down_bias", own.down_bias, "channels", C);
  if (keep < 0 || keep > I)
    refuse(BAD_SIZE, "keep is %lld, not 0 to %lld neurons", (long long)keep, (long long)I);
  if (own.total) present("neurons", own.neurons.at);
  if (!own.neurons.at) return;
  some("neurons", "neurons a row", own.kept());
  same("neurons", "rows", own.neurons.size[0], B);
  const auto* all = own.neurons.template as<int64_t>();
  indices("neurons", all, size_t(B * own.kept()), I, "neurons");
  for (int64_t b = 1; own.total && b < B; b++)
    if (memcmp(all, all + b * own.kept(), size_t(own.kept()) * sizeof *all))
      refuse(BAD_SIZE, "neurons differ between rows, but the weights are those of one choice");
}

void check(const AttentionOperands& own, int64_t layer, int64_t window) {
  const int64_t B = own.q.size[0], H = own.q.size[1], N = own.q.size[2], D = own.q.size[3];
  const int64_t G = own.k.size[1], V = own.v.size[3], S = own.keys.size[3], M = own.mask.size[2];
  present("q", own.q.at);
  some("q", "rows", B), some("q", "heads", H), some("q", "tokens", N), some("q", "numbers a head", D);
  some("k", "heads", G), some("v", "numbers a head", V);
  if (H % G != 0)
    refuse(BAD_SIZE, "k has %lld heads, which do not divide the %lld heads of q", (long long)G,
           (long long)H);
  shaped("k", own.k, {"rows", "heads", "tokens", "numbers a head"}, {B, G, N, D});
  shaped("v", own.v, {"rows", "heads", "tokens", "numbers a head"}, {B, G, N, V});
  const int64_t layers = own.keys.size[0];
  if (layer < 0 || layer >= layers)
    refuse(BAD_INDEX, "layer is %lld, but k_cache has %lld layers", (long long)layer, (long long)layers);
  some("k_cache", "slots", S);
  const char* const cache[] = {"layers", "rows", "heads", "slots", "numbers a head"};
  shaped("k_cache", own.keys, cache, {layers, B, G, S, D});
  shaped("v_cache", own.values, cache, {layers, B, G, S, V});
  some("tree_mask", "slots of the block", M);
  if (own.mask.size[0] != 1) same("tree_mask", "rows", own.mask.size[0], B);
  shaped("tree_mask", own.mask, {"rows", "tokens", "slots of the block"}, {own.mask.size[0], N, M});
  shaped("positions", own.positions, {"rows", "tokens"}, {B, N});
  indices("positions", own.positions.as<int64_t>(), size_t(B * N), INT64_MAX, "positions");
  shaped("length", own.length, {"rows"}, {B});
  indices("length", own.length.as<int64_t>(), size_t(B), S + 1, "lengths that k_cache has room for");
  optional("sinks", own.sinks, "heads", H);
  if (window < 0) refuse(BAD_SIZE, "window is %lld, not 0 or more", (long long)window);
  const bool apart = own.block_keys.at != nullptr;
  const char* const block[] = {"rows", "heads", "slots", "numbers a head"};
  if (apart) {
    shaped("k_block", own.block_keys, block, {B, G, M, D});
    shaped("v_block", own.block_values, block, {B, G, M, V});
  }
  shaped("slots", own.slots, {"rows", "tokens"}, {apart ? 1 : B, N});
  indices("slots", own.slots.as<int64_t>(), size_t((apart ? 1 : B) * N), apart ? M : S, "slots");
}

// Fills in the rest of `mlp`, whose weights are set, and runs it.
template <class T, class Weights, class Weight>
void run(Mlp<T, Weights>& mlp, const MlpOperands<Weight>& own, int act, int64_t keep, int thresholded,
         float threshold, int threads) {
  mlp.B = size_t(own.x.size[0]), mlp.N = size_t(own.x.size[1]), mlp.C = size_t(own.x.size[2]);
  mlp.I = size_t(own.total ? own.total : neurons_of(own.gate));
  mlp.x = own.x.template as<const T>();
  mlp.gate_bias = own.gate_bias.template as<const T>();
  mlp.up_bias = own.up_bias.template as<const T>();
  mlp.down_bias = own.down_bias.template as<const T>();
  mlp.act = Activation(act);
  mlp.neurons = own.neurons.template as<const int64_t>(), mlp.K = size_t(own.kept());
  mlp.keep = size_t(keep);
  mlp.thresholded = thresholded != 0, mlp.threshold = threshold;
  mlp.y = (T*)own.y, mlp.counts = (int64_t*)own.counts, mlp.z = (T*)own.z;
  mlp.threads = bounded(threads);
  mlp.run();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Why this thread's last call failed; may be empty.
const char* sirius_reason() { return reason(); }

// Products of x [N, C] with up to MOST_LINEARS weights [O, C].
int sirius_linears(int type, const void* x, int64_t N, int64_t C, const void* operands, int64_t count,
                   int threads) {
  constexpr int64_t MOST_LINEARS = 8;
  const auto* own = static_cast<const LinearOperands*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    Product<T> all[MOST_LINEARS];
    between("the call", "weights", count, 0, MOST_LINEARS);
    present("x", x), few("x", N), some("x", "channels", C);
    for (int64_t i = 0; i < count; i++) {
      const LinearOperands& one = own[i];
      some("weight", "outputs", one.weight.rows);
      shaped("weight", one.weight, {"outputs", "channels"}, one.weight.rows, C);
      optional("bias", one.bias, "outputs", one.weight.rows);
      all[i] = {one.weight.as<T>(), size_t(one.weight.stride), one.bias.as<const T>(), (T*)one.y,
                size_t(one.weight.rows)};
    }
    linears_by_outputs<T>((const T*)x, all, size_t(count), size_t(N), size_t(C), bounded(threads));
  });
}

// The product of x [N, C] with a weight [C, O].
int sirius_linear_by_inputs(int type, const void* x, int64_t N, int64_t C, const void* operands,
                            int threads) {
  const auto& own = *static_cast<const LinearOperands*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t O = own.weight.columns;
    present("x", x), few("x", N), some("x", "channels", C), some("weight", "outputs", O);
    shaped("weight", own.weight, {"channels", "outputs"}, C, O);
    optional("bias", own.bias, "outputs", O);
    linear_by_inputs<T>((const T*)x, own.weight.as<T>(), size_t(own.weight.stride),
                        own.bias.as<const T>(), (T*)own.y, size_t(N), size_t(C), size_t(O),
                        bounded(threads));
  });
}

int sirius_sparse_linear(int type, const void* operands, float threshold, int threads) {
  const auto& own = *static_cast<const SparseOperands*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t B = own.x.size[0], N = own.x.size[1], C = own.x.size[2], O = own.weight.columns;
    present("x", own.x.at), some("x", "rows", B), few("x", N), some("x", "channels", C);
    some("weight", "outputs", O);
    shaped("weight", own.weight, {"channels", "outputs"}, C, O);
    optional("bias", own.bias, "outputs", O);
    sparse_linear<T>(own.x.as<const T>(), own.weight.as<T>(), size_t(own.weight.stride),
                     own.bias.as<const T>(), threshold, (T*)own.y, (int64_t*)own.counts, size_t(B),
                     size_t(N), size_t(C), size_t(O), bounded(threads));
  });
}

int sirius_mlp(int type, const void* operands, int act, int64_t keep, int thresholded,
               float threshold, int threads) {
  const auto& own = *static_cast<const MlpOperands<Matrix>*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    check(own, keep);
    Mlp<T> mlp;
    mlp.gate = {own.gate.as<T>(), size_t(own.gate.stride), copied(own, own.gate)};
    if (own.up.at) mlp.up = {own.up.as<T>(), size_t(own.up.stride), copied(own, own.up)};
    mlp.down = {own.down.as<T>(), size_t(own.down.stride), copied(own, own.down)};
    run(mlp, own, act, keep, thresholded, threshold, threads);
  });
}

// The same for nested weights.
int sirius_nested_mlp(int type, const void* operands, int act, int64_t keep, int thresholded,
                      float threshold, int threads) {
  const auto& own = *static_cast<const MlpOperands<NestedMatrix>*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    check(own, keep);
    typedef Mlp<T, NestedWeights<T>> Own;
    Own mlp;
    mlp.gate = typename Own::Matrix(own.gate.nested(), false, copied(own, own.gate));
    if (own.up.at) mlp.up = typename Own::Matrix(own.up.nested(), false, copied(own, own.up));
    mlp.down = typename Own::Matrix(own.down.nested(), true, copied(own, own.down));
    run(mlp, own, act, keep, thresholded, threshold, threads);
  });
}

// Products of x [N, C] with up to MOST_LINEARS nested weights [O, C] by outputs.
int sirius_nested_linears(int type, const void* x, int64_t N, int64_t C, const void* operands,
                          int64_t count, int threads) {
  constexpr int64_t MOST_LINEARS = 8;
  const auto* own = static_cast<const NestedLinearOperands*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    NestedProduct<T> all[MOST_LINEARS];
    between("the call", "weights", count, 0, MOST_LINEARS);
    present("x", x), few("x", N), some("x", "channels", C);
    for (int64_t i = 0; i < count; i++) {
      const NestedLinearOperands& one = own[i];
      const int64_t O = one.weight.outputs;
      some("weight", "outputs", O);
      shaped("weight", one.weight, false, O, C);
      optional("bias", one.bias, "outputs", O);
      all[i] = {one.weight.nested(), one.bias.as<const T>(), (T*)one.y, size_t(O)};
    }
    nested_linears<T>((const T*)x, all, size_t(count), size_t(N), size_t(C), bounded(threads));
  });
}

// The product with a nested weight by inputs; if `counts` is not null, over channels above the threshold.
int sirius_nested_by_inputs(int type, const void* operands, float threshold, int threads) {
  const auto& own = *static_cast<const NestedSparseOperands*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t B = own.x.size[0], N = own.x.size[1], C = own.x.size[2], O = own.weight.outputs;
    present("x", own.x.at), some("x", "rows", B), few("x", N), some("x", "channels", C);
    some("weight", "outputs", O);
    shaped("weight", own.weight, true, O, C);
    optional("bias", own.bias, "outputs", O);
    nested_by_inputs<T>(own.x.as<const T>(), own.weight.nested(), own.bias.as<const T>(), threshold,
                        (T*)own.y, (int64_t*)own.counts, size_t(B), size_t(N), size_t(C), size_t(O),
                        bounded(threads));
  });
}

// Converts a nested weight to numbers: by outputs [O, C], or only the rows `ids`; by inputs [C, O].
int sirius_unnest(int type, const void* operands, void* to, int threads) {
  struct Own {
    NestedMatrix weight;
    Tensor<1> ids;
  };
  const auto& own = *static_cast<const Own*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t O = own.weight.outputs, C = own.weight.inputs;
    const bool by_inputs = own.weight.block > 0;
    some("weight", "outputs", O), some("weight", "inputs", C);
    shaped("weight", own.weight, by_inputs, O, C);
    if (by_inputs) return unnest_inputs<T>(own.weight.nested(), size_t(C), size_t(O), (T*)to, bounded(threads));
    const auto* ids = own.ids.as<const int64_t>();
    if (ids) indices("ids", ids, size_t(own.ids.size[0]), O, "rows");
    unnest_rows<T>(own.weight.nested(), ids, size_t(ids ? own.ids.size[0] : O), size_t(C), (T*)to,
                   bounded(threads));
  });
}

// Nests a matrix, whose rows are inputs or outputs, in either layout. Writes both planes, contiguous.
int sirius_nest(int type, const void* operands, int threads) {
  struct Own {
    Matrix matrix;
    int64_t rows_are_inputs, by_inputs, as_q8_0;
    void *to, *found;
  };
  const auto& own = *static_cast<const Own*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const Matrix& given = own.matrix;
    const int64_t O = own.rows_are_inputs ? given.columns : given.rows;
    const int64_t C = own.rows_are_inputs ? given.rows : given.columns;
    some("matrix", "outputs", O), some("matrix", "inputs", C);
    shaped("matrix", given, {"rows", "columns"}, given.rows, given.columns);
    nestable("matrix", O, C, own.by_inputs);
    present("planes", own.to), present("found", own.found);
    *static_cast<Found*>(own.found) = nest<T>({given.as<T>(), size_t(given.stride), bool(own.rows_are_inputs)},
                                              own.by_inputs, size_t(O), size_t(C),
                                              static_cast<uint8_t*>(own.to),
                                              own.as_q8_0 ? Scales::Q8_0 : Scales::DRAFTS, bounded(threads));
  });
}

int sirius_attention(int type, const void* operands, int64_t layer, int64_t window, float scale,
                     float softcap, int by_tokens, int threads) {
  const auto& given = *static_cast<const AttentionOperands*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    check(given, layer, window);
    Attention<T> own;
    own.B = size_t(given.q.size[0]), own.H = size_t(given.q.size[1]);
    own.N = size_t(given.q.size[2]), own.D = size_t(given.q.size[3]);
    own.G = size_t(given.k.size[1]), own.V = size_t(given.v.size[3]);
    own.S = size_t(given.keys.size[3]), own.M = size_t(given.mask.size[2]);
    own.q = given.q.as<const T>(), own.k = given.k.as<const T>(), own.v = given.v.as<const T>();
    const size_t slots = size_t(layer) * own.B * own.G * own.S;  // slots of the layers before this one
    own.keys = given.keys.as<T>() + slots * own.D, own.values = given.values.as<T>() + slots * own.V;
    own.block_keys = given.block_keys.as<T>(), own.block_values = given.block_values.as<T>();
    own.positions = given.positions.as<const int64_t>(), own.slots = given.slots.as<const int64_t>();
    own.length = given.length.as<const int64_t>(), own.mask = given.mask.as<const int64_t>();
    own.mask_stride = given.mask.size[0] == 1 ? 0 : own.N * own.M;
    own.window = window;
    own.scale = scale, own.softcap = softcap, own.sinks = given.sinks.as<const T>();
    own.out = (T*)given.out, own.by_tokens = by_tokens != 0, own.threads = bounded(threads);
    own.run();
  });
}

int sirius_activity(int type, const void* z, void* y, int64_t N, int64_t I, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    present("z", z), some("z", "tokens", N), some("z", "neurons", I);
    activity<T>((const T*)z, (float*)y, size_t(N), size_t(I), bounded(threads));
  });
}

// u may be null, and y, of n numbers, may be g.
int sirius_gated(int type, int act, const void* g, int64_t n, const void* u, int64_t u_size, void* y,
                 int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    if (n) present("gate's products", g), present("the result", y);
    if (u) same("up", "products", u_size, n);
    gated<T>(Activation(act), (const T*)g, (const T*)u, (T*)y, size_t(n), bounded(threads));
  });
}

int sirius_statistic(int type, const void* operands, void* y, int threads) {
  struct Own {
    Tensor<3> z;
    Tensor<2> valid;
  };
  const auto& own = *static_cast<const Own*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t B = own.z.size[0], N = own.z.size[1], I = own.z.size[2];
    present("z", own.z.at), some("z", "rows", B), some("z", "tokens", N), some("z", "neurons", I);
    shaped("valid", own.valid, {"rows", "tokens"}, {B, N});
    statistic<T>(own.z.as<const T>(), own.valid.as<const uint8_t>(), (float*)y, size_t(B), size_t(N),
                 size_t(I), bounded(threads));
  });
}

// x [N, C] has `size` numbers; addend, which may be null, has `addend_size`.
int sirius_rms_norm(int type, const void* x, int64_t size, const void* addend, int64_t addend_size,
                    void* total, const void* weight, int64_t C, float epsilon, void* y, int threads) {
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    present("x", x), present("weight", weight), some("weight", "channels", C);
    if (size % C != 0)
      refuse(BAD_SIZE, "x has %lld numbers, not a multiple of weight's %lld channels", (long long)size,
             (long long)C);
    if (addend) same("addend", "numbers", addend_size, size), present("total", total);
    rms_norm<T>((const T*)x, (const T*)addend, (T*)total, (const T*)weight, epsilon, (T*)y,
                size_t(size / C), size_t(C), bounded(threads));
  });
}

int sirius_rotate(int type, const void* operands, void* y, int threads) {
  struct Own {
    Tensor<4> x;
    int64_t row, head, token;  // strides
    Tensor<4> cosine, sine;
  };
  const auto& own = *static_cast<const Own*>(operands);
  return with_type(type, [&](auto zero) {
    typedef decltype(zero) T;
    const int64_t B = own.x.size[0], H = own.x.size[1], N = own.x.size[2], D = own.x.size[3];
    present("x", own.x.at), some("x", "rows", B), some("x", "heads", H), some("x", "tokens", N);
    some("x", "numbers a head", D);
    if (D % 2) refuse(BAD_SIZE, "x has %lld numbers a head, not an even number", (long long)D);
    if (own.row < 0 || own.head < 0 || own.token < 0) refuse(BAD_SIZE, "x has negative strides");
    const char* const units[] = {"rows", "heads", "tokens", "numbers a head"};
    shaped("cosine", own.cosine, units, {B, 1, N, D});
    shaped("sine", own.sine, units, {B, 1, N, D});
    rotate<T>(own.x.as<const T>(), own.row, own.head, own.token, own.cosine.as<const T>(),
              own.sine.as<const T>(), (T*)y, size_t(B), size_t(H), size_t(N), size_t(D),
              bounded(threads));
  });
}

// Reads `bytes` as fast as the threads can; benchmarks compare the kernels with this bandwidth.
uint64_t sirius_read(const void* from, int64_t bytes, int threads) {
  const size_t tasks = size_t(bounded(threads)) * 8, words = size_t(bytes) / sizeof(Words) / 8;
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
#pragma GCC visibility pop
