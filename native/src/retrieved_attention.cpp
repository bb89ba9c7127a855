// Attention to the blocks of a cache that queries retrieve by their landmarks.
//
// The queries of all heads that share a kv head are called columns. Columns choose blocks in the lanes of vectors: each
// lane keeps its best landmarks in order, and a score that enters no lane costs one comparison. The chosen pairs of a
// column and a block are then sorted by block, so that the keys of a block are loaded once for all columns that chose
// it, and rotated once for those that read it in the same slot. The result of each pair is stored separately until the
// pairs of a column are merged: no result depends on the order of threads. Memory grows with the number of pairs, not
// with the cache.

#include "regard_retrieved_attention.h"

#include "vector.h"

#include "lanes.h"
#include "parallel.h"
#include "product.h"
#include "token_blocks.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;
using Args = regard_retrieved_attention_args;

constexpr int COLUMNS = 64;  // columns that choose, or attend to a block, together
constexpr int MARKS = 64;    // landmarks scored at once
constexpr int FEW = 4;       // columns up to which sums across lanes beat a transposed block
constexpr int SPAN = 8;      // blocks in a task
constexpr int64_t WORTH_THREADS = 1 << 15;  // keys read by all columns that are worth several threads
constexpr int32_t NONE = -1;

REGARD_INLINE float infinity() { return __builtin_inff(); }

// Limits ranks, which may be any integers, so that sums do not overflow.
REGARD_INLINE int64_t bounded(int64_t x) { return most(least(x, int64_t{1} << 40), -(int64_t{1} << 40)); }

// The score-independent data of a row of the batch.
struct Row {
  const int64_t* closed;
  const uint8_t* landmark;
  int64_t offset;  // slot of a key minus its rank
  int64_t lowest;  // first slot that holds a token
  int64_t count;   // number of blocks that exist: the last ones
  int64_t open;    // with `own`, tokens after the last landmark before the last slot

  Row(const Args& args, int64_t b)
      : closed(args.closed + b * args.closed_stride),
        landmark(args.landmark + b * args.landmark_stride),
        offset(args.m - bounded(args.length[b])),
        lowest(most(args.m - bounded(args.cached[b]), int64_t{0})),
        count(0),
        open(0) {
    while (count < args.blocks && exists(args, args.blocks - 1 - count)) ++count;
    if (args.own != 0) open = args.m - 1 - first_token(args, args.m - 1);
  }

  int64_t slot(int64_t block) const { return bounded(closed[block]) + offset; }
  bool exists(const Args& args, int64_t block) const { return slot(block) >= lowest && slot(block) < args.m; }
  int64_t first_token(const Args& args, int64_t end) const {
    int64_t first = end;
    while (first > lowest && end - first < args.block && landmark[first - 1] == 0) --first;
    return first;
  }
  // The slot to which a block is rotated: for scoring, and as pick j of a column.
  int64_t scored_at(const Args& args, int64_t block) const {
    return most(block - args.blocks + least(count, args.top_k + 1), int64_t{0});
  }
  int64_t read_at(const Args& args, int64_t block, int64_t j) const {
    if (count <= args.top_k) return block - (args.blocks - count);
    return args.top_k - args.picks + j + (block >= args.blocks - args.top_k);
  }
  int64_t own_position(const Args& args) const { return least(count, args.top_k + 1) * (args.block + 1) + open; }
};

template <class T>
const T* head_of(const void* data, const int64_t* strides, int64_t b, int64_t h) {
  return static_cast<const T*>(data) + b * strides[0] + h * strides[1];
}

template <class T>
REGARD_INLINE Vec load_lanes(const T* p, int64_t count) {
  return count >= LANES ? load(p) : load(p, static_cast<int>(count));
}
REGARD_INLINE void store_lanes(float* p, Vec v, int64_t count) {
  if (count >= LANES)
    store(p, v);
  else
    store(p, v, static_cast<int>(count));
}

// One thread's memory.
struct Worker {
  float* keys;     // (max of MARKS and a block, line)
  float* turned;   // (line, max of COLUMNS and score_line)
  float* scores;   // (max of MARKS x COLUMNS and COLUMNS x score_line)
  float* queries;  // (COLUMNS, line)
  float* values;   // (block, value_line)
  float* found;    // (COLUMNS, value_line)
  float* best;     // (picks + 1, COLUMNS)
  int32_t* index;  // (picks + 1, COLUMNS)
};

