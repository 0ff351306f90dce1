// Tensors as Python passes them: addresses and sizes. The structs contain only pointers and 64-bit
// integers, in the order in which `kernels/arguments.py` packs them.
#pragma once

#include "nested.h"
#include "refusals.h"

namespace sirius {

// A contiguous tensor. Python's None is a null pointer with zero sizes.
template <int RANK>
struct Tensor {
  void* at;
  int64_t size[RANK];

  template <class T>
  T* as() const { return static_cast<T*>(at); }
};

// A matrix with contiguous rows, which begin `stride` numbers apart.
struct Matrix {
  void* at;
  int64_t rows, columns, stride;

  template <class T>
  const T* as() const { return static_cast<const T*>(at); }
};

// A nested weight [outputs, inputs] with 1 or 2 planes. Strides in bytes: `plane` between the planes,
// `row` between rows and, by inputs, `block` between groups of 32 inputs (by outputs it is 0).
struct NestedMatrix {
  void* at;
  int64_t planes, outputs, inputs, plane, row, block;

  Nested nested() const {
    const auto* high = static_cast<const uint8_t*>(at);
    return {high, planes == 2 ? high + plane : nullptr, size_t(row), size_t(block)};
  }
};

// Checks that a tensor has memory: torch's `meta` tensors have none.
inline void present(const char* operand, const void* at) {
  if (!at) refuse(BAD_SIZE, "%s has no memory", operand);
}

// Checks a tensor's sizes. units: what each dimension counts; needed: the required sizes.
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
  if (has.stride < 0) refuse(BAD_SIZE, "%s has a negative stride", operand);
}

// Checks that a matrix of these sizes can be nested.
inline void nestable(const char* operand, int64_t outputs, int64_t inputs, bool by_inputs) {
  if (inputs % NEST || (by_inputs && outputs % NEST))
    refuse(BAD_SIZE, "%s has %lld outputs and %lld inputs, not multiples of 32", operand,
           (long long)outputs, (long long)inputs);
}

inline void shaped(const char* operand, const NestedMatrix& has, bool by_inputs, int64_t outputs,
                   int64_t inputs) {
  present(operand, has.at);
  same(operand, "outputs", has.outputs, outputs);
  same(operand, "inputs", has.inputs, inputs);
  between(operand, "planes", has.planes, 1, 2);
  nestable(operand, outputs, inputs, by_inputs);
  if (by_inputs != (has.block > 0)) refuse(BAD_SIZE, "%s is nested in the other layout", operand);
  if (has.plane < 0 || has.row < 0 || has.block < 0)
    refuse(BAD_SIZE, "%s has negative strides", operand);
}

// Checks an optional vector, such as a bias.
inline void optional(const char* operand, const Tensor<1>& has, const char* unit, int64_t needed) {
  if (has.at) same(operand, unit, has.size[0], needed);
}

}  // namespace sirius
