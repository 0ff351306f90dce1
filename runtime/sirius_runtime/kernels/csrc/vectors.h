// Vectors of floats, and loading and storing numbers of each type.
//
// GCC's and Clang's vector extensions make one source serve every instruction set; intrinsics are used
// only for instructions that the extensions can't express. The instruction set is chosen at compile
// time: build.py compiles the library once for each that is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sirius {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Floats __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// scalars

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bit_cast<float>(uint32_t(v.bits) << 16); }
inline float to_float(fp16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Reads the exponent as a float's, then scales by the difference of the biases; right for denormals.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t(239) << 23);
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

// Rounds to nearest, ties to even, as torch's conversions do.
inline void round_into(float* to, float v) { *to = v; }
inline void round_into(bf16* to, float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  if ((bits & 0x7fffffff) > 0x7f800000)
    to->bits = 0x7fc0;
  else
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void round_into(fp16* to, float v) {
  const uint32_t bits = bit_cast<uint32_t>(v), sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    to->bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or beyond
    to->bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // becomes a denormal: the addition rounds
    const float sum = bit_cast<float>(magnitude) + 0.5f;
    to->bits = uint16_t(sign | (bit_cast<uint32_t>(sum) - 0x3f000000));
  } else {
    magnitude += 0xfff + ((magnitude >> 13) & 1) - (uint32_t(112) << 23);
    to->bits = uint16_t(sign | magnitude >> 13);
  }
}

// v rounded to T.
template <class T>
inline float rounded(float v) {
  T stored;
  round_into(&stored, v);
  return to_float(stored);
}

// vectors

inline Floats splat(float v) { return Floats{} + v; }

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline Floats load(const bf16* p) {
  Halves v;
  memcpy(&v, p, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}
inline Floats load(const fp16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Floats v;
  for (int i = 0; i < W; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }
inline void store(bf16* p, Floats v) {
#if defined(__AVX512BF16__)
  const __m256bh stored = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &stored, sizeof stored);
#else
  const Words bits = (Words)v, magnitude = bits & 0x7fffffff;
  const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words stored = magnitude > 0x7f800000 ? Words{} + 0x7fc0 : nearest;
  const Halves halves = __builtin_convertvector(stored, Halves);
  memcpy(p, &halves, sizeof halves);
#endif
}
inline void store(fp16* p, Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; i++) round_into(p + i, v[i]);
#endif
}

// The values of v rounded to T.
template <class T>
inline Floats rounded(Floats v) {
  T stored[W];
  store(stored, v);
  return load(stored);
}

// The first n < W values, then zeros; nothing beyond p[n - 1] is read.
template <class T>
inline Floats load_part(const T* p, size_t n) {
  T padded[W] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_part(T* p, Floats v, size_t n) {
  T stored[W];
  store(stored, v);
  memcpy(p, stored, n * sizeof(T));
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float parts[W];
  store(parts, v);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
#endif
}

// Writes the sums of four vectors to four floats.
inline __attribute__((always_inline)) void sum_four(const Floats v[4], float* to) {
#if defined(__AVX2__)
  // Adjacent lanes are added first, so that one vector holds partial sums of all four.
#if defined(__AVX512F__)
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
#else
  const __m256 a = (__m256)v[0], b = (__m256)v[1], c = (__m256)v[2], d = (__m256)v[3];
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; i++) to[i] = sum(v[i]);
#endif
}

}  // namespace sirius
