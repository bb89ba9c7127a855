// The gated recurrence, in blocks of 16 tokens: reads from the state before the block, reads between its tokens, and
// writes to the state.
//
// Decays between tokens of a block are products of at most 16 factors exp(g) in [0, 1], taken one or four at a time, so
// no exponent is ever positive and nothing is subtracted. A block's decay of the state is the exponential of a sum,
// applied as S + S (exp(G) - 1) where it is near 1: rounding it to a float in every block would accumulate over a long
// past.
//
// Linear attention is the same without decay, with queries and keys mapped by phi as they are loaded. Its normaliser z
// is one more value feature that is 1 at every token, kept as a vector next to S instead of as a column.
//
// The backward pass visits the blocks in reverse with R = dL/dS. States at the starts of blocks are recomputed from
// checkpoints of the forward pass, a segment at a time. S and R are kept transposed there (V x K), so that gradients of
// a token are computed along its key features.

#include "regard_recurrence.h"

#include "feature_maps.h"
#include "token_blocks.h"
#include "token_pairs.h"

#include "parallel.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

// A 16 x 16 matrix between the tokens of a block, with row j for the writer and column i for the reader.
constexpr int SQUARE = TOKENS * TOKENS;

// exp(x) - 1 for -1/3 < x <= 0, to full relative precision.
REGARD_INLINE Vec exp_minus_1(Vec x) {
  const Vec r = x * LOG2_E;
  Vec p = broadcast(EXP2_5);
  p = fma(p, r, broadcast(EXP2_4));
  p = fma(p, r, broadcast(EXP2_3));
  p = fma(p, r, broadcast(EXP2_2));
  p = fma(p, r, broadcast(EXP2_1));
  return p * r;
}

// The decay exp(G) as two numbers, applied as S whole + S rest: (1, exp(G) - 1) or (0, exp(G)).
REGARD_INLINE void split_decay(Vec total, float* whole, float* rest) {
  const IntVec near = reinterpret_cast<IntVec>(total > -0.33f);
  store(whole, select(near, broadcast(1.f), zero()));
  store(rest, select(near, exp_minus_1(total), exp(total)));
}

// Mask of the lanes i of token vector t that read token j: j <= i.
REGARD_INLINE IntVec after(int j, int t) { return reinterpret_cast<IntVec>(lane_numbers() + t * LANES >= j); }

// Decays of a block. SCALAR: from the start through each token, from after each token to the end, and between tokens
// (j, i]. VECTOR: exp(g), row by row.
struct Decays {
  int64_t kind;
  float* each;      // (16 x K) for VECTOR
  float* whole;     // (K) the decay of the state over the block, as split_decay gives it
  float* rest;      // (K)
  float between[SQUARE];
  float from_start[TOKENS], to_end[TOKENS];
  bool dead[TOKENS];  // SCALAR: exp(g) = 0
};

void take_decays(Decays& decays, const Rows& g, int64_t first, int rows, int width, int64_t ld) {
  if (decays.kind == REGARD_DECAY_NONE) return;
  if (decays.kind == REGARD_DECAY_VECTOR) {
    const float* gates = load_tokens(g, first, rows, width, decays.each, ld);
    for (int64_t d = 0; d < ld; d += LANES) {
      Vec total = zero();
      for (int i = 0; i < TOKENS; ++i) {
        const Vec x = load(gates + i * ld + d);
        total += x;
        store(decays.each + i * ld + d, exp(x));
      }
      split_decay(total, decays.whole + d, decays.rest + d);
    }
    return;
  }
  alignas(64) float each[TOKENS];
  float total = 0;
  for (int i = 0; i < TOKENS; ++i) {
    each[i] = i < rows ? load_number(g, first + i) : 0.f;
    total += each[i];
  }
  for (int i = 0; i < TOKENS; i += LANES) store(each + i, exp(load(each + i)));
  for (int i = 0; i < TOKENS; ++i) decays.dead[i] = each[i] == 0.f;
  Vec through[TOKEN_VECTORS];
  for (int t = 0; t < TOKEN_VECTORS; ++t) through[t] = broadcast(1.f);
  float running = 1;
  for (int j = TOKENS - 1; j >= 0; --j) {
    for (int t = 0; t < TOKEN_VECTORS; ++t) store(decays.between + j * TOKENS + t * LANES, through[t]);
    for (int t = 0; t < TOKEN_VECTORS; ++t) through[t] = select(after(j, t), through[t] * each[j], through[t]);
    decays.to_end[j] = running;
    running *= each[j];
  }
  for (int t = 0; t < TOKEN_VECTORS; ++t) store(decays.from_start + t * LANES, through[t]);
  for (int64_t d = 0; d < ld; d += LANES) split_decay(broadcast(total), decays.whole + d, decays.rest + d);
}

// Rows multiplied by one number each, in `to`.
const float* scaled(const float* by, const float* rows, float* to, int64_t ld) {
  for (int i = 0; i < TOKENS; ++i)
    for (int64_t d = 0; d < ld; d += LANES) store(to + i * ld + d, by[i] * load(rows + i * ld + d));
  return to;
}

// rows_j times the decay from after token j to the block's end, in `to`; without decay the rows themselves.
const float* decay_to_end(const Decays& decays, const float* rows, float* to, int64_t ld) {
  if (decays.kind == REGARD_DECAY_NONE) return rows;
  if (decays.kind == REGARD_DECAY_SCALAR) return scaled(decays.to_end, rows, to, ld);
  for (int64_t d = 0; d < ld; d += LANES) {
    Vec running = broadcast(1.f);
    for (int j = TOKENS - 1; j >= 0; --j) {
      store(to + j * ld + d, load(rows + j * ld + d) * running);
      running = running * load(decays.each + j * ld + d);
    }
  }
  return to;
}

// Sums the lanes of 16 rows of one vector each.
REGARD_INLINE void add_lanes(const float* rows, float* sums) {
  for (int t = 0; t < TOKENS; t += LANES) {
    Vec x[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) x[l] = load(rows + (t + l) * LANES);
    store(sums + t, sums_of_lanes(x));
  }
}

// Tokens of a block read each other in quads of 4 readers and 4 writers (token_pairs.h), with or without decay. A read
// of an earlier quad is the product of the query decayed from its own quad's start and the key decayed up to there, so
// that only pairs inside a quad multiply decays one by one.
constexpr int QUADS = TOKENS / QUAD, WRITERS = QUAD_ROWS;
static_assert(TOKENS == PAIR_TOKENS);

// reads_ij = sum over d of q_id k_jd, 0 for hidden pairs.
void read_each_other(const float* q, const float* k, int64_t ld, bool inclusive, float* reads) {
  pair_products<Triangle::UPPER>(ld, k, ld, q, ld, reads);
  for (int j = 0; j < TOKENS; ++j)
    for (int t = 0; t < TOKEN_VECTORS; ++t) {
      float* at = reads + j * TOKENS + t * LANES;
      store(at, select(after(inclusive ? j : j + 1, t), load(at), zero()));
    }
}

// Decays over each quad (4 x K), and queries decayed from their quad's start (16 x K).
struct QuadRows {
  float *decays, *queries;
};

void decay_inside_quads(const float* q, const float* each, int64_t ld, const QuadRows& quads) {
  for (int64_t d = 0; d < ld; d += LANES)
    for (int i = 0; i < TOKENS; i += QUAD) {
      Vec running = broadcast(1.f);
#pragma GCC unroll 4
      for (int64_t at = i * ld + d; at < (i + QUAD) * ld; at += ld) {
        running *= load(each + at);
        store(quads.queries + at, load(q + at) * running);
      }
      store(quads.decays + i / QUAD * ld + d, running);
    }
}

