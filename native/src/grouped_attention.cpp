// Softmax on two levels over groups of keys, forward and backward.
//
// A block of 64 queries visits chunks of keys: as many whole groups as fit in 64 slots, or one longer group. Scores of
// a chunk are kept transposed, a key by all queries of the block, with queries in the lanes of vectors, so that neither
// softmax needs sums across lanes. Since groups are whole, the lower level is finished in place: its weights are
// multiplied by the group's gate and enter the upper level, a running softmax, in one product with the values. Each
// thread needs memory for one chunk, at most the longest group. At the edge of causal visibility a block is divided
// into parts of 16 queries, each up to the last key that it may see.
//
// Backward uses the log-sum-exp of the upper level and recomputes that of the groups. With dW = dO V^T,
// delta = dO . out, and D_c the sum of u_ij dW_ij over a group:
//   dS = W (dW - delta) for tokens of the query's own group, W (dW - D_c) for others, t_c (D_c - delta) for landmarks.

#include "regard_grouped_attention.h"

#include "vector.h"

#include "lanes.h"
#include "parallel.h"
#include "product.h"
#include "token_blocks.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

constexpr int QUERIES = 64;  // in a block; a multiple of LANES for every instruction set
constexpr int PART = 16;     // queries in a part of a block
constexpr int STEP = 64;     // keys loaded at once
constexpr int32_t ABSENT = -1;

// How far a score may exceed the reference of the running softmax before the reference moves.
constexpr float HEADROOM = 20.f;

REGARD_INLINE float infinity() { return __builtin_inff(); }

REGARD_INLINE IntVec equal(IntVec a, int32_t b) { return a == b - IntVec{}; }
REGARD_INLINE IntVec finite_below(Vec x) { return reinterpret_cast<IntVec>(x > -infinity()); }

// e^x for weights, for any x; equally accurate over the whole range of x.
REGARD_INLINE Vec weight(Vec x) {
  x *= LOG2_E;
#if defined(__AVX512DQ__)
  // 2^(x - floor x), with the least relative error (8e-8) of this degree on [0, 1); infinite x has remainder 0
  const Vec r = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 9));
  Vec p = broadcast(0.001877575065009296f);
  p = fma(p, r, broadcast(0.008989344350993633f));
  p = fma(p, r, broadcast(0.05582631379365921f));
  p = fma(p, r, broadcast(0.24015362560749054f));
  p = fma(p, r, broadcast(0.6931530833244324f));
  p = fma(p, r, broadcast(0.9999999403953552f));
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(x)));
#else
  return exp2(x);
#endif
}

struct Chunk {
  int64_t begin, end;  // slots
  int32_t group;       // its first group
  int32_t low, high;   // range of ranks of its keys; high is ABSENT if no key exists
  bool gaps;           // whether a key is missing
};

// The score-independent data of one row of the batch.
struct Row {
  int32_t *queries, *keys;  // ranks
  int32_t* own;             // groups of queries
  int64_t* starts;          // (groups + 1,) first slot of each group
  Chunk* chunks;
  int64_t groups, count, longest;  // number of groups, of chunks, of slots in the longest chunk

  static size_t bytes(int64_t n, int64_t m) {
    using regard::Workspace;
    const size_t queries = static_cast<size_t>(n), keys = static_cast<size_t>(m);
    return 2 * Workspace::bytes_of<int32_t>(queries) + Workspace::bytes_of<int32_t>(keys) +
           Workspace::bytes_of<int64_t>(keys + 1) + Workspace::bytes_of<Chunk>(keys);
  }

