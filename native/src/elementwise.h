// Going over the features of a row, in whole vectors but for the last.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

REGARD_INLINE Vec sigmoid(Vec x) {
  return reciprocal(exp2(minimum(broadcast(120.f), x * -LOG2_E)) + 1.f);  // the limit keeps the sum finite
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

// f(first, count, full) for vectors that cover [0, width); `full` is a compile-time constant.
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
