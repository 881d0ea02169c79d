// Vectors of floats as wide as the processor's, and the few operations that the step needs.
//
// What is here computes every lane on its own, and sums lanes in one order. With -ffp-contract=off
// and without -ffast-math, the bits of a result depend on the machine, but not on how a loop around
// it was unrolled or cut.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pipespec {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int ACCUMULATORS = 16;  // vectors that a product keeps in registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int ACCUMULATORS = 12;
#else
constexpr int LANES = 4;
constexpr int ACCUMULATORS = 12;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

template <class Vector = Floats>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class Vector>
inline void store(void* to, const Vector& vector) {
  std::memcpy(to, &vector, sizeof vector);
}

// sum + vector * factor, rounded once where the processor can.
inline Floats multiply_add(Floats sum, Floats vector, float factor) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(vector, _mm512_set1_ps(factor), sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(vector, _mm256_set1_ps(factor), sum);
#else
  return sum + vector * factor;
#endif
}

inline float sum_of(Floats vector) {
  float sum = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) sum += vector[lane];
  return sum;
}

inline float largest_of(Floats vector) {
  float largest = vector[0];
  for (int lane = 1; lane < LANES; ++lane)
    if (vector[lane] > largest) largest = vector[lane];
  return largest;
}

// e^x to about two units in the last place (Cephes' expf); 0 below -87, e^88 above 88.
inline Floats exponential(Floats x) {
  const Floats zero = {};
  const Floats bounded = x < -88.0f ? zero - 88.0f : x > 88.0f ? zero + 88.0f : x;
  const Floats scaled = bounded * 1.44269504f;
  const Floats half = scaled < 0.0f ? zero - 0.5f : zero + 0.5f;
  const Ints power = __builtin_convertvector(scaled + half, Ints);
  const Floats whole = __builtin_convertvector(power, Floats);
  const Floats rest = (bounded - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats series = zero + 1.9875691500e-4f;
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  const Floats fraction = (series * rest * rest + rest) + 1.0f;
  const Floats result = fraction * (Floats)((power + 127) << 23);
  return x < -87.0f ? zero : result;
}

// Lanes that are bfloat16 in the upper half of a word.
inline Floats upper(Words words) { return (Floats)(words & 0xffff0000u); }

// To bfloat16, to nearest, ties to even.
inline Halves rounded(Floats vector) {
  const Words words = (Words)vector;
  return __builtin_convertvector((words + 0x7fffu + ((words >> 16) & 1u)) >> 16, Halves);
}

}  // namespace pipespec