  void prepare(const regard_grouped_attention_args& args, int64_t b, regard::Workspace& space) {
    const int64_t n = args.n, m = args.m;
    queries = space.take<int32_t>(static_cast<size_t>(n));
    own = space.take<int32_t>(static_cast<size_t>(n));
    keys = space.take<int32_t>(static_cast<size_t>(m));
    starts = space.take<int64_t>(static_cast<size_t>(m + 1));
    chunks = space.take<Chunk>(static_cast<size_t>(m));
    const int64_t* from = args.query_ranks + b * args.query_ranks_stride;
    for (int64_t i = 0; i < n; ++i) queries[i] = static_cast<int32_t>(from[i]);
    for (int64_t i = 0; i < n; ++i)
      own[i] = args.own == nullptr ? ABSENT : static_cast<int32_t>(args.own[b * args.own_stride + i]);
    from = args.key_ranks + b * args.key_ranks_stride;
    const uint8_t* landmark = args.landmark + b * args.landmark_stride;
    groups = 0;
    starts[0] = 0;
    for (int64_t j = 0; j < m; ++j) {
      keys[j] = from[j] < 0 ? ABSENT : static_cast<int32_t>(from[j]);
      if (landmark[j] || j + 1 == m) starts[++groups] = j + 1;
    }
    count = longest = 0;
    for (int64_t g = 0; g < groups; ++count) {
      Chunk chunk{starts[g], starts[g + 1], static_cast<int32_t>(g), INT32_MAX, ABSENT, false};
      while (++g < groups && starts[g + 1] - chunk.begin <= STEP) chunk.end = starts[g + 1];
      for (int64_t j = chunk.begin; j < chunk.end; ++j) {
        if (keys[j] == ABSENT) {
          chunk.gaps = true;
          continue;
        }
        chunk.low = least(chunk.low, keys[j]);
        chunk.high = most(chunk.high, keys[j]);
      }
      chunks[count] = chunk;
      longest = most(longest, chunk.end - chunk.begin);
    }
  }
};

// Numbers for the queries of a block, one per lane.
struct Lanes {
  int32_t ranks[QUERIES], own[QUERIES];
  float reference[QUERIES];  // of the upper level: running in forward, the log-sum-exp in backward
  float sums[QUERIES];       // sums of weights of the upper level
  float delta[QUERIES];
};

// The block of queries that a thread is processing, and the thread's memory; lines are padded with zeros to full
// vectors.
struct Block {
  const regard_grouped_attention_args* args;
  const Row* row;
  const uint8_t* landmark;
  int64_t b, h, begin;
  int count;              // queries
  int32_t first;          // lowest of their ranks
  int32_t last[QUERIES / PART];  // highest of their ranks in each part
  int rows[QUERIES / PART];      // slots of the current chunk up to the last one that each part may see
  bool even;                     // whether `rows` is the same for all parts
  int64_t line, value_line;  // floats of a key and of a value
  Lanes* lanes;
  float *queries, *turned;  // (QUERIES, line) scaled, and its transpose (line, QUERIES)
  float *keys, *values;     // (STEP, line), (STEP, value_line)
  float* output;            // (QUERIES, value_line)
  float* scores;            // (chunk, QUERIES), then weights
  // backward only
  float *grad, *grad_turned;  // (QUERIES, value_line), (value_line, QUERIES): gradient of the output
  float* slopes;              // (chunk, QUERIES): gradients of weights, then of scores
  float* grad_q;              // (QUERIES, line)

  static size_t floats(int64_t line, int64_t value_line, int64_t longest, bool backward) {
    const int64_t both = line + value_line;
    return static_cast<size_t>(QUERIES * (2 * line + value_line + longest) + STEP * both +
                               (backward ? QUERIES * (both + value_line + longest) : 0)) +
           regard::Workspace::bytes_of<Lanes>(1) / sizeof(float);
  }

  void take(float* space, int64_t longest, bool backward) {
    const auto next = [&space](int64_t size) {
      float* found = space;
      space += size;
      return found;
    };
    lanes = reinterpret_cast<Lanes*>(next(static_cast<int64_t>(regard::Workspace::bytes_of<Lanes>(1) / sizeof(float))));
    queries = next(QUERIES * line);
    turned = next(QUERIES * line);
    keys = next(STEP * line);
    values = next(STEP * value_line);
    output = next(QUERIES * value_line);
    scores = next(QUERIES * longest);
    if (!backward) return;
    grad = next(QUERIES * value_line);
    grad_turned = next(QUERIES * value_line);
    slopes = next(QUERIES * longest);
    grad_q = next(QUERIES * line);
  }

  void place(int64_t row_of_batch, int64_t head, int64_t block, const Row* rows) {
    b = row_of_batch;
    h = head;
    row = rows + b;
    landmark = args->landmark + b * args->landmark_stride;
    begin = block * QUERIES;
    count = static_cast<int>(least<int64_t>(QUERIES, args->n - begin));
    first = INT32_MAX;
    for (int32_t& highest : last) highest = ABSENT;
    for (int i = 0; i < QUERIES; ++i) {
      const bool there = i < count;
      lanes->ranks[i] = there ? row->queries[begin + i] : ABSENT;
      lanes->own[i] = there ? row->own[begin + i] : ABSENT;
      if (!there) continue;
      first = least(first, lanes->ranks[i]);
      last[i / PART] = most(last[i / PART], lanes->ranks[i]);
    }
  }

