// Tests over all lanes of a vector, and loads and stores of integer vectors.
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

}  // namespace
}  // namespace REGARD_ISA
