// Sums across the lanes of many vectors at once, by transposing them.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

// Interleaved lanes of a and b, a0 b0 a1 b1 ...: of their first halves, then of their second.
REGARD_INLINE void in_turns(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  *low = reinterpret_cast<Vec>(_mm512_permutex2var_ps(x, first, y));
  *high = reinterpret_cast<Vec>(_mm512_permutex2var_ps(x, second, y));
#elif defined(__AVX__)
  const __m256 x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
  const __m256 even = _mm256_unpacklo_ps(x, y), odd = _mm256_unpackhi_ps(x, y);
  *low = reinterpret_cast<Vec>(_mm256_permute2f128_ps(even, odd, 0x20));
  *high = reinterpret_cast<Vec>(_mm256_permute2f128_ps(even, odd, 0x31));
#elif defined(__SSE2__)
  *low = reinterpret_cast<Vec>(_mm_unpacklo_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
  *high = reinterpret_cast<Vec>(_mm_unpackhi_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  for (int i = 0; i < LANES / 2; ++i) {
    (*low)[2 * i] = a[i], (*low)[2 * i + 1] = b[i];
    (*high)[2 * i] = a[LANES / 2 + i], (*high)[2 * i + 1] = b[LANES / 2 + i];
  }
#endif
}

// Transposes a square of LANES lines: each of log2(LANES) rounds moves one bit of the line's number into the lane's.
template <int ROUNDS = LANES>
REGARD_INLINE void turn(Vec (&lines)[LANES]) {
  if constexpr (ROUNDS > 1) {
    Vec turned[LANES];
#pragma GCC unroll 8
    for (int r = 0; r < LANES / 2; ++r) in_turns(lines[r], lines[r + LANES / 2], &turned[2 * r], &turned[2 * r + 1]);
    turn<ROUNDS / 2>(turned);
#pragma GCC unroll 16
    for (int r = 0; r < LANES; ++r) lines[r] = turned[r];
  }
}

// Lane i of the result is the sum of the lanes of v[i].
template <int COUNT>
REGARD_INLINE Vec sums_of(const Vec (&v)[COUNT]) {
  if constexpr (COUNT == 1) {
    return v[0];
  } else {
    Vec half[COUNT / 2];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT / 2; ++i) {
      Vec low, high;
      in_turns(v[i], v[i + COUNT / 2], &low, &high);
      half[i] = low + high;
    }
    return sums_of(half);
  }
}

// Dot products of LANES rows with one query; with TAIL of the first `count` rows, and the other lanes are undefined.
// The query is padded with zeros to a full vector.
template <bool TAIL, class T>
REGARD_INLINE Vec dots(const T* k, int64_t ldk, int count, const float* q, int64_t width) {
  Vec sums[LANES];
  const int64_t whole = width / LANES * LANES;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    const T* line = k + (TAIL ? least(i, count - 1) : i) * ldk;
    Vec total = zero();
    for (int64_t p = 0; p < whole; p += LANES) total = fma(load(line + p), load(q + p), total);
    sums[i] = total;
  }
  if (whole < width) {
    const Vec x = load(q + whole);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      sums[i] = fma(load(k + (TAIL ? least(i, count - 1) : i) * ldk + whole, static_cast<int>(width - whole)), x,
                    sums[i]);
  }
  return sums_of(sums);
}

}  // namespace
}  // namespace REGARD_ISA