  int64_t kv_head() const { return h / (args->heads / args->kv_heads); }

  int parts() const { return static_cast<int>(ceil_div(count, PART)); }

  // Sets `rows` and `even` for a chunk; returns whether any query may see any of its keys.
  bool reach(const Chunk& chunk) {
    int most_rows = 0;
    even = true;
    for (int part = 0; part < parts(); ++part) {
      int64_t end = chunk.end;
      if (chunk.high == ABSENT || (args->causal && chunk.low > last[part]))
        end = chunk.begin;
      else if (!whole(chunk))
        while (end > chunk.begin && !sees(row->keys[end - 1], last[part])) --end;
      rows[part] = static_cast<int>(end - chunk.begin);
      even = even && rows[part] == rows[0];
      most_rows = most(most_rows, rows[part]);
    }
    return most_rows > 0;
  }
  bool sees(int32_t rank, int32_t highest) const { return rank != ABSENT && (!args->causal || rank <= highest); }
  bool whole(const Chunk& chunk) const { return !chunk.gaps && (!args->causal || chunk.high <= first); }
};

template <class T>
const T* head_of(const void* data, const int64_t* strides, int64_t b, int64_t h) {
  return static_cast<const T*>(data) + b * strides[0] + h * strides[1];
}
template <class T>
T* head_of(void* data, const int64_t* strides, int64_t b, int64_t h) {
  return static_cast<T*>(data) + b * strides[0] + h * strides[1];
}

// Loads the rows of a block of queries, padded with zeros.
template <class T>
void load_block(const Block& block, const T* from, int64_t stride, int64_t width, float* to, int64_t line) {
  load_rows(from + block.begin * stride, stride, block.count, static_cast<int>(width), to, line);
  for (int64_t j = block.count * line; j < QUERIES * line; j += LANES) store(to + j, zero());
}

template <class T>
void load_queries(Block& block) {
  const regard_grouped_attention_args& args = *block.args;
  load_block(block, head_of<T>(args.q, args.q_strides, block.b, block.h), args.q_strides[2], args.width, block.queries,
             block.line);
  for (int64_t j = 0; j < block.count * block.line; j += LANES)
    store(block.queries + j, load(block.queries + j) * args.scale);
  transpose_padded(QUERIES, static_cast<int>(block.line), block.queries, block.line, block.turned, QUERIES);
}

// A step of keys or values as contiguous float32 lines: in place if they already are, otherwise copied. Rows that are
// far apart would occupy only a few sets of the cache.
struct Lines {
  const float* data;
  int64_t line;
};

// Calls f(first query, queries, slots) for the parts of a block, or once for all queries if they may see the same
// slots.
template <class F>
REGARD_INLINE void each_piece(const Block& block, F&& f) {
  const int parts = block.even ? 1 : block.parts();
  for (int part = 0; part < parts; ++part) {
    const int first = part * PART, queries = block.even ? block.count : least(PART, block.count - first);
    f(first, queries, block.rows[part]);
  }
}
template <class T>
Lines load_step(const void* from, const int64_t* strides, const Block& block, int64_t first, int rows, int64_t width,
                float* to, int64_t line, bool anyhow = false) {
  const T* data = head_of<T>(from, strides, block.b, block.kv_head()) + first * strides[2];
  if (sizeof(T) == sizeof(float) && ((width == line && strides[2] == line) || anyhow))
    return {reinterpret_cast<const float*>(data), strides[2]};
  load_rows(data, strides[2], rows, static_cast<int>(width), to, line);
  return {to, line};
}
template <class T>
Lines load_keys(const Block& block, int64_t first, int rows, bool anyhow) {
  return load_step<T>(block.args->k, block.args->k_strides, block, first, rows, block.args->width, block.keys,
                      block.line, anyhow);
}
template <class T>
Lines load_values(const Block& block, int64_t first, int rows, bool anyhow) {
  return load_step<T>(block.args->v, block.args->v_strides, block, first, rows, block.args->value_width, block.values,
                      block.value_line, anyhow);
}

