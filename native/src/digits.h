// Numbers as three 8-bit digits, for exact products with codes by integer dot products (VNNI): x is approximated by
// step (d0 + 256 d1 + 65536 d2) with an error of at most max |x| / 2^24, the rounding error of float32 for the largest
// x. Sums of codes times digits are integers without any error.
#pragma once

#include "vector.h"

#if defined(__AVX512VNNI__)

namespace REGARD_ISA {
namespace {

constexpr int DIGITS = 3;
constexpr int64_t STEP = 64;           // bytes of codes multiplied at once
constexpr int64_t MOST_COLUMNS = 1 << 16;  // most columns whose sums of byte products are below 2^31
constexpr float LARGEST = 8355000.f;   // largest number whose highest digit fits in 8 bits

// Digits of 128 columns of a row of x, for `STEP` bytes of 4-bit codes. Codes count from 0 in the product; `start`
// corrects for this offset in each lane.
struct Digits {
  __m512i even[DIGITS], odd[DIGITS], start;
};

// The largest |x|; infinity or NaN if x has one.
inline float largest(const float* x, int64_t count) {
  __m512 found = _mm512_setzero_ps();
  for (int64_t j = 0; j < count; j += LANES) {
    const __m512 v = _mm512_abs_ps(reinterpret_cast<__m512>(load(x + j, static_cast<int>(least<int64_t>(LANES, count - j)))));
    found = _mm512_max_ps(v, found);
    if (_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q)) return __builtin_nanf("");
  }
  return _mm512_reduce_max_ps(found);
}

// 64 integers as bytes of each digit.
REGARD_INLINE void take_digits(const __m512i q[4], __m512i digits[DIGITS]) {
  __m512i left[4];
  for (int i = 0; i < 4; ++i) left[i] = q[i];
  const __m512i half = _mm512_set1_epi32(128);
  for (int d = 0; d < DIGITS; ++d) {
    __m512i packed = _mm512_castsi128_si512(_mm512_cvtepi32_epi8(left[0]));
    packed = _mm512_inserti32x4(packed, _mm512_cvtepi32_epi8(left[1]), 1);
    packed = _mm512_inserti32x4(packed, _mm512_cvtepi32_epi8(left[2]), 2);
    packed = _mm512_inserti32x4(packed, _mm512_cvtepi32_epi8(left[3]), 3);
    digits[d] = packed;
    // subtract the signed byte, which stands for -128 to 127
    for (int i = 0; i < 4; ++i) left[i] = _mm512_srai_epi32(_mm512_add_epi32(left[i], half), 8);
  }
}

REGARD_INLINE __m512i whole(const float* x, int64_t at, int64_t count, __m512 per_step) {
  const int many = static_cast<int>(most<int64_t>(0, least<int64_t>(LANES, count - at)));
  return _mm512_cvtps_epi32(_mm512_mul_ps(reinterpret_cast<__m512>(load(x + at, many)), per_step));
}

REGARD_INLINE __m512i combine(const __m512i sums[DIGITS]) {
  return _mm512_add_epi32(sums[0], _mm512_add_epi32(_mm512_slli_epi32(sums[1], 8), _mm512_slli_epi32(sums[2], 16)));
}

// The product of codes with 128 columns: integers below 2^31, 8 columns per lane.
REGARD_INLINE __m512i product(__m512i start, __m512i low, __m512i high, const Digits& x) {
  __m512i sums[DIGITS] = {start, _mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 3
  for (int d = 0; d < DIGITS; ++d)
    sums[d] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[d], low, x.even[d]), high, x.odd[d]);
  return combine(sums);
}

inline void digits_of_row(const float* x, int64_t count, float per_step, int64_t steps, Digits* made) {
  const __m512 factor = _mm512_set1_ps(per_step);
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const __m512i middle = _mm512_set1_epi8(8), none = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s) {
    __m512i q[8], split[4];
    for (int i = 0; i < 8; ++i) q[i] = whole(x, s * 2 * STEP + i * LANES, count, factor);
    for (int i = 0; i < 4; ++i) split[i] = _mm512_permutex2var_epi32(q[2 * i], evens, q[2 * i + 1]);
    take_digits(split, made[s].even);
    for (int i = 0; i < 4; ++i) split[i] = _mm512_permutex2var_epi32(q[2 * i], odds, q[2 * i + 1]);
    take_digits(split, made[s].odd);
    made[s].start = _mm512_sub_epi32(none, product(none, middle, middle, made[s]));
  }
}

}  // namespace
}  // namespace REGARD_ISA

#endif
