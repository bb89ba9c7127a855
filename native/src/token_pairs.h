// Products between the tokens of a block of 16, with features along the lanes, so that nothing is transposed.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

// Lane l of the result is the sum of the lanes of vector l.
template <int S = 1>
REGARD_INLINE Vec sums_of_lanes(Vec (&x)[LANES]) {
  if constexpr (S == LANES) {
    return x[0];
  } else {
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l += 2 * S) {
      exchange<S>(x[l], x[l + S]);
      x[l] += x[l + S];
    }
    return sums_of_lanes<2 * S>(x);
  }
}

// Pairs are computed in quads of 4 x 4 tokens, whose lane sums are taken all at once, or on narrower vectors for a few
// rows of a quad at a time.
constexpr int PAIR_TOKENS = 16, QUAD = 4, QUAD_ROWS = LANES / QUAD;

// Dot products of the tokens from `row` on with the quad from `column` on, numbered 4 i + j, written to `pairs`.
REGARD_INLINE void put_quad(Vec (&sums)[LANES], int row, int column, float* pairs) {
  alignas(64) float found[LANES];
  store(found, sums_of_lanes(sums));
  for (int i = 0; i < QUAD_ROWS; ++i)
    memcpy(pairs + (row + i) * PAIR_TOKENS + column, found + QUAD * i, sizeof(float) * QUAD);
}

enum class Triangle { LOWER, UPPER };

// pairs_ij = x_i . y_j in all quads that intersect the triangle; other pairs are not written. Any width.
template <Triangle TRIANGLE>
void pair_products(int64_t width, const float* x, int64_t ldx, const float* y, int64_t ldy, float* pairs) {
  for (int row = 0; row < PAIR_TOKENS; row += QUAD_ROWS) {
    const int own = row / QUAD * QUAD, first = TRIANGLE == Triangle::UPPER ? own : 0,
              end = TRIANGLE == Triangle::UPPER ? PAIR_TOKENS : own + QUAD;
    for (int column = first; column < end; column += QUAD) {
      Vec sums[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) sums[l] = zero();
      auto add = [&](int64_t d, auto&& take) __attribute__((always_inline)) {
        Vec left[QUAD_ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < QUAD_ROWS; ++i) left[i] = take(x + (row + i) * ldx + d);
#pragma GCC unroll 4
        for (int j = 0; j < QUAD; ++j) {
          const Vec right = take(y + (column + j) * ldy + d);
#pragma GCC unroll 4
          for (int i = 0; i < QUAD_ROWS; ++i) sums[QUAD * i + j] = fma(left[i], right, sums[QUAD * i + j]);
        }
      };
      int64_t d = 0;
      for (; d + LANES <= width; d += LANES)
        add(d, [](const float* p) __attribute__((always_inline)) { return load(p); });
      const int tail = static_cast<int>(width - d);
      if (tail > 0) add(d, [tail](const float* p) __attribute__((always_inline)) { return load(p, tail); });
      put_quad(sums, row, column, pairs);
    }
  }
}

}  // namespace
}  // namespace REGARD_ISA
