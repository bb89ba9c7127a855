// Distance of an estimated map from exact attention, forward and backward.
//
// A task is a block of queries of a row, head by head. Scores are computed tile by tile and never stored: keys in rows,
// queries in the lanes, so that maxima, exponentials and sums of many queries are computed at once. Then the tile is
// transposed and the weights of a pixel, whose keys are adjacent, are added run by run; the lists of runs are shared by
// all heads. Without a target only the estimate has a gradient, which depends on the sum of each pixel: backward
// computes no scores.

#include "regard_map_distance.h"

#include "vector.h"

#include "parallel.h"
#include "pixels.h"
#include "product.h"
#include "token_blocks.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int QUERIES = 64, KEYS = 64;  // in a tile
constexpr float LOWEST = -200.f;        // below this, e^x and x e^x are 0

REGARD_INLINE float infinity() { return __builtin_inff(); }

struct Problem {
  const regard_map_distance_args* args;
  int64_t line, pixel_line, runs;  // most runs of a query: moved keys begin two more at each border

  explicit Problem(const regard_map_distance_args& a)
      : args(&a),
        line(round_up(a.width, LANES)),
        pixel_line(round_up(a.pixels, LANES)),
        runs(least(a.m, a.jitter == nullptr ? a.pixels : 3 * a.pixels)) {}

  int64_t blocks() const { return ceil_div(args->n, QUERIES); }
  int64_t total(int64_t b, int64_t t) const { return args->totals[b * args->totals_stride + t]; }
  const int64_t* slots(int64_t b) const { return args->slots == nullptr ? nullptr : args->slots + b * args->slots_stride; }
  int64_t place(int64_t b, int64_t h, int64_t t) const { return (b * args->heads + h) * args->n + t; }
  int64_t kv_head(int64_t h) const { return h / (args->heads / args->kv_heads); }
  // Also nullptr if no key is moved.
  const double* jitter(int64_t b) const {
    const double* found = args->jitter == nullptr ? nullptr : args->jitter + b * args->jitter_stride;
    for (int64_t j = 0; found != nullptr && j < args->m; ++j)
      if (found[j] != 0) return found;
    return nullptr;
  }
};

// Adjacent keys of one pixel: from the end of the previous run up to rank `end`.
struct Run {
  int32_t end, pixel;
};

// Numbers accumulated for each query.
enum Number {
  TOP,     // largest score
  SUM,     // sum of e = exp(score - top)
  SQUARE,  // sum of e^2
  SLOPE,   // sum of e (score - top); with a target, of e p
  P,       // sum of the target p
  P_SQUARE,
  P_LOG,    // sum of p log p
  P_SCORE,  // sum of p times the score
  NUMBERS
};

struct Room {
  char* memory;  // nullptr: only counts the bytes needed
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* found = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += Workspace::bytes_of<T>(static_cast<size_t>(count));
    return found;
  }
};

// One thread's memory.
struct Worker {
  Run* runs;       // (QUERIES, p.runs)
  int32_t* seen;   // (QUERIES,) number of visible keys
  int32_t* at;     // (QUERIES,) next run
  float* queries;  // (QUERIES, line) scaled
  float* turned;   // (line, QUERIES) transposed queries
  float* keys;     // (KEYS, line)
  float* scores;   // (KEYS, QUERIES)
  float* rows;     // (LANES, KEYS): weights or targets of a vector of queries
  float* targets;  // (KEYS, LANES) transposed
  float* numbers;  // (NUMBERS, QUERIES)
  float* mass;     // (QUERIES, pixel_line)
  float* lengths;  // (pixel_line,) number of keys in each pixel
  float* shares;   // (pixel_line,) r of each key in a pixel
  float* grad_q;   // (QUERIES, line)
  float* grad_k;   // (KEYS, line)

