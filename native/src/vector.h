// Vectors of float32 for the instruction set that this file is compiled for. Every kernel source is compiled once for
// each set, inside the namespace REGARD_ISA. Everything here has internal linkage and no standard library templates are
// used: the linker would merge a function compiled for AVX-512 with the baseline's function of the same name.
#pragma once

#include <float.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef REGARD_ISA
#error "compile with -DREGARD_ISA=name"
#endif

#define REGARD_INLINE inline __attribute__((always_inline))

namespace REGARD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int REGISTERS = 16;
#else
constexpr int LANES = 4;
#if defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UIntVec __attribute__((vector_size(LANES * 4)));

template <class T>
struct RemoveReference {
  using type = T;
};
template <class T>
struct RemoveReference<T&> {
  using type = T;
};

template <class T>
REGARD_INLINE T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
REGARD_INLINE T most(T a, T b) {
  return a > b ? a : b;
}
REGARD_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
REGARD_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

REGARD_INLINE Vec broadcast(float x) { return x - Vec{}; }  // x - 0 keeps the sign of -0 and NaN
REGARD_INLINE Vec zero() { return Vec{}; }

REGARD_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
REGARD_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// The first `count` lanes (0 <= count <= LANES), zeros in the others; memory beyond them is not accessed.
REGARD_INLINE Vec load(const float* p, int count) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
#else
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
REGARD_INLINE void store(float* p, Vec v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), reinterpret_cast<__m512>(v));
#else
  for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// bfloat16 is the upper half of a float32. Stores round to nearest even, and NaN stays NaN.
typedef uint16_t bfloat16;

REGARD_INLINE float to_float(float x) { return x; }
REGARD_INLINE float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
REGARD_INLINE bfloat16 to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (x != x) return static_cast<bfloat16>((bits >> 16) | 0x40);
  return static_cast<bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
REGARD_INLINE void from_float(float x, float* p) { *p = x; }
REGARD_INLINE void from_float(float x, bfloat16* p) { *p = to_bfloat16(x); }

REGARD_INLINE Vec load(const bfloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(LANES * 2)));
  Half h;
  __builtin_memcpy(&h, p, sizeof h);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, UIntVec) << 16);
}
REGARD_INLINE Vec load(const bfloat16* p, int count) {
  Vec v{};
  for (int i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}
REGARD_INLINE void store(bfloat16* p, Vec v) {
  typedef uint16_t Half __attribute__((vector_size(LANES * 2)));
  const UIntVec bits = reinterpret_cast<UIntVec>(v);
  const UIntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UIntVec quiet = (bits >> 16) | 0x40;
  const UIntVec is_nan = reinterpret_cast<UIntVec>(v != v);
  const Half h = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), Half);
  __builtin_memcpy(p, &h, sizeof h);
}
REGARD_INLINE void store(bfloat16* p, Vec v, int count) {
  for (int i = 0; i < count; ++i) p[i] = to_bfloat16(v[i]);
}

// a b + c with a single rounding where the processor has FMA (-ffp-contract=fast).
REGARD_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

REGARD_INLINE Vec select(IntVec mask, Vec yes, Vec no) {
  return reinterpret_cast<Vec>((reinterpret_cast<IntVec>(yes) & mask) | (reinterpret_cast<IntVec>(no) & ~mask));
}

// The larger of a and b; b if either is NaN.
REGARD_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return select(reinterpret_cast<IntVec>(a > b), a, b);
#endif
}
REGARD_INLINE Vec minimum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vec>(_mm_min_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return select(reinterpret_cast<IntVec>(a < b), a, b);
#endif
}

REGARD_INLINE float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float total = 0;
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  total = v[0];
  return total;
#endif
}
// The largest lane; NaN lanes may be ignored.
REGARD_INLINE float largest(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  float found = v[0];
  for (int i = 1; i < LANES; ++i) found = v[i] > found ? v[i] : found;
  return found;
#endif
}

