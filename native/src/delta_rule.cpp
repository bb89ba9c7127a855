// The delta rule in chunks (arXiv 2406.06484, section 3; with a gate 2412.06464, section 3). With S the state before a
// chunk, D_ij = exp(sum of g over (j, i]), f_i = exp(sum of g up to i), h_j = exp(sum of g after j), F = exp(sum of g):
//
//   (I + B A) U = B (V - (f K) S),  A_ij = k_i . D_ij k_j for j < i,  B = diag(beta)
//   O = (f Q) S + P U,              P_ij = q_i . D_ij k_j for j <= i (exclusive: j < i)
//   S <- F S + (h K)^T U
//
// Chunks are sequential; heads are independent, and so are the value columns of U, O and S. Exponents are sums over
// the segment itself, never differences, and every exponential is of a number <= 0. Backward reads the states before
// every SEGMENT tokens and recomputes everything in between:
//
//   dU = P^T dO + (h K) dS,  (I + A^T B) W = dU,  dV = G = B W,  dbeta = rowsum(W Y) with U = B Y
//   dA = -G U^T,  dP = dO U^T,  d(f Q) = dO S^T,  d(f K) = -G S^T,  d(h K) = U dS^T
//   dS <- F dS + (f Q)^T dO - (f K)^T G

#include "regard_delta_rule.h"

#include "token_pairs.h"
#include "vector.h"

#include "parallel.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

constexpr int SEGMENT = REGARD_DELTA_RULE_SEGMENT;

// Allocates from a workspace, or from one thread's part of it.
struct Memory {
  char* at;

  explicit Memory(const regard::Workspace& workspace, size_t offset = 0)
      : at(static_cast<char*>(workspace.memory) + offset) {}
  float* take(size_t count) {
    float* found = reinterpret_cast<float*>(at);
    at += bytes(count);
    return found;
  }
  static size_t bytes(size_t count) { return regard::Workspace::bytes_of<float>(count); }
};

enum class Gate { NONE, SCALAR, VECTOR };

// Tokens in a chunk: longer chunks have more pairs, shorter ones access the state more often. Chunks, features and
// value columns are padded to multiples of C (with zeros where it matters), so that inner loops have no tails.
constexpr int C = 16;

inline int64_t padded(int64_t width) { return round_up(width, C); }

// Flushes denormal numbers to zero. Products of decays become denormal on their way to zero, and some processors are a
// hundred times slower on denormals.
struct FlushDenormals {
#if defined(__SSE2__)
  FlushDenormals() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before); }
  unsigned before;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

REGARD_INLINE IntVec lane_numbers() {
  IntVec lanes{};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

// Calls f(offset, count) for the vectors of a row.
template <class F>
REGARD_INLINE void for_vectors(int64_t width, F&& f) {
  int64_t at = 0;
  for (; at + LANES <= width; at += LANES) f(at, LANES);
  if (at < width) f(at, static_cast<int>(width - at));
}

template <class T>
REGARD_INLINE Vec load_some(const T* p, int count) {
  return count == LANES ? load(p) : load(p, count);
}
template <class T>
REGARD_INLINE void store_some(T* p, Vec v, int count) {
  if (count == LANES)
    store(p, v);
  else
    store(p, v, count);
}

template <class From, class To>
inline void copy_rows(int rows, int64_t width, const From* from, int64_t ldf, To* to, int64_t ldt) {
  for (int i = 0; i < rows; ++i)
    for_vectors(width, [&](int64_t at, int some) {
      store_some(to + i * ldt + at, load_some(from + i * ldf + at, some), some);
    });
}

inline void fill_rows(int64_t rows, int64_t width, float* to, int64_t ldt) {
  for (int64_t i = 0; i < rows; ++i) memset(to + i * ldt, 0, static_cast<size_t>(width) * sizeof(float));
}

// Prefetches rows to the second-level cache. Streams that jump between heads and tensors are too short for the hardware
// prefetcher.
template <class T>
REGARD_INLINE void prefetch_rows(int rows, int64_t width, const T* from, int64_t ldf) {
  for (int i = 0; i < rows; ++i)
    for (int64_t at = 0; at < width; at += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(from + i * ldf + at, 0, 2);
}

// A LANES x LANES square is transposed by exchanging its off-diagonal quarters, then those of the quarters, and so on.
template <int S>
REGARD_INLINE void exchange_all(Vec (&x)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if ((i & S) == 0) exchange<S>(x[i], x[i + S]);
}

__attribute__((noinline)) void transpose_square(const float* from, int64_t ldf, float* to, int64_t ldt) {
  Vec x[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) x[i] = load(from + i * ldf);
  exchange_all<1>(x);
  exchange_all<2>(x);
  if constexpr (LANES >= 8) exchange_all<4>(x);
  if constexpr (LANES >= 16) exchange_all<8>(x);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(to + i * ldt, x[i]);
}

inline void transpose_rows(int64_t rows, int64_t columns, const float* from, int64_t ldf, float* to, int64_t ldt) {
  for (int64_t i = 0; i < rows; i += LANES)
    for (int64_t j = 0; j < columns; j += LANES) transpose_square(from + i * ldf + j, ldf, to + j * ldt + i, ldt);
}

// C rows as padded float32: in place if they already are, otherwise copied and padded with zeros.
template <class T>
inline const float* as_float(int count, int64_t width, const T* from, int64_t ldf, float* own, int64_t* ld) {
  if constexpr (sizeof(T) == sizeof(float))
    if (count == C && width % C == 0) {
      *ld = ldf;
      return from;
    }
  *ld = padded(width);
  for (int i = 0; i < C; ++i)
    for (int64_t at = 0; at < *ld; at += LANES) {
      const int64_t some = i < count ? most<int64_t>(0, least<int64_t>(LANES, width - at)) : 0;
      store(own + i * *ld + at, some == 0 ? zero() : load_some(from + i * ldf + at, static_cast<int>(some)));
    }
  return own;
}

// Sums of products, tile by tile in registers. A term is A B with A (rows x depth), element (i, p) at
// a[i * ai + p * ap], so either of its axes may be contiguous; rows of B are ldb apart. LOWER and UPPER are triangular
// squares of tokens.
enum class Part { ALL, LOWER, UPPER };

template <Part PART, bool NEGATIVE = false>
struct Term {
  int depth;  // 0 for no term
  const float* a;
  int64_t ai, ap;
  const float* b;
  int64_t ldb;

  template <int R, int V>
  REGARD_INLINE void add(Vec (&sums)[R][V], int64_t row, int64_t column) const {
    const int from = PART == Part::UPPER ? static_cast<int>(row) : 0;
    const int to = PART == Part::LOWER ? least(static_cast<int>(row) + R, depth) : depth;
    for (int p = from; p < to; ++p) {
      Vec x[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) x[j] = load(b + p * ldb + column + j * LANES);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec factor = broadcast(a[(row + i) * ai + p * ap]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] = NEGATIVE ? sums[i][j] - factor * x[j] : sums[i][j] + factor * x[j];
      }
    }
  }
};

// Initial value of a sum: zero, rows, or rows of the state decayed over a chunk.
struct Nothing {
  template <int R, int V>
  REGARD_INLINE void begin(Vec (&sums)[R][V], int64_t, int64_t) const {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = zero();
  }
};
struct Rows {
  const float* x;
  int64_t ld;

  template <int R, int V>
  REGARD_INLINE void begin(Vec (&sums)[R][V], int64_t row, int64_t column) const {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] = load(x + (row + i) * ld + column + j * LANES);
  }
};
template <Gate GATE>
struct Decayed {
  const float* x;
  int64_t ld;
  const float* total;

