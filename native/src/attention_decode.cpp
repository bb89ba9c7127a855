// Decoding: few queries against a long cache, where most of the time is spent on reading the cache once.
//
// The steps of 64 keys that a row's queries see, for all rows and kv heads in one list, are divided into equal spans,
// one per thread (stream-K: LeanAttention, arXiv 2405.10480). All query heads that share a kv head are processed
// together, so that its keys and values are read from memory once. A span is processed in chunks of steps: scores of
// the keys, weights relative to the largest score so far, then values. If a (row, kv head) is divided, the partial
// results of its spans (the largest score, the sum of weights and the sum of weighted values) are merged in the order
// of spans.

#include "regard_attention.h"

#include "vector.h"

#include "attention_pairs.h"
#include "lane_sums.h"
#include "parallel.h"
#include "product.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int STEP = Pairs::STEP;
constexpr int CHUNK = 8;                           // steps in a chunk
constexpr int SCORES_LINE = CHUNK * STEP + LANES;  // a tile's last vector may reach beyond the last key
constexpr int LEAST_STEPS = 4;                     // fewest steps of a span that are worth a thread
constexpr int SCANNED = 64;                        // steps whose ranks a task reads
constexpr int LEAST_SCANNED = 1 << 15;             // fewest keys whose ranks are worth several threads
constexpr int DOTS = LANES / 2;   // rows of queries up to which sums across lanes beat partly empty vectors
constexpr int TOGETHER = 4;       // queries whose scores share loads of keys
constexpr int64_t AHEAD = 4096;   // distance of prefetching, in bytes
constexpr int64_t PAGES_AHEAD = 4;  // the same in pages, for pages of at most AHEAD bytes

REGARD_INLINE float infinity() { return __builtin_inff(); }

// Prefetches rows to the second-level cache: the hardware prefetcher alone does not keep up when several queries are
// computed with each key.
template <class T>
REGARD_INLINE void fetch(const T* p, int64_t ldp, int64_t rows, int64_t width) {
  constexpr int64_t SIZE = sizeof(T);
  for (int64_t i = 0; i < rows; ++i, p += ldp)
    for (int64_t c = 0; c < width; c += 64 / SIZE) __builtin_prefetch(p + c, 0, 2);
}

// Prefetches rows at a distance after p, possibly beyond the end of the tensor.
template <class T>
REGARD_INLINE void fetch_ahead(const T* p, int64_t ldp, int rows, int64_t width) {
  fetch(p + most(AHEAD / (width * int64_t{sizeof(T)}), int64_t{1}) * ldp, ldp, rows, width);
}

// tanh to full relative precision: e^(2x) - 1 without cancellation, given 2 log2(e) x.
REGARD_INLINE Vec tanh_of(Vec x) {
  x = minimum(broadcast(60.f), maximum(broadcast(-60.f), x));
  const IntVec n = __builtin_convertvector(
      x + select(reinterpret_cast<IntVec>(x < 0.f), broadcast(-0.5f), broadcast(0.5f)), IntVec);
  const Vec r = x - __builtin_convertvector(n, Vec);
  Vec p = broadcast(EXP2_5);
  p = fma(p, r, broadcast(EXP2_4));
  p = fma(p, r, broadcast(EXP2_3));
  p = fma(p, r, broadcast(EXP2_2));
  p = fma(p, r, broadcast(EXP2_1));
  const Vec whole = reinterpret_cast<Vec>((n + 127) << 23);
  const Vec less_one = fma(whole, p * r, whole - 1.f);
  return less_one / (less_one + 2.f);
}

// Visibility of a row's keys for its queries.
struct Row {
  Pairs pairs;
  int32_t* steps;   // (count,) steps with a visible key, in order
  int64_t count;
  uint8_t* begin;   // (all steps,) first visible key of a step
  uint8_t* end;     // end of its visible keys; 0 if none is visible
  uint8_t* whole;   // whether every query sees every key of the step
  uint64_t* bits;   // (all steps, n) keys of a step that a query sees; only for steps that are not whole
};

struct Problem {
  const regard_attention_decode_args* decode;
  const regard_attention_args* args;
  Row* rows;
  bool one_row;
  int64_t queries;  // rows of queries that share a kv head
  int64_t query_line, value_line;
  float query_scale;
  bool ahead;  // whether reads continue at the next addresses, which is not so in small pages

  const Row& row(int64_t b) const { return rows[one_row ? 0 : b]; }
};