// Queries decayed from the block's start, in `to`, which may be quads.queries.
const float* decay_over_quads(const QuadRows& quads, float* to, int64_t ld) {
  for (int64_t d = 0; d < ld; d += LANES) {
    Vec before = broadcast(1.f);
    for (int i = 0; i < TOKENS; i += QUAD) {
#pragma GCC unroll 4
      for (int64_t at = i * ld + d; at < (i + QUAD) * ld; at += ld) store(to + at, load(quads.queries + at) * before);
      before *= load(quads.decays + i / QUAD * ld + d);
    }
  }
  return to;
}

// Reads of writers [FIRST, FIRST + WRITERS) of a quad in the same quad; keys decayed to the quad's end go to `to_end`.
template <int FIRST>
REGARD_INLINE void read_own_quad(int quad, const float* q, const float* k, const float* each, int64_t ld, bool inclusive,
                                 float* to_end, float* reads) {
  Vec sums[LANES];
#pragma GCC unroll 16
  for (int l = 0; l < LANES; ++l) sums[l] = zero();
  for (int64_t d = 0; d < ld; d += LANES) {
#pragma GCC unroll 4
    for (int w = 0; w < WRITERS; ++w) {
      const int64_t row = (quad + FIRST + w) * ld + d;
      Vec key = load(k + row);
      sums[QUAD * w + FIRST + w] = fma(load(q + row), key, sums[QUAD * w + FIRST + w]);
#pragma GCC unroll 4
      for (int r = FIRST + w + 1; r < QUAD; ++r) {
        key *= load(each + (quad + r) * ld + d);
        sums[QUAD * w + r] = fma(load(q + (quad + r) * ld + d), key, sums[QUAD * w + r]);
      }
      store(to_end + row, key);
    }
  }
  if (!inclusive)
#pragma GCC unroll 4
    for (int w = 0; w < WRITERS; ++w) sums[QUAD * w + FIRST + w] = zero();
  put_quad(sums, quad + FIRST, quad, reads);
  if constexpr (FIRST + WRITERS < QUAD)
    read_own_quad<FIRST + WRITERS>(quad, q, k, each, ld, inclusive, to_end, reads);
}

// reads_ij = sum over d of q_id k_jd decay_d(j, i], 0 for hidden pairs. Keys decayed to the block's end go to `to_end`,
// which may be `k`.
void read_each_other_decayed(const float* q, const float* k, const float* each, int64_t ld, bool inclusive,
                             const QuadRows& quads, float* to_end, float* reads) {
  for (int i = 0; i < SQUARE; i += LANES) store(reads + i, zero());
  for (int quad = 0; quad < TOKENS; quad += QUAD) {
    read_own_quad<0>(quad, q, k, each, ld, inclusive, to_end, reads);
    for (int readers = quad + QUAD; readers < TOKENS; readers += QUAD)
      for (int writer = quad; writer < quad + QUAD; writer += WRITERS) {
        Vec sums[LANES];
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l) sums[l] = zero();
        for (int64_t d = 0; d < ld; d += LANES) {
          const Vec decay = load(quads.decays + readers / QUAD * ld + d);
          Vec key[WRITERS];
#pragma GCC unroll 4
          for (int w = 0; w < WRITERS; ++w) key[w] = load(to_end + (writer + w) * ld + d);
#pragma GCC unroll 4
          for (int r = 0; r < QUAD; ++r) {
            const Vec query = load(quads.queries + (readers + r) * ld + d);
#pragma GCC unroll 4
            for (int w = 0; w < WRITERS; ++w) sums[QUAD * w + r] = fma(query, key[w], sums[QUAD * w + r]);
          }
#pragma GCC unroll 4
          for (int w = 0; w < WRITERS; ++w) store(to_end + (writer + w) * ld + d, key[w] * decay);
        }
        put_quad(sums, writer, readers, reads);
      }
  }
}

// c (rows x vectors) = A B.
void multiply(int rows, int vectors, int depth, const float* a, int64_t ai, int64_t ap, const float* b, int64_t ldb,
              float* c, int64_t ldc) {
  tiles(rows, vectors, [&](auto r, auto w, int i, int j) __attribute__((always_inline)) {
    Vec sums[decltype(r)::value][decltype(w)::value];
    clear(sums);
    accumulate(sums, depth, a + i * ai, ai, ap, b + j * LANES, ldb);
    put(sums, c + i * ldc + j * LANES, ldc);
  });
}

// Reads between the tokens of a block, decayed and masked. On return q points to queries decayed from the block's
// start, in `queries` or in place, and k to keys decayed to its end, in `keys` or in place.
void read_inside(const Decays& decays, int64_t ld, bool inclusive, const QuadRows& quads, const float*& q, float* queries,
                 const float*& k, float* keys, float* reads) {
  if (decays.kind == REGARD_DECAY_VECTOR) {
    decay_inside_quads(q, decays.each, ld, quads);
    read_each_other_decayed(q, k, decays.each, ld, inclusive, quads, keys, reads);
    q = decay_over_quads(quads, queries, ld);
    k = keys;
    return;
  }
  read_each_other(q, k, ld, inclusive, reads);
  if (decays.kind == REGARD_DECAY_NONE) return;
  for (int i = 0; i < SQUARE; i += LANES) store(reads + i, load(reads + i) * load(decays.between + i));
  q = scaled(decays.from_start, q, queries, ld);
  k = scaled(decays.to_end, k, keys, ld);
}

// Updates S (K x V): S = decay S + keys^T values. The block's writes are summed first, since rounding S at every token
// would lose digits over a long past.
template <bool DECAYING>
void write_state(const Decays& decays, int rows, int vectors, const float* keys, int64_t ldk, const float* values,
                 float* state, int64_t ld) {
  tiles(rows, vectors, [&](auto r, auto w, int i, int j) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value, W = decltype(w)::value;
    Vec sums[R][W];
    clear(sums);
    accumulate(sums, TOKENS, keys + i, 1, ldk, values + j * LANES, ld);
#pragma GCC unroll 16
    for (int a = 0; a < R; ++a) {
      float* at = state + (i + a) * ld + j * LANES;
      const Vec whole = broadcast(DECAYING ? decays.whole[i + a] : 1.f), rest = broadcast(DECAYING ? decays.rest[i + a] : 0.f);
#pragma GCC unroll 4
      for (int b = 0; b < W; ++b) {
        const Vec x = load(at + b * LANES);
        sums[a][b] = DECAYING ? fma(x, whole, fma(x, rest, sums[a][b])) : x + sums[a][b];
      }
#pragma GCC unroll 4
      for (int b = 0; b < W; ++b) store(at + b * LANES, sums[a][b]);
    }
  });
}
void write_state(const Decays& decays, int rows, int vectors, const float* keys, int64_t ldk, const float* values,
                 float* state, int64_t ld) {
  (decays.kind == REGARD_DECAY_NONE ? write_state<false> : write_state<true>)(decays, rows, vectors, keys, ldk, values,
                                                                             state, ld);
}

// Updates S or R transposed (V x K): to = decay S + values^T keys, with rows of values `ldv` apart.
template <bool DECAYING>
void write_transposed(const Decays& decays, int rows, int vectors, const float* values, int64_t ldv, const float* keys,
                      const float* state, float* to, int64_t ld) {
  tiles(rows, vectors, [&](auto r, auto w, int i, int j) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value, W = decltype(w)::value;
    Vec sums[R][W];
    clear(sums);
    accumulate(sums, TOKENS, values + i, 1, ldv, keys + j * LANES, ld);
#pragma GCC unroll 4
    for (int b = 0; b < W; ++b) {
      const Vec whole = DECAYING ? load(decays.whole + (j + b) * LANES) : broadcast(1.f),
                rest = DECAYING ? load(decays.rest + (j + b) * LANES) : zero();
#pragma GCC unroll 16
      for (int a = 0; a < R; ++a) {
        const Vec x = load(state + (i + a) * ld + (j + b) * LANES);
        sums[a][b] = DECAYING ? fma(x, whole, fma(x, rest, sums[a][b])) : x + sums[a][b];
      }
    }
    put(sums, to + i * ld + j * LANES, ld);
  });
}
void write_transposed(const Decays& decays, int rows, int vectors, const float* values, int64_t ldv, const float* keys,
                      const float* state, float* to, int64_t ld) {
  (decays.kind == REGARD_DECAY_NONE ? write_transposed<false> : write_transposed<true>)(decays, rows, vectors, values, ldv,
                                                                                       keys, state, to, ld);
}