  template <int R, int V>
  REGARD_INLINE void begin(Vec (&sums)[R][V], int64_t row, int64_t column) const {
    Rows{x, ld}.begin(sums, row, column);
    if constexpr (GATE != Gate::NONE)
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] *= total[GATE == Gate::VECTOR ? row + i : 0];
  }
};

template <int R, int V, class To, class Start, class... Terms>
REGARD_INLINE void combine_columns(int64_t rows, int64_t column, To* to, int64_t ldt, const Start& start,
                                   const Terms&... terms) {
  for (int64_t row = 0; row < rows; row += R) {
    Vec sums[R][V];
    start.begin(sums, row, column);
    (terms.add(sums, row, column), ...);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) store(to + (row + i) * ldt + column + j * LANES, sums[i][j]);
  }
}

// to = start + terms; rows and columns are multiples of C. `to` may be the initial value itself.
template <class To, class Start, class... Terms>
__attribute__((noinline)) void combine(int64_t rows, int64_t columns, To* to, int64_t ldt, const Start& start,
                                       const Terms&... terms) {
  int64_t j = 0;
  if constexpr (REGISTERS >= 32) {
    for (; j + 4 * LANES <= columns; j += 4 * LANES) combine_columns<4, 4>(rows, j, to, ldt, start, terms...);
    for (; j + 2 * LANES <= columns; j += 2 * LANES) combine_columns<8, 2>(rows, j, to, ldt, start, terms...);
    if constexpr (LANES == C)
      if (j < columns) combine_columns<16, 1>(rows, j, to, ldt, start, terms...);
  } else {
    for (; j < columns; j += 2 * LANES) combine_columns<4, 2>(rows, j, to, ldt, start, terms...);
  }
}