  Worker(Room& room, const Problem& p) {
    runs = room.take<Run>(QUERIES * p.runs);
    seen = room.take<int32_t>(QUERIES);
    at = room.take<int32_t>(QUERIES);
    queries = room.take<float>(QUERIES * p.line);
    turned = room.take<float>(p.line * QUERIES);
    keys = room.take<float>(KEYS * p.line);
    scores = room.take<float>(KEYS * QUERIES);
    rows = room.take<float>(LANES * KEYS);
    targets = room.take<float>(KEYS * LANES);
    numbers = room.take<float>(NUMBERS * QUERIES);
    mass = room.take<float>(QUERIES * p.pixel_line);
    lengths = room.take<float>(p.pixel_line);
    shares = room.take<float>(p.pixel_line);
    grad_q = room.take<float>(QUERIES * p.line);
    grad_k = room.take<float>(KEYS * p.line);
  }
  static size_t bytes(const Problem& p) {
    Room room{nullptr};
    Worker(room, p);
    return room.used;
  }
  float* number(Number which) const { return numbers + which * QUERIES; }
};

// --- keys and pixels

// How many keys each query of a block sees, and the end of the ranks that any of them sees.
int64_t see(const Problem& p, const Worker& worker, int64_t b, int64_t begin) {
  int64_t reach = 0;
  for (int64_t i = 0; i < QUERIES; ++i) {
    const int64_t total = begin + i < p.args->n ? p.total(b, begin + i) : 0;
    const int64_t seen = most<int64_t>(0, least(total, p.args->m));
    worker.seen[i] = static_cast<int32_t>(seen);
    reach = most(reach, seen);
  }
  return reach;
}

// The runs of the keys that query i sees, out of `total`.
void find_runs(const Problem& p, const Worker& worker, int64_t b, int64_t i, int64_t total, const double* jitter) {
  const int64_t seen = worker.seen[i], pixels = p.args->pixels;
  Run* to = worker.runs + i * p.runs;
  if (jitter == nullptr) {
    int64_t end = 0;
    for (int64_t pixel = 0; pixel < pixels && end < seen; ++pixel) {
      const int64_t next = least(first_of_pixel(pixel + 1, total, pixels), seen);
      if (next > end) *to++ = {static_cast<int32_t>(next), static_cast<int32_t>(pixel)};
      end = next;
    }
    return;
  }
  const int64_t* slots = p.slots(b);
  int64_t before = -1;
  for (int64_t j = 0; j < seen; ++j) {
    const int64_t pixel = pixel_of_moved(j, jitter[slots == nullptr ? j : slots[j]], total, pixels);
    if (pixel != before) ++to;
    to[-1] = {static_cast<int32_t>(j + 1), static_cast<int32_t>(pixel)};
    before = pixel;
  }
}

void find_all_runs(const Problem& p, const Worker& worker, int64_t b, int64_t begin) {
  const double* jitter = p.jitter(b);
  for (int64_t i = 0; i < QUERIES && begin + i < p.args->n; ++i)
    find_runs(p, worker, b, i, p.total(b, begin + i), jitter);
}

// The number of keys that query i sees in each pixel.
void count_keys(const Problem& p, const Worker& worker, int64_t i) {
  for (int64_t c = 0; c < p.pixel_line; c += LANES) store(worker.lengths + c, zero());
  int32_t begin = 0;
  for (const Run* run = worker.runs + i * p.runs; begin < worker.seen[i]; ++run) {
    worker.lengths[run->pixel] += static_cast<float>(run->end - begin);
    begin = run->end;
  }
}

// --- tiles

template <class T>
void load_queries(const Problem& p, const Worker& worker, int64_t b, int64_t h, int64_t begin) {
  const regard_map_distance_args& a = *p.args;
  const T* from = static_cast<const T*>(a.q) + b * a.q_strides[0] + h * a.q_strides[1] + begin * a.q_strides[2];
  const int count = static_cast<int>(least<int64_t>(QUERIES, a.n - begin));
  load_rows(from, a.q_strides[2], count, static_cast<int>(a.width), worker.queries, p.line);
  for (int64_t c = 0; c < count * p.line; c += LANES) store(worker.queries + c, load(worker.queries + c) * a.scale);
  for (int64_t c = count * p.line; c < QUERIES * p.line; c += LANES) store(worker.queries + c, zero());
  transpose_padded(QUERIES, static_cast<int>(p.line), worker.queries, p.line, worker.turned, QUERIES);
}