// The partial result of some keys of a (row, kv head), for each of its queries.
struct Partial {
  float* reference;  // largest score; -inf if no key was visible
  float* sums;       // sums of weights
  float* output;     // (queries, value_line)

  static size_t bytes(const Problem& problem) {
    const size_t queries = static_cast<size_t>(problem.queries);
    return 2 * Workspace::bytes_of<float>(queries) +
           Workspace::bytes_of<float>(queries * static_cast<size_t>(problem.value_line));
  }
  static Partial in(Workspace& space, const Problem& problem) {
    const size_t queries = static_cast<size_t>(problem.queries);
    Partial made;
    made.reference = space.take<float>(queries);
    made.sums = space.take<float>(queries);
    made.output = space.take<float>(queries * static_cast<size_t>(problem.value_line));
    return made;
  }
};

// One thread's memory.
struct Worker {
  float* queries;  // (queries, query_line) scaled; with more than DOTS of them transposed, (width, queries_line)
  float* scores;   // (queries, SCORES_LINE)
  float* turned;   // (STEP, queries_line) scores of a step
  float* keys;     // (STEP, width) as float32
  Partial partial;       // of a (row, kv head) that only this thread processes
  Partial first, last;   // of one that another thread began, and of one that another thread continues
  int64_t first_unit, last_unit;  // -1 for none
};

// --- visibility

// Reads the ranks of the keys of one step, and their visibility.
void scan_step(const Problem& problem, int64_t b, Row& row, int64_t step) {
  const regard_attention_args& args = *problem.args;
  const int64_t begin = step * STEP, count = least(static_cast<int64_t>(STEP), args.m - begin);
  int32_t* keys = const_cast<int32_t*>(row.pairs.keys) + begin;
  int32_t low = INT32_MAX, high = Pairs::ABSENT;
  bool gap = false;
  if (problem.decode->lengths != nullptr) {
    const int64_t there = most(least(problem.decode->lengths[b] - begin, count), int64_t{0});
    for (int64_t j = 0; j < count; ++j) keys[j] = j < there ? static_cast<int32_t>(begin + j) : Pairs::ABSENT;
    gap = there < count;
    if (there > 0) low = static_cast<int32_t>(begin), high = static_cast<int32_t>(begin + there - 1);
  } else {
    const int64_t* ranks = args.visibility.key_ranks + b * args.visibility.key_ranks_stride + begin;
    int64_t odd = ranks[0] < 0;
    for (int64_t j = 0; j < count; ++j) odd |= ranks[j] ^ (ranks[0] + j);
    if (!odd) {
      for (int64_t j = 0; j < count; ++j) keys[j] = static_cast<int32_t>(ranks[0] + j);
      low = keys[0];
      high = keys[count - 1];
    } else {
      gap = true;
      for (int64_t j = 0; j < count; ++j) {
        keys[j] = ranks[j] < 0 ? Pairs::ABSENT : static_cast<int32_t>(ranks[j]);
        if (keys[j] < 0) continue;
        low = least(low, keys[j]);
        high = most(high, keys[j]);
      }
    }
  }
  const_cast<int32_t*>(row.pairs.lowest)[step] = low;
  const_cast<int32_t*>(row.pairs.highest)[step] = high;
  const_cast<uint8_t*>(row.pairs.gaps)[step] = gap;

  const Tile tile = row.pairs.classify(0, args.n, step);
  row.whole[step] = tile == Tile::FULL;
  row.begin[step] = 0;
  row.end[step] = tile == Tile::FULL ? static_cast<uint8_t>(count) : 0;
  if (tile != Tile::PARTIAL) return;
  uint64_t any = 0;
  for (int64_t i = 0; i < args.n; ++i) {
    uint64_t seen = 0;
    for (int64_t j = 0; j < count; ++j)
      seen |= static_cast<uint64_t>(row.pairs.visible(i, begin + j)) << j;
    row.bits[step * args.n + i] = seen;
    any |= seen;
  }
  if (any == 0) return;
  row.begin[step] = static_cast<uint8_t>(__builtin_ctzll(any));
  row.end[step] = static_cast<uint8_t>(64 - __builtin_clzll(any));
}

size_t row_bytes(int64_t n, int64_t m) {
  const size_t steps = static_cast<size_t>(ceil_div(m, static_cast<int64_t>(STEP)));
  return Workspace::bytes_of<int32_t>(static_cast<size_t>(n)) + Workspace::bytes_of<int32_t>(static_cast<size_t>(m)) +
         3 * Workspace::bytes_of<int32_t>(steps) + 4 * Workspace::bytes_of<uint8_t>(steps) +
         Workspace::bytes_of<uint64_t>(steps * static_cast<size_t>(n));
}