// Half a chunk of y = start + terms - A u, u = beta y, with A strictly triangular and u of the other half known or not
// needed yet.
template <int V, bool REVERSE, class Start, class... Terms>
REGARD_INLINE void substitute(int64_t row, int64_t column, const float* a, const float* beta, float* y, float* u,
                              int64_t ld, const Start& start, const Terms&... terms) {
  constexpr int R = C / 2;
  constexpr int AI = REVERSE ? 1 : C, AP = REVERSE ? C : 1;
  Vec sums[R][V];
  start.begin(sums, row, column);
  (terms.add(sums, row, column), ...);
  if (row == (REVERSE ? 0 : R)) {
    const int other = R - static_cast<int>(row);
    Term<Part::ALL, true>{R, a + other * AP, AI, AP, u + other * ld, ld}.add(sums, row, column);
  }
#pragma GCC unroll 8
  for (int s = 0; s < R; ++s) {
    const int p = REVERSE ? R - 1 - s : s;
    const Vec rate = broadcast(beta[row + p]);
    Vec known[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      const int64_t at = (row + p) * ld + column + j * LANES;
      known[j] = rate * sums[p][j];
      if (y != nullptr) store(y + at, sums[p][j]);
      store(u + at, known[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
      if (REVERSE ? i < p : i > p) {
        const Vec factor = broadcast(a[(row + i) * AI + (row + p) * AP]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] = sums[i][j] - factor * known[j];
      }
  }
}

template <int V, bool REVERSE, class Start, class... Terms>
REGARD_INLINE void solve_columns(int64_t column, const float* a, const float* beta, float* y, float* u, int64_t ld,
                                 const Start& start, const Terms&... terms) {
  substitute<V, REVERSE>(REVERSE ? C / 2 : 0, column, a, beta, y, u, ld, start, terms...);
  substitute<V, REVERSE>(REVERSE ? 0 : C / 2, column, a, beta, y, u, ld, start, terms...);
}

// Solves y = start + terms - A u with u = beta y for a chunk, A (C x C) strictly lower triangular, or its transpose,
// from the last row up (REVERSE). y is stored if not null.
template <bool REVERSE, class Start, class... Terms>
__attribute__((noinline)) void solve(int64_t columns, const float* a, const float* beta, float* y, float* u, int64_t ld,
                                     const Start& start, const Terms&... terms) {
  int64_t j = 0;
  if constexpr (REGISTERS >= 32)
    for (; j + 2 * LANES <= columns; j += 2 * LANES) solve_columns<2, REVERSE>(j, a, beta, y, u, ld, start, terms...);
  for (; j < columns; j += LANES) solve_columns<1, REVERSE>(j, a, beta, y, u, ld, start, terms...);
}

// One head of one row of the batch, and some of its value columns.
template <class T>
struct Head {
  const T *q, *k, *v;
  const float *log_decay, *beta;
  int64_t ldq, ldk, ldv, ldg, ld_beta;
  int width, columns;
  bool inclusive;

  void prefetch(int64_t start, int count) const {
    if (q != nullptr) prefetch_rows(count, width, q + start * ldq, ldq);
    prefetch_rows(count, width, k + start * ldk, ldk);
    prefetch_rows(count, columns, v + start * ldv, ldv);
  }
};

template <class T>
Head<T> head_of(const regard_delta_rule_args* args, int64_t pair, int64_t first_column, int columns) {
  const int64_t b = pair / args->heads, h = pair % args->heads;
  const auto at = [&](const int64_t* strides) { return b * strides[0] + h * strides[1]; };
  Head<T> head;
  head.q = args->q == nullptr ? nullptr : static_cast<const T*>(args->q) + at(args->q_strides);
  head.k = static_cast<const T*>(args->k) + at(args->k_strides);
  head.v = static_cast<const T*>(args->v) + at(args->v_strides) + first_column;
  head.log_decay = args->log_decay == nullptr ? nullptr : args->log_decay + at(args->log_decay_strides);
  head.beta = args->beta + at(args->beta_strides);
  head.ldq = args->q_strides[2];
  head.ldk = args->k_strides[2];
  head.ldv = args->v_strides[2];
  head.ldg = args->log_decay_strides[2];
  head.ld_beta = args->beta_strides[2];
  head.width = static_cast<int>(args->width);
  head.columns = columns;
  head.inclusive = args->inclusive != 0;
  return head;
}

// The value-independent part of a chunk: products between its tokens, and decays to and from its borders.
template <class T, Gate GATE>
struct Chunk {
  int count;
  const float *q, *k, *q_in, *k_in, *k_out;  // q, k; f q, f k, h k
  int64_t ldq, ldk, ld_in, ldq_in;           // ld_in is that of k_in and k_out
  float *pairs, *reads;                      // A and P, C apart
  float *between;                            // D (scalar gates)
  float *from_start, *to_end, *each, *total; // f, h, exp(g), F: one number per token or a row of ld
  float *beta;
  int64_t ld;  // of feature rows computed here

  float *own_q, *own_k, *own_q_in, *own_k_in, *own_k_out, *k_transposed;

  static size_t bytes(int64_t width) {
    const int64_t ld = padded(width);
    return 9 * Memory::bytes(C * ld) + 3 * Memory::bytes(C * C) + 2 * Memory::bytes(ld);
  }

  Chunk(Memory& memory, int64_t width) : ld(padded(width)) {
    own_q = memory.take(C * ld);
    own_k = memory.take(C * ld);
    own_q_in = memory.take(C * ld);
    own_k_in = memory.take(C * ld);
    own_k_out = memory.take(C * ld);
    k_transposed = memory.take(C * ld);
    from_start = memory.take(C * ld);
    to_end = memory.take(C * ld);
    each = memory.take(C * ld);
    pairs = memory.take(C * C);
    reads = memory.take(C * C);
    between = memory.take(C * C);
    total = memory.take(ld);
    beta = memory.take(ld);
  }

  // Prepares the chunk of tokens [start, start + count); P and f q only if `read`.
  void prepare(const Head<T>& head, int64_t start, int tokens, bool read) {
    count = tokens;
    for (int i = 0; i < C; ++i) beta[i] = i < count ? head.beta[(start + i) * head.ld_beta] : 0.f;
    k = as_float(count, head.width, head.k + start * head.ldk, head.ldk, own_k, &ldk);
    q = k;
    ldq = ldk;
    if (read) q = as_float(count, head.width, head.q + start * head.ldq, head.ldq, own_q, &ldq);
    if constexpr (GATE == Gate::VECTOR) {
      transpose_rows(C, ld, k, ldk, k_transposed, C);
    } else {
      pair_products<Triangle::LOWER>(head.width, k, ldk, k, ldk, pairs);
      if (read) pair_products<Triangle::LOWER>(head.width, q, ldq, k, ldk, reads);
    }
    if constexpr (GATE == Gate::NONE) {
      k_in = k_out = k;
      ld_in = ldk;
      q_in = q;
      ldq_in = ldq;
    } else {
      if constexpr (GATE == Gate::SCALAR) {
        scalar_gates(head.log_decay + start * head.ldg, head.ldg);
        decay_pairs(pairs);
        if (read) decay_pairs(reads);
      } else {
        vector_gates(head.log_decay + start * head.ldg, head.ldg, head.width);
        vector_pairs(head.width, head.inclusive, read);
      }
      k_in = own_k_in;
      k_out = own_k_out;
      q_in = own_q_in;
      ld_in = ldq_in = ld;
      scale(from_start, k, ldk, own_k_in);
      scale(to_end, k, ldk, own_k_out);
      if (read) scale(from_start, q, ldq, own_q_in);
    }
    if (read) mask(reads, head.inclusive);
  }

  // Zeros the part above the diagonal, and the diagonal unless inclusive.
  void mask(float* square, bool inclusive) {
    const IntVec lanes = lane_numbers();
    for (int i = 0; i < C; ++i)
      for (int j = i / LANES * LANES; j < C; j += LANES) {
        const IntVec kept = lanes + j < (inclusive ? i + 1 : i);
        store(square + i * C + j, select(kept, load(square + i * C + j), zero()));
      }
  }

  void decay_pairs(float* square) {
    for (int i = 0; i < C; ++i)
      for (int j = 0; j <= i; j += LANES)
        store(square + i * C + j, load(square + i * C + j) * load(between + i * C + j));
  }

  // Row i of `to` is row i of `from` times factor i, a number or a row.
  void scale(const float* factors, const float* from, int64_t ldf, float* to) {
    for (int i = 0; i < C; ++i)
      for (int64_t at = 0; at < ld; at += LANES) {
        const Vec by = GATE == Gate::SCALAR ? broadcast(factors[i]) : load(factors + i * ld + at);
        store(to + i * ld + at, by * load(from + i * ldf + at));
      }
  }

  void scalar_gates(const float* g, int64_t ldg) {
    float gates[C];
    float sum_so_far = 0, sum_after = 0;
    for (int i = 0; i < C; ++i) {
      gates[i] = i < count ? g[i * ldg] : 0.f;
      from_start[i] = sum_so_far += gates[i];
    }
    for (int i = C - 1; i >= 0; --i) {
      to_end[i] = sum_after;
      sum_after += gates[i];
    }
    for (int i = 0; i < C; i += LANES) {
      store(from_start + i, exp(load(from_start + i)));
      store(to_end + i, exp(load(to_end + i)));
    }
    total[0] = from_start[C - 1];
    const IntVec lanes = lane_numbers();
    for (int j = 0; j < C; j += LANES) {
      Vec segment = zero();  // sum over (lane, i]
      for (int i = j; i < C; ++i) {
        segment = select(lanes + j < i, segment + gates[i], segment);
        store(between + i * C + j, exp(segment));
      }
    }
  }

  void vector_gates(const float* g, int64_t ldg, int width) {
    for_vectors(width, [&](int64_t at, int some) {
      Vec running = zero();
      for (int i = 0; i < C; ++i) {
        const Vec gate = i < count ? load_some(g + i * ldg + at, some) : zero();
        running += gate;
        store(from_start + i * ld + at, exp(running));
        store(each + i * ld + at, exp(gate));
      }
      store(total + at, load(from_start + (C - 1) * ld + at));
      running = zero();
      for (int i = C - 1; i >= 0; --i) {
        store(to_end + i * ld + at, exp(running));
        if (i < count) running += load_some(g + i * ldg + at, some);
      }
    });
  }

  // A and P feature by feature: a vector of keys, one per lane, decays from query to query.
  void vector_pairs(int width, bool inclusive, bool read) {
    memset(pairs, 0, C * C * sizeof(float));
    memset(reads, 0, C * C * sizeof(float));
    int d = 0;
    for (; d + 4 <= width; d += 4) vector_pairs_of<4>(d, inclusive, read);
    for (; d < width; ++d) vector_pairs_of<1>(d, inclusive, read);
  }
  template <int FEATURES>
  void vector_pairs_of(int d, bool inclusive, bool read) {
    const IntVec lanes = lane_numbers();
    for (int j = 0; j < C; j += LANES) {
      Vec keys[FEATURES], decayed[FEATURES];
#pragma GCC unroll 4
      for (int e = 0; e < FEATURES; ++e) {
        keys[e] = load(k_transposed + (d + e) * C + j);
        decayed[e] = zero();
      }
      for (int i = j; i < C; ++i) {
        const IntVec here = lanes + j == i;
        Vec pair = load(pairs + i * C + j), seen = load(reads + i * C + j);
#pragma GCC unroll 4
        for (int e = 0; e < FEATURES; ++e) {
          decayed[e] *= each[i * ld + d + e];
          pair = fma(broadcast(k[i * ldk + d + e]), decayed[e], pair);
          const Vec after = select(here, keys[e], decayed[e]);
          if (read) seen = fma(broadcast(q[i * ldq + d + e]), inclusive ? after : decayed[e], seen);
          decayed[e] = after;
        }
        store(pairs + i * C + j, pair);
        store(reads + i * C + j, seen);
      }
    }
  }
};

// Computes Y = V - (f K) S - A U and U = B Y of a chunk. y may be null.
template <class T, Gate GATE>
void write_values(const Head<T>& head, const Chunk<T, GATE>& chunk, int64_t start, const float* state, int64_t lds,
                  float* own_v, float* y, float* u) {
  int64_t ldv;
  const float* v = as_float(chunk.count, head.columns, head.v + start * head.ldv, head.ldv, own_v, &ldv);
  solve<false>(padded(head.columns), chunk.pairs, chunk.beta, y, u, lds, Rows{v, ldv},
               Term<Part::ALL, true>{head.width, chunk.k_in, chunk.ld_in, 1, state, lds});
}

// Computes S after a chunk: F S + (h K)^T U.
template <class T, Gate GATE>
void write_state(const Head<T>& head, const Chunk<T, GATE>& chunk, const float* u, const float* before, float* after,
                 int64_t lds) {
  combine(chunk.ld, padded(head.columns), after, lds, Decayed<GATE>{before, lds, chunk.total},
          Term<Part::ALL>{C, chunk.k_out, 1, chunk.ld_in, u, lds});
}

// How the value columns of a head are divided if there are fewer heads than threads.
struct Split {
  int64_t pairs;
  int parts, columns;  // columns of each part; the last may have fewer
};

Split split_columns(const regard_delta_rule_args* args) {
  Split split{args->batch * args->heads, 1, static_cast<int>(args->value_width)};
  if (split.pairs > 0 && split.pairs < args->threads && args->value_width > 16) {
    const int64_t wanted = least(ceil_div(args->threads, split.pairs), ceil_div(args->value_width, 16));
    split.columns = static_cast<int>(round_up(ceil_div(args->value_width, wanted), 16));
    split.parts = static_cast<int>(ceil_div(args->value_width, split.columns));
  }
  return split;
}

template <class T, Gate GATE>
int forward(const regard_delta_rule_args* args) {
  using regard::Workspace;
  const Split split = split_columns(args);
  const int64_t tasks = split.pairs * split.parts;
  const int64_t n = args->n, width = args->width, values = args->value_width;
  const int64_t lds = padded(split.columns), ldo = args->out_strides[2];
  const size_t bytes =
      Chunk<T, GATE>::bytes(width) + Memory::bytes(padded(width) * lds) + 3 * Memory::bytes(C * lds);
  const int64_t kept = n > 0 ? (n - 1) / SEGMENT : 0;
  int status = REGARD_OK;
  parallel_tasks(static_cast<int>(args->threads), tasks, [&](int64_t task) {
    const FlushDenormals flush;
    Workspace workspace(bytes);
    if (!workspace) {
      __atomic_store_n(&status, REGARD_OUT_OF_MEMORY, __ATOMIC_RELAXED);
      return;
    }
    const int64_t pair = task / split.parts, first = task % split.parts * split.columns;
    const int columns = static_cast<int>(least<int64_t>(split.columns, values - first));
    const Head<T> head = head_of<T>(args, pair, first, columns);
    Memory memory(workspace);
    Chunk<T, GATE> chunk(memory, width);
    float* state = memory.take(padded(width) * lds);
    float* own_v = memory.take(C * lds);
    float* u = memory.take(C * lds);
    float* buffer = memory.take(C * lds);
    const int64_t b = pair / args->heads, h = pair % args->heads;
    if (args->state != nullptr)
      copy_rows(width, columns, args->state + b * args->state_strides[0] + h * args->state_strides[1] + first,
                args->state_strides[2], state, lds);
    else
      fill_rows(width, columns, state, lds);
    T* out = head.q == nullptr
                 ? nullptr
                 : static_cast<T*>(args->out) + b * args->out_strides[0] + h * args->out_strides[1] + first;
    for (int64_t start = 0; start < n; start += C) {
      const int count = static_cast<int>(least<int64_t>(C, n - start));
      if (args->kept != nullptr && start > 0 && start % SEGMENT == 0)
        copy_rows(width, columns, state, lds,
                  args->kept + (pair * kept + start / SEGMENT - 1) * width * values + first, values);
      chunk.prepare(head, start, count, out != nullptr);
      head.prefetch(start + count, static_cast<int>(least<int64_t>(C, n - start - count)));
      write_values(head, chunk, start, state, lds, own_v, nullptr, u);
      if (out != nullptr) {
        T* to = out + start * ldo;
        const Term<Part::ALL> before{head.width, chunk.q_in, chunk.ldq_in, 1, state, lds};
        const Term<Part::LOWER> inside{C, chunk.reads, C, 1, u, lds};
        if (count == C && columns % C == 0) {
          combine(C, columns, to, ldo, Nothing{}, before, inside);
        } else {
          combine(C, padded(columns), buffer, lds, Nothing{}, before, inside);
          copy_rows(count, columns, buffer, lds, to, ldo);
        }
      }
      write_state(head, chunk, u, state, state, lds);
    }
    copy_rows(width, columns, state, lds, args->final_state + pair * width * values + first, values);
  });
  return status;
}

// Backward of one head's value columns, segment by segment from the last.
template <class T, Gate GATE>
struct Backward {
  static constexpr int CHUNKS = SEGMENT / C;

  const Head<T> head;
  Chunk<T, GATE> chunk;
  int64_t ldk, lds;                // rows of key features and of values
  float *states, *ys, *us;         // states before each chunk of the segment; Y and U of all its tokens
  float *grad_state;               // dS
  float *transposed, *grad_transposed;  // S^T and dS^T
  float *own_v, *own_grad_o, *w, *g, *grad_pairs, *grad_reads;
  const float* grad_o;
  int64_t ldo;
  float *grad_q, *grad_k, *grad_q_in, *grad_k_in, *grad_k_out, *grad_gate;  // of the chunk
  float *grad_beta;

  static size_t bytes(int64_t width, int64_t columns) {
    const int64_t ldk = padded(width), lds = padded(columns);
    return Chunk<T, GATE>::bytes(width) + Memory::bytes(CHUNKS * ldk * lds) + 2 * Memory::bytes(SEGMENT * lds) +
           3 * Memory::bytes(ldk * lds) + 4 * Memory::bytes(C * lds) + 2 * Memory::bytes(C * C) +
           6 * Memory::bytes(C * ldk) + Memory::bytes(C);
  }

  Backward(const Head<T>& of, Memory& memory)
      : head(of), chunk(memory, of.width), ldk(padded(of.width)), lds(padded(of.columns)) {
    states = memory.take(CHUNKS * ldk * lds);
    ys = memory.take(SEGMENT * lds);
    us = memory.take(SEGMENT * lds);
    grad_state = memory.take(ldk * lds);
    transposed = memory.take(ldk * lds);
    grad_transposed = memory.take(ldk * lds);
    own_v = memory.take(C * lds);
    own_grad_o = memory.take(C * lds);
    w = memory.take(C * lds);
    g = memory.take(C * lds);
    grad_pairs = memory.take(C * C);
    grad_reads = memory.take(C * C);
    grad_q = memory.take(C * ldk);
    grad_k = memory.take(C * ldk);
    grad_q_in = memory.take(C * ldk);
    grad_k_in = memory.take(C * ldk);
    grad_k_out = memory.take(C * ldk);
    grad_gate = memory.take(C * ldk);
    grad_beta = memory.take(C);
  }

  float* state_before(int index) { return states + index * ldk * lds; }

  // Computes the states, Y and U of tokens [start, start + count) from the state in state_before(0).
  void recompute(int64_t start, int count) {
    for (int at = 0; at < count; at += C) {
      const int index = at / C;
      chunk.prepare(head, start + at, least(C, count - at), false);
      prefetch_rows(least(C, count - at - C), head.width, head.k + (start + at + C) * head.ldk, head.ldk);
      prefetch_rows(least(C, count - at - C), head.columns, head.v + (start + at + C) * head.ldv, head.ldv);
      write_values(head, chunk, start + at, state_before(index), lds, own_v, ys + at * lds, us + at * lds);
      if (at + C < count)
        write_state(head, chunk, us + at * lds, state_before(index), state_before(index + 1), lds);
    }
  }

  // Computes the gradients of the chunk that begins `at` tokens into the segment, and dS before it. grad_out may be
  // null.
  void chunk_gradients(int64_t start, int at, int count, const T* grad_out, int64_t ld_out) {
    const bool read = grad_out != nullptr;
    const float *u = us + at * lds, *y = ys + at * lds, *state = state_before(at / C);
    const int width = head.width, columns = head.columns, tokens_read = read ? C : 0;
    chunk.prepare(head, start + at, count, read);
    grad_o = own_grad_o;
    ldo = lds;
    if (read) grad_o = as_float(count, columns, grad_out, ld_out, own_grad_o, &ldo);
    if (at > 0) {
      if (read) prefetch_rows(C, columns, grad_out - C * ld_out, ld_out);
      if (read) prefetch_rows(C, width, head.q + (start + at - C) * head.ldq, head.ldq);
    }

    solve<true>(lds, chunk.pairs, chunk.beta, w, g, lds, Nothing{},
                Term<Part::ALL>{width, chunk.k_out, chunk.ld_in, 1, grad_state, lds},
                Term<Part::UPPER>{tokens_read, chunk.reads, 1, C, grad_o, ldo});
    for (int i = 0; i < count; ++i) {
      Vec total = zero();
      for_vectors(columns, [&](int64_t j, int some) {
        total = fma(load_some(w + i * lds + j, some), load_some(y + i * lds + j, some), total);
      });
      grad_beta[i] = sum(total);
    }

    pair_products<Triangle::LOWER>(columns, g, lds, u, lds, grad_pairs);  // -dA
    chunk.mask(grad_pairs, false);
    if (read) {
      pair_products<Triangle::LOWER>(columns, grad_o, ldo, u, lds, grad_reads);
      chunk.mask(grad_reads, head.inclusive);
    }

    transpose_rows(ldk, lds, grad_state, lds, grad_transposed, ldk);
    transpose_rows(ldk, lds, state, lds, transposed, ldk);
    const Term<Part::ALL> to_k_out{columns, u, lds, 1, grad_transposed, ldk};
    const Term<Part::ALL> to_q_in{read ? columns : 0, grad_o, ldo, 1, transposed, ldk};
    const Term<Part::LOWER, true> later{C, grad_pairs, C, 1, chunk.k, chunk.ldk};
    const Term<Part::UPPER, true> earlier{C, grad_pairs, 1, C, chunk.k, chunk.ldk};
    const Term<Part::UPPER> readers{tokens_read, grad_reads, 1, C, chunk.q, chunk.ldq};
    const Term<Part::LOWER> reading{tokens_read, grad_reads, C, 1, chunk.k, chunk.ldk};
    if constexpr (GATE == Gate::NONE) {
      const Term<Part::ALL, true> to_k_in{columns, g, lds, 1, transposed, ldk};
      combine(C, ldk, grad_k, ldk, Nothing{}, to_k_out, to_k_in, later, earlier, readers);
      combine(C, ldk, grad_q, ldk, Nothing{}, to_q_in, reading);
    } else {
      combine(C, ldk, grad_k_out, ldk, Nothing{}, to_k_out);
      combine(C, ldk, grad_k_in, ldk, Nothing{}, Term<Part::ALL>{columns, g, lds, 1, transposed, ldk});  // -d(f K)
      combine(C, ldk, grad_q_in, ldk, Nothing{}, to_q_in);
      total_gradient(state);
      gather_boundary();
      if constexpr (GATE == Gate::SCALAR) {
        scalar_gate_gradients(read);
        combine(C, ldk, grad_k, ldk, Rows{grad_k, ldk}, later, earlier, readers);
        combine(C, ldk, grad_q, ldk, Rows{grad_q, ldk}, reading);
      } else {
        vector_pair_gradients(read);
      }
    }

    combine(ldk, lds, grad_state, lds, Decayed<GATE>{grad_state, lds, chunk.total},
            Term<Part::ALL>{tokens_read, chunk.q_in, 1, chunk.ldq_in, grad_o, ldo},
            Term<Part::ALL, true>{C, chunk.k_in, 1, chunk.ld_in, g, lds});
  }

  // dF F, which contributes to the gates of all tokens, in the first row of grad_gate.
  void total_gradient(const float* state) {
    if constexpr (GATE == Gate::NONE) return;
    float all = 0;
    for (int d = 0; d < head.width; ++d) {
      Vec total = zero();
      for_vectors(head.columns, [&](int64_t j, int some) {
        total = fma(load_some(state + d * lds + j, some), load_some(grad_state + d * lds + j, some), total);
      });
      if (GATE == Gate::VECTOR)
        grad_gate[d] = chunk.total[d] * sum(total);
      else
        all += sum(total);
    }
    if (GATE == Gate::SCALAR) grad_gate[0] = chunk.total[0] * all;
  }

  // dq = f d(f q), dk = f d(f k) + h d(h k), and the gates' gradients through f, h and F. Row 0 of grad_gate holds dF
  // F.
  void gather_boundary() {
    float starts[C], ends[C];
    for (int i = 0; i < C; ++i) {
      Vec all_start = zero(), all_end = zero();
      for (int64_t d = 0; d < ldk; d += LANES) {
        const int64_t at = i * ldk + d;
        const Vec f = GATE == Gate::VECTOR ? load(chunk.from_start + at) : broadcast(chunk.from_start[i]);
        const Vec h = GATE == Gate::VECTOR ? load(chunk.to_end + at) : broadcast(chunk.to_end[i]);
        const Vec k = load(chunk.k + i * chunk.ldk + d), q = load(chunk.q + i * chunk.ldq + d);
        const Vec in = f * load(grad_k_in + at), out = h * load(grad_k_out + at), q_in = f * load(grad_q_in + at);
        store(grad_k + at, out - in);
        store(grad_q + at, q_in);
        const Vec start = q_in * q - in * k, end = out * k;
        const int some = static_cast<int>(most<int64_t>(0, least<int64_t>(LANES, head.width - d)));
        const IntVec real = lane_numbers() < some;
        all_start += select(real, start, zero());
        all_end += select(real, end, zero());
        store(grad_q_in + at, start);
        store(grad_k_out + at, end);
      }
      starts[i] = sum(all_start);
      ends[i] = sum(all_end);
    }
    // gate r is in f of the tokens from r on, and in h of the tokens before r
    if constexpr (GATE == Gate::SCALAR) {
      const float total = grad_gate[0];
      float before = 0, after = 0;
      for (int i = 0; i < C; ++i) {
        grad_gate[i] = total + before;
        before += ends[i];
      }
      for (int i = C - 1; i >= 0; --i) grad_gate[i] += after += starts[i];
    } else {
      for (int64_t d = 0; d < ldk; d += LANES) {
        const Vec total = load(grad_gate + d);
        Vec before = zero(), after = zero();
        for (int i = 0; i < C; ++i) {
          store(grad_gate + i * ldk + d, total + before);
          before += load(grad_k_out + i * ldk + d);
        }
        for (int i = C - 1; i >= 0; --i) {
          after += load(grad_q_in + i * ldk + d);
          store(grad_gate + i * ldk + d, load(grad_gate + i * ldk + d) + after);
        }
      }
    }
  }

  // The gate of token r is in the exponents of pairs j < r <= i. Leaves D dA and D dP for the gradients of q and k.
  void scalar_gate_gradients(bool read) {
    const IntVec lanes = lane_numbers();
    Vec rows[C];  // sums over j < r
    for (int i = 0; i < C; ++i) rows[i] = zero();
    for (int j = 0; j < C; j += LANES) {
      Vec below = zero();  // sum over i >= r
      for (int r = C - 1; r >= j; --r) {
        const int64_t at = r * C + j;
        const Vec pair = load(grad_pairs + at), between = load(chunk.between + at);
        Vec here = -(pair * load(chunk.pairs + at));
        store(grad_pairs + at, pair * between);
        if (read) {
          const Vec seen = load(grad_reads + at);
          here = fma(seen, load(chunk.reads + at), here);
          store(grad_reads + at, seen * between);
        }
        below += select(lanes + j < r, here, zero());
        rows[r] += select(lanes + j < r, below, zero());
      }
    }
    for (int r = 0; r < C; ++r) grad_gate[r] += sum(rows[r]);
  }

  void vector_pair_gradients(bool read) {
    const int count = chunk.count;
    for_vectors(head.width, [&](int64_t d, int some) {
      float rows[C * LANES];  // key j decayed to each later token
      for (int j = 0; j < count; ++j) {
        const Vec key = load_some(chunk.k + j * chunk.ldk + d, some);
        Vec decayed = key;
        for (int i = j + 1; i < count; ++i) {
          decayed *= load(chunk.each + i * ldk + d);
          store(rows + i * LANES, decayed);
          float* to_k = grad_k + i * ldk + d;
          store(to_k, load(to_k) - grad_pairs[i * C + j] * decayed);
          float* to_q = grad_q + i * ldk + d;
          if (read) store(to_q, fma(broadcast(grad_reads[i * C + j]), decayed, load(to_q)));
        }
        Vec later = zero();  // gradient of key j from later tokens, at token i
        for (int i = count - 1; i > j; --i) {
          later -= grad_pairs[i * C + j] * load_some(chunk.k + i * chunk.ldk + d, some);
          if (read) later += grad_reads[i * C + j] * load_some(chunk.q + i * chunk.ldq + d, some);
          float* to_gate = grad_gate + i * ldk + d;
          store(to_gate, fma(load(rows + i * LANES), later, load(to_gate)));
          later *= load(chunk.each + i * ldk + d);
        }
        if (read) {
          const Vec own = broadcast(grad_reads[j * C + j]);
          later = fma(own, load_some(chunk.q + j * chunk.ldq + d, some), later);
          float* to_q = grad_q + j * ldk + d;
          store(to_q, fma(own, key, load(to_q)));
        }
        store(grad_k + j * ldk + d, load(grad_k + j * ldk + d) + later);
      }
    });
  }
};

// Gradients of keys, queries, gates and rates of a segment when value columns are split: every part has its own sums,
// which are added up in order afterwards.
struct Partial {
  float *q, *k, *gate, *beta;
  int64_t gate_width;

  static size_t bytes(int64_t width, int64_t gate_width) {
    return 2 * Memory::bytes(SEGMENT * width) + Memory::bytes(SEGMENT * gate_width) +
           Memory::bytes(SEGMENT);
  }
  Partial(Memory& memory, int64_t width, int64_t gates) : gate_width(gates) {
    q = memory.take(SEGMENT * width);
    k = memory.take(SEGMENT * width);
    gate = memory.take(SEGMENT * gates);
    beta = memory.take(SEGMENT);
  }
};

inline const float* state_at(const regard_delta_rule_args* args, int64_t pair, int64_t segment, int64_t* ld) {
  const int64_t width = args->width, values = args->value_width, kept = (args->n - 1) / SEGMENT;
  if (segment > 0) {
    *ld = values;
    return args->kept + (pair * kept + segment - 1) * width * values;
  }
  *ld = args->state_strides[2];
  const int64_t b = pair / args->heads, h = pair % args->heads;
  return args->state == nullptr ? nullptr : args->state + b * args->state_strides[0] + h * args->state_strides[1];
}

template <class T, Gate GATE>
void segment_gradients(const regard_delta_rule_backward_args* args, Backward<T, GATE>& work, int64_t pair,
                       int64_t first, int64_t segment, Partial* partial) {
  const regard_delta_rule_args* forward = args->forward;
  const int64_t n = forward->n, width = forward->width, values = forward->value_width;
  const int64_t gate_width = forward->decay_width, b = pair / forward->heads, h = pair % forward->heads;
  const int64_t start = segment * SEGMENT;
  const int length = static_cast<int>(least<int64_t>(SEGMENT, n - start)), columns = work.head.columns;
  int64_t ld_state;
  const float* state = state_at(forward, pair, segment, &ld_state);
  if (state != nullptr)
    copy_rows(width, columns, state + first, ld_state, work.states, work.lds);
  else
    fill_rows(width, columns, work.states, work.lds);
  work.recompute(start, length);
  const T* grad_out = forward->q == nullptr || args->grad_out == nullptr
                          ? nullptr
                          : static_cast<const T*>(args->grad_out) + b * args->grad_out_strides[0] +
                                h * args->grad_out_strides[1] + first;
  const int64_t ldo = args->grad_out_strides[2];
  for (int at = (length - 1) / C * C; at >= 0; at -= C) {
    const int count = least(C, length - at);
    const int64_t token = pair * n + start + at;
    work.chunk_gradients(start, at, count, grad_out == nullptr ? nullptr : grad_out + (start + at) * ldo, ldo);
    if (args->grad_v != nullptr)
      copy_rows(count, columns, work.g, work.lds, static_cast<T*>(args->grad_v) + token * values + first, values);
    if (partial != nullptr) {
      copy_rows(count, width, work.grad_q, work.ldk, partial->q + at * width, width);
      copy_rows(count, width, work.grad_k, work.ldk, partial->k + at * width, width);
      if (gate_width == 1)
        memcpy(partial->gate + at, work.grad_gate, count * sizeof(float));
      else
        copy_rows(count, gate_width, work.grad_gate, work.ldk, partial->gate + at * gate_width, gate_width);
      memcpy(partial->beta + at, work.grad_beta, count * sizeof(float));
      continue;
    }
    if (args->grad_q != nullptr)
      copy_rows(count, width, work.grad_q, work.ldk, static_cast<T*>(args->grad_q) + token * width, width);
    if (args->grad_k != nullptr)
      copy_rows(count, width, work.grad_k, work.ldk, static_cast<T*>(args->grad_k) + token * width, width);
    if (args->grad_log_decay != nullptr) {
      if (GATE == Gate::SCALAR)
        memcpy(args->grad_log_decay + token, work.grad_gate, count * sizeof(float));
      else
        copy_rows(count, gate_width, work.grad_gate, work.ldk, args->grad_log_decay + token * gate_width, gate_width);
    }
    if (args->grad_beta != nullptr) memcpy(args->grad_beta + token, work.grad_beta, count * sizeof(float));
  }
}

template <class T, Gate GATE>
void begin_gradients(const regard_delta_rule_backward_args* args, Backward<T, GATE>& work, int64_t pair,
                     int64_t first) {
  const int64_t b = pair / args->forward->heads, h = pair % args->forward->heads;
  const int64_t* strides = args->grad_final_state_strides;
  if (args->grad_final_state != nullptr)
    copy_rows(work.head.width, work.head.columns, args->grad_final_state + b * strides[0] + h * strides[1] + first,
              strides[2], work.grad_state, work.lds);
  else
    fill_rows(work.head.width, work.head.columns, work.grad_state, work.lds);
}

template <class T, Gate GATE>
void end_gradients(const regard_delta_rule_backward_args* args, Backward<T, GATE>& work, int64_t pair, int64_t first) {
  const int64_t width = args->forward->width, values = args->forward->value_width;
  if (args->grad_state != nullptr)
    copy_rows(width, work.head.columns, work.grad_state, work.lds, args->grad_state + pair * width * values + first,
              values);
}

// Sums `count` numbers over parts that are `distance` floats apart.
template <class To>
void add_parts(int parts, int64_t distance, int64_t count, const float* from, To* to) {
  if (to == nullptr) return;
  for_vectors(count, [&](int64_t at, int some) {
    Vec total = load_some(from + at, some);
    for (int part = 1; part < parts; ++part) total += load_some(from + part * distance + at, some);
    store_some(to + at, total, some);
  });
}

template <class T, Gate GATE>
int backward(const regard_delta_rule_backward_args* args) {
  using regard::Workspace;
  using Work = Backward<T, GATE>;
  const regard_delta_rule_args* forward = args->forward;
  const Split split = split_columns(forward);
  const int threads = static_cast<int>(forward->threads);
  const int64_t n = forward->n, width = forward->width, values = forward->value_width;
  const int64_t segments = ceil_div(n, SEGMENT), gate_width = forward->decay_width;
  const size_t bytes = Work::bytes(width, split.columns);
  if (split.parts == 1) {
    int status = REGARD_OK;
    parallel_tasks(threads, split.pairs, [&](int64_t pair) {
      const FlushDenormals flush;
      Workspace workspace(bytes);
      if (!workspace) {
        __atomic_store_n(&status, REGARD_OUT_OF_MEMORY, __ATOMIC_RELAXED);
        return;
      }
      Memory memory(workspace);
      Work work(head_of<T>(forward, pair, 0, static_cast<int>(values)), memory);
      begin_gradients(args, work, pair, 0);
      for (int64_t segment = segments - 1; segment >= 0; --segment)
        segment_gradients(args, work, pair, 0, segment, nullptr);
      end_gradients(args, work, pair, 0);
    });
    return status;
  }

  // One parallel region per segment, so that the parts' sums take little memory; dS stays in each part's workspace.
  const int64_t tasks = split.pairs * split.parts;
  const size_t each = bytes + Partial::bytes(width, gate_width);
  Workspace workspace(static_cast<size_t>(tasks) * each);
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  const auto work_of = [&](int64_t task, auto&& f) {
    Memory part(workspace, static_cast<size_t>(task) * each);
    const int64_t pair = task / split.parts, first = task % split.parts * split.columns;
    Partial partial(part, width, gate_width);  // taken first, so that its offset is the same in every part
    Work work(head_of<T>(forward, pair, first, static_cast<int>(least<int64_t>(split.columns, values - first))), part);
    f(work, partial, pair, first);
  };
  for (int64_t segment = segments - 1; segment >= -1; --segment) {
    parallel_tasks(threads, tasks, [&](int64_t task) {
      const FlushDenormals flush;
      work_of(task, [&](Work& work, Partial& partial, int64_t pair, int64_t first) {
        if (segment == segments - 1) begin_gradients(args, work, pair, first);
        if (segment >= 0)
          segment_gradients(args, work, pair, first, segment, &partial);
        else
          end_gradients(args, work, pair, first);
      });
    });
    if (segment < 0) break;
    parallel_tasks(threads, split.pairs, [&](int64_t pair) {
      work_of(pair * split.parts, [&](Work&, Partial& partial, int64_t, int64_t) {
        const int64_t distance = static_cast<int64_t>(each / sizeof(float)), start = segment * SEGMENT;
        const int64_t token = pair * n + start, length = least<int64_t>(SEGMENT, n - start);
        const auto grad_q = static_cast<T*>(args->grad_q), grad_k = static_cast<T*>(args->grad_k);
        add_parts(split.parts, distance, length * width, partial.q, grad_q ? grad_q + token * width : nullptr);
        add_parts(split.parts, distance, length * width, partial.k, grad_k ? grad_k + token * width : nullptr);
        add_parts(split.parts, distance, length * gate_width, partial.gate,
                  args->grad_log_decay ? args->grad_log_decay + token * gate_width : nullptr);
        add_parts(split.parts, distance, length, partial.beta, args->grad_beta ? args->grad_beta + token : nullptr);
      });
    });
  }
  return REGARD_OK;
}

bool valid(const regard_delta_rule_args* args) {
  const int64_t decay = args->decay_width;
  return args->threads >= 1 && args->batch >= 0 && args->heads >= 0 && args->n >= 0 && args->width >= 1 &&
         args->value_width >= 1 && (decay == 0 || decay == 1 || decay == args->width) &&
         (decay == 0 || args->log_decay != nullptr || args->batch * args->heads * args->n == 0) &&
         (args->dtype == REGARD_FLOAT32 || args->dtype == REGARD_BFLOAT16);
}

Gate gate_of(const regard_delta_rule_args* args) {
  return args->decay_width == 0 ? Gate::NONE : args->decay_width == 1 ? Gate::SCALAR : Gate::VECTOR;
}

}  // namespace

int delta_rule(const regard_delta_rule_args* args) {
  if (!valid(args)) return REGARD_BAD_ARGUMENT;
  const bool half = args->dtype == REGARD_BFLOAT16;
  switch (gate_of(args)) {
    case Gate::NONE:
      return half ? forward<bfloat16, Gate::NONE>(args) : forward<float, Gate::NONE>(args);
    case Gate::SCALAR:
      return half ? forward<bfloat16, Gate::SCALAR>(args) : forward<float, Gate::SCALAR>(args);
    default:
      return half ? forward<bfloat16, Gate::VECTOR>(args) : forward<float, Gate::VECTOR>(args);
  }
}

int delta_rule_backward(const regard_delta_rule_backward_args* args) {
  if (!valid(args->forward)) return REGARD_BAD_ARGUMENT;
  const bool half = args->forward->dtype == REGARD_BFLOAT16;
  switch (gate_of(args->forward)) {
    case Gate::NONE:
      return half ? backward<bfloat16, Gate::NONE>(args) : backward<float, Gate::NONE>(args);
    case Gate::SCALAR:
      return half ? backward<bfloat16, Gate::SCALAR>(args) : backward<float, Gate::SCALAR>(args);
    default:
      return half ? backward<bfloat16, Gate::VECTOR>(args) : backward<float, Gate::VECTOR>(args);
  }
}

}  // namespace REGARD_ISA