// Scores of the queries with the `count` keys from rank j0 on, a row for each key.
template <class T>
void find_scores(const Problem& p, const Worker& worker, int64_t b, int64_t h, int64_t j0, int count) {
  const regard_map_distance_args& a = *p.args;
  const T* from = static_cast<const T*>(a.k) + b * a.k_strides[0] + p.kv_head(h) * a.k_strides[1];
  const int64_t* slots = p.slots(b);
  const int width = static_cast<int>(a.width);
  if (slots == nullptr)
    load_rows(from + j0 * a.k_strides[2], a.k_strides[2], count, width, worker.keys, p.line);
  else
    for (int j = 0; j < count; ++j)
      load_rows(from + slots[j0 + j] * a.k_strides[2], 0, 1, width, worker.keys + j * p.line, p.line);
  product<Into::ZERO>(count, QUERIES, width, worker.keys, p.line, 1, worker.turned, QUERIES, worker.scores, QUERIES);
}

REGARD_INLINE IntVec load_seen(const Worker& worker, int g) {
  IntVec seen;
  __builtin_memcpy(&seen, worker.seen + g, sizeof seen);
  return seen;
}

// The most and the fewest keys that a query of a vector sees.
struct Reach {
  int32_t low, high;

  Reach(const Worker& worker, int g) : low(worker.seen[g]), high(low) {
    for (int l = 1; l < LANES; ++l) low = least(low, worker.seen[g + l]), high = most(high, worker.seen[g + l]);
  }
};

// Targets of a vector of queries for keys from rank j0 on, by query and transposed; 0 for hidden keys.
void load_targets(const Problem& p, const Worker& worker, int64_t b, int64_t h, int64_t begin, int g, int64_t j0) {
  const regard_map_distance_args& a = *p.args;
  const int64_t* slots = p.slots(b);
  for (int l = 0; l < LANES; ++l) {
    float* to = worker.rows + l * KEYS;
    const int left = static_cast<int>(most<int64_t>(0, least<int64_t>(KEYS, worker.seen[g + l] - j0)));
    for (int j = 0; j < KEYS; j += LANES) store(to + j, zero());
    if (left == 0) continue;
    const float* from = a.target + b * a.target_strides[0] + h * a.target_strides[1] + (begin + g + l) * a.target_strides[2];
    if (slots == nullptr)
      load_rows(from + j0, 0, 1, left, to, KEYS);
    else
      for (int j = 0; j < left; ++j) to[j] = from[slots[j0 + j]];
  }
  for (int j = 0; j < KEYS; j += LANES) transpose_square(worker.rows + j, KEYS, worker.targets + j * LANES, LANES);
}

// The natural logarithm of normal positive numbers m 2^e with m near 1, by log m = 2 atanh((m - 1) / (m + 1)).
REGARD_INLINE Vec log(Vec x) {
  constexpr int32_t ROOT = 0x3f3504f3;  // square root of 1/2
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec e = (bits - ROOT) >> 23;
  const Vec m = reinterpret_cast<Vec>(bits - (e << 23));
  const Vec s = (m - 1.f) * reciprocal(m + 1.f), z = s * s;
  Vec series = broadcast(2.f / 9);
  series = fma(series, z, broadcast(2.f / 7));
  series = fma(series, z, broadcast(2.f / 5));
  series = fma(series, z, broadcast(2.f / 3));
  return fma(__builtin_convertvector(e, Vec), broadcast(LN_2), fma(series * z, s, s + s));
}

