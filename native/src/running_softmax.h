// Weights of a running softmax along a row of scores, a vector of tokens at a time.
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

constexpr float INFINITE = __builtin_inff();

// Scores and decays of one (row, head) and query.
struct Scores {
  const float* s;
  int64_t token;
  const float* decay;
  int64_t decay_token;
};

// v shifted up by K lanes, with the first K from `fill`.
template <int K>
REGARD_INLINE Vec shifted(Vec v, Vec fill) {
#define REGARD_LANE(i) ((i) >= K ? (i)-K : LANES + (i))
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, fill, REGARD_LANE(0), REGARD_LANE(1), REGARD_LANE(2), REGARD_LANE(3),
                                 REGARD_LANE(4), REGARD_LANE(5), REGARD_LANE(6), REGARD_LANE(7), REGARD_LANE(8),
                                 REGARD_LANE(9), REGARD_LANE(10), REGARD_LANE(11), REGARD_LANE(12), REGARD_LANE(13),
                                 REGARD_LANE(14), REGARD_LANE(15));
#elif defined(__AVX__)
  return __builtin_shufflevector(v, fill, REGARD_LANE(0), REGARD_LANE(1), REGARD_LANE(2), REGARD_LANE(3),
                                 REGARD_LANE(4), REGARD_LANE(5), REGARD_LANE(6), REGARD_LANE(7));
#else
  return __builtin_shufflevector(v, fill, REGARD_LANE(0), REGARD_LANE(1), REGARD_LANE(2), REGARD_LANE(3));
#endif
#undef REGARD_LANE
}

// Inclusive scans over the lanes in log2(LANES) steps: of max(m + g, s), of sums, and of u = a u + e.
template <int K = 1>
REGARD_INLINE void scan_maximum(Vec& m, Vec& g) {
  if constexpr (K < LANES) {
    m = maximum(shifted<K>(m, broadcast(-INFINITE)) + g, m);
    g += shifted<K>(g, zero());
    scan_maximum<2 * K>(m, g);
  }
}
template <int K = 1>
REGARD_INLINE void scan_sum(Vec& x) {
  if constexpr (K < LANES) {
    x += shifted<K>(x, zero());
    scan_sum<2 * K>(x);
  }
}
template <int K = 1>
REGARD_INLINE void scan_linear(Vec& u, Vec& a) {
  if constexpr (K < LANES) {
    u = fma(a, shifted<K>(u, zero()), u);
    a *= shifted<K>(a, broadcast(1.f));
    scan_linear<2 * K>(u, a);
  }
}

REGARD_INLINE Vec load_strided(const float* p, int64_t stride, int count, Vec others) {
  if (stride == 1 && count == LANES) return load(p);
  Vec v = others;
  for (int i = 0; i < count; ++i) v[i] = p[i * stride];
  return v;
}

REGARD_INLINE Vec finite_base(Vec m) {
  return select(reinterpret_cast<IntVec>(m == -INFINITE), zero(), m);
}

// For `count` tokens from `begin` (arrays have room for full vectors): factors a on all earlier weights, own weights e
// and sums u; m and u are carried from token to token. `rescaled` is set at tokens whose factor is not 1. A maximum
// shifted by decay is rounded; the factor compensates for the rounding. A NaN score does not change the maximum, but
// stays in u.
void weigh(const Scores& row, int64_t begin, int count, float* m, float* u, float* a, float* e, float* sums,
           uint8_t* rescaled, float* maxima) {
  const Vec nothing = broadcast(-INFINITE);
  for (int i = 0; i < count; i += LANES) {
    const int here = least(LANES, count - i);
    const Vec s = load_strided(row.s + (begin + i) * row.token, row.token, here, nothing);
    if (row.decay == nullptr && largest(s) <= *m) {
      const Vec weights = exp(s - finite_base(broadcast(*m)));
      Vec total = weights;
      scan_sum(total);
      total += *u;
      *u = total[LANES - 1];
      store(a + i, broadcast(1.f));
      store(e + i, weights);
      store(sums + i, total);
      if (maxima != nullptr) store(maxima + i, broadcast(*m));
      continue;
    }
    Vec gates = zero();
    if (row.decay != nullptr)
      gates = load_strided(row.decay + (begin + i) * row.decay_token, row.decay_token, here, zero());
    Vec running = select(reinterpret_cast<IntVec>(s == s), s, nothing), decayed = gates;
    scan_maximum(running, decayed);
    running = maximum(running, decayed + *m);
    const Vec base = finite_base(running);
    const Vec factors = exp((shifted<1>(running, broadcast(*m)) - base) + gates), weights = exp(s - base);
    Vec total = weights, products = factors;
    scan_linear(total, products);
    total = fma(products, broadcast(*u), total);
    *m = running[LANES - 1];
    *u = total[LANES - 1];
    store(a + i, factors);
    store(e + i, weights);
    store(sums + i, total);
    if (maxima != nullptr) store(maxima + i, running);
    if (rescaled != nullptr)
      for (int j = 0; j < here; ++j) rescaled[i + j] |= a[i + j] != 1.f;
  }
}

void invert(int64_t count, float* u) {
  for (int64_t i = 0; i < count; ++i) u[i] = u[i] > 0.f ? 1.f / u[i] : 0.f;
}

// d = a d + b from the last token to the first, for ROWS rows at once so that their dependency chains overlap. b
// becomes d.
template <int ROWS>
REGARD_INLINE void recur_back(int count, const float* a, float* b, int64_t row, int64_t b_row, float* d) {
  float now[ROWS];
  for (int q = 0; q < ROWS; ++q) now[q] = d[q];
  for (int t = count - 1; t >= 0; --t)
    for (int q = 0; q < ROWS; ++q) {
      now[q] = a[q * row + t] * now[q] + b[q * b_row + t];
      b[q * b_row + t] = now[q];
    }
  for (int q = 0; q < ROWS; ++q) d[q] = now[q];
}

}  // namespace
}  // namespace REGARD_ISA
