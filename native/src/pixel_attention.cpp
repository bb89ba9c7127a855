// Softmax over the keys of chosen pixels, forward and backward.
//
// A task is a block of queries of a row. Their pixels are chosen first, by log-probabilities in double, so that every
// form of the engine keeps the same ones. The threshold is found by bisection, which counts full vectors and takes as
// long for few pixels as for many. Then, head by head, the keys of a query's pixels are listed and read in place: those
// of a pixel are adjacent, so memory is read in runs. Only one list per thread is as long as the keys.

#include "regard_pixel_attention.h"

#include "vector.h"

#include "parallel.h"
#include "pixels.h"
#include "token_blocks.h"
#include "token_pairs.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int QUERIES = 32;   // in a block
constexpr int STRETCH = 128;  // values between stored running sums
constexpr int WIDE = 8;       // vectors of a line summed at once

REGARD_INLINE float infinity() { return __builtin_inff(); }

typedef double Double __attribute__((vector_size(LANES * 4)));
typedef int64_t Long __attribute__((vector_size(LANES * 4)));
typedef int32_t Half __attribute__((vector_size(LANES * 2)));
constexpr int DOUBLES = LANES / 2;

REGARD_INLINE Double load(const double* p) {
  Double v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
REGARD_INLINE void store(double* p, Double v) { __builtin_memcpy(p, &v, sizeof v); }
REGARD_INLINE Double select(Long mask, Double yes, Double no) {
  return reinterpret_cast<Double>((reinterpret_cast<Long>(yes) & mask) | (reinterpret_cast<Long>(no) & ~mask));
}

// e^x for x <= 0 to nearly full precision; almost 0 below -700 and for NaN.
REGARD_INLINE Double exp_down(Double x) {
  x = select(reinterpret_cast<Long>(x >= -700.0), x, Double{} - 700.0);
  const Half n = __builtin_convertvector(x * 1.4426950408889634 - 0.5, Half);  // truncates to the nearest
  const Double whole = __builtin_convertvector(n, Double);
  const Double r = (x - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;
  // 1 / k!, to an error of 4e-18
  constexpr double C[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
                   1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0};
  Double p = Double{} + C[0];
#pragma GCC unroll 13
  for (int i = 1; i < 14; ++i) p = p * r + C[i];
  return p * reinterpret_cast<Double>((__builtin_convertvector(n, Long) + 1023) << 52);
}

struct Problem {
  const regard_pixel_attention_args* args;
  int64_t line, value_line, words, pixel_line;
  float* running;  // (B, kv_heads, stretches, value_line): sums of the values before each stretch; or nullptr

  explicit Problem(const regard_pixel_attention_args& a)
      : args(&a),
        line(round_up(a.width, LANES)),
        value_line(round_up(a.value_width, LANES)),
        words(ceil_div(a.pixels, 32)),
        pixel_line(round_up(a.pixels, LANES)),
        running(nullptr) {}

  int64_t stretches() const { return args->count / STRETCH + 1; }
  int64_t blocks() const { return ceil_div(args->n, QUERIES); }
  int64_t total(int64_t b, int64_t t) const { return args->totals[b * args->totals_stride + t]; }
  const int64_t* slots(int64_t b) const { return args->slots == nullptr ? nullptr : args->slots + b * args->slots_stride; }
  const double* jitter(int64_t b) const { return args->jitter == nullptr ? nullptr : args->jitter + b * args->jitter_stride; }
  template <class T>
  const T* keys(int64_t b, int64_t h) const {
    return static_cast<const T*>(args->k) + b * args->k_strides[0] + kv_head(h) * args->k_strides[1];
  }
  template <class T>
  const T* values(int64_t b, int64_t h) const {
    return static_cast<const T*>(args->v) + b * args->v_strides[0] + kv_head(h) * args->v_strides[1];
  }
  int64_t kv_head(int64_t h) const { return h / (args->heads / args->kv_heads); }
};

// One thread's memory.
struct Worker {
  double* logs;      // (heads, pixel_line) log-probabilities of a query's pixels
  uint32_t* kept;    // (QUERIES, heads, words)
  int32_t* slots;    // (m + LANES,) slots of the keys that a query reads
  float *scores, *slopes;  // (m + LANES,)
  float* query;      // (line,) scaled
  float* row;        // (value_line,)
  float* sums;       // (value_line,)
  float* grad_q;     // (line,)

  static size_t bytes(const Problem& p, bool backward) {
    const size_t heads = static_cast<size_t>(p.args->heads), keys = static_cast<size_t>(p.args->m + LANES);
    return Workspace::bytes_of<double>(backward ? 0 : heads * static_cast<size_t>(p.pixel_line)) +
           Workspace::bytes_of<uint32_t>(backward ? 0 : QUERIES * heads * static_cast<size_t>(p.words)) +
           Workspace::bytes_of<int32_t>(keys) + (backward ? 2 : 1) * Workspace::bytes_of<float>(keys) +
           2 * Workspace::bytes_of<float>(static_cast<size_t>(p.line)) +
           2 * Workspace::bytes_of<float>(static_cast<size_t>(p.value_line));
  }
  Worker(Workspace& space, const Problem& p, bool backward) {
    const size_t heads = static_cast<size_t>(p.args->heads), keys = static_cast<size_t>(p.args->m + LANES);
    logs = space.take<double>(backward ? 0 : heads * static_cast<size_t>(p.pixel_line));
    kept = space.take<uint32_t>(backward ? 0 : QUERIES * heads * static_cast<size_t>(p.words));
    slots = space.take<int32_t>(keys);
    scores = space.take<float>(keys);
    slopes = backward ? space.take<float>(keys) : nullptr;
    query = space.take<float>(static_cast<size_t>(p.line));
    grad_q = space.take<float>(static_cast<size_t>(p.line));
    row = space.take<float>(static_cast<size_t>(p.value_line));
    sums = space.take<float>(static_cast<size_t>(p.value_line));
  }
};

// --- pixels and keys

struct Bounds {
  double low, high;  // of the numbers above -inf; (1, -inf) if there are none
};

// Bounds of numbers below 1, in full vectors.
Bounds bounds(const double* x, int64_t size) {
  Double low = Double{} + 1, high = Double{} - __builtin_inf();
  for (int64_t i = 0; i < size; i += DOUBLES) {
    const Double here = load(x + i);
    low = select(reinterpret_cast<Long>(here > -__builtin_inf()) & reinterpret_cast<Long>(here < low), here, low);
    high = select(reinterpret_cast<Long>(here > high), here, high);
  }
  Bounds found{low[0], high[0]};
  for (int i = 1; i < DOUBLES; ++i) found = {least(found.low, low[i]), most(found.high, high[i])};
  return found;
}

// Log-softmax of a query's map in one head; -inf beyond its pixels.
void log_probabilities(const float* estimate, int64_t pixels, int64_t line, double* to) {
  for (int64_t c = 0; c < pixels; ++c) to[c] = estimate[c];
  for (int64_t c = pixels; c < line; ++c) to[c] = -__builtin_inf();
  const double top = bounds(to, line).high;
  Double sums{};
  for (int64_t c = 0; c < line; c += DOUBLES) {
    const Double x = load(to + c);
    const Double here = exp_down(x - top);
    sums += select(reinterpret_cast<Long>(x > -__builtin_inf()), here, Double{});
  }
  double sum = 0;
  for (int i = 0; i < DOUBLES; ++i) sum += sums[i];
  const double log_sum = top + __builtin_log(sum);
  for (int64_t c = 0; c < line; c += DOUBLES) store(to + c, load(to + c) - log_sum);
}

int64_t count_from(const double* x, int64_t size, double least_one) {
  Long counts{};
  for (int64_t i = 0; i < size; i += DOUBLES) counts -= reinterpret_cast<Long>(load(x + i) >= least_one);
  int64_t count = 0;
  for (int i = 0; i < DOUBLES; ++i) count += counts[i];
  return count;
}

// Marks the `wanted` largest numbers of heads x pixels; ties go to the first.
void mark_largest(const double* x, int64_t heads, int64_t pixels, int64_t line, int64_t wanted, uint32_t* kept,
                  int64_t words) {
  auto [low, high] = bounds(x, heads * line);
  // invariant: fewer numbers than wanted (or all above -inf) are >= high; at least as many as wanted are >= low
  int64_t above = 0, enough = count_from(x, heads * line, low);
  if (enough < wanted) {
    above = enough;
    high = low;
    low = -__builtin_inf();
  } else {
    high += 1;
    while (enough != wanted) {
      const double middle = low + (high - low) / 2;
      if (!(middle > low && middle < high)) break;  // equal numbers at the threshold
      const int64_t count = count_from(x, heads * line, middle);
      if (count >= wanted) {
        low = middle;
        enough = count;
      } else {
        high = middle;
        above = count;
      }
    }
  }
  int64_t left = wanted - above;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t word = 0; word < words; ++word) {
      uint32_t bits = 0;
      for (int64_t c = 32 * word; c < least(32 * word + 32, pixels); ++c) {
        const double number = x[h * line + c];
        bool take = number >= low;
        if (take && !(number >= high)) take = left-- > 0;
        bits |= static_cast<uint32_t>(take) << (c % 32);
      }
      kept[h * words + word] = bits;
    }
}

// Chooses the pixels of query t in all heads: kept (heads, words).
void choose(const Problem& p, const Worker& worker, int64_t b, int64_t t, uint32_t* kept) {
  const regard_pixel_attention_args& a = *p.args;
  const int64_t total = p.total(b, t);
  if (total <= 0) {
    for (int64_t i = 0; i < a.heads * p.words; ++i) kept[i] = 0;
    return;
  }
  for (int64_t h = 0; h < a.heads; ++h)
    log_probabilities(a.estimate + b * a.estimate_strides[0] + h * a.estimate_strides[1] + t * a.estimate_strides[2],
                      a.pixels, p.pixel_line, worker.logs + h * p.pixel_line);
  const double each = a.top_k * a.oversample * static_cast<double>(a.pixels) / static_cast<double>(total);
  const int64_t heads = a.together ? a.heads : 1;
  const double budget = __builtin_rint(static_cast<double>(heads) * each);
  const int64_t all = heads * a.pixels;
  const int64_t wanted = budget >= static_cast<double>(all) ? all : most<int64_t>(1, static_cast<int64_t>(budget));
  for (int64_t h = 0; h < a.heads; h += heads)
    mark_largest(worker.logs + h * p.pixel_line, heads, a.pixels, p.pixel_line, wanted, kept + h * p.words, p.words);
}

// With oversampling, whether a key of a kept pixel is read.
bool reads(const regard_pixel_attention_args& a, int64_t key, int64_t total) {
  const double all = static_cast<double>(total), parts = most(1.0, __builtin_rint(all / a.oversample));
  const double scaled = static_cast<double>(key + 1) / all * parts;
  const double step = least(most(all, a.top_k), a.top_k * a.oversample) / a.top_k;
  return __builtin_fabs(scaled - __builtin_rint(scaled)) <= 0.5 / step + 1e-4;
}

// Lists the slots of the keys of kept pixels, and returns their number. Keys that are moved by less than one rank can
// cross the border of their pixel only if they are its first or last.
int64_t collect(const Problem& p, int64_t b, int64_t total, const uint32_t* kept, int32_t* found) {
  const regard_pixel_attention_args& a = *p.args;
  const int64_t* slots = p.slots(b);
  const double* jitter = p.jitter(b);
  const int64_t seen = least(total, a.m);
  int64_t count = 0;
  for (int64_t word = 0; word < p.words; ++word)
    for (uint32_t bits = kept[word]; bits != 0; bits &= bits - 1) {
      const int64_t pixel = 32 * word + __builtin_ctz(bits);
      const int64_t first = first_of_pixel(pixel, total, a.pixels), last = first_of_pixel(pixel + 1, total, a.pixels) - 1;
      const int64_t near = jitter == nullptr ? 0 : 1;
      for (int64_t j = most<int64_t>(0, first - near); j < least(last + 1 + near, seen); ++j) {
        const int64_t slot = slots == nullptr ? j : slots[j];
        if (near && (j <= first || j >= last) && pixel_of_moved(j, jitter[slot], total, a.pixels) != pixel) continue;
        if (a.oversample <= 1 || reads(a, j, total)) found[count++] = static_cast<int32_t>(slot);
      }
    }
  return count;
}

// --- products with lists of rows

// to_j = line j . x, for x padded with zeros to a full vector; full vectors of `to` are written.
template <class T>
void dots(const T* lines, int64_t stride, const int32_t* slots, int64_t count, const float* x, int64_t width, float* to) {
  const int64_t whole = width / LANES * LANES;
  const int rest = static_cast<int>(width - whole);
  for (int64_t j = 0; j < count; j += LANES) {
    const int here = static_cast<int>(least<int64_t>(LANES, count - j));
    Vec sums[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      const T* from = lines + slots[j + least(i, here - 1)] * stride;
      Vec sum = zero();
      for (int64_t c = 0; c < whole; c += LANES) sum = fma(load(from + c), load(x + c), sum);
      if (rest > 0) sum = fma(load(from + whole, rest), load(x + whole), sum);
      sums[i] = sum;
    }
    store(to + j, sums_of_lanes(sums));
  }
}

template <int VECTORS, class T>
REGARD_INLINE void sum_columns(const T* lines, int64_t stride, const int32_t* slots, int64_t count,
                               const float* weights, int tail, float* to) {
  Vec sums[VECTORS];
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; ++c) sums[c] = zero();
  for (int64_t j = 0; j < count; ++j) {
    const T* from = lines + slots[j] * stride;
    const Vec weight = broadcast(weights[j]);
#pragma GCC unroll 8
    for (int c = 0; c < VECTORS; ++c) {
      const Vec x = c + 1 < VECTORS || tail == LANES ? load(from + c * LANES) : load(from + c * LANES, tail);
      sums[c] = fma(weight, x, sums[c]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < VECTORS; ++c) store(to + c * LANES, sums[c]);
}

// to (full vectors) = sum of weight_j times line j.
template <class T>
void weighted_sum(const T* lines, int64_t stride, const int32_t* slots, int64_t count, const float* weights,
                  int64_t width, float* to) {
  int64_t c = 0;
  for (; c + WIDE * LANES <= width; c += WIDE * LANES)
    sum_columns<WIDE>(lines + c, stride, slots, count, weights, LANES, to + c);
  for (; c + 4 * LANES <= width; c += 4 * LANES)
    sum_columns<4>(lines + c, stride, slots, count, weights, LANES, to + c);
  for (; c < width; c += LANES)
    sum_columns<1>(lines + c, stride, slots, count, weights, static_cast<int>(least<int64_t>(LANES, width - c)), to + c);
}

// line j += weight_j x, for lines of full vectors.
void add_outer(float* lines, int64_t line, const int32_t* slots, int64_t count, const float* weights, const float* x) {
  for (int64_t j = 0; j < count; ++j) {
    float* to = lines + slots[j] * line;
    const Vec weight = broadcast(weights[j]);
    for (int64_t c = 0; c < line; c += LANES) store(to + c, fma(weight, load(x + c), load(to + c)));
  }
}

template <class T>
void load_query(const Problem& p, const Worker& worker, int64_t b, int64_t h, int64_t t) {
  const regard_pixel_attention_args& a = *p.args;
  const T* from = static_cast<const T*>(a.q) + b * a.q_strides[0] + h * a.q_strides[1] + t * a.q_strides[2];
  load_rows(from, 0, 1, static_cast<int>(a.width), worker.query, p.line);
  for (int64_t c = 0; c < p.line; c += LANES) store(worker.query + c, load(worker.query + c) * a.scale);
}

// --- forward

// Turns the worker's scores into unnormalised weights, and returns their sum. Writes the log-sum-exp to `lse` unless
// nullptr.
float weigh(const Worker& worker, int64_t count, float* lse) {
  for (int64_t j = count; j < round_up(count, LANES); ++j) worker.scores[j] = -infinity();
  Vec tops = broadcast(-infinity());
  for (int64_t j = 0; j < count; j += LANES) tops = maximum(tops, load(worker.scores + j));
  const float top = largest(tops), base = top == -infinity() ? 0.f : top;
  Vec sums = zero();
  for (int64_t j = 0; j < count; j += LANES) {
    const Vec weights = exp(load(worker.scores + j) - base);
    store(worker.scores + j, weights);
    sums += weights;
  }
  const float total = sum(sums);
  if (lse != nullptr) *lse = total == 0.f ? -infinity() : base + __builtin_logf(total);
  return total;
}

REGARD_INLINE float logistic(float x) { return 1.f / (1.f + exp(-x)); }

// The factors from a query's logits: its output is row mix P V + rest mean.
struct Gates {
  float row = 1.f, mix = 1.f, rest = 0.f;

  Gates(const regard_pixel_attention_args& a, int64_t place, int64_t total) {
    if (a.row_logit != nullptr) row = logistic(a.row_logit[place]);
    if (a.mix_logit == nullptr || total <= 0) return;
    mix = logistic(a.mix_logit[place]);
    rest = logistic(-a.mix_logit[place]);
  }
};

template <class T>
const T* new_values(const Problem& p, int64_t b, int64_t h) {
  return p.values<T>(b, h) + (p.args->m - p.args->count) * p.args->v_strides[2];
}

// The means of a head's queries; the latest running sum is kept for the next query.
template <class T>
struct Means {
  const Problem& p;
  int64_t b, h;
  float* sums;  // (value_line,)
  int64_t at = -1;

  // Number of new values that a query sees.
  static int64_t seen(const regard_pixel_attention_args& a, int64_t b, int64_t total) {
    return most<int64_t>(0, least(total - a.before[b], a.count));
  }
  // A query's mean is of(total) times factor(total).
  float factor(int64_t total) const { return p.running == nullptr ? 1.f : 1.f / static_cast<float>(total); }
  const float* of(int64_t total) {
    const regard_pixel_attention_args& a = *p.args;
    if (p.running == nullptr) return a.first + (b * a.first_heads + h / (a.heads / a.first_heads)) * a.value_width;
    const int64_t to = seen(a, b, total);
    if (at < 0 || to < at || to - at > STRETCH) {
      at = to / STRETCH * STRETCH;
      const float* kept = p.running + ((b * a.kv_heads + p.kv_head(h)) * p.stretches() + at / STRETCH) * p.value_line;
      for (int64_t c = 0; c < p.value_line; c += LANES) store(sums + c, load(kept + c));
    }
    for (const T* values = new_values<T>(p, b, h); at < to; ++at)
      add(values + at * a.v_strides[2], static_cast<int>(a.value_width), sums);
    return sums;
  }
  static void add(const T* from, int width, float* sums) {
    int c = 0;
    for (; c + LANES <= width; c += LANES) store(sums + c, load(sums + c) + load(from + c));
    if (c < width) store(sums + c, load(sums + c) + load(from + c, width - c));
  }
};

// Sums of the values before each stretch of a (row, kv head), added to `first`.
template <class T>
void run_sums(const Problem& p, int64_t b, int64_t g) {
  const regard_pixel_attention_args& a = *p.args;
  float* to = p.running + (b * a.kv_heads + g) * p.stretches() * p.value_line;
  for (int64_t c = 0; c < p.value_line; ++c)
    to[c] = c < a.value_width ? a.first[(b * a.kv_heads + g) * a.value_width + c] : 0.f;
  const T* values = new_values<T>(p, b, g * (a.heads / a.kv_heads));
  for (int64_t stretch = 1; stretch < p.stretches(); ++stretch, to += p.value_line) {
    for (int64_t c = 0; c < p.value_line; c += LANES) store(to + p.value_line + c, load(to + c));
    for (int64_t i = (stretch - 1) * STRETCH; i < stretch * STRETCH; ++i)
      Means<T>::add(values + i * a.v_strides[2], static_cast<int>(a.value_width), to + p.value_line);
  }
}

template <class T>
void attend(const Problem& p, const Worker& worker, int64_t b, int64_t block) {
  const regard_pixel_attention_args& a = *p.args;
  const int64_t begin = block * QUERIES, end = least(begin + QUERIES, a.n);
  const int64_t of_query = a.heads * p.words;
  for (int64_t t = begin; t < end && a.chosen == nullptr; ++t)
    choose(p, worker, b, t, worker.kept + (t - begin) * of_query);
  for (int64_t h = 0; h < a.heads; ++h) {
    const T *keys = p.keys<T>(b, h), *values = p.values<T>(b, h);
    Means<T> means{p, b, h, worker.sums};
    for (int64_t t = begin; t < end; ++t) {
      const int64_t total = p.total(b, t), place = (b * a.heads + h) * a.n + t;
      const uint32_t* kept = a.chosen != nullptr ? a.chosen + place * p.words : worker.kept + (t - begin) * of_query + h * p.words;
      if (a.kept != nullptr)
        for (int64_t word = 0; word < p.words; ++word) a.kept[place * p.words + word] = kept[word];
      const int64_t count = collect(p, b, total, kept, worker.slots);
      float share = 0.f, *lse = a.lse == nullptr ? nullptr : a.lse + place;
      if (count > 0) {
        load_query<T>(p, worker, b, h, t);
        dots(keys, a.k_strides[2], worker.slots, count, worker.query, a.width, worker.scores);
        const float sum = weigh(worker, count, lse);
        weighted_sum(values, a.v_strides[2], worker.slots, count, worker.scores, a.value_width, worker.row);
        share = sum == 0.f ? 0.f : 1.f / sum;
      } else {
        for (int64_t c = 0; c < p.value_line; c += LANES) store(worker.row + c, zero());
        if (lse != nullptr) *lse = -infinity();
      }
      const Gates gates(a, place, total);
      share *= gates.row * gates.mix;
      const float* mean = gates.rest == 0.f ? worker.row : means.of(total);
      const float rest = gates.rest == 0.f ? 0.f : gates.rest * means.factor(total);
      T* to = static_cast<T*>(a.out) + b * a.out_strides[0] + h * a.out_strides[1] + t * a.out_strides[2];
      int64_t c = 0;
      for (; c + LANES <= a.value_width; c += LANES) {
        const Vec x = load(worker.row + c) * share;
        store(to + c, rest == 0.f ? x : fma(broadcast(rest), load(mean + c), x));
      }
      if (c < a.value_width) {
        const int tail = static_cast<int>(a.value_width - c);
        const Vec x = load(worker.row + c) * share;
        store(to + c, rest == 0.f ? x : fma(broadcast(rest), load(mean + c, tail), x), tail);
      }
    }
  }
}

// Floats for the running sums of all values, if `wanted` and queries have running means.
size_t running_floats(const Problem& p, bool wanted) {
  const regard_pixel_attention_args& a = *p.args;
  const bool runs = wanted && a.mix_logit != nullptr && a.before != nullptr;
  return runs ? static_cast<size_t>(a.batch * a.kv_heads * p.stretches() * p.value_line) : 0;
}

template <class T>
void run_all_sums(Problem& p, Workspace& space, size_t floats) {
  if (floats == 0) return;
  p.running = space.take<float>(floats);
  parallel_tasks(static_cast<int>(p.args->threads), p.args->batch * p.args->kv_heads,
                 [&](long task) { run_sums<T>(p, task / p.args->kv_heads, task % p.args->kv_heads); });
}

template <class T>
int run(const regard_pixel_attention_args& a) {
  Problem p(a);
  const int64_t tasks = a.batch * p.blocks(), parts = most<int64_t>(1, least(a.threads, tasks));
  const size_t sums = running_floats(p, true);
  Workspace space(Workspace::bytes_of<float>(sums) + static_cast<size_t>(parts) * Worker::bytes(p, false) +
                  Workspace::bytes_of<Worker>(static_cast<size_t>(parts)));
  if (!space) return REGARD_OUT_OF_MEMORY;
  run_all_sums<T>(p, space, sums);
  Worker* workers = space.take<Worker>(static_cast<size_t>(parts));
  for (int64_t part = 0; part < parts; ++part) workers[part] = Worker(space, p, false);
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      attend<T>(p, workers[part], task / p.blocks(), task % p.blocks());
    }
  });
  return REGARD_OK;
}