// Accumulates the tile's scores for a vector of queries; without a target, replaces them by unnormalised weights.
template <bool TARGET>
void fold(const Worker& worker, int g, int64_t j0, int count) {
  const IntVec left = load_seen(worker, g) - static_cast<int32_t>(j0);
  const bool whole = Reach(worker, g).low >= j0 + count;
  float* scores = worker.scores + g;
  const auto at = [&](Number which) { return worker.number(which) + g; };
  const Vec before = load(at(TOP));
  Vec top = before;
  for (int j = 0; j < count; ++j) {
    Vec s = load(scores + j * QUERIES);
    if (!whole) {
      s = select(left > j, s, broadcast(-infinity()));
      store(scores + j * QUERIES, s);
    }
    top = maximum(top, s);
  }
  const Vec base = select(reinterpret_cast<IntVec>(top == -infinity()), zero(), top);
  const Vec factor = exp(before - base), fall = maximum(broadcast(LOWEST), before - base);
  Vec sum = zero(), square = zero(), slope = zero(), p_sum = zero(), p_square = zero(), p_log = zero(), p_score = zero();
  for (int j = 0; j < count; ++j) {
    const Vec s = load(scores + j * QUERIES), d = maximum(broadcast(LOWEST), s - base), e = exp(d);
    sum += e;
    square = fma(e, e, square);
    if constexpr (TARGET) {
      const Vec p = load(worker.targets + j * LANES);
      slope = fma(e, p, slope);
      p_sum += p;
      p_square = fma(p, p, p_square);
      p_log += select(reinterpret_cast<IntVec>(p == 0.f), zero(), p * log(p));
      p_score = fma(p, whole ? s : select(left > j, s, zero()), p_score);
    } else {
      slope = fma(e, d, slope);
      store(scores + j * QUERIES, e);
    }
  }
  const Vec sum_before = load(at(SUM));
  const Vec slope_before = TARGET ? load(at(SLOPE)) : fma(sum_before, fall, load(at(SLOPE)));
  store(at(TOP), top);
  store(at(SUM), fma(sum_before, factor, sum));
  store(at(SQUARE), fma(load(at(SQUARE)) * factor, factor, square));
  store(at(SLOPE), fma(slope_before, factor, slope));
  if constexpr (TARGET) {
    store(at(P), load(at(P)) + p_sum);
    store(at(P_SQUARE), load(at(P_SQUARE)) + p_square);
    store(at(P_LOG), load(at(P_LOG)) + p_log);
    store(at(P_SCORE), load(at(P_SCORE)) + p_score);
  }
}

REGARD_INLINE float sum_of(const float* x, int64_t count) {
  if (count < 4) {
    float sum = 0.f;
    for (int64_t j = 0; j < count; ++j) sum += x[j];
    return sum;
  }
  Vec sums = zero();
  int64_t j = 0;
  for (; j + LANES <= count; j += LANES) sums += load(x + j);
  if (j < count) sums += load(x + j, static_cast<int>(count - j));
  return sum(sums);
}

// Adds the rows of a vector of queries to the sums of their pixels.
void add_runs(const Problem& p, const Worker& worker, int g, int64_t j0, int count) {
  for (int l = 0; l < LANES; ++l) {
    const int64_t i = g + l, stop = least<int64_t>(worker.seen[i], j0 + count);
    const Run* run = worker.runs + i * p.runs + worker.at[i];
    const float* row = worker.rows + l * KEYS;
    float* mass = worker.mass + i * p.pixel_line;
    for (int64_t j = j0; j < stop;) {
      const int64_t end = least<int64_t>(run->end, stop);
      mass[run->pixel] += sum_of(row + (j - j0), end - j);
      if (end == run->end) ++run;
      j = end;
    }
    worker.at[i] = static_cast<int32_t>(run - (worker.runs + i * p.runs));
  }
}

// Rescales sums of weights where the largest score has grown.
void shrink(const Problem& p, const Worker& worker, int g, const float* tops) {
  float factors[LANES];
  const Vec top = load(worker.number(TOP) + g);
  store(factors, exp(load(tops) - select(reinterpret_cast<IntVec>(top == -infinity()), zero(), top)));
  for (int l = 0; l < LANES; ++l) {
    if (factors[l] == 1.f) continue;
    float* mass = worker.mass + (g + l) * p.pixel_line;
    for (int64_t c = 0; c < p.pixel_line; c += LANES) store(mass + c, load(mass + c) * factors[l]);
  }
}

// --- forward