float dot(const float* a, const float* b, int64_t width) {
  Vec total = zero();
  for (int64_t d = 0; d < width; d += LANES) total = fma(load(a + d), load(b + d), total);
  return sum(total);
}

// sums (ld) += the rows of a block.
void add_rows(const float* rows, float* sums, int64_t ld) {
  for (int64_t d = 0; d < ld; d += LANES) {
    Vec total = zero();
    for (int i = 0; i < TOKENS; ++i) total += load(rows + i * ld + d);
    store(sums + d, load(sums + d) + total);
  }
}

// 1 / (z . q_i + eps) for the tokens of a block, where z is the sum of keys before it and reads_ij = q_i . k_j.
void normalizers(const float* q, const float* z, const float* reads, float eps, int64_t ld, float* inverse) {
  alignas(64) float rows[TOKENS * LANES];
  for (int i = 0; i < TOKENS; ++i) {
    Vec total = zero();
    for (int64_t d = 0; d < ld; d += LANES) total = fma(load(q + i * ld + d), load(z + d), total);
    store(rows + i * LANES, total);
  }
  add_lanes(rows, inverse);
  for (int i = 0; i < TOKENS; i += LANES) {
    Vec total = load(inverse + i);
    for (int j = 0; j < i + LANES; ++j) total += load(reads + j * TOKENS + i);
    store(inverse + i, 1.f / (total + eps));
  }
}

template <int R, int V>
REGARD_INLINE void take(Vec (&sums)[R][V], const float* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = load(c + i * ldc + j * LANES);
}

template <int R, int V>
REGARD_INLINE void scale_rows(Vec (&sums)[R][V], const float* by) {
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] *= by[i];
}

// Division of the work over heads and, if there are too few for the threads, over ranges of value features.
struct Split {
  int64_t parts, width;
};

Split split_values(int64_t heads, int64_t threads, int64_t value_width) {
  int64_t parts = 1;
  while (heads * parts < 4 * threads && heads * parts % threads != 0 && ceil_div(value_width, parts + 1) >= 32) ++parts;
  const int64_t width = round_up(ceil_div(value_width, parts), LANES);
  return {value_width == 0 ? 1 : ceil_div(value_width, width), width};
}

// Sizes and options shared by both passes.
struct Problem {
  Problem(int64_t threads, int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t values,
          const regard_linear_attention_options& options)
      : options(options),
        heads(heads),
        tokens(tokens),
        keys(static_cast<int>(keys)),
        values(static_cast<int>(values)),
        columns(values + (options.normalize != 0 ? 1 : 0)),
        padded_keys(static_cast<int>(round_up(keys, LANES))),
        split(split_values(batch * heads, threads, values)),
        padded_values(static_cast<int>(split.width)) {}

  int valid_keys(int64_t batch, int64_t first, int count) const {
    if (options.valid == nullptr) return count;
    return static_cast<int>(most<int64_t>(0, least<int64_t>(count, options.valid[batch] - first)));
  }

  // Copies z between the caller's state, NULL for zero, and the workspace.
  void take_normalizer(const float* state, float* z) const {
    for (int d = 0; d < padded_keys; ++d) z[d] = d < keys && state != nullptr ? state[d * columns + values] : 0.f;
  }
  void give_normalizer(const float* z, float* state) const {
    for (int d = 0; d < keys; ++d) state[d * columns + values] = z[d];
  }

  const regard_linear_attention_options options;
  int64_t heads, tokens;
  int keys, values;
  int64_t columns;  // columns of a state
  int padded_keys;
  Split split;
  int padded_values;  // of one part
};

struct Task {
  Task(const Problem& problem, int64_t task)
      : part(task % problem.split.parts),
        head(task / problem.split.parts % problem.heads),
        batch(task / problem.split.parts / problem.heads),
        first(static_cast<int>(part * problem.split.width)),
        width(static_cast<int>(least(problem.split.width, problem.values - part * problem.split.width))) {}

  int64_t part, head, batch;
  int first, width;  // value features
};

void forward(const regard_gated_recurrence_args& args, const Problem& problem, int64_t number, Workspace& memory) {
  const Task task(problem, number);
  const int64_t index = task.batch * args.heads + task.head;
  const int kp = problem.padded_keys, vp = problem.padded_values;
  const bool reading = args.q.data != nullptr, inclusive = args.inclusive != 0;
  const regard_linear_attention_options& options = problem.options;
  const bool normalize = options.normalize != 0, first_part = task.part == 0;
  const Rows q(args.q, task.batch, task.head, args.heads), k(args.k, task.batch, task.head, args.heads),
      v(args.v, task.batch, task.head, args.heads, task.first), g(args.g, task.batch, task.head, args.heads),
      o(args.o, task.batch, task.head, args.heads, task.first);

  float* state = memory.take<float>(static_cast<size_t>(kp) * vp);
  float* query_rows = memory.take<float>(TOKENS * kp);
  float* key_rows = memory.take<float>(TOKENS * kp);
  float* value_rows = memory.take<float>(TOKENS * vp);
  float* reads = memory.take<float>(SQUARE);
  float* outputs = memory.take<float>(TOKENS * vp);
  float* z = memory.take<float>(kp);
  alignas(64) float inverse[TOKENS];
  Decays decays;
  decays.kind = args.decay;
  decays.each = memory.take<float>(TOKENS * kp);
  decays.whole = memory.take<float>(kp);
  decays.rest = memory.take<float>(kp);
  const QuadRows quads{memory.take<float>(QUADS * kp), memory.take<float>(TOKENS * kp)};

  for (int64_t i = 0; i < static_cast<int64_t>(kp) * vp; i += LANES) store(state + i, zero());
  const int64_t columns = problem.columns, matrix = problem.keys * columns;
  if (args.state != nullptr)
    load_rows(args.state + index * matrix + task.first, columns, problem.keys, task.width, state, vp);
  if (normalize) problem.take_normalizer(args.state == nullptr ? nullptr : args.state + index * matrix, z);
  auto give_state = [&](float* to) {
    store_rows(to + task.first, columns, problem.keys, task.width, state, vp);
    if (normalize && first_part) problem.give_normalizer(z, to);
  };

  const int64_t checkpoints = ceil_div(args.tokens, args.checkpoint_every) - 1;
  for (int64_t first = 0; first < args.tokens; first += TOKENS) {
    const int count = static_cast<int>(least<int64_t>(TOKENS, args.tokens - first));
    if (args.checkpoints != nullptr && first > 0 && first % args.checkpoint_every == 0)
      give_state(args.checkpoints + (index * checkpoints + first / args.checkpoint_every - 1) * matrix);
    take_decays(decays, g, first, count, problem.keys, kp);
    const float* keys = load_tokens(k, first, count, problem.keys, key_rows, kp);
    keys = map_features(options.feature_map, 1.f, options.shift, keys, problem.valid_keys(task.batch, first, count),
                        problem.keys, key_rows, kp);
    const float* values = load_tokens(v, first, count, task.width, value_rows, vp);
    if (!reading) {
      keys = decay_to_end(decays, keys, key_rows, kp);
      write_state(decays, kp, vp / LANES, keys, kp, values, state, vp);
      if (normalize) add_rows(keys, z, kp);
      continue;
    }
    const float* queries = load_tokens(q, first, count, problem.keys, query_rows, kp);
    queries = map_features(options.feature_map, options.scale, options.shift, queries, count, problem.keys, query_rows, kp);
    read_inside(decays, kp, inclusive, quads, queries, query_rows, keys, key_rows, reads);
    if (normalize) {
      normalizers(queries, z, reads, options.eps, kp, inverse);
      if (options.inverse != nullptr && first_part)
        for (int i = 0; i < count; ++i) options.inverse[index * args.tokens + first + i] = inverse[i];
      add_rows(keys, z, kp);
    }
    float* read = room_for_tokens(o, first, count, task.width, outputs, vp);
    tiles(TOKENS, vp / LANES, [&](auto r, auto w, int i, int j) __attribute__((always_inline)) {
      constexpr int R = decltype(r)::value, W = decltype(w)::value;
      Vec sums[R][W];
      clear(sums);
      accumulate(sums, problem.keys, queries + i * kp, kp, 1, state + j * LANES, vp);
      accumulate(sums, i + R, reads + i, 1, TOKENS, values + j * LANES, vp);
      if (normalize) scale_rows(sums, inverse + i);
      put(sums, read + i * vp + j * LANES, vp);
    });
    if (read == outputs) store_tokens(o, first, count, task.width, outputs, vp);
    write_state(decays, kp, vp / LANES, keys, kp, values, state, vp);
  }
  give_state(args.final_state + index * matrix);
}