// to (slots, QUERIES) = lines (slots, width) turned (width, QUERIES) for a step of a chunk from slot r on.
REGARD_INLINE void multiply(const Block& block, const Lines& lines, int r, int64_t width, const float* turned,
                            float* to) {
  each_piece(block, [&](int first, int queries, int rows) {
    const int here = least(STEP, rows - r);
    if (here > 0)
      product<Into::ZERO>(here, static_cast<int>(round_up(queries, LANES)), static_cast<int>(width), lines.data,
                          lines.line, 1, turned + first, QUERIES, to + r * QUERIES + first, QUERIES);
  });
}
// to (QUERIES, line) += weights^T (QUERIES, slots) lines (slots, line) for a step of a chunk from slot r on.
REGARD_INLINE void gather(const Block& block, const Lines& lines, int r, int64_t line, const float* weights,
                          float* to) {
  each_piece(block, [&](int first, int queries, int rows) {
    const int here = least(STEP, rows - r);
    if (here > 0)
      product<Into::SUM>(queries, static_cast<int>(line), here, weights + r * QUERIES + first, 1, QUERIES, lines.data,
                         lines.line, to + first * line, line);
  });
}
// to (slots, line) += weights (slots, QUERIES) from (QUERIES, line) for a chunk.
REGARD_INLINE void scatter(const Block& block, const float* weights, const float* from, int64_t line, float* to) {
  each_piece(block, [&](int first, int queries, int rows) {
    product<Into::SUM>(rows, static_cast<int>(line), queries, weights + first, QUERIES, 1, from + first * line, line,
                       to, line);
  });
}

// Calls f(first slot, slots) for the steps of a chunk that any query may see.
template <class F>
REGARD_INLINE void each_step(const Block& block, F&& f) {
  int rows = 0;
  for (int part = 0; part < block.parts(); ++part) rows = most(rows, block.rows[part]);
  for (int r = 0; r < rows; r += STEP) f(r, least(STEP, rows - r));
}

// Scores of a chunk, for the slots that each part may see; -inf for hidden pairs.
template <class T>
void compute_scores(const Block& block, const Chunk& chunk) {
  each_step(block, [&](int r, int here) {
    const Lines keys = load_keys<T>(block, chunk.begin + r, here, true);  // in place: each key is read once
    multiply(block, keys, r, block.args->width, block.turned, block.scores);
  });
  if (block.whole(chunk)) return;
  const Vec nothing = broadcast(-infinity());
  for (int j = 0; j < block.count; j += LANES)
    for (int r = 0; r < block.rows[j / PART]; ++r) {
      const int32_t rank = block.row->keys[chunk.begin + r];
      const bool hidden = rank == ABSENT;
      if (!hidden && (!block.args->causal || rank <= block.first)) continue;
      float* to = block.scores + r * QUERIES + j;
      const IntVec seen = load(block.lanes->ranks + j) >= rank - IntVec{};
      store(to, hidden ? nothing : select(seen, load(to), nothing));
    }
}

// The slots of one group among the first `rows` of a chunk.
struct Members {
  int begin, end;  // tokens
  bool closed;     // whether slot `end` is its landmark

  Members(const Block& block, const Chunk& chunk, int64_t group, int rows) {
    const int64_t* starts = block.row->starts;
    begin = static_cast<int>(starts[group] - chunk.begin);
    end = static_cast<int>(least<int64_t>(rows, starts[group + 1] - chunk.begin));
    closed = end > begin && block.landmark[chunk.begin + end - 1] != 0;
    if (closed) --end;
  }
};

// Calls f(members, group) for the groups of the first `rows` slots of a chunk.
template <class F>
REGARD_INLINE void each_group(const Block& block, const Chunk& chunk, int rows, F&& f) {
  for (int64_t g = chunk.group; g < block.row->groups && block.row->starts[g] < chunk.begin + rows; ++g)
    f(Members(block, chunk, g, rows), static_cast<int32_t>(g));
}

// The largest score of a group's tokens.
REGARD_INLINE Vec peak_of(const float* scores, const Members& members) {
  Vec peak = broadcast(-infinity());
  for (int r = members.begin; r < members.end; ++r) peak = maximum(load(scores + r * QUERIES), peak);
  return peak;
}

