// Tensors as Python hands them over: where they are, and the sizes that they have. Structs of
// pointers and 64-bit integers alone, in the order in which `kernels/arguments.py` packs them.
#pragma once

#include "refusals.h"

namespace sirius {

// Contiguous. No tensor is a null pointer and zeros.
template <int RANK>
struct Tensor {
  void* at;
  int64_t size[RANK];

  template <class T>
  T* as() const { return static_cast<T*>(at); }
};

// Its rows are contiguous and `stride` numbers apart.
struct Matrix {
  void* at;
  int64_t rows, columns, stride;

  template <class T>
  const T* as() const { return static_cast<const T*>(at); }
};

// That there is a tensor: some have no memory (torch's `meta`).
inline void present(const char* operand, const void* at) {
  if (!at) refuse(BAD_SIZE, "%s has no memory", operand);
}

// `units`: what its dimensions count. `needed`: its sizes.
template <int RANK>
void shaped(const char* operand, const Tensor<RANK>& has, const char* const (&units)[RANK],
            const int64_t (&needed)[RANK]) {
  present(operand, has.at);
  for (int i = 0; i < RANK; i++) same(operand, units[i], has.size[i], needed[i]);
}

inline void shaped(const char* operand, const Matrix& has, const char* const (&units)[2], int64_t rows,
                   int64_t columns) {
  present(operand, has.at);
  same(operand, units[0], has.rows, rows);
  same(operand, units[1], has.columns, columns);
  if (has.stride < 0) refuse(BAD_SIZE, "%s has rows that lie backwards in memory", operand);
}

// A bias or the like, which need not be.
inline void optional(const char* operand, const Tensor<1>& has, const char* unit, int64_t needed) {
  if (has.at) same(operand, unit, has.size[0], needed);
}

}  // namespace sirius
