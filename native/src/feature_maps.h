// Feature maps phi of linear attention on blocks of tokens, and their derivatives.
#pragma once

#include "token_blocks.h"

namespace REGARD_ISA {
namespace {

REGARD_INLINE Vec where_positive(Vec x, Vec yes, Vec no) { return select(reinterpret_cast<IntVec>(x > 0.f), yes, no); }
REGARD_INLINE Vec logistic(Vec x) { return 1.f / (1.f + exp(-x)); }

template <int64_t MAP>
REGARD_INLINE Vec feature(Vec x) {
  if constexpr (MAP == REGARD_FEATURES_ELU) return where_positive(x, x + 1.f, exp(x));
  if constexpr (MAP == REGARD_FEATURES_RELU) return maximum(zero(), x);  // NaN stays NaN
  if constexpr (MAP == REGARD_FEATURES_RELU_SQUARED) return maximum(zero(), x) * maximum(zero(), x);
  if constexpr (MAP == REGARD_FEATURES_SIGMOID) return logistic(x);
  if constexpr (MAP == REGARD_FEATURES_EXP) return exp(x);
  if constexpr (MAP == REGARD_FEATURES_SILU) return x * logistic(x);
  return x;
}

template <int64_t MAP>
REGARD_INLINE Vec feature_slope(Vec x) {
  if constexpr (MAP == REGARD_FEATURES_ELU) return where_positive(x, broadcast(1.f), exp(x));
  if constexpr (MAP == REGARD_FEATURES_RELU) return where_positive(x, broadcast(1.f), zero());
  if constexpr (MAP == REGARD_FEATURES_RELU_SQUARED) return 2.f * maximum(zero(), x);
  if constexpr (MAP == REGARD_FEATURES_EXP) return exp(x);
  if constexpr (MAP == REGARD_FEATURES_SIGMOID || MAP == REGARD_FEATURES_SILU) {
    const Vec y = logistic(x);
    return MAP == REGARD_FEATURES_SIGMOID ? y * (1.f - y) : y * (1.f + x * (1.f - y));
  }
  return broadcast(1.f);
}

template <int64_t MAP>
struct FeatureMap {
  static constexpr int64_t value = MAP;
};

template <class F>
REGARD_INLINE void with_feature_map(int64_t map, F&& f) {
  switch (map) {
    case REGARD_FEATURES_ELU: return f(FeatureMap<REGARD_FEATURES_ELU>{});
    case REGARD_FEATURES_RELU: return f(FeatureMap<REGARD_FEATURES_RELU>{});
    case REGARD_FEATURES_RELU_SQUARED: return f(FeatureMap<REGARD_FEATURES_RELU_SQUARED>{});
    case REGARD_FEATURES_SIGMOID: return f(FeatureMap<REGARD_FEATURES_SIGMOID>{});
    case REGARD_FEATURES_EXP: return f(FeatureMap<REGARD_FEATURES_EXP>{});
    case REGARD_FEATURES_SILU: return f(FeatureMap<REGARD_FEATURES_SILU>{});
    default: return f(FeatureMap<REGARD_FEATURES_IDENTITY>{});
  }
}

// phi(scale x) + shift of the first `count` tokens of a block, ld apart, in `to`, which may be `x` itself; zeros after
// the tokens and beyond the width. REGARD_FEATURES_AS_THEY_ARE returns the rows themselves.
inline const float* map_features(int64_t map, float scale, float shift, const float* rows, int count, int width, float* to,
                                 int64_t ld) {
  if (map == REGARD_FEATURES_AS_THEY_ARE) return rows;
  with_feature_map(map, [&](auto phi) __attribute__((always_inline)) {
    for (int i = 0; i < count; ++i)
      for (int64_t d = 0; d < ld; d += LANES) {
        const Vec y = feature<decltype(phi)::value>(scale * load(rows + i * ld + d)) + shift;
        store(to + i * ld + d,
              d + LANES <= width ? y : select(lane_numbers() < static_cast<int>(width - d), y, zero()));
      }
  });
  for (int64_t j = count * ld; j < TOKENS * ld; j += LANES) store(to + j, zero());
  return to;
}

// Turns `grad` from the gradient of phi(scale x) into that of x for the first `count` tokens of a block; zeros after
// them.
inline void differentiate_features(int64_t map, float scale, const float* rows, int count, float* grad, int64_t ld) {
  with_feature_map(map, [&](auto phi) __attribute__((always_inline)) {
    for (int64_t j = 0; j < count * ld; j += LANES)
      store(grad + j, load(grad + j) * (scale * feature_slope<decltype(phi)::value>(scale * load(rows + j))));
  });
  for (int64_t j = count * ld; j < TOKENS * ld; j += LANES) store(grad + j, zero());
}

}  // namespace
}  // namespace REGARD_ISA