// The landmark's score; -inf for the query's own group and for groups without a visible token, whose gate is 0.
REGARD_INLINE Vec gate_of(const float* scores, const Members& members, Vec peak, IntVec mine) {
  const Vec shut = broadcast(-infinity());
  if (!members.closed) return shut;
  return select(finite_below(peak) & ~mine, load(scores + members.end * QUERIES), shut);
}

// Turns scores into weights in place, for the lanes of vector c.
__attribute__((noinline)) void weigh(const Block& block, const Chunk& chunk, int rows, int c) {
  float* scores = block.scores + c * LANES;
  Lanes& lanes = *block.lanes;
  const IntVec own = load(lanes.own + c * LANES);
  Vec peaks[STEP];
  Vec top = broadcast(-infinity());
  int at = 0;
  each_group(block, chunk, rows, [&](const Members& members, int32_t group) {
    const IntVec mine = equal(own, group);
    const Vec peak = peaks[at++] = peak_of(scores, members);
    top = maximum(select(mine, peak, gate_of(scores, members, peak, mine)), top);
  });

  Vec reference = load(lanes.reference + c * LANES), sums = load(lanes.sums + c * LANES);
  const IntVec over = reinterpret_cast<IntVec>(top > reference + HEADROOM);
  if (any(over)) {
    // with a reference of -inf no key was visible before: the factor is 0
    const Vec factor = select(over, exp(reference - top), broadcast(1.f));
    reference = select(over, top, reference);
    store(lanes.reference + c * LANES, reference);
    sums *= factor;
    for (int i = 0; i < LANES; ++i) {
      if (factor[i] == 1.f) continue;
      float* line = block.output + (c * LANES + i) * block.value_line;
      for (int64_t p = 0; p < block.value_line; p += LANES) store(line + p, load(line + p) * factor[i]);
    }
  }
  const Vec base = select(finite_below(reference), reference, zero());

  at = 0;
  each_group(block, chunk, rows, [&](const Members& members, int32_t group) {
    const IntVec mine = equal(own, group);
    const Vec peak = peaks[at++];
    const Vec gate = exp(gate_of(scores, members, peak, mine) - base);
    const Vec from = select(mine, base, select(finite_below(peak), peak, zero()));
    Vec total = zero();
    for (int r = members.begin; r < members.end; ++r) {
      const Vec w = weight(load(scores + r * QUERIES) - from);
      total += w;
      store(scores + r * QUERIES, w);
    }
    sums += select(mine, total, gate);
    if (any(~mine)) {
      // 0 / 0 should be 0, and NaN propagate
      const Vec share = select(reinterpret_cast<IntVec>(total > 0.f), gate / total, gate * total);
      const Vec factor = select(mine, broadcast(1.f), share);
      for (int r = members.begin; r < members.end; ++r)
        store(scores + r * QUERIES, load(scores + r * QUERIES) * factor);
    }
    if (members.closed) store(scores + members.end * QUERIES, zero());
  });
  store(lanes.sums + c * LANES, sums);
}

template <class T>
void attend(Block& block) {
  const regard_grouped_attention_args& args = *block.args;
  Lanes& lanes = *block.lanes;
  load_queries<T>(block);
  for (int i = 0; i < QUERIES; ++i) {
    lanes.reference[i] = -infinity();
    lanes.sums[i] = 0;
  }
  for (int64_t i = 0; i < QUERIES * block.value_line; i += LANES) store(block.output + i, zero());
  for (int64_t at = 0; at < block.row->count; ++at) {
    const Chunk& chunk = block.row->chunks[at];
    if (!block.reach(chunk)) continue;
    compute_scores<T>(block, chunk);
    for (int j = 0; j < block.count; j += LANES) weigh(block, chunk, block.rows[j / PART], j / LANES);
    each_step(block, [&](int r, int here) {
      const Lines values = load_values<T>(block, chunk.begin + r, here, false);
      gather(block, values, r, block.value_line, block.scores, block.output);
    });
  }
  float* lse = args.lse + (block.b * args.heads + block.h) * args.n + block.begin;
  for (int i = 0; i < block.count; ++i) {
    const float sum = lanes.sums[i];
    const Vec factor = broadcast(sum == 0.f ? 0.f : 1.f / sum);
    float* line = block.output + i * block.value_line;
    for (int64_t p = 0; p < block.value_line; p += LANES) store(line + p, load(line + p) * factor);
    lse[i] = sum == 0.f ? -infinity() : lanes.reference[i] + __builtin_logf(sum);
  }
  T* out = head_of<T>(args.out, args.out_strides, block.b, block.h) + block.begin * args.out_strides[2];
  store_rows(out, args.out_strides[2], block.count, static_cast<int>(args.value_width), block.output,
             block.value_line);
}