size_t forward_bytes(const Problem& problem) {
  const size_t kp = problem.padded_keys, vp = problem.padded_values;
  return 4 * (kp * vp + TOKENS * (4 * kp + 2 * vp) + SQUARE + (3 + QUADS) * kp) + 64 * 13;
}

bool good(int64_t threads, int64_t batch, int64_t heads, int64_t tokens, int64_t keys, int64_t values, int64_t decay) {
  return threads >= 1 && batch >= 0 && heads >= 0 && tokens >= 0 && keys >= 0 && values >= 0 && keys < (1 << 20) &&
         values < (1 << 20) && decay >= REGARD_DECAY_NONE && decay <= REGARD_DECAY_VECTOR;
}

bool shared_by(const regard_sequence& sequence, int64_t heads) {
  return sequence.data == nullptr || (sequence.heads >= 1 && heads % sequence.heads == 0);
}

constexpr regard_linear_attention_options AS_THEY_ARE{};

bool good(const regard_linear_attention_options& options, int64_t decay, int64_t inclusive) {
  return decay == REGARD_DECAY_NONE && inclusive != 0 && options.feature_map >= REGARD_FEATURES_IDENTITY &&
         options.feature_map <= REGARD_FEATURES_SILU;
}

int run_forward(const regard_gated_recurrence_args* args, const regard_linear_attention_options& options) {
  if (!good(args->threads, args->batch, args->heads, args->tokens, args->key_width, args->value_width, args->decay) ||
      !shared_by(args->q, args->heads) || !shared_by(args->k, args->heads) || args->checkpoint_every < TOKENS ||
      args->checkpoint_every % TOKENS != 0)
    return REGARD_BAD_ARGUMENT;
  const Problem problem(args->threads, args->batch, args->heads, args->tokens, args->key_width, args->value_width,
                        options);
  const long tasks = static_cast<long>(args->batch * args->heads * problem.split.parts);
  int failed = 0;
  parallel_tasks(static_cast<int>(args->threads), tasks, [&](long number) {
    const FlushDenormals flush;
    Workspace memory(forward_bytes(problem));
    if (memory)
      forward(*args, problem, number, memory);
    else
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed ? REGARD_OUT_OF_MEMORY : REGARD_OK;
}

// Sum over value features of (decay S) R, for each key feature; S and R transposed.
void carried_products(const Decays& decays, int values, const float* state, const float* later, int64_t ld,
                      float* carried) {
  auto columns = [&](auto v, int64_t d) __attribute__((always_inline)) {
    constexpr int V = decltype(v)::value;
    Vec sums[2][V];
    clear(sums);
    for (int64_t at = d; at < values * ld; at += 2 * ld)
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c)
          sums[r][c] = fma(load(state + at + r * ld + c * LANES), load(later + at + r * ld + c * LANES), sums[r][c]);
#pragma GCC unroll 4
    for (int c = 0; c < V; ++c) {
      const int64_t at = d + c * LANES;
      store(carried + at, (load(decays.whole + at) + load(decays.rest + at)) * (sums[0][c] + sums[1][c]));
    }
  };
  int64_t d = 0;
  for (; d + 4 * LANES <= ld; d += 4 * LANES) columns(Constant<4>{}, d);
  for (; d < ld; d += LANES) columns(Constant<1>{}, d);
}

// A block in the backward pass. Rows of 16 tokens unless stated otherwise.
struct Block {
  const float *q, *k, *v, *grad_o;
  const float* queries;    // q decayed from the start
  float *grad_q, *grad_k;  // first the part from the states, not yet decayed; then complete
  float* grad_g;
  float* carried;          // (K)
  float *reads, *weights;  // (16 x 16), row j for the writer: decayed q k; masked do v
};

// VECTOR. With b_ij = do_i . v_j, 0 for hidden pairs, reads inside the block have the gradients
//     q_i: sum over j < i of b_ij k_j decay(j, i],     k_j: sum over i > j of b_ij q_i decay(j, i],
// by quads like the reads themselves. A gate decays what earlier tokens write and tokens from it on read. Pairs with a
// token in another block contribute sums; pairs inside contribute a reverse sum of q dq - k dk over pairs of different
// tokens, whose cancellation is exact up to rounding.
void finish_vector(const Decays& decays, const Block& x, const QuadRows& quads, int64_t ld) {
  for (int64_t d = 0; d < ld; d += LANES) {
    Vec across[TOKENS];  // gradient of q from earlier quads, at its quad's start
    Vec inside[TOKENS], readers[TOKENS], writers[TOKENS];  // terms of the gates' gradients
    for (int i = 0; i < TOKENS; ++i) across[i] = zero();
    Vec before = broadcast(1.f), writers_before = load(x.carried + d);
    for (int quad = 0; quad < TOKENS; quad += QUAD) {
      Vec q[QUAD], k[QUAD], each[QUAD], key[QUAD], near_q[QUAD], near_k[QUAD];
#pragma GCC unroll 4
      for (int r = 0; r < QUAD; ++r) {
        const int64_t at = (quad + r) * ld + d;
        q[r] = load(x.q + at);
        k[r] = load(x.k + at);
        each[r] = load(decays.each + at);
        near_q[r] = zero();
      }
#pragma GCC unroll 4
      for (int w = 0; w < QUAD; ++w) {
        const float* b = x.weights + (quad + w) * TOKENS + quad;
        key[w] = k[w];
        near_k[w] = zero();
#pragma GCC unroll 4
        for (int r = w + 1; r < QUAD; ++r) {
          key[w] *= each[r];
          near_q[r] = fma(broadcast(b[r]), key[w], near_q[r]);
        }
#pragma GCC unroll 4
        for (int r = QUAD - 1; r > w; --r) near_k[w] = fma(broadcast(b[r]), q[r], near_k[w]) * each[r];
      }
      Vec between = broadcast(1.f), later[QUAD];  // later: gradients of keys, at their quad's end
#pragma GCC unroll 4
      for (int w = 0; w < QUAD; ++w) later[w] = zero();
      for (int i = quad + QUAD; i < TOKENS; i += QUAD) {
        Vec decayed[QUAD], total[QUAD];
#pragma GCC unroll 4
        for (int w = 0; w < QUAD; ++w) {
          decayed[w] = key[w] * between;
          total[w] = zero();
        }
#pragma GCC unroll 4
        for (int r = 0; r < QUAD; ++r) {
          const Vec query = load(quads.queries + (i + r) * ld + d);
          Vec sum = across[i + r];
#pragma GCC unroll 4
          for (int w = 0; w < QUAD; ++w) {
            const Vec b = broadcast(x.weights[(quad + w) * TOKENS + i + r]);
            sum = fma(b, decayed[w], sum);
            total[w] = fma(b, query, total[w]);
          }
          across[i + r] = sum;
        }
#pragma GCC unroll 4
        for (int w = 0; w < QUAD; ++w) later[w] = fma(between, total[w], later[w]);
        between *= load(quads.decays + i / QUAD * ld + d);
      }
      Vec after = broadcast(1.f);
#pragma GCC unroll 4
      for (int w = QUAD - 1; w >= 0; --w) {
        near_k[w] = fma(after, later[w], near_k[w]);
        later[w] = load(x.grad_k + (quad + w) * ld + d) * (after * between);
        after *= each[w];
      }
      Vec running = broadcast(1.f);
#pragma GCC unroll 4
      for (int r = 0; r < QUAD; ++r) {
        const int i = quad + r;
        const int64_t at = i * ld + d;
        running *= each[r];
        const Vec self = broadcast(x.weights[i * TOKENS + i]), far_q = load(x.grad_q + at) * (running * before);
        near_q[r] = fma(running, across[i], near_q[r]);
        inside[i] = q[r] * near_q[r] - k[r] * near_k[r];
        readers[i] = q[r] * far_q;
        writers[i] = writers_before;
        writers_before = fma(k[r], later[r], writers_before);
        store(x.grad_q + at, far_q + fma(k[r], self, near_q[r]));
        store(x.grad_k + at, later[r] + fma(q[r], self, near_k[r]));
      }
      before *= running;
    }
    Vec inside_sum = zero(), readers_sum = zero();
    for (int i = TOKENS - 1; i >= 0; --i) {
      const int64_t at = i * ld + d;
      inside_sum += inside[i];
      readers_sum += readers[i];
      const Vec all = (inside_sum + readers_sum) + writers[i];
      store(x.grad_g + at, select(reinterpret_cast<IntVec>(load(decays.each + at) == 0.f), zero(), all));
    }
  }
}

// NONE and SCALAR: gradients inside the block are matrix products.
void finish_scalar(const Decays& decays, const Block& x, int64_t ld) {
  alignas(64) float weights[SQUARE], readers[TOKENS];
  float writers[TOKENS];
  const bool decaying = decays.kind == REGARD_DECAY_SCALAR;
  for (int i = 0; i < SQUARE; i += LANES)
    store(weights + i, decaying ? load(x.weights + i) * load(decays.between + i) : load(x.weights + i));
  if (decaying)
    for (int i = 0; i < TOKENS; ++i) {
      readers[i] = dot(x.queries + i * ld, x.grad_q + i * ld, ld);
      writers[i] = dot(x.k + i * ld, x.grad_k + i * ld, ld) * decays.to_end[i];
    }
  tiles(TOKENS, static_cast<int>(ld) / LANES, [&](auto r, auto w, int i, int j) __attribute__((always_inline)) {
    constexpr int R = decltype(r)::value, W = decltype(w)::value;
    Vec sums[R][W];
#pragma GCC unroll 16
    for (int a = 0; a < R; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < W; ++b)
        sums[a][b] = load(x.grad_q + (i + a) * ld + (j + b) * LANES) * (decaying ? decays.from_start[i + a] : 1.f);
    accumulate(sums, i + R, weights + i, 1, TOKENS, x.k + j * LANES, ld);
    put(sums, x.grad_q + i * ld + j * LANES, ld);
#pragma GCC unroll 16
    for (int a = 0; a < R; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < W; ++b)
        sums[a][b] = load(x.grad_k + (i + a) * ld + (j + b) * LANES) * (decaying ? decays.to_end[i + a] : 1.f);
    accumulate(sums, TOKENS - i, weights + i * TOKENS + i, TOKENS, 1, x.q + i * ld + j * LANES, ld);
    put(sums, x.grad_k + i * ld + j * LANES, ld);
  });
  if (!decaying) return;
  // Gate t is between writers before it and readers from it on: sums over writers for each reader, then over readers.
  float writers_before = 0;
  for (int64_t d = 0; d < ld; ++d) writers_before += x.carried[d];
  alignas(64) float rows[TOKENS * LANES], found[TOKENS];
  Vec before[TOKEN_VECTORS];
  for (int s = 0; s < TOKEN_VECTORS; ++s) before[s] = load(readers + s * LANES);
  for (int t = 0; t < TOKENS; ++t) {
    Vec total = zero();
    for (int s = 0; s < TOKEN_VECTORS; ++s) total += select(after(t, s), before[s], zero());
    store(rows + t * LANES, total);
    for (int s = 0; s < TOKEN_VECTORS; ++s)
      before[s] = fma(load(x.reads + t * TOKENS + s * LANES), load(x.weights + t * TOKENS + s * LANES), before[s]);
  }
  add_lanes(rows, found);
  for (int t = 0; t < TOKENS; ++t) {
    x.grad_g[t * LANES] = decays.dead[t] ? 0.f : found[t] + writers_before;
    writers_before += writers[t];
  }
}

// The rows of a block multiplied by one number each, in `to`; zeros after the last token.
const float* divide_rows(const float* inverse, const float* rows, int count, float* to, int64_t ld) {
  for (int i = 0; i < TOKENS; ++i)
    for (int64_t d = 0; d < ld; d += LANES)
      store(to + i * ld + d, i < count ? load(rows + i * ld + d) * inverse[i] : zero());
  return to;
}

// Adds gradients through the denominators of the first `count` tokens, after x.grad_o has been divided by them and
// propagated. The gradient of token i's denominator is minus its inverse times (its gradient . its output), which is
// q_i . grad_q_i + sum of reads_ij weights_ij. The normaliser is one more value feature, 1 at every token.
void differentiate_normalizer(const Block& x, const float* inverse, int count, const float* z, float* later, int64_t ld) {
  for (int j = 0; j < TOKENS; ++j)
    for (int64_t d = 0; d < ld; d += LANES)
      store(x.grad_k + j * ld + d, load(x.grad_k + j * ld + d) + load(later + d));
  alignas(64) float changes[TOKENS] = {};
  for (int t = 0; t < TOKENS; t += LANES) {
    Vec total = zero();
    for (int j = 0; j < TOKENS; ++j)
      total = fma(load(x.reads + j * TOKENS + t), load(x.weights + j * TOKENS + t), total);
    store(changes + t, total);
  }
  for (int i = 0; i < TOKENS; ++i)
    changes[i] = i < count ? -inverse[i] * (changes[i] + dot(x.q + i * ld, x.grad_q + i * ld, ld)) : 0.f;
  for (int j = 0; j < TOKENS; ++j)
    for (int t = 0; t < TOKEN_VECTORS; ++t) {
      float* at = x.weights + j * TOKENS + t * LANES;
      store(at, load(at) + select(after(j, t), load(changes + t * LANES), zero()));
    }
  for (int64_t d = 0; d < ld; d += LANES) {
    Vec total = load(later + d);
    for (int i = 0; i < TOKENS; ++i) {
      float* at = x.grad_q + i * ld + d;
      store(at, fma(broadcast(changes[i]), load(z + d), load(at)));
      total = fma(broadcast(changes[i]), load(x.q + i * ld + d), total);
    }
    store(later + d, total);
  }
}

// Destination of a task's gradients: the tensors themselves, or parts that are summed later.
struct Gradients {
  Rows q, k, v, g;
  float* normalizer;  // (K) gradient of z before the first token; NULL: not wanted
};

struct BackwardMemory {
  BackwardMemory(Workspace& memory, const Problem& problem, int64_t blocks, int64_t kind) {
    const size_t kp = problem.padded_keys, vp = problem.padded_values;
    states = memory.take<float>(static_cast<size_t>(blocks) * kp * vp);
    later = memory.take<float>(kp * vp);
    matrix = memory.take<float>(kp * vp);
    keys_across = memory.take<float>(kp * TOKENS);
    grad_v = memory.take<float>(vp * TOKENS);
    grad_values_across = memory.take<float>(vp * TOKENS);
    v = memory.take<float>(vp * TOKENS);
    grad_o = memory.take<float>(vp * TOKENS);
    float** const rows[] = {&q, &k, &raw, &queries, &keys, &quads.queries, &grad_q, &grad_k};
    for (float** each : rows) *each = memory.take<float>(kp * TOKENS);
    grad_g = memory.take<float>(most<size_t>(kp, LANES) * TOKENS);
    quads.decays = memory.take<float>(QUADS * kp);
    normalizers = memory.take<float>(static_cast<size_t>(blocks) * kp);
    float** const single[] = {&later_normalizer, &block.carried};
    for (float** each : single) *each = memory.take<float>(kp);
    decays = memory.take<Decays>(blocks);
    for (int64_t i = 0; i < blocks; ++i) {
      decays[i].kind = kind;
      decays[i].each = memory.take<float>(TOKENS * kp);
      decays[i].whole = memory.take<float>(kp);
      decays[i].rest = memory.take<float>(kp);
    }
    block.reads = memory.take<float>(SQUARE);
    block.weights = memory.take<float>(SQUARE);
  }

  static size_t bytes(const Problem& problem, int64_t blocks) {
    const size_t kp = problem.padded_keys, vp = problem.padded_values;
    return 4 * ((blocks + 2) * kp * vp + TOKENS * ((10 + blocks) * kp + 4 * vp + LANES) + (3 * blocks + 2 + QUADS) * kp + 2 * SQUARE) + sizeof(Decays) * blocks + 64 * (24 + 3 * blocks);
  }

  float *states, *later, *matrix;
  float *normalizers, *later_normalizer;  // z before each block; the gradient of z after it
  float *keys_across, *grad_v, *grad_values_across;
  float *q, *k, *v, *grad_o, *queries, *keys, *raw;
  float *grad_q, *grad_k, *grad_g;
  QuadRows quads;
  Block block;
  Decays* decays;  // decays of each block
};

void backward(const regard_gated_recurrence_backward_args& args, const Problem& problem, int64_t number,
              const Gradients& to, Workspace& workspace) {
  const Task task(problem, number);
  const int64_t index = task.batch * args.heads + task.head;
  const int kp = problem.padded_keys, vp = problem.padded_values;
  const int64_t columns = problem.columns, matrix = problem.keys * columns, size = static_cast<int64_t>(kp) * vp;
  const regard_linear_attention_options& options = problem.options;
  const bool normalize = options.normalize != 0;
  const bool reading = args.grad_o.data != nullptr, inclusive = args.inclusive != 0;
  const Rows q(args.q, task.batch, task.head, args.heads), k(args.k, task.batch, task.head, args.heads),
      v(args.v, task.batch, task.head, args.heads, task.first), g(args.g, task.batch, task.head, args.heads),
      grad_o(args.grad_o, task.batch, task.head, args.heads, task.first);
  const int64_t blocks = least(args.checkpoint_every, round_up(args.tokens, TOKENS)) / TOKENS;
  BackwardMemory memory(workspace, problem, blocks, args.decay);
  Block& x = memory.block;

  // transposes the caller's (K x V) to (V x K)
  auto take_matrix = [&](const float* from, float* transposed) {
    for (int64_t i = 0; i < size; i += LANES) store(memory.matrix + i, zero());
    if (from != nullptr)
      load_rows(from + task.first, columns, problem.keys, task.width, memory.matrix, vp);
    transpose_padded(kp, vp, memory.matrix, vp, transposed, kp);
  };
  const float* grad_final = args.grad_final_state == nullptr ? nullptr : args.grad_final_state + index * matrix;
  take_matrix(grad_final, memory.later);
  // parts of the value features are summed, so only one of them begins with it
  if (normalize) problem.take_normalizer(task.part == 0 ? grad_final : nullptr, memory.later_normalizer);
  auto take_keys = [&](int64_t first, int count) {
    return map_features(options.feature_map, 1.f, options.shift,
                        load_tokens(k, first, count, problem.keys, memory.k, kp),
                        problem.valid_keys(task.batch, first, count), problem.keys, memory.k, kp);
  };

  if (!reading) {
    for (int i = 0; i < TOKENS * kp; i += LANES) store(memory.q + i, zero());
    for (int i = 0; i < TOKENS * vp; i += LANES) store(memory.grad_o + i, zero());
    x.q = memory.q;
    x.grad_o = memory.grad_o;
  }
  const int64_t segments = ceil_div(args.tokens, args.checkpoint_every);
  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t start = segment * args.checkpoint_every, end = least(start + args.checkpoint_every, args.tokens);
    const float* checkpoint = args.state == nullptr ? nullptr : args.state + index * matrix;
    if (segment > 0) checkpoint = args.checkpoints + (index * (segments - 1) + segment - 1) * matrix;
    take_matrix(checkpoint, memory.states);
    if (normalize) problem.take_normalizer(checkpoint, memory.normalizers);
    for (int64_t first = start; first + TOKENS < end; first += TOKENS) {
      float* state = memory.states + (first - start) / TOKENS * size;
      Decays& decays = memory.decays[(first - start) / TOKENS];
      take_decays(decays, g, first, TOKENS, problem.keys, kp);
      const float* keys = take_keys(first, TOKENS);
      if (normalize) {
        float* z = memory.normalizers + (first - start) / TOKENS * kp;
        memcpy(z + kp, z, sizeof(float) * kp);
        add_rows(keys, z + kp, kp);
      }
      const float* values = load_tokens(v, first, TOKENS, task.width, memory.v, vp);
      keys = decay_to_end(decays, keys, memory.k, kp);
      write_transposed(decays, vp, kp / LANES, values, vp, keys, state, state + size, kp);
    }
    for (int64_t first = start + (end - start - 1) / TOKENS * TOKENS; first >= start; first -= TOKENS) {
      const float* state = memory.states + (first - start) / TOKENS * size;
      const int count = static_cast<int>(least<int64_t>(TOKENS, end - first));
      Decays& decays = memory.decays[(first - start) / TOKENS];
      if (first + TOKENS >= end) take_decays(decays, g, first, count, problem.keys, kp);
      x.k = take_keys(first, count);
      x.v = load_tokens(v, first, count, task.width, memory.v, vp);
      if (reading) {
        x.q = map_features(options.feature_map, options.scale, options.shift,
                           load_tokens(q, first, count, problem.keys, memory.q, kp), count, problem.keys, memory.q, kp);
        x.grad_o = load_tokens(grad_o, first, count, task.width, memory.grad_o, vp);
        if (normalize)
          x.grad_o = divide_rows(options.inverse + index * args.tokens + first, x.grad_o, count, memory.grad_o, vp);
      }
      read_each_other(x.grad_o, x.v, vp, inclusive, x.weights);
      const float* keys = x.k;
      x.queries = x.q;
      read_inside(decays, kp, inclusive, memory.quads, x.queries, memory.queries, keys, memory.keys, x.reads);

      auto room = [&](const Rows& rows, float* buffer) {
        return rows.data == nullptr ? buffer : room_for_tokens(rows, first, count, problem.keys, buffer, kp);
      };
      x.grad_q = room(to.q, memory.grad_q);
      x.grad_k = room(to.k, memory.grad_k);
      x.grad_g = args.decay == REGARD_DECAY_VECTOR ? room(to.g, memory.grad_g) : memory.grad_g;
      multiply(TOKENS, kp / LANES, vp, x.grad_o, vp, 1, state, kp, x.grad_q, kp);
      multiply(TOKENS, kp / LANES, vp, x.v, vp, 1, memory.later, kp, x.grad_k, kp);
      if (normalize)
        differentiate_normalizer(x, options.inverse + index * args.tokens + first, reading ? count : 0,
                                 memory.normalizers + (first - start) / TOKENS * kp, memory.later_normalizer, kp);
      if (to.v.data != nullptr) {
        transpose_padded(TOKENS, kp, keys, kp, memory.keys_across, TOKENS);
        multiply(vp, TOKEN_VECTORS, problem.keys, memory.later, kp, 1, memory.keys_across, TOKENS,
                 memory.grad_values_across, TOKENS);
        float* grad_v = room_for_tokens(to.v, first, count, task.width, memory.grad_v, vp);
        transpose_padded(vp, TOKENS, memory.grad_values_across, TOKENS, grad_v, vp);
        tiles(TOKENS, vp / LANES, [&](auto r, auto w, int i, int j) __attribute__((always_inline)) {
          constexpr int R = decltype(r)::value, W = decltype(w)::value;
          Vec sums[R][W];
          float* at = grad_v + i * vp + j * LANES;
          take(sums, at, vp);
          accumulate(sums, TOKENS - i, x.reads + i * TOKENS + i, TOKENS, 1, x.grad_o + i * vp + j * LANES, vp);
          put(sums, at, vp);
        });
        if (grad_v == memory.grad_v) store_tokens(to.v, first, count, task.width, grad_v, vp);
      }
      if (args.decay != REGARD_DECAY_NONE)
        carried_products(decays, vp, state, memory.later, kp, x.carried);
      if (args.decay == REGARD_DECAY_VECTOR)
        finish_vector(decays, x, memory.quads, kp);
      else
        finish_scalar(decays, x, kp);
      if (to.q.data != nullptr) {
        if (options.feature_map != REGARD_FEATURES_AS_THEY_ARE && reading)
          differentiate_features(options.feature_map, options.scale,
                                 load_tokens(q, first, count, problem.keys, memory.raw, kp), count, x.grad_q, kp);
        if (x.grad_q == memory.grad_q) store_tokens(to.q, first, count, problem.keys, x.grad_q, kp);
      }
      if (to.k.data != nullptr) {
        if (options.feature_map != REGARD_FEATURES_AS_THEY_ARE)
          differentiate_features(options.feature_map, 1.f,
                                 load_tokens(k, first, count, problem.keys, memory.raw, kp),
                                 problem.valid_keys(task.batch, first, count), x.grad_k, kp);
        if (x.grad_k == memory.grad_k) store_tokens(to.k, first, count, problem.keys, x.grad_k, kp);
      }
      if (to.g.data != nullptr && x.grad_g == memory.grad_g)
        store_tokens(to.g, first, count, args.decay == REGARD_DECAY_VECTOR ? problem.keys : 1, x.grad_g,
                     args.decay == REGARD_DECAY_VECTOR ? kp : LANES);
      write_transposed(decays, vp, kp / LANES, x.grad_o, vp, x.queries, memory.later, memory.later, kp);
    }
  }
  if (args.grad_state != nullptr) {
    transpose_padded(vp, kp, memory.later, kp, memory.matrix, vp);
    store_rows(args.grad_state + index * matrix + task.first, columns, problem.keys, task.width, memory.matrix, vp);
    if (to.normalizer != nullptr) memcpy(to.normalizer, memory.later_normalizer, sizeof(float) * problem.keys);
  }
}