Row row_in(Workspace& space, const regard_attention_args& args, int64_t b) {
  const size_t n = static_cast<size_t>(args.n), m = static_cast<size_t>(args.m);
  const size_t steps = static_cast<size_t>(ceil_div(args.m, static_cast<int64_t>(STEP)));
  int32_t* queries = space.take<int32_t>(n);
  const int64_t* ranks = args.visibility.query_ranks + b * args.visibility.query_ranks_stride;
  for (size_t i = 0; i < n; ++i) queries[i] = static_cast<int32_t>(ranks[i]);
  const int32_t* keys = space.take<int32_t>(m);
  const int32_t* lowest = space.take<int32_t>(steps);
  const int32_t* highest = space.take<int32_t>(steps);
  int32_t* seen = space.take<int32_t>(steps);
  const uint8_t* gaps = space.take<uint8_t>(steps);
  uint8_t* begin = space.take<uint8_t>(steps);
  uint8_t* end = space.take<uint8_t>(steps);
  uint8_t* whole = space.take<uint8_t>(steps);
  return Row{Pairs{&args.visibility, queries, keys, lowest, highest, gaps, nullptr}, seen, 0, begin, end, whole,
             space.take<uint64_t>(steps * n)};
}

// --- one step of keys

// Calls f(first, columns before it, count) for the visible keys (or values) of a step, as runs of constant stride. With
// small pages, a later page, of rows of `width`, is prefetched first.
template <class T, class F>
REGARD_INLINE void for_runs(const Problem& problem, const Row& row, int64_t b, int64_t g, int64_t step, const T* base,
                            const int64_t (&strides)[3], int64_t width, F&& f) {
  const int64_t begin = step * STEP + row.begin[step], end = step * STEP + row.end[step];
  const regard_attention_decode_args& decode = *problem.decode;
  if (decode.pages == nullptr) {
    f(base + b * strides[0] + g * strides[1] + begin * strides[2], 0, static_cast<int>(end - begin));
    return;
  }
  for (int64_t at = begin; at < end;) {
    const int64_t* pages = decode.pages + b * decode.pages_stride;
    const int64_t page = at / decode.page_size, stop = least(end, (page + 1) * decode.page_size);
    if (!problem.ahead && (page + PAGES_AHEAD) * decode.page_size < decode.lengths[b])
      fetch(base + pages[page + PAGES_AHEAD] * strides[0] + g * strides[1], strides[2], decode.page_size, width);
    f(base + pages[page] * strides[0] + g * strides[1] + (at - page * decode.page_size) * strides[2],
      static_cast<int>(at - begin), static_cast<int>(stop - at));
    at = stop;
  }
}

// Scores of a few keys with TOGETHER queries, which share loads of keys. Otherwise as above.
template <bool TAIL, class T>
REGARD_INLINE void dots_together(const T* k, int64_t ldk, int count, const float* q, int64_t ldq, int64_t width,
                                 float* scores) {
  constexpr int KEYS = LANES / TOGETHER;
  Vec sums[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) sums[i] = zero();
  const int64_t whole = width / LANES * LANES;
  const auto add = [&](int64_t p, auto&& line_at) __attribute__((always_inline)) {
    Vec x[TOGETHER];
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; ++r) x[r] = load(q + r * ldq + p);
#pragma GCC unroll 4
    for (int i = 0; i < KEYS; ++i) {
      const Vec line = line_at(k + (TAIL ? least(i, count - 1) : i) * ldk + p);
#pragma GCC unroll 4
      for (int r = 0; r < TOGETHER; ++r) sums[r * KEYS + i] = fma(line, x[r], sums[r * KEYS + i]);
    }
  };
  for (int64_t p = 0; p < whole; p += LANES) add(p, [](const T* at) { return load(at); });
  if (whole < width)
    add(whole, [rest = static_cast<int>(width - whole)](const T* at) { return load(at, rest); });
  const Vec found = sums_of(sums);
  float by_query[LANES];
  store(by_query, found);
#pragma GCC unroll 4
  for (int r = 0; r < TOGETHER; ++r) __builtin_memcpy(scores + r * SCORES_LINE, by_query + r * KEYS, KEYS * 4);
}