// r of the keys of each pixel, which has worker.lengths visible keys; returns lse with log r = score - lse.
float find_shares(const Problem& p, const Worker& worker, const float* estimate) {
  const int64_t pixels = p.args->pixels;
  const auto score = [&](int64_t c) {
    const Vec x = c + LANES <= pixels ? load(estimate + c) : load(estimate + c, static_cast<int>(pixels - c));
    return select(reinterpret_cast<IntVec>(load(worker.lengths + c) > 0.f), x, broadcast(-infinity()));
  };
  Vec tops = broadcast(-infinity());
  for (int64_t c = 0; c < p.pixel_line; c += LANES) tops = maximum(tops, score(c));
  const float top = largest(tops), base = top == -infinity() ? 0.f : top;
  Vec sums = zero();
  for (int64_t c = 0; c < p.pixel_line; c += LANES) {
    const Vec x = exp(score(c) - base);
    store(worker.shares + c, x);
    sums = fma(load(worker.lengths + c), x, sums);
  }
  const float total = sum(sums), inverse = total == 0.f ? 0.f : 1.f / total;
  for (int64_t c = 0; c < p.pixel_line; c += LANES) store(worker.shares + c, load(worker.shares + c) * inverse);
  return total == 0.f ? base : base + __builtin_logf(total);
}

template <bool TARGET>
void finish(const Problem& p, const Worker& worker, int64_t b, int64_t h, int64_t t, int64_t i) {
  const regard_map_distance_args& a = *p.args;
  const int64_t place = p.place(b, h, t);
  const auto number = [&](Number which) { return worker.number(which)[i]; };
  float* mass = worker.mass + i * p.pixel_line;
  const float weights = number(SUM), inverse = weights == 0.f ? 0.f : 1.f / weights;
  const float square = number(SQUARE) * inverse * inverse, slope = number(SLOPE) * inverse;
  const float log_sum = weights == 0.f ? 0.f : __builtin_logf(weights);
  if (!TARGET)
    for (int64_t c = 0; c < p.pixel_line; c += LANES) store(mass + c, load(mass + c) * inverse);
  count_keys(p, worker, i);
  const float* estimate =
      a.estimate + b * a.estimate_strides[0] + h * a.estimate_strides[1] + t * a.estimate_strides[2];
  const float below = find_shares(p, worker, estimate);
  Vec logs = zero(), cross = zero(), own = zero();
  for (int64_t c = 0; c < p.pixel_line; c += LANES) {
    const Vec length = load(worker.lengths + c), share = load(worker.shares + c), weight = load(mass + c);
    const Vec x = c + LANES <= a.pixels ? load(estimate + c) : load(estimate + c, static_cast<int>(a.pixels - c));
    logs += select(reinterpret_cast<IntVec>(length > 0.f), weight * (x - below), zero());
    cross = fma(weight, share, cross);
    own = fma(length * share, share, own);
  }
  const float p_log = TARGET ? number(P_LOG) : slope - log_sum, p_square = TARGET ? number(P_SQUARE) : square;
  float kl = p_log - sum(logs), squares = p_square - 2 * sum(cross) + sum(own);
  if (TARGET) {
    const float lse = weights == 0.f ? 0.f : number(TOP) + log_sum;
    kl += p_log - (number(P_SCORE) - lse * number(P));
    squares += p_square - 2 * slope + square;
    if (a.rows != nullptr) {
      a.rows[3 * place] = lse;
      a.rows[3 * place + 1] = number(P);
      a.rows[3 * place + 2] = square - slope;
    }
  }
  a.kl[place] = kl;
  a.squares[place] = squares;
  if (a.mass != nullptr) store_rows(a.mass + place * a.pixels, 0, 1, static_cast<int>(a.pixels), mass, p.pixel_line);
}