// Partial gradients, one part for every task, (tasks, N, width).
struct Parts {
  Parts(const regard_sequence& to, int64_t heads, int64_t parts, int64_t tokens, int64_t width)
      : each(to.data == nullptr ? 1 : heads / to.heads * parts), tokens(tokens), width(width) {}

  bool needed() const { return each > 1; }
  size_t count(int64_t tasks) const { return needed() ? static_cast<size_t>(tasks * tokens * width) : 0; }

  Rows rows(const regard_sequence& to, const Problem& problem, int64_t number) const {
    const Task task(problem, number);
    if (!needed()) return Rows(to, task.batch, task.head, problem.heads);
    regard_sequence own{memory, REGARD_FLOAT32, 1, 0, 0, width};
    own.data = memory + number * tokens * width;
    return Rows(own, 0, 0, 1);
  }

  // Sums the parts of one head for a range of tokens, in the order of the tasks.
  void merge(const regard_sequence& to, int64_t batch, int64_t head, int64_t first, int64_t last) const {
    const Rows out(to, batch, head, to.heads);
    const float* from = memory + (batch * to.heads + head) * each * tokens * width;
    for (int64_t token = first; token < last; ++token)
      for (int64_t j = 0; j < width; j += LANES) {
        const int wide = static_cast<int>(least<int64_t>(LANES, width - j));
        Vec total = zero();
        for (int64_t part = 0; part < each; ++part) total += load(from + (part * tokens + token) * width + j, wide);
        alignas(64) float row[LANES];
        store(row, total);
        Rows here = out;
        here.data = static_cast<char*>(here.data) + j * (here.dtype == REGARD_BFLOAT16 ? 2 : 4);
        store_tokens(here, token, 1, wide, row, LANES);
      }
  }

