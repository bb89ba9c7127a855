// Tests over all lanes of a vector, loads and stores of integer vectors, and bytes as integers.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

REGARD_INLINE bool any(IntVec mask) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= mask[i];
  return all != 0;
#endif
}

REGARD_INLINE IntVec load(const int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
REGARD_INLINE void store(int32_t* p, IntVec v) { __builtin_memcpy(p, &v, sizeof v); }

// LANES bytes as integers, with intrinsics since compilers would convert them one by one.
REGARD_INLINE IntVec signed_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
#if defined(__SSE2__)
  const __m128i none = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(static_cast<int>(word));
  return reinterpret_cast<IntVec>(_mm_unpacklo_epi16(none, _mm_unpacklo_epi8(none, bytes))) >> 24;
#else
  return reinterpret_cast<IntVec>((UIntVec{} + word) << UIntVec{24, 16, 8, 0}) >> 24;
#endif
#endif
}

}  // namespace
}  // namespace REGARD_ISA