struct Retrieval {
  const Args* args;
  const Row* rows;
  int64_t columns;  // columns of a kv head
  int64_t parts;    // parts of a column: its picks and, with `own`, the tokens after the last landmark
  int64_t line, value_line, score_line;
  float* queries;   // (units, columns, line) scaled and rotated; a unit is a kv head of a row
  int32_t* chosen;  // (units, columns, picks) oldest first, preceded by NONE
  int32_t* order;   // (units, columns x picks) pairs by block
  int32_t* starts;  // (units, blocks + 1)
  float* gates;     // (units, columns, parts): logit of each part; -inf if empty
  float* partial;   // (units, columns, parts, value_line)

  const float* query(int64_t unit, int64_t column) const { return queries + (unit * columns + column) * line; }
  int64_t place(int64_t unit, int64_t column, int64_t part) const { return (unit * columns + column) * parts + part; }

  // Loads a row as float32, padded with zeros to a full line and rotated to a position.
  template <class T>
  void load_row(const T* from, int64_t position, float* to) const {
    const int64_t width = args->width, rotated = args->turns == nullptr ? 0 : args->rotated, pairs = rotated / 2;
    for (int64_t i = line - LANES; i >= 0 && i + LANES > width; i -= LANES) store(to + i, zero());
    for (int64_t i = rotated; i < width; i += LANES) store_lanes(to + i, load_lanes(from + i, width - i), width - i);
    if (rotated == 0) return;
    const float* turn = args->turns + most(least(position, args->positions - 1), int64_t{0}) * rotated;
    for (int64_t i = 0; i < pairs; i += LANES) {
      const int64_t here = pairs - i;
      const Vec c = load_lanes(turn + i, here), s = load_lanes(turn + pairs + i, here);
      const Vec x = load_lanes(from + i, here), y = load_lanes(from + pairs + i, here);
      store_lanes(to + i, x * c - y * s, here);
      store_lanes(to + pairs + i, x * s + y * c, here);
    }
  }
};

void load_queries(const Retrieval& all, int64_t unit) {
  const Args& args = *all.args;
  const int64_t b = unit / args.kv_heads, first = unit % args.kv_heads * (args.heads / args.kv_heads);
  const Row& row = all.rows[b];
  for (int64_t column = 0; column < all.columns; ++column) {
    const float* from =
        head_of<float>(args.q, args.q_strides, b, first + column / args.n) + column % args.n * args.q_strides[2];
    float* to = all.queries + (unit * all.columns + column) * all.line;
    if (args.own != 0) {
      all.load_row(from, row.own_position(args), to);
    } else {
      for (int64_t i = 0; i < all.line; i += LANES)
        store(to + i, i < args.width ? load_lanes(from + i, args.width - i) : zero());
    }
    for (int64_t i = 0; i < all.line; i += LANES) store(to + i, load(to + i) * args.scale);
  }
}

// --- choosing

float length(const float* x, int64_t line) {
  Vec total = zero();
  for (int64_t i = 0; i < line; i += LANES) total = fma(load(x + i), load(x + i), total);
  return __builtin_sqrtf(sum(total));
}

// Scores of `count` landmarks from `first` on, by landmark and column.
template <class T>
void score_marks(const Retrieval& all, const Worker& worker, int64_t unit, int64_t first, int count, int lanes) {
  const Args& args = *all.args;
  const int64_t b = unit / args.kv_heads;
  const T* marks = head_of<T>(args.marks, args.marks_strides, b, unit % args.kv_heads);
  for (int r = 0; r < count; ++r)
    all.load_row(marks + (first + r) * args.marks_strides[2],
                 all.rows[b].scored_at(args, first + r) * (args.block + 1) + args.block, worker.keys + r * all.line);
  product<Into::ZERO>(count, lanes, static_cast<int>(args.width), worker.keys, all.line, 1, worker.turned, COLUMNS,
                      worker.scores, COLUMNS);
}

// NaN counts as largest, so it shows.
REGARD_INLINE Vec load_scores(const float* p) {
  const Vec score = load(p);
  return select(reinterpret_cast<IntVec>(score == score), score, broadcast(infinity()));
}