  int64_t each, tokens, width;
  float* memory = nullptr;
};

int run_backward(const regard_gated_recurrence_backward_args* args, const regard_linear_attention_options& options) {
  if (!good(args->threads, args->batch, args->heads, args->tokens, args->key_width, args->value_width, args->decay) ||
      !shared_by(args->q, args->heads) || !shared_by(args->k, args->heads) || !shared_by(args->grad_q, args->heads) ||
      !shared_by(args->grad_k, args->heads) || args->checkpoint_every < TOKENS || args->checkpoint_every % TOKENS != 0)
    return REGARD_BAD_ARGUMENT;
  const Problem problem(args->threads, args->batch, args->heads, args->tokens, args->key_width, args->value_width,
                        options);
  const int64_t split = problem.split.parts, tokens = args->tokens;
  const long tasks = static_cast<long>(args->batch * args->heads * split);
  const int64_t gates = args->decay == REGARD_DECAY_VECTOR ? args->key_width : 1;
  Parts q(args->grad_q, args->heads, split, tokens, args->key_width),
      k(args->grad_k, args->heads, split, tokens, args->key_width), g(args->grad_g, args->heads, split, tokens, gates);
  const bool of_normalizer = options.normalize != 0 && args->grad_state != nullptr;
  const int64_t normalizer_width = of_normalizer ? args->key_width : 0;
  Workspace parts(4 * (q.count(tasks) + k.count(tasks) + g.count(tasks) + tasks * normalizer_width) + 4 * 64);
  if (!parts) return REGARD_OUT_OF_MEMORY;
  Parts* const all[] = {&q, &k, &g};
  for (Parts* each : all) each->memory = parts.take<float>(each->count(tasks));
  float* const normalizers = parts.take<float>(tasks * normalizer_width);
  const int64_t blocks = least(args->checkpoint_every, round_up(tokens, TOKENS)) / TOKENS;
  int failed = 0;
  parallel_tasks(static_cast<int>(args->threads), tasks, [&](long number) {
    const FlushDenormals flush;
    Workspace memory(BackwardMemory::bytes(problem, blocks));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    const Task task(problem, number);
    const Gradients to{q.rows(args->grad_q, problem, number), k.rows(args->grad_k, problem, number),
                       Rows(args->grad_v, task.batch, task.head, args->heads, task.first),
                       g.rows(args->grad_g, problem, number),
                       of_normalizer ? normalizers + number * normalizer_width : nullptr};
    backward(*args, problem, number, to, memory);
  });
  if (failed) return REGARD_OUT_OF_MEMORY;
  constexpr int64_t RANGE = 256;
  const int64_t ranges = ceil_div(tokens, RANGE);
  const regard_sequence* const outputs[] = {&args->grad_q, &args->grad_k, &args->grad_g};
  for (int i = 0; i < 3; ++i) {
    const regard_sequence& to = *outputs[i];
    if (!all[i]->needed()) continue;
    parallel_tasks(static_cast<int>(args->threads), static_cast<long>(args->batch * to.heads * ranges), [&](long number) {
      const int64_t first = number % ranges * RANGE, head = number / ranges % to.heads,
                    batch = number / ranges / to.heads;
      all[i]->merge(to, batch, head, first, least(first + RANGE, tokens));
    });
  }
  if (of_normalizer)
    for (int64_t head = 0; head < args->batch * args->heads; ++head) {
      float *const total = normalizers + head * split * normalizer_width;
      for (int64_t i = normalizer_width; i < split * normalizer_width; ++i) total[i % normalizer_width] += total[i];
      problem.give_normalizer(total, args->grad_state + head * normalizer_width * problem.columns);
    }
  return REGARD_OK;
}

}  // namespace