// Coefficients of 2^r = 1 + r (c1 + r (c2 + ...)) for |r| <= 1/2, with the least relative error (9e-8) for which 2^0 =
// 1.
constexpr float EXP2_1 = 0.6931469775997527f, EXP2_2 = 0.24022242085357753f, EXP2_3 = 0.05550733742307457f,
                EXP2_4 = 0.009671512641764374f, EXP2_5 = 0.0013264727490419788f;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// 2^x: 0 below -150 (also for -inf), inf from 128 on, NaN for NaN. It rounds by conversion to integers, since
// -ffast-math would remove the addition and subtraction of a large number.
REGARD_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  // infinity reduces to 0, and scaling by 2^whole saturates: nothing is out of range
  const Vec r = reinterpret_cast<Vec>(
      _mm512_reduce_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const Vec whole = x - r;
#else
  // maximum and minimum return their second argument for NaN
  const Vec limited = minimum(broadcast(160.f), maximum(broadcast(-160.f), x));
  const IntVec n = __builtin_convertvector(
      limited + select(reinterpret_cast<IntVec>(limited < 0.f), broadcast(-0.5f), broadcast(0.5f)), IntVec);
  const Vec r = limited - __builtin_convertvector(n, Vec);
#endif
  Vec p = broadcast(EXP2_5);
  p = fma(p, r, broadcast(EXP2_4));
  p = fma(p, r, broadcast(EXP2_3));
  p = fma(p, r, broadcast(EXP2_2));
  p = fma(p, r, broadcast(EXP2_1));
  p = fma(p, r, broadcast(1.f));
#if defined(__AVX512DQ__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(whole)));
#else
  // two factors, since 2^n alone may be out of range where the product is not; NaN stays NaN
  const IntVec half = n >> 1, rest = n - half;
  const Vec first = reinterpret_cast<Vec>((half + 127) << 23), second = reinterpret_cast<Vec>((rest + 127) << 23);
  return p * first * second;
#endif
}
REGARD_INLINE Vec exp(Vec x) { return exp2(x * LOG2_E); }
REGARD_INLINE float exp2(float x) { return exp2(broadcast(x))[0]; }
REGARD_INLINE float exp(float x) { return exp(broadcast(x))[0]; }

// 1 / x to full precision for normal x.
REGARD_INLINE Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
  const Vec y = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return fma(y, fma(-x, y, broadcast(1.f)), y);  // one Newton step: from 14 to 28 bits
#else
  return 1.f / x;
#endif
}

// 1 / x to full precision for normal x, and 0 for infinity.
REGARD_INLINE Vec reciprocal_or_zero(Vec x) {
#if defined(__AVX512F__)
  const Vec y = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return fma(y, minimum(fma(-x, y, broadcast(1.f)), broadcast(1.f)), y);  // infinity times 0 is NaN: minimum gives 1
#else
  return 1.f / x;
#endif
}

// Exchanges lanes of two vectors: a gets the lanes of both whose number lacks bit S, b the lanes whose number has it.
template <int S>
REGARD_INLINE void exchange(Vec& a, Vec& b) {
#define REGARD_FIRST(l) (((l) & S) == 0 ? (l) : LANES + (l)-S)
#define REGARD_SECOND(l) (((l) & S) == 0 ? (l) + S : LANES + (l))
#if defined(__AVX512F__)
#define REGARD_ALL(m) \
  m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7), m(8), m(9), m(10), m(11), m(12), m(13), m(14), m(15)
#elif defined(__AVX__)
#define REGARD_ALL(m) m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7)
#else
#define REGARD_ALL(m) m(0), m(1), m(2), m(3)
#endif
  const Vec first = __builtin_shufflevector(a, b, REGARD_ALL(REGARD_FIRST));
  b = __builtin_shufflevector(a, b, REGARD_ALL(REGARD_SECOND));
  a = first;
#undef REGARD_FIRST
#undef REGARD_SECOND
#undef REGARD_ALL
}

}  // namespace
}  // namespace REGARD_ISA