template <class T, bool TARGET>
void compare(const Problem& p, const Worker& worker, int64_t b, int64_t block) {
  const regard_map_distance_args& a = *p.args;
  const int64_t begin = block * QUERIES, reach = see(p, worker, b, begin);
  find_all_runs(p, worker, b, begin);
  for (int64_t h = 0; h < a.heads; ++h) {
    load_queries<T>(p, worker, b, h, begin);
    for (int64_t c = 0; c < NUMBERS * QUERIES; c += LANES)
      store(worker.numbers + c, c < QUERIES ? broadcast(-infinity()) : zero());
    for (int64_t c = 0; c < QUERIES * p.pixel_line; c += LANES) store(worker.mass + c, zero());
    for (int i = 0; i < QUERIES; ++i) worker.at[i] = 0;
    for (int64_t j0 = 0; j0 < reach; j0 += KEYS) {
      const int count = static_cast<int>(least<int64_t>(KEYS, reach - j0));
      find_scores<T>(p, worker, b, h, j0, count);
      for (int g = 0; g < QUERIES; g += LANES) {
        if (Reach(worker, g).high <= j0) continue;
        if constexpr (TARGET) load_targets(p, worker, b, h, begin, g, j0);
        float tops[LANES];
        store(tops, load(worker.number(TOP) + g));
        fold<TARGET>(worker, g, j0, count);
        if constexpr (!TARGET) {
          if (j0 > 0) shrink(p, worker, g, tops);
          for (int j = 0; j < count; j += LANES)
            transpose_square(worker.scores + j * QUERIES + g, QUERIES, worker.rows + j, KEYS);
        }
        add_runs(p, worker, g, j0, count);
      }
    }
    for (int64_t i = 0; i < QUERIES && begin + i < a.n; ++i) finish<TARGET>(p, worker, b, h, begin + i, i);
  }
}

// Runs tasks on all threads, each with its own worker.
template <class F>
int run_tasks(const Problem& p, int64_t tasks, F&& f) {
  const int64_t parts = most<int64_t>(1, least(p.args->threads, tasks));
  const size_t each = Worker::bytes(p);
  Workspace space(each * static_cast<size_t>(parts));
  if (!space) return REGARD_OUT_OF_MEMORY;
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    Room room{static_cast<char*>(space.memory) + each * static_cast<size_t>(part)};
    const Worker worker(room, p);
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      f(worker, task);
    }
  });
  return REGARD_OK;
}

template <class T, bool TARGET>
int run(const Problem& p) {
  return run_tasks(p, p.args->batch * p.blocks(), [&](const Worker& worker, int64_t task) {
    compare<T, TARGET>(p, worker, task / p.blocks(), task % p.blocks());
  });
}

// --- backward

// With P the sum of p, n_c the number of keys of pixel c, m_c the sum of their p, and a_c = 2 (n_c r_c - m_c):
// d kl / d e_c = P n_c r_c - m_c and d squares / d e_c = r_c (a_c - n_c sum of a r).
void learn_estimate(const Problem& p, const Worker& worker, const regard_map_distance_backward_args& args, int64_t b,
                    int64_t block) {
  const regard_map_distance_args& a = *p.args;
  const int64_t begin = block * QUERIES;
  see(p, worker, b, begin);
  find_all_runs(p, worker, b, begin);
  for (int64_t h = 0; h < a.heads; ++h)
    for (int64_t i = 0; i < QUERIES && begin + i < a.n; ++i) {
      const int64_t t = begin + i, place = p.place(b, h, t);
      const float kl = args.grad_kl == nullptr ? 0.f : args.grad_kl[place];
      const float squares = args.grad_squares == nullptr ? 0.f : args.grad_squares[place];
      float* mass = worker.mass;
      load_rows(a.mass + place * a.pixels, 0, 1, static_cast<int>(a.pixels), mass, p.pixel_line);
      count_keys(p, worker, i);
      find_shares(p, worker, a.estimate + b * a.estimate_strides[0] + h * a.estimate_strides[1] + t * a.estimate_strides[2]);
      Vec weights = zero(), products = zero();
      for (int64_t c = 0; c < p.pixel_line; c += LANES) {
        const Vec share = load(worker.shares + c), weight = load(mass + c);
        weights += weight;
        products = fma(2.f * share, fma(load(worker.lengths + c), share, -weight), products);
      }
      const float all = sum(weights), product = sum(products);
      for (int64_t c = 0; c < p.pixel_line; c += LANES) {
        const Vec share = load(worker.shares + c), weight = load(mass + c), length = load(worker.lengths + c);
        const Vec of_kl = fma(all * length, share, -weight);
        const Vec of_squares = share * (2.f * fma(length, share, -weight) - length * product);
        store(mass + c, kl * of_kl + squares * of_squares);
      }
      store_rows(args.grad_estimate + place * a.pixels, 0, 1, static_cast<int>(a.pixels), mass, p.pixel_line);
    }
}

