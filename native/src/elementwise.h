// Loops over the features of a row, in full vectors except the last.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

REGARD_INLINE Vec sigmoid(Vec x) {
  return reciprocal(exp2(minimum(broadcast(120.f), x * -LOG2_E)) + 1.f);  // the limit keeps the sum finite
}

REGARD_INLINE Vec magnitude(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(x) & 0x7fffffff); }

// softplus and its derivative.
struct Softplus {
  Vec value, slope;
};

REGARD_INLINE Softplus softplus(Vec x) {
  const Vec e = exp(-magnitude(x));
  // log(1 + e) = 2 atanh(e / (2 + e)), relatively accurate for small e too
  const Vec s = e * reciprocal(e + 2.f), square = s * s;
  Vec p = broadcast(0.1400599330663681f);
  p = fma(p, square, broadcast(0.14000903069972992f));
  p = fma(p, square, broadcast(0.2001076340675354f));
  p = fma(p, square, broadcast(0.3333320915699005f));
  const Vec logarithm = 2.f * fma(p * square, s, s);
  const Vec whole = reciprocal(e + 1.f);
  return {maximum(zero(), x) + logarithm, select(reinterpret_cast<IntVec>(x < 0.f), e * whole, whole)};
}

template <bool FULL, class T>
REGARD_INLINE Vec take(const T* p, int count) {
  return FULL ? load(p) : load(p, count);
}
template <bool FULL, class T>
REGARD_INLINE void put(T* p, Vec v, int count) {
  if (FULL)
    store(p, v);
  else
    store(p, v, count);
}

// Calls f(first, count, full) for vectors that cover [0, width); `full` is a compile-time constant.
struct Full {
  static constexpr bool value = true;
};
struct Partial {
  static constexpr bool value = false;
};
template <class F>
REGARD_INLINE void over_vectors(int64_t width, F&& f) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) f(i, LANES, Full{});
  if (i < width) f(i, static_cast<int>(width - i), Partial{});
}

}  // namespace
}  // namespace REGARD_ISA