// Turns scores into weights, and gradients of weights into gradients of scores, in place, for the lanes of vector c.
__attribute__((noinline)) void differentiate(const Block& block, const Chunk& chunk, int rows, int c) {
  float *scores = block.scores + c * LANES, *slopes = block.slopes + c * LANES;
  const Lanes& lanes = *block.lanes;
  const IntVec own = load(lanes.own + c * LANES);
  const Vec lse = load(lanes.reference + c * LANES), delta = load(lanes.delta + c * LANES);
  const Vec base = select(finite_below(lse), lse, zero());
  each_group(block, chunk, rows, [&](const Members& members, int32_t group) {
    const IntVec mine = equal(own, group);
    const Vec peak = peak_of(scores, members);
    // no weight exceeds 1, even if differences of large numbers are rounded up
    const Vec gate = exp(minimum(zero(), gate_of(scores, members, peak, mine) - base));
    const Vec from = select(mine, base, select(finite_below(peak), peak, zero()));
    Vec total = zero(), dot = zero();
    for (int r = members.begin; r < members.end; ++r) {
      const Vec w = weight(minimum(zero(), load(scores + r * QUERIES) - from));
      total += w;
      dot += select(reinterpret_cast<IntVec>(w == 0.f), zero(), w * load(slopes + r * QUERIES));
      store(scores + r * QUERIES, w);
    }
    const Vec inverse = select(reinterpret_cast<IntVec>(total > 0.f), 1.f / total, total);
    const Vec mean = dot * inverse;
    const Vec factor = select(mine, broadcast(1.f), gate * inverse), offset = select(mine, delta, mean);
    for (int r = members.begin; r < members.end; ++r) {
      const Vec w = load(scores + r * QUERIES) * factor;
      const Vec slope = w * (load(slopes + r * QUERIES) - offset);
      store(scores + r * QUERIES, w);
      store(slopes + r * QUERIES, select(reinterpret_cast<IntVec>(w == 0.f), zero(), slope));
    }
    if (!members.closed) return;
    store(scores + members.end * QUERIES, zero());
    const Vec slope = gate * (mean - delta);
    store(slopes + members.end * QUERIES, select(reinterpret_cast<IntVec>(gate == 0.f), zero(), slope));
  });
}

// Gradients of a block of queries; those of its keys are added to grad_k (m, line) and grad_v (m, value_line).
template <class T>
void attend_backward(Block& block, const regard_grouped_attention_backward_args& args, float* grad_k, float* grad_v) {
  const regard_grouped_attention_args& forward = *block.args;
  Lanes& lanes = *block.lanes;
  const int width = static_cast<int>(forward.width), value_width = static_cast<int>(forward.value_width);
  const int line = static_cast<int>(block.line), value_line = static_cast<int>(block.value_line);
  load_queries<T>(block);
  load_block(block, head_of<T>(forward.out, forward.out_strides, block.b, block.h), forward.out_strides[2],
             value_width, block.output, value_line);
  load_block(block, head_of<T>(args.grad_out, args.grad_out_strides, block.b, block.h), args.grad_out_strides[2],
             value_width, block.grad, value_line);
  transpose_padded(QUERIES, value_line, block.grad, value_line, block.grad_turned, QUERIES);
  const float* lse = forward.lse + (block.b * forward.heads + block.h) * forward.n + block.begin;
  for (int i = 0; i < QUERIES; ++i) {
    Vec delta = zero();
    for (int p = 0; p < value_line; p += LANES)
      delta = fma(load(block.output + i * value_line + p), load(block.grad + i * value_line + p), delta);
    lanes.delta[i] = sum(delta);
    lanes.reference[i] = i < block.count ? lse[i] : -infinity();
  }
  for (int64_t i = 0; i < QUERIES * block.line; i += LANES) store(block.grad_q + i, zero());
  for (int64_t at = 0; at < block.row->count; ++at) {
    const Chunk& chunk = block.row->chunks[at];
    if (!block.reach(chunk)) continue;
    compute_scores<T>(block, chunk);
    each_step(block, [&](int r, int here) {
      const Lines values = load_values<T>(block, chunk.begin + r, here, true);
      multiply(block, values, r, value_width, block.grad_turned, block.slopes);
    });
    for (int j = 0; j < block.count; j += LANES) differentiate(block, chunk, block.rows[j / PART], j / LANES);
    if (grad_v != nullptr) scatter(block, block.scores, block.grad, value_line, grad_v + chunk.begin * value_line);
    if (grad_k != nullptr) scatter(block, block.slopes, block.queries, line, grad_k + chunk.begin * line);
    if (args.grad_q == nullptr) continue;
    each_step(block, [&](int r, int here) {
      const Lines keys = load_keys<T>(block, chunk.begin + r, here, false);
      gather(block, keys, r, line, block.slopes, block.grad_q);
    });
  }
  if (args.grad_q == nullptr) return;
  for (int64_t i = 0; i < block.count * block.line; i += LANES)
    store(block.grad_q + i, load(block.grad_q + i) * forward.scale);
  T* to = head_of<T>(args.grad_q, args.grad_q_strides, block.b, block.h) + block.begin * args.grad_q_strides[2];
  store_rows(to, args.grad_q_strides[2], block.count, width, block.grad_q, line);
}