// Gradients with a target, for a block of the queries of a head: d kl / d s_j = P w_j - p_j and
// d squares / d s_j = 2 w_j (w_j - p_j - sum of w (w - p)). Gradients of the keys are added to `grad_k` (m, line).
template <class T>
void learn_scores(const Problem& p, const Worker& worker, const regard_map_distance_backward_args& args, int64_t b,
                  int64_t h, int64_t block, float* grad_k) {
  const regard_map_distance_args& a = *p.args;
  const int64_t begin = block * QUERIES, reach = see(p, worker, b, begin);
  const int64_t* slots = p.slots(b);
  const int line = static_cast<int>(p.line);
  load_queries<T>(p, worker, b, h, begin);
  // by query, in slots of `numbers` that are unused here: the gradients of both results, and the query's numbers
  float *kl = worker.number(SUM), *squares = worker.number(SQUARE), *lse = worker.number(TOP), *all = worker.number(P),
        *apart = worker.number(SLOPE);
  for (int64_t i = 0; i < QUERIES; ++i) {
    const int64_t place = p.place(b, h, begin + i);
    const bool there = begin + i < a.n;
    kl[i] = there && args.grad_kl != nullptr ? args.grad_kl[place] : 0.f;
    squares[i] = there && args.grad_squares != nullptr ? args.grad_squares[place] : 0.f;
    lse[i] = there ? a.rows[3 * place] : 0.f;
    all[i] = there ? a.rows[3 * place + 1] : 0.f;
    apart[i] = there ? a.rows[3 * place + 2] : 0.f;
  }
  for (int64_t c = 0; c < QUERIES * p.line; c += LANES) store(worker.grad_q + c, zero());
  for (int64_t j0 = 0; j0 < reach; j0 += KEYS) {
    const int count = static_cast<int>(least<int64_t>(KEYS, reach - j0));
    find_scores<T>(p, worker, b, h, j0, count);
    for (int g = 0; g < QUERIES; g += LANES) {
      load_targets(p, worker, b, h, begin, g, j0);
      const IntVec left = load_seen(worker, g) - static_cast<int32_t>(j0);
      for (int j = 0; j < count; ++j) {
        float* at = worker.scores + j * QUERIES + g;
        const Vec target = load(worker.targets + j * LANES), w = exp(load(at) - load(lse + g));
        const Vec of_kl = fma(load(all + g), w, -target), of_squares = 2.f * w * (w - target - load(apart + g));
        const Vec slope = fma(load(kl + g), of_kl, load(squares + g) * of_squares);
        store(at, select(left > j, slope, zero()));
      }
    }
    if (args.grad_q != nullptr)
      product<Into::SUM>(QUERIES, line, count, worker.scores, 1, QUERIES, worker.keys, line, worker.grad_q, line);
    if (grad_k == nullptr) continue;
    if (slots == nullptr) {
      product<Into::SUM>(count, line, QUERIES, worker.scores, QUERIES, 1, worker.queries, line, grad_k + j0 * line, line);
      continue;
    }
    product<Into::ZERO>(count, line, QUERIES, worker.scores, QUERIES, 1, worker.queries, line, worker.grad_k, line);
    for (int j = 0; j < count; ++j) {
      float* to = grad_k + slots[j0 + j] * line;
      for (int c = 0; c < line; c += LANES) store(to + c, load(to + c) + load(worker.grad_k + j * line + c));
    }
  }
  if (args.grad_q == nullptr) return;
  for (int64_t c = 0; c < QUERIES * p.line; c += LANES) store(worker.grad_q + c, load(worker.grad_q + c) * a.scale);
  store_rows(static_cast<T*>(args.grad_q) + b * args.grad_q_strides[0] + h * args.grad_q_strides[1] +
                 begin * args.grad_q_strides[2],
             args.grad_q_strides[2], static_cast<int>(least<int64_t>(QUERIES, a.n - begin)), static_cast<int>(a.width),
             worker.grad_q, p.line);
}