template <class T>
void score_run(const Problem& problem, const Worker& worker, const T* k, int64_t ldk, int column, int count) {
  constexpr int KEYS = LANES / TOGETHER;
  const int64_t width = problem.args->width, ldq = problem.query_line;
  const int64_t together = problem.queries / TOGETHER * TOGETHER;
  for (int j = 0; j < count; j += LANES) {
    const T* at = k + j * ldk;
    const int here = least(LANES, count - j);
    float* scores = worker.scores + column + j;
    if (problem.ahead) fetch_ahead(at, ldk, LANES, width);
    for (int64_t r = 0; r < together; r += TOGETHER) {
      const float* q = worker.queries + r * ldq;
      float* to = scores + r * SCORES_LINE;
      int i = 0;
      for (; i + KEYS <= here; i += KEYS) dots_together<false>(at + i * ldk, ldk, KEYS, q, ldq, width, to + i);
      if (i < here) dots_together<true>(at + i * ldk, ldk, here - i, q, ldq, width, to + i);
    }
    for (int64_t r = together; r < problem.queries; ++r)
      store(scores + r * SCORES_LINE,
            here == LANES ? dots<false>(at, ldk, LANES, worker.queries + r * ldq, width)
                          : dots<true>(at, ldk, here, worker.queries + r * ldq, width));
  }
}

// The same if many queries share the keys: computed with queries in the lanes, then transposed.
void score_run_turned(const Problem& problem, const Worker& worker, const float* k, int64_t ldk, int column,
                      int count) {
  const int64_t line = round_up(problem.queries, static_cast<int64_t>(LANES));
  if (problem.ahead) fetch_ahead(k, ldk, count, problem.args->width);
  product<Into::ZERO>(count, static_cast<int>(line), static_cast<int>(problem.args->width), k, ldk, 1, worker.queries,
                      line, worker.turned, line);
  for (int j = 0; j < count; j += LANES)
    for (int64_t r = 0; r < problem.queries; r += LANES) {
      Vec lines[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) lines[i] = load(worker.turned + (j + i) * line + r);
      turn(lines);
      float* to = worker.scores + r * SCORES_LINE + column + j;
      const int64_t rows = problem.queries - r;
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        if (i < rows) store(to + i * SCORES_LINE, lines[i]);
    }
}
void score_run_turned(const Problem& problem, const Worker& worker, const bfloat16* k, int64_t ldk, int column,
                      int count) {
  const int64_t width = problem.args->width;
  for (int i = 0; i < count; ++i) {
    int64_t p = 0;
    for (; p + LANES <= width; p += LANES) store(worker.keys + i * width + p, load(k + i * ldk + p));
    for (; p < width; ++p) worker.keys[i * width + p] = to_float(k[i * ldk + p]);
  }
  score_run_turned(problem, worker, worker.keys, width, column, count);
}

// Applies softcap, biases and visibility to one query's scores of one step, and pads them with -inf to a full vector.
void finish_scores(const Problem& problem, const Row& row, int64_t b, int64_t h, int64_t i, int64_t step,
                   float* scores) {
  const regard_attention_args& args = *problem.args;
  const regard_score_biases& biases = args.biases;
  const int64_t first = step * STEP + row.begin[step];
  const int count = row.end[step] - row.begin[step];
  const bool whole = row.whole[step];
  const uint64_t seen = whole ? ~uint64_t{0} : row.bits[step * args.n + i] >> row.begin[step];
  const float* bias = nullptr;
  const int64_t bias_stride = biases.bias_strides[3];
  if (biases.bias != nullptr)
    bias = biases.bias + b * biases.bias_strides[0] + h * biases.bias_strides[1] + i * biases.bias_strides[2] +
           first * bias_stride;
  const float* table = biases.distance == nullptr ? nullptr : biases.distance + h * biases.distance_stride;
  const int64_t zero_at = biases.distance_zero - row.pairs.queries[i];
  const Vec hidden = broadcast(-infinity());
  IntVec lane;
  for (int l = 0; l < LANES; ++l) lane[l] = 1 << l;
  for (int j = 0; j < count; j += LANES) {
    const int here = least(LANES, count - j);
    Vec x = load(scores + j);
    if (args.softcap > 0) x = tanh_of(x) * args.softcap;
    if (bias != nullptr) {
      Vec added = zero();
      if (bias_stride == 1)
        added = load(bias + j, here);
      else if (bias_stride == 0)
        added = broadcast(bias[0]);
      else
        for (int l = 0; l < here; ++l) added[l] = bias[(j + l) * bias_stride];
      x = select(reinterpret_cast<IntVec>(added == hidden), hidden, x + added);
    }
    if (table != nullptr) {
      Vec added = zero();
      if (whole) {  // ranks are consecutive
        added = load(table + row.pairs.keys[first + j] + zero_at, here);
      } else {
        for (int l = 0; l < here; ++l) {
          const int64_t at = row.pairs.keys[first + j + l] + zero_at;
          added[l] = at >= 0 && at < biases.distances ? table[at] : 0.f;
        }
      }
      x = select(reinterpret_cast<IntVec>(added == hidden), hidden, x + added);
    }
    const int32_t bits = static_cast<int32_t>((seen >> j) & ((uint64_t{1} << here) - 1));
    const IntVec shown = ((IntVec{} + bits) & lane) != 0;
    store(scores + j, select(shown, x, hidden));
  }
}