int gated_recurrence(const regard_gated_recurrence_args* args) { return run_forward(args, AS_THEY_ARE); }

int gated_recurrence_backward(const regard_gated_recurrence_backward_args* args) {
  return run_backward(args, AS_THEY_ARE);
}

int linear_attention(const regard_linear_attention_args* args) {
  if (!good(args->options, args->recurrence.decay, args->recurrence.inclusive)) return REGARD_BAD_ARGUMENT;
  return run_forward(&args->recurrence, args->options);
}

int linear_attention_backward(const regard_linear_attention_backward_args* args) {
  const bool reads = args->options.normalize != 0 && args->recurrence.grad_o.data != nullptr;
  if (!good(args->options, args->recurrence.decay, args->recurrence.inclusive) ||
      (reads && args->options.inverse == nullptr))
    return REGARD_BAD_ARGUMENT;
  return run_backward(&args->recurrence, args->options);
}

namespace {

// Updates one state, read once and written once; if STREAMING, written past the caches.
template <bool STREAMING>
void step_state(const Rows& q, const Rows& k, const Rows& v, const Rows& g, int64_t decay, bool correcting, float beta,
                int keys, int values, int64_t vp, const float* state, const Rows& o, float* to, float* memory) {
  float *u = memory, *outputs = memory + vp, *query = memory + 2 * vp, *key = query + round_up(keys, LANES),
        *decays = key + round_up(keys, LANES);
  load_token(v, values, u);
  load_token(k, keys, key);
  load_token(q, keys, query);
  if (decay == REGARD_DECAY_VECTOR) {
    load_token(g, keys, decays);
    for (int d = 0; d < keys; d += LANES) store(decays + d, exp(load(decays + d)));
  } else {
    const Vec all = decay == REGARD_DECAY_SCALAR ? exp(broadcast(load_number(g, 0))) : broadcast(1.f);
    for (int d = 0; d < keys; d += LANES) store(decays + d, all);
  }
  constexpr int WIDE = 4;
  int j = 0;
  auto columns = [&](auto w, int tail) __attribute__((always_inline)) {
    constexpr int W = decltype(w)::value;
    auto row = [&](int d, int c) __attribute__((always_inline)) {
      const float* from = state + static_cast<int64_t>(d) * values + j + c * LANES;
      return c + 1 < W || tail == LANES ? load(from) : load(from, tail);
    };
    Vec value[W], output[W];
#pragma GCC unroll 4
    for (int c = 0; c < W; ++c) {
      value[c] = load(u + j + c * LANES);
      output[c] = zero();
    }
    if (correcting) {
      for (int d = 0; d < keys; ++d) {
        const Vec x = broadcast(decays[d] * key[d]);
#pragma GCC unroll 4
        for (int c = 0; c < W; ++c) output[c] = fma(x, row(d, c), output[c]);
      }
#pragma GCC unroll 4
      for (int c = 0; c < W; ++c) {
        value[c] = beta * (value[c] - output[c]);
        output[c] = zero();
      }
    }
    for (int d = 0; d < keys; ++d) {
      const Vec a = broadcast(decays[d]), b = broadcast(key[d]), y = broadcast(query[d]);
#pragma GCC unroll 4
      for (int c = 0; c < W; ++c) {
        const Vec x = fma(b, value[c], a * row(d, c));
        output[c] = fma(y, x, output[c]);
        float* at = to + static_cast<int64_t>(d) * values + j + c * LANES;
        if (c + 1 < W || tail == LANES) {
#if defined(__AVX512F__)
          if (STREAMING)
            _mm512_stream_ps(at, reinterpret_cast<__m512>(x));
          else
            store(at, x);
#elif defined(__AVX__)
          if (STREAMING)
            _mm256_stream_ps(at, reinterpret_cast<__m256>(x));
          else
            store(at, x);
#else
          store(at, x);
#endif
        } else {
          store(at, x, tail);
        }
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < W; ++c) store(outputs + j + c * LANES, output[c]);
  };
  for (; j + WIDE * LANES <= values; j += WIDE * LANES) columns(Constant<WIDE>{}, LANES);
  for (; j < values; j += LANES) columns(Constant<1>{}, least(LANES, values - j));
  store_tokens(o, 0, 1, values, outputs, vp);
}

}  // namespace

int gated_recurrence_step(const regard_gated_recurrence_step_args* args) {
  if (!good(args->threads, args->batch, args->heads, 1, args->key_width, args->value_width, args->decay) ||
      !shared_by(args->q, args->heads) || !shared_by(args->k, args->heads))
    return REGARD_BAD_ARGUMENT;
  const int keys = static_cast<int>(args->key_width), values = static_cast<int>(args->value_width);
  const int64_t heads = args->heads, states = args->batch * heads, matrix = static_cast<int64_t>(keys) * values;
  const int64_t kp = round_up(keys, LANES), vp = round_up(values, LANES);
  // Writes bypass the caches if old and new states do not fit in them; such stores need full, aligned vectors.
  const bool streaming = 2 * 4 * states * matrix > (int64_t{32} << 20) && values % LANES == 0 &&
                         reinterpret_cast<uintptr_t>(args->new_state) % (LANES * 4) == 0;
  const int64_t run = most<int64_t>(1, least<int64_t>(ceil_div(states, args->threads), (1 << 16) / most<int64_t>(1, matrix)));
  int failed = 0;
  parallel_tasks(static_cast<int>(args->threads), static_cast<long>(ceil_div(states, run)), [&](long number) {
    const FlushDenormals flush;
    Workspace memory(4 * (2 * vp + 3 * kp));
    if (!memory) {
      __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t i = number * run; i < least((number + 1) * run, states); ++i) {
      const int64_t batch = i / heads, head = i % heads;
      const Rows q(args->q, batch, head, heads), k(args->k, batch, head, heads), v(args->v, batch, head, heads),
          g(args->g, batch, head, heads), b(args->beta, batch, head, heads), o(args->o, batch, head, heads);
      const bool correcting = args->beta.data != nullptr;
      const float beta = correcting ? load_number(b, 0) : 0.f;
      (streaming ? step_state<true> : step_state<false>)(q, k, v, g, args->decay, correcting, beta, keys, values, vp,
                                                         args->state + i * matrix, o, args->new_state + i * matrix,
                                                         static_cast<float*>(memory.memory));
    }
#if defined(__SSE2__)
    if (streaming) _mm_sfence();
#endif
  });
  return failed ? REGARD_OUT_OF_MEMORY : REGARD_OK;
}

}  // namespace REGARD_ISA