// Inserts a landmark's scores into the best ones of each lane; equal ones keep the earlier one.
REGARD_INLINE void enter(Vec score, int32_t number, int64_t count, float* best, int32_t* index) {
  if (!any(reinterpret_cast<IntVec>(score > load(best + (count - 1) * COLUMNS)))) return;
  IntVec at = number - IntVec{};
  for (int64_t j = 0; j < count; ++j) {
    const Vec held = load(best + j * COLUMNS);
    const IntVec held_at = load(index + j * COLUMNS), over = reinterpret_cast<IntVec>(score > held);
    store(best + j * COLUMNS, select(over, score, held));
    store(index + j * COLUMNS, (at & over) | (held_at & ~over));
    score = select(over, held, score);
    at = (held_at & over) | (at & ~over);
  }
}

void sort(int32_t* numbers, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const int32_t x = numbers[i];
    int64_t j = i;
    for (; j > 0 && numbers[j - 1] > x; --j) numbers[j] = numbers[j - 1];
    numbers[j] = x;
  }
}

// In columns whose picks tie with landmarks that they left out, replaces these picks by the newest of the ties, searched
// from the last landmark back. `longest` is the greatest length of a landmark's key.
template <class T>
void settle_ties(const Retrieval& all, const Worker& worker, int64_t unit, int64_t column, int count, int lanes,
                 float longest) {
  const Args& args = *all.args;
  const int64_t picks = args.picks, oldest = args.blocks - all.rows[unit / args.kv_heads].count;
  float lowest[COLUMNS], highest[COLUMNS];
  int64_t taken[COLUMNS], open = 0;
  for (int i = 0; i < lanes; ++i) {
    lowest[i] = highest[i] = __builtin_nanf("");  // no score is a tie
    if (i >= count) continue;
    const auto best = [&](int64_t j) { return worker.best[j * COLUMNS + i]; };
    const float* query = all.query(unit, column + i);
    const float margin = args.tolerance * longest * length(query, all.line), least = best(picks - 1);
    if (best(picks) == -infinity() || !(best(picks) >= least - margin)) continue;
    lowest[i] = least - margin;
    highest[i] = least + margin;
    for (taken[i] = 0; best(taken[i]) > highest[i];) ++taken[i];
    for (int64_t j = taken[i]; j < picks; ++j) worker.index[j * COLUMNS + i] = NONE;
    open += picks - taken[i];
  }
  for (int64_t end = args.blocks; open > 0 && end > oldest; end -= MARKS) {
    const int64_t first = most(end - MARKS, oldest);
    score_marks<T>(all, worker, unit, first, static_cast<int>(end - first), lanes);
    for (int64_t c = end - 1; c >= first && open > 0; --c)
      for (int v = 0; v < lanes; v += LANES) {
        const Vec score = load_scores(worker.scores + (c - first) * COLUMNS + v);
        const IntVec tied = reinterpret_cast<IntVec>(score >= load(lowest + v)) &
                            reinterpret_cast<IntVec>(score <= load(highest + v));
        if (!any(tied)) continue;
        for (int i = 0; i < LANES; ++i) {
          if (tied[i] == 0) continue;
          worker.index[taken[v + i]++ * COLUMNS + v + i] = static_cast<int32_t>(c);
          if (taken[v + i] == picks) lowest[v + i] = __builtin_nanf("");
          --open;
        }
      }
  }
}

template <class T>
void choose(const Retrieval& all, const Worker& worker, int64_t unit, int64_t first) {
  const Args& args = *all.args;
  const int64_t picks = args.picks;
  const int count = static_cast<int>(least<int64_t>(COLUMNS, all.columns - first));
  const int lanes = static_cast<int>(round_up(count, LANES));
  transpose_padded(lanes, static_cast<int>(all.line), all.query(unit, first), all.line, worker.turned, COLUMNS);
  for (int64_t j = 0; j < (picks + 1) * COLUMNS; j += LANES) {
    store(worker.best + j, broadcast(-infinity()));
    store(worker.index + j, NONE - IntVec{});
  }
  float longest = 0;
  for (int64_t c = args.blocks - all.rows[unit / args.kv_heads].count; c < args.blocks; c += MARKS) {
    const int here = static_cast<int>(least<int64_t>(MARKS, args.blocks - c));
    score_marks<T>(all, worker, unit, c, here, lanes);
    for (int r = 0; r < here; ++r) {
      const float size = length(worker.keys + r * all.line, all.line);
      if (size > longest && size < infinity()) longest = size;
    }
    for (int v = 0; v < lanes; v += LANES)
      for (int r = 0; r < here; ++r)
        enter(load_scores(worker.scores + r * COLUMNS + v), static_cast<int32_t>(c + r), picks + 1, worker.best + v,
              worker.index + v);
  }
  settle_ties<T>(all, worker, unit, first, count, lanes, longest);
  for (int i = 0; i < count; ++i) {
    int32_t* to = all.chosen + (unit * all.columns + first + i) * picks;
    for (int64_t j = 0; j < picks; ++j) to[j] = worker.index[j * COLUMNS + i];
    sort(to, picks);
  }
}