// Adds weights times values to ROWS queries' sums of VECTORS vectors. With FETCH later values are prefetched.
template <int ROWS, int VECTORS, bool FETCH, class T>
REGARD_INLINE void value_tile(int keys, const float* weights, const T* v, int64_t ldv, float* to, int64_t ldt,
                              int tail) {
  Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) sums[i][c] = load(to + i * ldt + c * LANES);
  const bool whole = tail == LANES;
  for (int j = 0; j < keys; ++j, v += ldv) {
    Vec line[VECTORS];
    if (FETCH) fetch_ahead(v, ldv, 1, VECTORS * LANES);
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c)
      line[c] = c + 1 < VECTORS || whole ? load(v + c * LANES) : load(v + c * LANES, tail);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = broadcast(weights[i * SCORES_LINE + j]);
#pragma GCC unroll 8
      for (int c = 0; c < VECTORS; ++c) sums[i][c] = fma(x, line[c], sums[i][c]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) store(to + i * ldt + c * LANES, sums[i][c]);
}

template <int VECTORS, bool FETCH, class T>
int value_rows(int64_t rows, int keys, const float* weights, const T* v, int64_t ldv, float* to, int64_t ldt,
               int tail) {
  if (TILE_ROWS > 4 && rows >= TILE_ROWS && rows != 8) {
    value_tile<TILE_ROWS, VECTORS, FETCH>(keys, weights, v, ldv, to, ldt, tail);
    return TILE_ROWS;
  }
  if (rows >= 4) {
    value_tile<4, VECTORS, FETCH>(keys, weights, v, ldv, to, ldt, tail);
    return 4;
  }
  if (rows >= 2) {
    value_tile<2, VECTORS, FETCH>(keys, weights, v, ldv, to, ldt, tail);
    return 2;
  }
  value_tile<1, VECTORS, FETCH>(keys, weights, v, ldv, to, ldt, tail);
  return 1;
}

template <int VECTORS, class T>
void value_columns(const Problem& problem, int keys, const float* weights, const T* v, int64_t ldv, float* to, int tail) {
  const int64_t rows = problem.queries, ldt = problem.value_line;
  int64_t i = problem.ahead ? value_rows<VECTORS, true>(rows, keys, weights, v, ldv, to, ldt, tail) : 0;
  while (i < rows)
    i += value_rows<VECTORS, false>(rows - i, keys, weights + i * SCORES_LINE, v, ldv, to + i * ldt, ldt, tail);
}

template <class T>
void value_run(const Problem& problem, const Worker& worker, const T* v, int64_t ldv, int column, int count,
               float* to) {
  const int width = static_cast<int>(problem.args->value_width);
  const float* weights = worker.scores + column;
  int c = 0;
  for (; c + TILE_VECTORS * LANES <= width; c += TILE_VECTORS * LANES)
    value_columns<TILE_VECTORS>(problem, count, weights, v + c, ldv, to + c, LANES);
  for (; c + 2 * LANES <= width; c += 2 * LANES)
    value_columns<2>(problem, count, weights, v + c, ldv, to + c, LANES);
  for (; c < width; c += LANES)
    value_columns<1>(problem, count, weights, v + c, ldv, to + c, least(LANES, width - c));
}

// --- a span of one (row, kv head)