// --- backward

float dot(const float* x, const float* y, int64_t width) {
  Vec sums = zero();
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) sums = fma(load(x + c), load(y + c), sums);
  const int tail = static_cast<int>(width - c);
  if (tail > 0) sums = fma(load(x + c, tail), load(y + c, tail), sums);
  return sum(sums);
}

// Sums of the gradients of a (row, kv head); nullptr if not wanted.
struct Sums {
  float* keys;    // (m, line)
  float* values;  // (m, value_line)
  float* means;   // (lines, value_line): gradients of its heads' means; or of running means, line i from queries with i
                  // visible new values, for each of these values
};

// Gradients from block `block` of the queries of a head: those of the queries, and additions to those of keys and
// values. With weights p, d_j = dO . v_j and both gates: ds = row mix p (d - sum of p d).
template <class T>
void attend_backward(const Problem& p, const Worker& worker, const regard_pixel_attention_backward_args& args, int64_t b,
                     int64_t h, int64_t block, Means<T>& means, const Sums& to) {
  const regard_pixel_attention_args& a = *p.args;
  const T *keys = p.keys<T>(b, h), *values = p.values<T>(b, h);
  for (int64_t t = block * QUERIES; t < least((block + 1) * QUERIES, a.n); ++t) {
    const int64_t place = (b * a.heads + h) * a.n + t, total = p.total(b, t);
    const int64_t count = collect(p, b, total, a.kept + place * p.words, worker.slots);
    const Gates gates(a, place, total);
    const T* grad = static_cast<const T*>(args.grad_out) + b * args.grad_out_strides[0] + h * args.grad_out_strides[1] +
                    t * args.grad_out_strides[2];
    load_rows(grad, 0, 1, static_cast<int>(a.value_width), worker.row, p.value_line);
    float delta = 0.f;
    if (count > 0) {
      load_query<T>(p, worker, b, h, t);
      dots(keys, a.k_strides[2], worker.slots, count, worker.query, a.width, worker.scores);
      dots(values, a.v_strides[2], worker.slots, count, worker.row, a.value_width, worker.slopes);
      const float lse = a.lse[place], base = lse == -infinity() ? 0.f : lse;
      for (int64_t j = count; j < round_up(count, LANES); ++j) worker.scores[j] = -infinity(), worker.slopes[j] = 0.f;
      Vec products = zero();
      for (int64_t j = 0; j < count; j += LANES) {
        const Vec weights = exp(load(worker.scores + j) - base);
        store(worker.scores + j, weights);
        products = fma(weights, load(worker.slopes + j), products);
      }
      delta = sum(products);
      const Vec share = broadcast(gates.row * gates.mix);
      for (int64_t j = 0; j < count; j += LANES) {
        const Vec weights = share * load(worker.scores + j);
        store(worker.scores + j, weights);
        store(worker.slopes + j, weights * (load(worker.slopes + j) - delta));
      }
      if (to.values != nullptr) add_outer(to.values, p.value_line, worker.slots, count, worker.scores, worker.row);
      if (to.keys != nullptr) add_outer(to.keys, p.line, worker.slots, count, worker.slopes, worker.query);
    }
    if (args.grad_row_logit != nullptr)
      args.grad_row_logit[place] = gates.mix * gates.row * logistic(-a.row_logit[place]) * delta;
    if (args.grad_mix_logit != nullptr) {
      float slope = 0.f;
      if (gates.rest != 0.f)
        slope = gates.row * delta - means.factor(total) * dot(worker.row, means.of(total), a.value_width);
      args.grad_mix_logit[place] = gates.mix * gates.rest * slope;
    }
    if (to.means != nullptr && gates.rest != 0.f) {
      const int64_t own = h % (a.heads / a.kv_heads) / (a.heads / a.first_heads);
      const int64_t at = a.before == nullptr ? own : Means<T>::seen(a, b, total);
      const float factor = a.before == nullptr ? gates.rest : gates.rest / static_cast<float>(total);
      float* line = to.means + at * p.value_line;
      for (int64_t c = 0; c < p.value_line; c += LANES)
        store(line + c, fma(broadcast(factor), load(worker.row + c), load(line + c)));
    }
    if (args.grad_q == nullptr) continue;
    weighted_sum(keys, a.k_strides[2], worker.slots, count, worker.slopes, a.width, worker.grad_q);
    for (int64_t c = 0; c < p.line; c += LANES) store(worker.grad_q + c, load(worker.grad_q + c) * a.scale);
    store_rows(static_cast<T*>(args.grad_q) + b * args.grad_q_strides[0] + h * args.grad_q_strides[1] +
                   t * args.grad_q_strides[2],
               0, 1, static_cast<int>(a.width), worker.grad_q, p.line);
  }
}