void take_chosen(const Retrieval& all, int64_t unit) {
  const Args& args = *all.args;
  const int64_t b = unit / args.kv_heads, first = unit % args.kv_heads * (args.heads / args.kv_heads);
  for (int64_t column = 0; column < all.columns; ++column) {
    const int64_t* from = args.chosen + b * args.chosen_strides[0] + (first + column / args.n) * args.chosen_strides[1] +
                          column % args.n * args.chosen_strides[2];
    for (int64_t j = 0; j < args.picks; ++j) {
      const bool there = from[j] >= args.blocks - all.rows[b].count && from[j] < args.blocks;
      all.chosen[(unit * all.columns + column) * args.picks + j] = there ? static_cast<int32_t>(from[j]) : NONE;
    }
  }
}

// Sorts pairs by block, keeping their order within a block.
void sort_pairs(const Retrieval& all, int64_t unit) {
  const int64_t blocks = all.args->blocks, picks = all.args->picks, pairs = all.columns * picks;
  const int32_t* chosen = all.chosen + unit * pairs;
  int32_t *order = all.order + unit * pairs, *starts = all.starts + unit * (blocks + 1);
  for (int64_t c = 0; c <= blocks; ++c) starts[c] = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    if (chosen[p] == NONE)
      all.gates[all.place(unit, p / picks, p % picks)] = -infinity();
    else
      ++starts[chosen[p]];
  }
  int32_t total = 0;
  for (int64_t c = 0; c <= blocks; ++c) {
    total += starts[c];
    starts[c] = total;  // the end; filling from the last pair turns it into the start
  }
  for (int64_t p = pairs - 1; p >= 0; --p)
    if (chosen[p] != NONE) order[--starts[chosen[p]]] = static_cast<int32_t>(p);
}

// --- attending

// Dot products of keys (rows, line) with a column.
REGARD_INLINE void dots(const float* keys, int rows, const float* query, int64_t line, float* scores) {
  for (int r = 0; r < rows; ++r) {
    Vec total = zero();
    for (int64_t i = 0; i < line; i += LANES) total = fma(load(keys + r * line + i), load(query + i), total);
    scores[r] = sum(total);
  }
}

// Turns scores of tokens into weights in place, padded with zeros to a full vector; holds their sum and the subtracted
// base.
struct Weights {
  float total, base;

  Weights(float* scores, int tokens, int64_t line) {
    for (int64_t i = tokens; i < line; ++i) scores[i] = -infinity();
    Vec peak = broadcast(-infinity()), sums = zero();
    for (int64_t i = 0; i < line; i += LANES) peak = maximum(load(scores + i), peak);
    const float top = largest(peak);
    base = top == -infinity() ? 0.f : top;
    for (int64_t i = 0; i < line; i += LANES) {
      const Vec w = exp(load(scores + i) - base);
      store(scores + i, w);
      sums += w;
    }
    total = sum(sums);
  }
};

template <class T>
struct Values {
  const float* data;
  int64_t line;

  // In place, or converted to float32.
  Values(const Retrieval& all, const T* from, int64_t stride, int64_t tokens, float* room) : data(room), line(stride) {
    if constexpr (sizeof(T) == sizeof(float)) {
      data = from;
    } else {
      line = all.value_line;
      load_rows(from, stride, static_cast<int>(tokens), static_cast<int>(all.args->value_width), room, line);
    }
  }
};

// The weighted means of values for a few columns, each stored for its pair.
template <class T>
void read_values(const Retrieval& all, const Worker& worker, const Values<T>& values, int tokens, int count,
                 const float* factors, const int64_t* places) {
  product<Into::ZERO>(count, static_cast<int>(all.args->value_width), tokens, worker.scores, all.score_line, 1,
                      values.data, values.line, worker.found, all.value_line);
  for (int i = 0; i < count; ++i)
    for (int64_t p = 0; p < all.value_line; p += LANES)
      store(all.partial + places[i] * all.value_line + p, load(worker.found + i * all.value_line + p) * factors[i]);
}