// All rows of the batch, prepared. `space` is false when out of memory.
struct Prepared {
  regard::Workspace space;
  Row* rows;
  int64_t longest = 1;

  explicit Prepared(const regard_grouped_attention_args& args)
      : space(regard::Workspace::bytes_of<Row>(static_cast<size_t>(args.batch)) +
              static_cast<size_t>(args.batch) * Row::bytes(args.n, args.m)) {
    if (!space) return;
    rows = space.take<Row>(static_cast<size_t>(args.batch));
    for (int64_t b = 0; b < args.batch; ++b) {
      rows[b].prepare(args, b, space);
      longest = most(longest, rows[b].longest);
    }
  }
};

template <class T>
int run(const regard_grouped_attention_args& args) {
  const Prepared prepared(args);
  if (!prepared.space) return REGARD_OUT_OF_MEMORY;
  const int64_t line = round_up(args.width, LANES), value_line = round_up(args.value_width, LANES);
  const int64_t blocks = ceil_div(args.n, QUERIES), tasks = args.batch * args.heads * blocks;
  const int64_t parts = most<int64_t>(1, least(args.threads, tasks));
  const size_t each = Block::floats(line, value_line, prepared.longest, false);
  regard::Workspace space(regard::Workspace::bytes_of<float>(each) * static_cast<size_t>(parts));
  if (!space) return REGARD_OUT_OF_MEMORY;
  float* memory = space.take<float>(each * static_cast<size_t>(parts));
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    Block block{};
    block.args = &args;
    block.line = line;
    block.value_line = value_line;
    block.take(memory + static_cast<size_t>(part) * each, prepared.longest, false);
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      // the last queries have the most keys, and the shortest tasks should come last
      const int64_t head = task / blocks;
      block.place(head / args.heads, head % args.heads, blocks - 1 - task % blocks, prepared.rows);
      attend<T>(block);
    }
  });
  return REGARD_OK;
}

