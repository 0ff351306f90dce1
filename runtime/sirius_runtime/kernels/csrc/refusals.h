// Checks of a call's operands, and the messages for wrong ones. Sizes and indices are checked here once
// per call; the kernels rely on that.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>

namespace sirius {

enum Status { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2, BAD_SIZE = 3, FAILED = 4 };

constexpr size_t MOST_WORDS = 200;

// Why this thread's last call failed; begins with the operand. Empty if there is no reason to give.
inline char* reason() {
  thread_local char words[MOST_WORDS];
  return words;
}

struct Refusal : std::exception {
  explicit Refusal(Status own) : status(own) {}
  Status status;
};

[[noreturn]] inline __attribute__((cold, format(printf, 2, 3))) void refuse(Status status,
                                                                           const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(reason(), MOST_WORDS, format, values);
  va_end(values);
  throw Refusal(status);
}

// Checks a count. unit: what is counted, in the plural.
inline void same(const char* operand, const char* unit, int64_t has, int64_t needed) {
  if (has != needed)
    refuse(BAD_SIZE, "%s has %lld %s, not %lld", operand, (long long)has, unit, (long long)needed);
}

inline void between(const char* operand, const char* unit, int64_t has, int64_t least, int64_t most) {
  if (has < least || has > most)
    refuse(BAD_SIZE, "%s has %lld %s, not %lld to %lld", operand, (long long)has, unit,
           (long long)least, (long long)most);
}

// Checks that a count is at least 1, and small enough that the product of two does not overflow.
inline void some(const char* operand, const char* unit, int64_t has) {
  between(operand, unit, has, 1, INT32_MAX);
}

// Checks that indices are in 0 … limit - 1. where: what they index.
inline void indices(const char* operand, const int64_t* values, size_t count, int64_t limit,
                    const char* where) {
  for (size_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= limit)
      refuse(BAD_INDEX, "%s holds %lld, an index out of range: there are %lld %s", operand,
             (long long)values[i], (long long)limit, where);
}

}  // namespace sirius