// Attention of pairs to one block.
template <class T>
struct BlockOfKeys {
  const Retrieval& all;
  const Worker& worker;
  int64_t unit, block, first;
  int tokens;
  const T* keys;
  Values<T> values;
  int64_t slot = -1;        // slot to which its keys are rotated
  bool transposed = false;  // whether they are also transposed

  BlockOfKeys(const Retrieval& r, const Worker& w, int64_t u, int64_t c, const Row& row)
      : all(r),
        worker(w),
        unit(u),
        block(c),
        first(row.first_token(*r.args, row.slot(c))),
        tokens(static_cast<int>(row.slot(c) - first)),
        keys(at(r.args->k, r.args->k_strides)),
        values(r, at(r.args->v, r.args->v_strides), r.args->v_strides[2], tokens, w.values) {}

  const T* at(const void* data, const int64_t* strides) const {
    const Args& args = *all.args;
    return head_of<T>(data, strides, unit / args.kv_heads, unit % args.kv_heads) + first * strides[2];
  }

  void turn(int64_t to) {
    if (to == slot) return;
    const Args& args = *all.args;
    for (int r = 0; r <= tokens; ++r)
      all.load_row(keys + r * args.k_strides[2], to * (args.block + 1) + args.block - tokens + r,
                   worker.keys + r * all.line);
    slot = to;
    transposed = false;
  }

  // Attention of `pairs` that read the block in the same slot.
  void attend(const int32_t* pairs, int count) {
    const int64_t picks = all.args->picks, line = all.line, score_line = all.score_line;
    const int rows = tokens + 1;
    if (count <= FEW) {
      for (int i = 0; i < count; ++i)
        dots(worker.keys, rows, all.query(unit, pairs[i] / picks), line, worker.scores + i * score_line);
    } else {
      if (!transposed)
        transpose_padded(static_cast<int>(round_up(rows, LANES)), static_cast<int>(line), worker.keys, line,
                         worker.turned, score_line);
      transposed = true;
      for (int i = 0; i < count; ++i)
        __builtin_memcpy(worker.queries + i * line, all.query(unit, pairs[i] / picks), static_cast<size_t>(line) * 4);
      product<Into::ZERO>(count, rows, static_cast<int>(all.args->width), worker.queries, line, 1, worker.turned,
                          score_line, worker.scores, score_line);
    }
    float factors[COLUMNS];
    int64_t places[COLUMNS];
    for (int i = 0; i < count; ++i) {
      float* scores = worker.scores + i * score_line;
      places[i] = all.place(unit, pairs[i] / picks, pairs[i] % picks);
      all.gates[places[i]] = tokens == 0 ? -infinity() : scores[tokens];
      const Weights weights(scores, tokens, score_line);
      factors[i] = 1.f / weights.total;
    }
    read_values(all, worker, values, tokens, count, factors, places);
  }
};

template <class T>
void attend_block(const Retrieval& all, const Worker& worker, int64_t unit, int64_t c) {
  const Args& args = *all.args;
  const int64_t pairs = all.columns * args.picks;
  const int32_t* starts = all.starts + unit * (args.blocks + 1);
  const int32_t *begin = all.order + unit * pairs + starts[c], *end = all.order + unit * pairs + starts[c + 1];
  if (begin == end) return;
  const Row& row = all.rows[unit / args.kv_heads];
  BlockOfKeys<T> block(all, worker, unit, c, row);
  int64_t left = end - begin;
  for (int64_t slot = 0; left > 0 && slot <= args.top_k; ++slot) {
    int32_t together[COLUMNS];
    int count = 0;
    for (const int32_t* p = begin; p < end; ++p) {
      if (args.turns != nullptr && row.read_at(args, c, *p % args.picks) != slot) continue;
      together[count++] = *p;
      if (count < COLUMNS) continue;
      block.turn(slot);
      block.attend(together, count);
      left -= count;
      count = 0;
    }
    if (count == 0) continue;
    block.turn(slot);
    block.attend(together, count);
    left -= count;
  }
}