// Gradients of new values through running means: each value is in the means of all queries that see it.
void spread_means(const Problem& p, const Sums& sums) {
  const regard_pixel_attention_args& a = *p.args;
  for (int64_t i = a.count; i > 0; --i) {
    const float* line = sums.means + i * p.value_line;
    float *before = sums.means + (i - 1) * p.value_line,
          *value = sums.values == nullptr ? nullptr : sums.values + (a.m - a.count + i - 1) * p.value_line;
    for (int64_t c = 0; c < p.value_line; c += LANES) {
      store(before + c, load(before + c) + load(line + c));
      if (value != nullptr) store(value + c, load(value + c) + load(line + c));
    }
  }
}

// A task computes the gradients of one (row, kv head) or, if there are fewer of these than threads, of a share of its
// queries; the shares are added at the end.
template <class T>
int run_backward(const regard_pixel_attention_backward_args& args) {
  const regard_pixel_attention_args& a = *args.forward;
  Problem p(a);
  const int64_t pairs = a.batch * a.kv_heads, shared = a.heads / a.kv_heads, threads = most<int64_t>(1, a.threads);
  const int64_t shares = pairs >= threads ? 1 : ceil_div(threads, pairs), tasks = pairs * shares;
  const int64_t parts = least(threads, tasks);
  const bool running = a.before != nullptr;
  const bool of_means = args.grad_first != nullptr || (a.mix_logit != nullptr && running && args.grad_v != nullptr);
  const int64_t own = of_means && !running ? a.first_heads / a.kv_heads : 1;
  const int64_t key_floats = args.grad_k == nullptr ? 0 : a.m * p.line;
  const int64_t value_floats = args.grad_v == nullptr ? 0 : a.m * p.value_line;
  const int64_t mean_floats = of_means ? (running ? a.count + 1 : own) * p.value_line : 0;
  const int64_t floats = key_floats + value_floats + mean_floats, buffers = shares == 1 ? parts : tasks;
  const size_t runs = running_floats(p, args.grad_mix_logit != nullptr);
  Workspace space(Workspace::bytes_of<float>(static_cast<size_t>(floats * buffers)) + Workspace::bytes_of<float>(runs) +
                  static_cast<size_t>(parts) * Worker::bytes(p, true) +
                  Workspace::bytes_of<Worker>(static_cast<size_t>(parts)));
  if (!space) return REGARD_OUT_OF_MEMORY;
  float* buffer = space.take<float>(static_cast<size_t>(floats * buffers));
  run_all_sums<T>(p, space, runs);
  Worker* workers = space.take<Worker>(static_cast<size_t>(parts));
  for (int64_t part = 0; part < parts; ++part) workers[part] = Worker(space, p, true);
  const auto sums_at = [&](int64_t at) {
    float* from = buffer + at * floats;
    return Sums{key_floats == 0 ? nullptr : from, value_floats == 0 ? nullptr : from + key_floats,
                mean_floats == 0 ? nullptr : from + key_floats + value_floats};
  };
  const auto put = [&](int64_t pair, const Sums& sums) {
    const int64_t b = pair / a.kv_heads, g = pair % a.kv_heads;
    const auto store_part = [&](void* data, const int64_t* strides, int64_t width, const float* lines, int64_t line) {
      if (data != nullptr)
        store_rows(static_cast<T*>(data) + b * strides[0] + g * strides[1], strides[2], static_cast<int>(a.m),
                   static_cast<int>(width), lines, line);
    };
    if (sums.means != nullptr && running) spread_means(p, sums);
    store_part(args.grad_k, args.grad_k_strides, a.width, sums.keys, p.line);
    store_part(args.grad_v, args.grad_v_strides, a.value_width, sums.values, p.value_line);
    if (args.grad_first != nullptr)
      store_rows(args.grad_first + (b * a.kv_heads + g) * own * a.value_width, a.value_width, static_cast<int>(own),
                 static_cast<int>(a.value_width), sums.means, p.value_line);
  };
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      const int64_t pair = task / shares, share = task % shares, b = pair / a.kv_heads, g = pair % a.kv_heads;
      const int64_t at = shares == 1 ? part : task;
      for (int64_t i = 0; i < floats; i += LANES) store(buffer + at * floats + i, zero());
      const Sums sums = sums_at(at);
      for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
        Means<T> means{p, b, h, workers[part].sums};
        for (int64_t block = share; block < p.blocks(); block += shares)
          attend_backward<T>(p, workers[part], args, b, h, block, means, sums);
      }
      if (shares == 1) put(pair, sums);
    }
  });
  if (shares == 1 || floats == 0) return REGARD_OK;
  parallel_tasks(static_cast<int>(threads), pairs, [&](long pair) {
    float* total = buffer + pair * shares * floats;
    for (int64_t share = 1; share < shares; ++share)
      for (int64_t i = 0; i < floats; i += LANES)
        store(total + i, load(total + i) + load(total + share * floats + i));
    put(pair, sums_at(pair * shares));
  });
  return REGARD_OK;
}