// A task computes the gradients of one (row, kv head) or, if there are fewer of these than threads, of a share of its
// queries; the shares are added at the end.
template <class T>
int learn_all_scores(const Problem& p, const regard_map_distance_backward_args& args) {
  const regard_map_distance_args& a = *p.args;
  const int64_t pairs = a.batch * a.kv_heads, shared = a.heads / a.kv_heads, threads = most<int64_t>(1, a.threads);
  const int64_t shares = pairs >= threads ? 1 : ceil_div(threads, pairs), tasks = pairs * shares;
  const int64_t floats = args.grad_k == nullptr ? 0 : a.m * p.line;
  Workspace space(Workspace::bytes_of<float>(static_cast<size_t>(floats * tasks)));
  if (!space) return REGARD_OUT_OF_MEMORY;
  float* buffer = space.take<float>(static_cast<size_t>(floats * tasks));
  const int status = run_tasks(p, tasks, [&](const Worker& worker, int64_t task) {
    const int64_t pair = task / shares, b = pair / a.kv_heads, g = pair % a.kv_heads;
    float* mine = floats == 0 ? nullptr : buffer + task * floats;
    for (int64_t i = 0; i < floats; i += LANES) store(mine + i, zero());
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h)
      for (int64_t block = task % shares; block < p.blocks(); block += shares)
        learn_scores<T>(p, worker, args, b, h, block, mine);
  });
  if (status != REGARD_OK || floats == 0) return status;
  parallel_tasks(static_cast<int>(threads), pairs, [&](long pair) {
    float* total = buffer + pair * shares * floats;
    for (int64_t share = 1; share < shares; ++share)
      for (int64_t i = 0; i < floats; i += LANES)
        store(total + i, load(total + i) + load(total + share * floats + i));
    store_rows(static_cast<T*>(args.grad_k) + pair / a.kv_heads * args.grad_k_strides[0] +
                   pair % a.kv_heads * args.grad_k_strides[1],
               args.grad_k_strides[2], static_cast<int>(a.m), static_cast<int>(a.width), total, p.line);
  });
  return REGARD_OK;
}

bool valid(const regard_map_distance_args& a) {
  return a.kv_heads >= 1 && a.heads % a.kv_heads == 0 && a.width >= 1 && a.pixels >= 1;
}

}  // namespace

int map_distance(const regard_map_distance_args* args) {
  if (!valid(*args)) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->heads * args->n == 0) return REGARD_OK;
  const Problem p(*args);
  if (args->dtype == REGARD_BFLOAT16)
    return args->target == nullptr ? run<bfloat16, false>(p) : run<bfloat16, true>(p);
  return args->target == nullptr ? run<float, false>(p) : run<float, true>(p);
}

int map_distance_backward(const regard_map_distance_backward_args* args) {
  const regard_map_distance_args& a = *args->forward;
  const bool scores = args->grad_q != nullptr || args->grad_k != nullptr;
  const int64_t queries = a.batch * a.heads * a.n;
  if (!valid(a) || (queries > 0 && (a.mass == nullptr || (scores && a.rows == nullptr)))) return REGARD_BAD_ARGUMENT;
  if (queries * a.m > 0 && scores && a.target == nullptr) return REGARD_BAD_ARGUMENT;
  const Problem p(a);
  int status = REGARD_OK;
  if (args->grad_estimate != nullptr)
    status = run_tasks(p, a.batch * p.blocks(), [&](const Worker& worker, int64_t task) {
      learn_estimate(p, worker, *args, task / p.blocks(), task % p.blocks());
    });
  if (status != REGARD_OK || !scores || a.batch * a.heads == 0) return status;
  return a.dtype == REGARD_BFLOAT16 ? learn_all_scores<bfloat16>(p, *args) : learn_all_scores<float>(p, *args);
}

}  // namespace REGARD_ISA