// Attention to the tokens after the last landmark, including the query's own.
template <class T>
void attend_own(const Retrieval& all, const Worker& worker, int64_t unit) {
  const Args& args = *all.args;
  const int64_t b = unit / args.kv_heads, g = unit % args.kv_heads;
  const Row& row = all.rows[b];
  const int64_t first = args.m - 1 - row.open, begin = row.own_position(args) - row.open;
  const int tokens = static_cast<int>(row.open + (row.landmark[args.m - 1] == 0));
  const T* keys = head_of<T>(args.k, args.k_strides, b, g) + first * args.k_strides[2];
  const T* from = head_of<T>(args.v, args.v_strides, b, g) + first * args.v_strides[2];
  for (int r = 0; r < tokens; ++r) all.load_row(keys + r * args.k_strides[2], begin + r, worker.keys + r * all.line);
  const Values<T> values(all, from, args.v_strides[2], tokens, worker.values);
  for (int64_t column = 0; column < all.columns; ++column) {
    const int64_t place = all.place(unit, column, args.picks);
    dots(worker.keys, tokens, all.query(unit, column), all.line, worker.scores);
    const Weights weights(worker.scores, tokens, all.score_line);
    all.gates[place] = tokens == 0 ? -infinity() : weights.base + __builtin_logf(weights.total);
    const float factor = 1.f / weights.total;
    read_values(all, worker, values, tokens, 1, &factor, &place);
  }
}

void merge(const Retrieval& all, int64_t unit) {
  const Args& args = *all.args;
  const int64_t b = unit / args.kv_heads, first = unit % args.kv_heads * (args.heads / args.kv_heads);
  for (int64_t column = 0; column < all.columns; ++column) {
    const int64_t h = first + column / args.n, i = column % args.n, place = all.place(unit, column, 0);
    const float* gates = all.gates + place;
    float top = -infinity();
    for (int64_t j = 0; j < all.parts; ++j) top = gates[j] <= top ? top : gates[j];  // a NaN stays
    float* out =
        static_cast<float*>(args.out) + b * args.out_strides[0] + h * args.out_strides[1] + i * args.out_strides[2];
    for (int64_t p = 0; p < args.value_width; p += LANES) store_lanes(out + p, zero(), args.value_width - p);
    float* lse = args.lse + (b * args.heads + h) * args.n + i;
    *lse = -infinity();
    if (top == -infinity()) continue;
    float total = 0;
    for (int64_t j = 0; j < all.parts; ++j)
      if (gates[j] != -infinity()) total += exp(gates[j] - top);
    for (int64_t j = 0; j < all.parts; ++j) {
      if (gates[j] == -infinity()) continue;
      const float weight = exp(gates[j] - top) / total;
      const float* from = all.partial + (place + j) * all.value_line;
      for (int64_t p = 0; p < args.value_width; p += LANES) {
        const int64_t here = args.value_width - p;
        store_lanes(out + p, fma(load(from + p), broadcast(weight), load_lanes(out + p, here)), here);
      }
    }
    *lse = top + __builtin_logf(total);
  }
}

// --- the kernel