bool valid(const regard_pixel_attention_args& a) {
  const bool heads = a.kv_heads >= 1 && a.heads % a.kv_heads == 0;
  const bool means = a.mix_logit == nullptr ||
                     (heads && a.first != nullptr && a.first_heads >= 1 && a.heads % a.first_heads == 0 &&
                      a.first_heads % a.kv_heads == 0 && (a.before == nullptr || a.first_heads == a.kv_heads));
  return heads && means && a.width >= 1 && a.value_width >= 1 && a.pixels >= 1 && a.top_k > 0 && a.oversample >= 1;
}

}  // namespace

int pixel_attention(const regard_pixel_attention_args* args) {
  if (!valid(*args)) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->heads * args->n == 0) return REGARD_OK;
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : run<float>(*args);
}

int pixel_attention_backward(const regard_pixel_attention_backward_args* args) {
  const regard_pixel_attention_args& a = *args->forward;
  const bool mixed = a.mix_logit != nullptr || (args->grad_mix_logit == nullptr && args->grad_first == nullptr);
  const bool gated = a.row_logit != nullptr || args->grad_row_logit == nullptr;
  if (!valid(a) || (a.n > 0 && !(mixed && gated))) return REGARD_BAD_ARGUMENT;
  if (args->grad_first != nullptr && (a.first_heads < 1 || a.first_heads % a.kv_heads != 0)) return REGARD_BAD_ARGUMENT;
  if (a.batch * a.heads == 0) return REGARD_OK;
  return a.dtype == REGARD_BFLOAT16 ? run_backward<bfloat16>(*args) : run_backward<float>(*args);
}

}  // namespace REGARD_ISA