template <class T>
void load_queries(const Problem& problem, const Worker& worker, int64_t b, int64_t g) {
  const regard_attention_args& args = *problem.args;
  const int64_t width = args.width, groups = args.heads / args.kv_heads;
  const bool turned = problem.queries > DOTS;
  const int64_t line = turned ? round_up(problem.queries, static_cast<int64_t>(LANES)) : problem.query_line;
  const int64_t by_row = turned ? 1 : line, by_feature = turned ? line : 1;
  const int64_t rows = turned ? line : problem.queries, features = turned ? width : line;
  for (int64_t r = 0; r < rows; ++r) {
    float* to = worker.queries + r * by_row;
    int64_t p = 0;
    if (r < problem.queries) {
      const T* q = static_cast<const T*>(args.q) + b * args.q_strides[0] +
                   (g * groups + r / args.n) * args.q_strides[1] + r % args.n * args.q_strides[2];
      for (; p < width; ++p) to[p * by_feature] = to_float(q[p]) * problem.query_scale;
    }
    for (; p < features; ++p) to[p * by_feature] = 0.f;
  }
}

// Weights of one query's scores relative to the largest so far; rescales its sums if that has grown.
void weigh(const Problem& problem, const Partial& partial, int64_t r, int steps, const int* counts, float* scores) {
  Vec top = broadcast(-infinity());
  for (int s = 0; s < steps; ++s)
    for (int j = 0; j < counts[s]; j += LANES) top = maximum(load(scores + s * STEP + j), top);  // ignores NaN
  const float before = partial.reference[r], reference = most(before, largest(top));
  const float base = reference == -infinity() ? 0.f : reference;
  if (reference != before) {
    const float factor = exp(before - base);
    partial.reference[r] = reference;
    partial.sums[r] *= factor;
    float* output = partial.output + r * problem.value_line;
    for (int64_t p = 0; p < problem.value_line; p += LANES) store(output + p, load(output + p) * factor);
  }
  Vec total = zero();
  for (int s = 0; s < steps; ++s)
    for (int j = 0; j < counts[s]; j += LANES) {
      const Vec w = exp(load(scores + s * STEP + j) - base);
      store(scores + s * STEP + j, w);
      total += w;
    }
  partial.sums[r] += sum(total);
}

// Attention to the steps [from, to) in the list of those that the row's queries see.
template <class T>
void attend(const Problem& problem, const Worker& worker, const Partial& partial, int64_t b, int64_t g, int64_t from,
            int64_t to) {
  const regard_attention_args& args = *problem.args;
  const Row& row = problem.row(b);
  const int64_t groups = args.heads / args.kv_heads;
  const bool finished = args.softcap > 0 || args.biases.bias != nullptr || args.biases.distance != nullptr;
  load_queries<T>(problem, worker, b, g);
  for (int64_t r = 0; r < problem.queries; ++r) {
    partial.reference[r] = -infinity();
    partial.sums[r] = 0;
  }
  for (int64_t p = 0; p < problem.queries * problem.value_line; p += LANES) store(partial.output + p, zero());
  const T* k = static_cast<const T*>(args.k);
  const T* v = static_cast<const T*>(args.v);
  for (; from < to; from += CHUNK) {
    const int steps = static_cast<int>(least(static_cast<int64_t>(CHUNK), to - from));
    int counts[CHUNK];
    for (int s = 0; s < steps; ++s) {
      const int64_t step = row.steps[from + s];
      counts[s] = row.end[step] - row.begin[step];
      for_runs(problem, row, b, g, step, k, args.k_strides, args.width, [&](const T* run, int column, int count) {
        if (problem.queries > DOTS)
          score_run_turned(problem, worker, run, args.k_strides[2], s * STEP + column, count);
        else
          score_run(problem, worker, run, args.k_strides[2], s * STEP + column, count);
      });
      if (finished || !row.whole[step] || counts[s] % LANES != 0)
        for (int64_t r = 0; r < problem.queries; ++r)
          finish_scores(problem, row, b, g * groups + r / args.n, r % args.n, step,
                        worker.scores + r * SCORES_LINE + s * STEP);
    }
    for (int64_t r = 0; r < problem.queries; ++r) {
      float* const scores = worker.scores + r * SCORES_LINE;
      if (problem.decode->scores != nullptr) {
        float* to = problem.decode->scores + ((b * args.heads + g * groups + r / args.n) * args.n + r % args.n) * args.m;
        for (int s = 0; s < steps; ++s) {
          const int64_t step = row.steps[from + s], first = step * STEP + row.begin[step];
          __builtin_memcpy(to + first, scores + s * STEP, static_cast<size_t>(counts[s]) * sizeof(float));
        }
      }
      weigh(problem, partial, r, steps, counts, scores);
    }
    for (int s = 0; s < steps; ++s)
      for_runs(problem, row, b, g, row.steps[from + s], v, args.v_strides, args.value_width, [&](const T* run, int column,
                                                                                              int count) {
        value_run(problem, worker, run, args.v_strides[2], s * STEP + column, count, partial.output);
      });
  }
}

