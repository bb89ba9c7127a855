// Blocks of 16 tokens in cache, the units of chunked recurrences. Rows are padded with zeros to full vectors, so that
// computations need no masks; only loads and stores know the true widths, dtypes and strides.
#pragma once

#include "regard_recurrence.h"

#include "vector.h"

namespace REGARD_ISA {
namespace {

constexpr int TOKENS = 16;
constexpr int TOKEN_VECTORS = TOKENS / LANES;

// Flushes denormal numbers to zero. Products of decays become denormal on their way to zero, and some processors are a
// hundred times slower on denormals.
struct FlushDenormals {
#if defined(__SSE2__)
  FlushDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
  unsigned before;
#else
  FlushDenormals() {}
#endif
};

// One head of a sequence, starting at one of its features.
struct Rows {
  void* data;
  int64_t dtype, stride;

  Rows(const regard_sequence& from, int64_t batch, int64_t head, int64_t heads, int64_t feature = 0)
      : data(from.data), dtype(from.dtype), stride(from.token_stride) {
    if (data == nullptr) return;
    const int64_t own = head / (heads / from.heads);
    const int64_t offset = batch * from.batch_stride + own * from.head_stride + feature;
    data = static_cast<char*>(data) + offset * (dtype == REGARD_BFLOAT16 ? 2 : 4);
  }
};

template <class X>
inline void load_rows(const X* from, int64_t stride, int rows, int width, float* to, int64_t ld) {
  for (int i = 0; i < rows; ++i) {
    int j = 0;
    for (; j + LANES <= width; j += LANES) store(to + i * ld + j, load(from + i * stride + j));
    if (j < width) store(to + i * ld + j, load(from + i * stride + j, width - j));
  }
}

// The tokens from `first` on: in place if a full block can be read there, otherwise copied to `to`, with zeros after
// the last token and from the width up to ld, in full vectors.
inline const float* load_tokens(const Rows& from, int64_t first, int rows, int width, float* to, int64_t ld) {
  if (from.dtype == REGARD_BFLOAT16) {
    load_rows(static_cast<const bfloat16*>(from.data) + first * from.stride, from.stride, rows, width, to, ld);
  } else {
    const float* data = static_cast<const float*>(from.data) + first * from.stride;
    if (rows == TOKENS && width == ld && from.stride == ld) return data;
    load_rows(data, from.stride, rows, width, to, ld);
  }
  for (int i = 0; i < rows; ++i)
    for (int64_t j = round_up(width, LANES); j < ld; j += LANES) store(to + i * ld + j, zero());
  for (int64_t j = rows * ld; j < TOKENS * ld; j += LANES) store(to + j, zero());
  return to;
}

// Loads the first token only.
inline void load_token(const Rows& from, int width, float* to) {
  if (from.dtype == REGARD_BFLOAT16)
    load_rows(static_cast<const bfloat16*>(from.data), 0, 1, width, to, 0);
  else
    load_rows(static_cast<const float*>(from.data), 0, 1, width, to, 0);
}

inline float load_number(const Rows& from, int64_t token) {
  return from.dtype == REGARD_BFLOAT16 ? to_float(static_cast<const bfloat16*>(from.data)[token * from.stride])
                                       : static_cast<const float*>(from.data)[token * from.stride];
}

template <class X>
inline void store_rows(X* to, int64_t stride, int rows, int width, const float* from, int64_t ld) {
  for (int i = 0; i < rows; ++i) {
    int j = 0;
    for (; j + LANES <= width; j += LANES) store(to + i * stride + j, load(from + i * ld + j));
    if (j < width) store(to + i * stride + j, load(from + i * ld + j), width - j);
  }
}

// Where to write a block of results: directly to the output if a full block fits there, otherwise to `buffer`.
inline float* room_for_tokens(const Rows& to, int64_t first, int rows, int width, float* buffer, int64_t ld) {
  if (to.dtype == REGARD_BFLOAT16 || rows != TOKENS || width != ld || to.stride != ld) return buffer;
  return static_cast<float*>(to.data) + first * to.stride;
}

inline void store_tokens(const Rows& to, int64_t first, int rows, int width, const float* from, int64_t ld) {
  if (to.dtype == REGARD_BFLOAT16)
    store_rows(static_cast<bfloat16*>(to.data) + first * to.stride, to.stride, rows, width, from, ld);
  else
    store_rows(static_cast<float*>(to.data) + first * to.stride, to.stride, rows, width, from, ld);
}

// Transposes a LANES x LANES block.
REGARD_INLINE void transpose_square(const float* from, int64_t ldf, float* to, int64_t ldt) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from + i * ldf);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // a[4 r + c]: column c of each quarter of rows 4 r to 4 r + 3; the 4 x 4 blocks are still to be placed
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), odd_low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88),
                 odd_high = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(to + c * ldt, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(to + (4 + c) * ldt, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(to + (8 + c) * ldt, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(to + (12 + c) * ldt, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
#elif defined(__AVX__)
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * ldf);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d low = _mm256_castps_pd(b[i + j]), high = _mm256_castps_pd(b[i + j + 2]);
      a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * ldt, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(to + (4 + c) * ldt, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
#elif defined(__SSE2__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + ldf), c = _mm_loadu_ps(from + 2 * ldf),
         d = _mm_loadu_ps(from + 3 * ldf);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + ldt, b);
  _mm_storeu_ps(to + 2 * ldt, c);
  _mm_storeu_ps(to + 3 * ldt, d);
#else
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < LANES; ++j) to[j * ldt + i] = from[i * ldf + j];
#endif
}

// to (columns x rows) = from (rows x columns) transposed, both padded to full vectors in both directions.
inline void transpose_padded(int rows, int columns, const float* from, int64_t ldf, float* to, int64_t ldt) {
  for (int i = 0; i < rows; i += LANES)
    for (int j = 0; j < columns; j += LANES) transpose_square(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<R>, Constant<V>, row, vector) for tiles of R rows and V vectors that cover a matrix; rows are a
// multiple of 4. R x V sums stay in registers.
template <class F>
REGARD_INLINE void tiles(int rows, int vectors, F&& f) {
  constexpr int WIDE = REGISTERS >= 32 ? 4 : 2, TALL = REGISTERS >= 32 ? 16 : 8;
  int j = 0;
  for (; j + WIDE <= vectors; j += WIDE)
    for (int i = 0; i < rows; i += 4) f(Constant<4>{}, Constant<WIDE>{}, i, j);
  if constexpr (WIDE > 2)
    for (; j + 2 <= vectors; j += 2) {
      int i = 0;
      for (; i + 8 <= rows; i += 8) f(Constant<8>{}, Constant<2>{}, i, j);
      for (; i < rows; i += 4) f(Constant<4>{}, Constant<2>{}, i, j);
    }
  for (; j < vectors; ++j) {
    int i = 0;
    for (; i + TALL <= rows; i += TALL) f(Constant<TALL>{}, Constant<1>{}, i, j);
    for (; i < rows; i += 4) f(Constant<4>{}, Constant<1>{}, i, j);
  }
}

// sums (R x V vectors) += A (R x depth) B (depth x V vectors); A element (i, p) at a[i * ai + p * ap].
template <int R, int V>
REGARD_INLINE void accumulate(Vec (&sums)[R][V], int depth, const float* a, int64_t ai, int64_t ap, const float* b,
                              int64_t ldb) {
  for (int p = 0; p < depth; ++p) {
    Vec row[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) row[j] = load(b + p * ldb + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const Vec x = broadcast(a[i * ai + p * ap]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = fma(x, row[j], sums[i][j]);
    }
  }
}

template <int R, int V>
REGARD_INLINE void clear(Vec (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = zero();
}

template <int R, int V>
REGARD_INLINE void put(const Vec (&sums)[R][V], float* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(c + i * ldc + j * LANES, sums[i][j]);
}

REGARD_INLINE IntVec lane_numbers() {
  IntVec v{};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) v[i] = i;
  return v;
}

}  // namespace
}  // namespace REGARD_ISA
