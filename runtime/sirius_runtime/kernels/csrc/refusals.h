// What a call is refused for, and the words for it. Kernels trust no size and no index that has not
// been compared here, once a call.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>

namespace sirius {

enum Status { DONE = 0, NO_MEMORY = 1, BAD_INDEX = 2, BAD_SIZE = 3, FAILED = 4 };

constexpr size_t MOST_WORDS = 200;

// Why this thread's last call was not done: the operand first. Empty where there is nothing to say.
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

// `unit` is a plural: what is counted.
inline void same(const char* operand, const char* unit, int64_t has, int64_t needed) {
  if (has != needed)
    refuse(BAD_SIZE, "%s has %lld %s, not %lld", operand, (long long)has, unit, (long long)needed);
}

inline void between(const char* operand, const char* unit, int64_t has, int64_t least, int64_t most) {
  if (has < least || has > most)
    refuse(BAD_SIZE, "%s has %lld %s, not %lld to %lld", operand, (long long)has, unit,
           (long long)least, (long long)most);
}

// More than none, and few enough that products of two sizes are far from an overflow.
inline void some(const char* operand, const char* unit, int64_t has) {
  between(operand, unit, has, 1, INT32_MAX);
}

// Whether indices are 0 … limit - 1. `where`: what they point into.
inline void indices(const char* operand, const int64_t* values, size_t count, int64_t limit,
                    const char* where) {
  for (size_t i = 0; i < count; i++)
    if (values[i] < 0 || values[i] >= limit)
      refuse(BAD_INDEX, "%s holds %lld, an index out of range: there are %lld %s", operand,
             (long long)values[i], (long long)limit, where);
}

}  // namespace sirius