// Merges the partial result of another span.
void merge(const Problem& problem, const Partial& into, const Partial& other) {
  for (int64_t r = 0; r < problem.queries; ++r) {
    const float a = into.reference[r], b = other.reference[r], reference = most(a, b);
    const float base = reference == -infinity() ? 0.f : reference;
    const float mine = exp(a - base), theirs = exp(b - base);
    into.reference[r] = reference;
    into.sums[r] = into.sums[r] * mine + other.sums[r] * theirs;
    float* to = into.output + r * problem.value_line;
    const float* from = other.output + r * problem.value_line;
    for (int64_t p = 0; p < problem.value_line; p += LANES)
      store(to + p, load(to + p) * mine + load(from + p) * theirs);
  }
}

template <class T>
void write_output(const Problem& problem, const Partial& partial, int64_t b, int64_t g) {
  const regard_attention_args& args = *problem.args;
  const int64_t groups = args.heads / args.kv_heads;
  const int width = static_cast<int>(args.value_width);
  for (int64_t r = 0; r < problem.queries; ++r) {
    const int64_t h = g * groups + r / args.n, i = r % args.n;
    float total = partial.sums[r];
    const bool empty = total == 0.f;
    if (args.lse != nullptr)
      args.lse[(b * args.heads + h) * args.n + i] =
          empty ? -infinity() : partial.reference[r] + __builtin_logf(total);
    if (args.sink != nullptr) total += exp(args.sink[h] - partial.reference[r]);
    const float factor = empty ? 0.f : 1.f / total;
    const float* from = partial.output + r * problem.value_line;
    T* to = static_cast<T*>(args.out) + b * args.out_strides[0] + h * args.out_strides[1] + i * args.out_strides[2];
    int p = 0;
    for (; p + LANES <= width; p += LANES) store(to + p, empty ? zero() : load(from + p) * factor);
    if (p < width) store(to + p, empty ? zero() : load(from + p) * factor, width - p);
  }
}

// --- the kernel