// A task computes the gradients of one key/value head or, if there are fewer heads than threads, of a share of its
// queries; the shares are added at the end.
template <class T>
int run_backward(const regard_grouped_attention_backward_args& args) {
  const regard_grouped_attention_args& forward = *args.forward;
  const Prepared prepared(forward);
  if (!prepared.space) return REGARD_OUT_OF_MEMORY;
  const int64_t m = forward.m, line = round_up(forward.width, LANES), value_line = round_up(forward.value_width, LANES);
  const int64_t blocks = ceil_div(forward.n, QUERIES), pairs = forward.batch * forward.kv_heads;
  const int64_t shared = forward.heads / forward.kv_heads;
  const int64_t threads = most<int64_t>(1, forward.threads);
  const int64_t shares = pairs >= threads ? 1 : ceil_div(threads, pairs);
  const int64_t tasks = pairs * shares, parts = least(threads, tasks);
  const bool want_k = args.grad_k != nullptr, want_v = args.grad_v != nullptr;
  const size_t each = Block::floats(line, value_line, prepared.longest, true);
  const size_t gradients = static_cast<size_t>(m * ((want_k ? line : 0) + (want_v ? value_line : 0)));
  const size_t buffers = static_cast<size_t>(shares == 1 ? parts : tasks);
  regard::Workspace space(regard::Workspace::bytes_of<float>(each * static_cast<size_t>(parts)) +
                          regard::Workspace::bytes_of<float>(gradients * buffers));
  if (!space) return REGARD_OUT_OF_MEMORY;
  float* memory = space.take<float>(each * static_cast<size_t>(parts));
  float* sums = space.take<float>(gradients * buffers);
  const auto put = [&](int64_t pair, const float* from, int64_t first, int64_t rows) {
    const int64_t b = pair / forward.kv_heads, g = pair % forward.kv_heads;
    if (want_k)
      store_rows(head_of<T>(args.grad_k, args.grad_k_strides, b, g) + first * args.grad_k_strides[2],
                 args.grad_k_strides[2], static_cast<int>(rows), static_cast<int>(forward.width), from + first * line,
                 line);
    if (want_v)
      store_rows(head_of<T>(args.grad_v, args.grad_v_strides, b, g) + first * args.grad_v_strides[2],
                 args.grad_v_strides[2], static_cast<int>(rows), static_cast<int>(forward.value_width),
                 from + (want_k ? m * line : 0) + first * value_line, value_line);
  };
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    Block block{};
    block.args = &forward;
    block.line = line;
    block.value_line = value_line;
    block.take(memory + static_cast<size_t>(part) * each, prepared.longest, true);
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      const int64_t pair = task / shares, share = task % shares;
      float* mine = sums + static_cast<size_t>(shares == 1 ? part : task) * gradients;
      for (size_t i = 0; i < gradients; i += LANES) store(mine + i, zero());
      float* grad_k = want_k ? mine : nullptr;
      float* grad_v = want_v ? mine + (want_k ? m * line : 0) : nullptr;
      for (int64_t h = 0; h < shared; ++h)
        for (int64_t at = share; at < blocks; at += shares) {
          block.place(pair / forward.kv_heads, pair % forward.kv_heads * shared + h, at, prepared.rows);
          attend_backward<T>(block, args, grad_k, grad_v);
        }
      if (shares == 1) put(pair, mine, 0, m);
    }
  });
  if (shares == 1 || gradients == 0) return REGARD_OK;
  const int64_t pieces = ceil_div(m, STEP);
  parallel_tasks(static_cast<int>(threads), pairs * pieces, [&](long task) {
    const int64_t pair = task / pieces, first = task % pieces * STEP, rows = least<int64_t>(STEP, m - first);
    float* total = sums + static_cast<size_t>(pair * shares) * gradients;
    const auto add = [&](int64_t begin, int64_t count) {
      for (int64_t share = 1; share < shares; ++share) {
        const float* from = total + static_cast<size_t>(share) * gradients;
        for (int64_t i = begin; i < begin + count; i += LANES) store(total + i, load(total + i) + load(from + i));
      }
    };
    if (want_k) add(first * line, rows * line);
    if (want_v) add((want_k ? m * line : 0) + first * value_line, rows * value_line);
    put(pair, total, first, rows);
  });
  return REGARD_OK;
}

bool valid(const regard_grouped_attention_args& args) {
  return args.kv_heads >= 1 && args.heads % args.kv_heads == 0 && args.width >= 1 && args.value_width >= 1;
}

}  // namespace

int grouped_attention(const regard_grouped_attention_args* args) {
  if (!valid(*args)) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->heads * args->n == 0) return REGARD_OK;
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : run<float>(*args);
}

int grouped_attention_backward(const regard_grouped_attention_backward_args* args) {
  if (!valid(*args->forward)) return REGARD_BAD_ARGUMENT;
  if (args->forward->batch * args->forward->heads * most<int64_t>(args->forward->n, args->forward->m) == 0)
    return REGARD_OK;
  return args->forward->dtype == REGARD_BFLOAT16 ? run_backward<bfloat16>(*args) : run_backward<float>(*args);
}

}  // namespace REGARD_ISA
