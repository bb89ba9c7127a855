// Small matrix products in registers, for blocked kernels whose blocks are in cache.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

// C (m x n) = [C +] sign A (m x k) B (k x n). A is read one number at a time, element (i, p) at a[i * ai + p * ap], so
// either of its axes may be contiguous; rows of B and C are contiguous along n, ldb and ldc apart. Sizes are arbitrary:
// the last columns are masked, and nothing outside the matrices is accessed.
enum class Into { ZERO, SUM, DIFFERENCE };

template <int ROWS, int VECTORS, Into INTO>
REGARD_INLINE void product_tile(int k, const float* a, int64_t ai, int64_t ap, const float* b, int64_t ldb, float* c,
                                int64_t ldc, int tail) {
  Vec sums[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) sums[i][j] = zero();
  const bool whole = tail == LANES;
  for (int p = 0; p < k; ++p) {
    Vec row[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j)
      row[j] = (j + 1 < VECTORS || whole) ? load(b + p * ldb + j * LANES) : load(b + p * ldb + j * LANES, tail);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = broadcast(a[i * ai + p * ap]);
#pragma GCC unroll 8
      for (int j = 0; j < VECTORS; ++j) sums[i][j] = fma(x, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + i * ldc + j * LANES;
      const bool full = j + 1 < VECTORS || whole;
      Vec value = sums[i][j];
      if (INTO != Into::ZERO) {
        const Vec before = full ? load(to) : load(to, tail);
        value = INTO == Into::SUM ? before + value : before - value;
      }
      if (full)
        store(to, value);
      else
        store(to, value, tail);
    }
}

// Vectors of columns at once, so that their accumulators for all rows, a row of B and a number of A fit in the
// registers.
constexpr int TILE_VECTORS = REGISTERS >= 32 ? 4 : 2;
constexpr int TILE_ROWS = REGISTERS >= 32 ? 6 : 4;

template <int VECTORS, Into INTO>
REGARD_INLINE void product_columns(int m, int k, const float* a, int64_t ai, int64_t ap, const float* b, int64_t ldb,
                                   float* c, int64_t ldc, int tail) {
  int i = 0;
  for (; i + TILE_ROWS <= m; i += TILE_ROWS)
    product_tile<TILE_ROWS, VECTORS, INTO>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, tail);
  for (; i + 2 <= m; i += 2) product_tile<2, VECTORS, INTO>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, tail);
  if (i < m) product_tile<1, VECTORS, INTO>(k, a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, tail);
}

template <Into INTO>
inline void product(int m, int n, int k, const float* a, int64_t ai, int64_t ap, const float* b, int64_t ldb, float* c,
                    int64_t ldc) {
  int j = 0;
  for (; j + TILE_VECTORS * LANES <= n; j += TILE_VECTORS * LANES)
    product_columns<TILE_VECTORS, INTO>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, LANES);
  for (; j + 2 * LANES <= n; j += 2 * LANES)
    product_columns<2, INTO>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, LANES);
  for (; j < n; j += LANES)
    product_columns<1, INTO>(m, k, a, ai, ap, b + j, ldb, c + j, ldc, least(LANES, n - j));
}

// to (columns x rows) = from (rows x columns) transposed; rows of `to` are `ldt` apart.
template <class T>
inline void transpose(int rows, int columns, const T* from, int64_t ldf, float* to, int64_t ldt) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) to[j * ldt + i] = to_float(from[i * ldf + j]);
}

}  // namespace
}  // namespace REGARD_ISA