template <class T>
int run(const Args& args) {
  Retrieval all{};
  all.args = &args;
  all.columns = args.heads / args.kv_heads * args.n;
  all.parts = args.picks + (args.own != 0);
  all.line = round_up(args.width, LANES);
  all.value_line = round_up(args.value_width, LANES);
  all.score_line = round_up(args.block + 1, LANES);
  const int64_t units = args.batch * args.kv_heads, places = units * all.columns * all.parts;
  const int64_t pairs = units * all.columns * args.picks, rows = most<int64_t>(MARKS, all.score_line);
  const int64_t work = units * all.columns * (args.blocks + all.parts * (args.block + 1));
  const int threads = work < WORTH_THREADS ? 1 : static_cast<int>(most(args.threads, int64_t{1}));

  const auto floats = [](int64_t count) { return Workspace::bytes_of<float>(static_cast<size_t>(count)); };
  const int64_t sizes[] = {rows * all.line,
                           all.line * most<int64_t>(COLUMNS, all.score_line),
                           COLUMNS * most<int64_t>(MARKS, all.score_line),
                           COLUMNS * all.line,
                           (args.block + 1) * all.value_line,
                           COLUMNS * all.value_line,
                           (args.picks + 1) * COLUMNS,
                           (args.picks + 1) * COLUMNS};
  size_t each = 0;
  for (const int64_t size : sizes) each += floats(size);
  // full vectors of columns are read
  const int64_t query_floats = (units * all.columns + LANES) * all.line, starts = units * (args.blocks + 1);
  Workspace space(Workspace::bytes_of<Row>(static_cast<size_t>(args.batch)) + floats(query_floats) + 2 * floats(pairs) +
                  floats(starts) + floats(places) + floats(places * all.value_line) +
                  Workspace::bytes_of<Worker>(static_cast<size_t>(threads)) + static_cast<size_t>(threads) * each);
  if (!space) return REGARD_OUT_OF_MEMORY;
  Row* known = space.take<Row>(static_cast<size_t>(args.batch));
  for (int64_t b = 0; b < args.batch; ++b) {
    known[b] = Row(args, b);
    if (args.found == nullptr) continue;
    args.found[2 * b] = known[b].open;
    args.found[2 * b + 1] = known[b].landmark[args.m - 1] != 0;
  }
  all.rows = known;
  all.queries = space.take<float>(static_cast<size_t>(query_floats));
  all.chosen = space.take<int32_t>(static_cast<size_t>(pairs));
  all.order = space.take<int32_t>(static_cast<size_t>(pairs));
  all.starts = space.take<int32_t>(static_cast<size_t>(starts));
  all.gates = space.take<float>(static_cast<size_t>(places));
  all.partial = space.take<float>(static_cast<size_t>(places * all.value_line));
  Worker* workers = space.take<Worker>(static_cast<size_t>(threads));
  for (int part = 0; part < threads; ++part) {
    Worker& worker = workers[part];
    const auto next = [&](int which) { return space.take<float>(static_cast<size_t>(sizes[which])); };
    worker = Worker{next(0), next(1), next(2), next(3), next(4), next(5), next(6), nullptr};
    worker.index = space.take<int32_t>(static_cast<size_t>(sizes[7]));
  }

  const auto share = [&](int64_t tasks, auto&& f) {
    long at = 0;
    parallel(static_cast<int>(least<int64_t>(threads, tasks)), [&](int part) {
      for (;;) {
        const long task = __atomic_fetch_add(&at, 1, __ATOMIC_RELAXED);
        if (task >= tasks) return;
        f(static_cast<int64_t>(task), workers[part]);
      }
    });
  };
  share(units, [&](int64_t unit, Worker&) { load_queries(all, unit); });
  if (args.picks > 0) {
    const int64_t tiles = ceil_div(all.columns, int64_t{COLUMNS}), spans = ceil_div(args.blocks, int64_t{SPAN});
    if (args.chosen == nullptr)
      share(units * tiles, [&](int64_t task, Worker& worker) {
        choose<T>(all, worker, task / tiles, task % tiles * COLUMNS);
      });
    share(units, [&](int64_t unit, Worker&) {
      if (args.chosen != nullptr) take_chosen(all, unit);
      sort_pairs(all, unit);
    });
    share(units * spans, [&](int64_t task, Worker& worker) {
      const int64_t first = task % spans * SPAN;
      for (int64_t c = first; c < least(first + SPAN, args.blocks); ++c) attend_block<T>(all, worker, task / spans, c);
    });
  }
  if (args.own != 0) share(units, [&](int64_t unit, Worker& worker) { attend_own<T>(all, worker, unit); });
  share(units, [&](int64_t unit, Worker&) { merge(all, unit); });
  return REGARD_OK;
}

bool valid(const Args& args) {
  const bool turned = args.turns == nullptr ||
                      (args.positions >= 1 && args.rotated >= 2 && args.rotated % 2 == 0 && args.rotated <= args.width);
  const bool whole = args.picks >= 0 && args.picks <= args.top_k && (args.picks == 0 || args.blocks >= 1);
  return args.kv_heads >= 1 && args.heads % args.kv_heads == 0 && args.width >= 1 && args.value_width >= 1 &&
         args.block >= 1 && args.top_k >= 1 && args.blocks >= 0 && args.m >= 1 && turned && whole &&
         (args.own == 0 || args.n == 1);
}

}  // namespace

int retrieved_attention(const regard_retrieved_attention_args* args) {
  if (!valid(*args)) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->heads * args->n == 0) return REGARD_OK;
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : run<float>(*args);
}

}  // namespace REGARD_ISA