template <class T>
int run(const regard_attention_decode_args& decode) {
  const regard_attention_args& args = *decode.forward;
  const int64_t steps = ceil_div(args.m, static_cast<int64_t>(STEP));
  const int threads = static_cast<int>(most(args.threads, int64_t{1}));
  const int64_t groups = args.heads / args.kv_heads;

  Problem problem{};
  problem.decode = &decode;
  problem.args = &args;
  problem.one_row = args.visibility.query_ranks_stride == 0 && decode.lengths == nullptr &&
                    args.visibility.key_ranks_stride == 0;
  problem.queries = groups * args.n;
  problem.query_line = round_up(args.width, static_cast<int64_t>(LANES));
  problem.value_line = round_up(args.value_width, static_cast<int64_t>(LANES));
  problem.ahead = decode.pages == nullptr || decode.lengths == nullptr ||
                  decode.page_size * args.width * static_cast<int64_t>(sizeof(T)) > AHEAD;
  // with a softcap c, scores are computed as 2 log2(e) s / c
  problem.query_scale = args.softcap > 0 ? args.scale * 2.f * LOG2_E / args.softcap : args.scale;

  const size_t rows = static_cast<size_t>(problem.one_row ? 1 : args.batch);
  const bool turned = problem.queries > DOTS;
  const size_t queries_line = static_cast<size_t>(round_up(problem.queries, static_cast<int64_t>(LANES)));
  const size_t query_floats = turned ? queries_line * static_cast<size_t>(args.width)
                                     : static_cast<size_t>(problem.queries * problem.query_line);
  const size_t score_floats = static_cast<size_t>(problem.queries * SCORES_LINE);
  const size_t turned_floats = turned ? queries_line * STEP : 0;
  const size_t key_floats = turned && sizeof(T) != 4 ? static_cast<size_t>(args.width * STEP) : 0;
  const size_t worker_bytes =
      Workspace::bytes_of<float>(query_floats) + Workspace::bytes_of<float>(score_floats) +
      Workspace::bytes_of<float>(turned_floats) + Workspace::bytes_of<float>(key_floats) + 3 * Partial::bytes(problem);
  Workspace space(Workspace::bytes_of<Row>(rows) + rows * row_bytes(args.n, args.m) +
                  Workspace::bytes_of<Worker>(static_cast<size_t>(threads)) +
                  static_cast<size_t>(threads) * worker_bytes);
  if (!space) return REGARD_OUT_OF_MEMORY;

  problem.rows = space.take<Row>(rows);
  for (size_t b = 0; b < rows; ++b) problem.rows[b] = row_in(space, args, static_cast<int64_t>(b));
  const int64_t scans = ceil_div(steps, static_cast<int64_t>(SCANNED));
  const int64_t ranks = static_cast<int64_t>(rows) * args.m;
  parallel_tasks(ranks < LEAST_SCANNED ? 1 : threads, static_cast<long>(static_cast<int64_t>(rows) * scans),
                 [&](long task) {
                   const int64_t b = task / scans, first = task % scans * SCANNED;
                   for (int64_t step = first; step < least(first + SCANNED, steps); ++step)
                     scan_step(problem, b, problem.rows[b], step);
                 });
  int64_t work = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    Row& row = problem.rows[problem.one_row ? 0 : b];
    if (b == 0 || !problem.one_row)
      for (int64_t step = 0; step < steps; ++step)
        if (row.end[step] > 0) row.steps[row.count++] = static_cast<int32_t>(step);
    work += row.count * args.kv_heads;
  }

  const int64_t most_parts = ceil_div(work, static_cast<int64_t>(LEAST_STEPS));
  const int parts = static_cast<int>(most(least(static_cast<int64_t>(threads), most_parts), int64_t{1}));
  Worker* workers = space.take<Worker>(static_cast<size_t>(parts));
  for (int part = 0; part < parts; ++part) {
    Worker& worker = workers[part];
    worker.queries = space.take<float>(query_floats);
    worker.scores = space.take<float>(score_floats);
    worker.turned = space.take<float>(turned_floats);
    worker.keys = space.take<float>(key_floats);
    worker.partial = Partial::in(space, problem);
    worker.first = Partial::in(space, problem);
    worker.last = Partial::in(space, problem);
    worker.first_unit = worker.last_unit = -1;
  }
  parallel(parts, [&](int part) {
    Worker& worker = workers[part];
    const int64_t begin = work * part / parts, end = work * (part + 1) / parts;
    int64_t at = 0;  // number of steps before this (row, kv head)
    for (int64_t b = 0; b < args.batch; ++b) {
      const int64_t count = problem.row(b).count;
      if (count == 0 && part == 0)
        for (int64_t g = 0; g < args.kv_heads; ++g) {
          attend<T>(problem, worker, worker.partial, b, g, 0, 0);
          write_output<T>(problem, worker.partial, b, g);
        }
      for (int64_t g = 0; g < args.kv_heads && count > 0; ++g, at += count) {
        const int64_t from = most(begin - at, int64_t{0}), to = least(end - at, count);
        if (from >= to) continue;
        const bool starts = from == 0, ends = to == count;
        const Partial& partial = starts && ends ? worker.partial : starts ? worker.last : worker.first;
        attend<T>(problem, worker, partial, b, g, from, to);
        const int64_t unit = b * args.kv_heads + g;
        if (starts && ends)
          write_output<T>(problem, partial, b, g);
        else if (starts)
          worker.last_unit = unit;
        else
          worker.first_unit = unit;
      }
    }
  });
  for (int part = 0; part < parts; ++part) {
    const int64_t unit = workers[part].last_unit;
    if (unit < 0) continue;
    for (int other = part + 1; other < parts && workers[other].first_unit == unit; ++other)
      merge(problem, workers[part].last, workers[other].first);
    write_output<T>(problem, workers[part].last, unit / args.kv_heads, unit % args.kv_heads);
  }
  return REGARD_OK;
}

}  // namespace

int attention_decode(const regard_attention_decode_args* decode) {
  const regard_attention_args& args = *decode->forward;
  if (args.size != static_cast<int64_t>(sizeof args)) return REGARD_WRONG_SIZE;
  if (args.rule != REGARD_SOFTMAX || args.visibility.blocks != nullptr) return REGARD_BAD_ARGUMENT;
  if (args.kv_heads < 1 || args.heads % args.kv_heads != 0 || args.width < 1) return REGARD_BAD_ARGUMENT;
  if (decode->pages != nullptr && decode->page_size < 1) return REGARD_BAD_ARGUMENT;
  if (args.batch * args.heads * args.n == 0) return REGARD_OK;
  return args.dtype == REGARD_BFLOAT16 ? run<bfloat16>(*decode) : run<float>(*decode);
}

}  // namespace REGARD_ISA
