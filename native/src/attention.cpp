// Blocked attention, forward.
//
// A block of up to 48 queries visits the keys in steps of 64. Scores are computed transposed, a few keys by all queries
// of the block, with queries in the lanes of vectors. Then a query's data (its reference, its sum, the ranks that it
// sees) is in one lane, softmax needs no sums across lanes, keys are read in place, and the weights have the layout
// that the second product needs. Softmax is computed relative to a reference score for each query, which moves only
// when a score exceeds it by more than `HEADROOM`, since any reference cancels. Clipped softmax visits the keys twice:
// for the sums of its queries, and then, with fixed references and sums, for the weights.
//
// With bfloat16 instructions (`PAIRED`), which multiply two adjacent pairs and add both products to a float32 sum, both
// products use them: scores on pairs of features, as they are in memory, and values on pairs of keys, after values have
// been interleaved once and weights rounded to bfloat16. Everything between the products is float32.

#include "regard_attention.h"

#include "vector.h"

#include "attention_pairs.h"
#include "parallel.h"
#include "product.h"
#include "workspace.h"

#if defined(__AVX512BF16__)
namespace isa_avx512 {
int attention(const regard_attention_args*);
}
#endif

namespace REGARD_ISA {
namespace {

// The type that products multiply, and how many of them go into an accumulator at once.
#if defined(__AVX512BF16__)
typedef bfloat16 Number;
constexpr int PAIR = 2;
#else
typedef float Number;
constexpr int PAIR = 1;
#endif
constexpr bool PAIRED = PAIR == 2;

constexpr int QUERIES = 48;  // in a block; a multiple of LANES, VECTORS * LANES and TILE_ROWS for every instruction set
constexpr int STEP = Pairs::STEP;

// Numbers of keys and of vectors of queries whose scores are in registers at once.
#if defined(__AVX512F__)
constexpr int KEYS = 8, VECTORS = 3;
#elif defined(__AVX__)
constexpr int KEYS = 4, VECTORS = 3;
#else
constexpr int KEYS = REGISTERS >= 32 ? 8 : 4, VECTORS = REGISTERS >= 32 ? 3 : 2;
#endif
static_assert(QUERIES % (LANES * VECTORS) == 0 && QUERIES % TILE_ROWS == 0 && STEP % KEYS == 0, "blocks fit");

// How far a score may exceed the reference before the reference moves: sums of 2^24 weights of e^20, multiplied by
// values up to 2^70, stay finite.
constexpr float HEADROOM = 20.f;
constexpr int TABLE_PADDING = 3 * STEP;  // zeros before and after a table of distances
// With fewer keys the rounding of weights would be visible in the output, so weights are rounded to the sum of two
// bfloat16 numbers. So are the weights of rules other than softmax, where no division by a sum cancels the mean
// rounding error.
constexpr int FEW_KEYS = 128;
constexpr int BLOCKED = 32;  // visibility blocks of at least so many ranks determine where blocks of queries begin

REGARD_INLINE float infinity() { return __builtin_inff(); }

// 2^x for weights, for any x; as accurate as exp2 over the whole range of x.
REGARD_INLINE Vec power(Vec x) {
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

REGARD_INLINE bool any(IntVec mask) {
#if defined(__AVX512F__)
  const __m512i bits = reinterpret_cast<__m512i>(mask);
  return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= mask[i];
  return all != 0;
#endif
}
REGARD_INLINE IntVec compare(Vec a, Vec b) { return reinterpret_cast<IntVec>(a > b); }
REGARD_INLINE IntVec load(const int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
REGARD_INLINE IntVec broadcast_int(int32_t x) { return IntVec{} + x; }

// Broadcasts the number at p, or the pair, to every lane.
REGARD_INLINE Vec broadcast_numbers(const Number* p) {
  float bits;
  __builtin_memcpy(&bits, p, sizeof bits);
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_set1_ps(bits));
#else
  return broadcast(bits);
#endif
}

// c + the products of a and b.
REGARD_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a),
                                                reinterpret_cast<__m512bh>(b)));
#else
  return fma(a, b, c);
#endif
}

// Interleaves a and b to a0 b0 a1 b1 ..., and returns both halves.
REGARD_INLINE void interleave(Vec a, Vec b, Vec* low, Vec* high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
  *low = reinterpret_cast<Vec>(_mm512_permutex2var_ps(x, first, y));
  *high = reinterpret_cast<Vec>(_mm512_permutex2var_ps(x, second, y));
#elif defined(__AVX__)
  const __m256 x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
  const __m256 even = _mm256_unpacklo_ps(x, y), odd = _mm256_unpackhi_ps(x, y);
  *low = reinterpret_cast<Vec>(_mm256_permute2f128_ps(even, odd, 0x20));
  *high = reinterpret_cast<Vec>(_mm256_permute2f128_ps(even, odd, 0x31));
#elif defined(__SSE2__)
  *low = reinterpret_cast<Vec>(_mm_unpacklo_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
  *high = reinterpret_cast<Vec>(_mm_unpackhi_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  for (int i = 0; i < LANES / 2; ++i) {
    (*low)[2 * i] = a[i], (*low)[2 * i + 1] = b[i];
    (*high)[2 * i] = a[LANES / 2 + i], (*high)[2 * i + 1] = b[LANES / 2 + i];
  }
#endif
}

// to (columns x QUERIES) = lines (rows x columns) transposed; rows beyond `rows` are zeros. line(i, j, count) returns
// `count` 32-bit numbers of row i from column j on.
template <class Line>
REGARD_INLINE void transpose_lines(int rows, int columns, Line line, float* to) {
  for (int i = 0; i < QUERIES; i += LANES) {
    if (i >= round_up(rows, LANES)) break;
    for (int j = 0; j < columns; j += LANES) {
      const int count = least(LANES, columns - j);
      Vec lines[LANES], turned[LANES];
#pragma GCC unroll 16
      for (int r = 0; r < LANES; ++r)
        lines[r] = i + r >= rows ? zero() : line(i + r, j, count);
      // each round moves one bit of the row's number into the lane's
#pragma GCC unroll 4
      for (int half = LANES; half > 1; half /= 2) {
#pragma GCC unroll 8
        for (int r = 0; r < LANES / 2; ++r)
          interleave(lines[r], lines[r + LANES / 2], &turned[2 * r], &turned[2 * r + 1]);
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) lines[r] = turned[r];
      }
      if (count == LANES) {
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r) store(to + (j + r) * QUERIES + i, lines[r]);
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < LANES; ++r)
          if (r < count) store(to + (j + r) * QUERIES + i, lines[r]);
      }
    }
  }
}

template <class T>
inline void transpose_scaled(int rows, int columns, const T* from, int64_t ldf, float scale, float* to) {
  const auto line = [=](int i, int j, int count) {
    const T* at = from + i * ldf + j;
    return (count == LANES ? load(at) : load(at, count)) * scale;
  };
  transpose_lines(rows, columns, line, to);
}

#if defined(__AVX512BF16__)
// to (pairs of columns x QUERIES) = pairs of from (rows x columns) transposed, negated if `negative`.
inline void transpose_pairs(int rows, int columns, const bfloat16* from, int64_t ldf, bool negative, float* to) {
  const __m512i signs = _mm512_set1_epi16(static_cast<short>(negative ? 0x8000 : 0));
  const auto line = [=](int i, int j, int) {
    const int count = least(2 * LANES, columns - 2 * j);
    const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return reinterpret_cast<Vec>(_mm512_xor_si512(_mm512_maskz_loadu_epi16(there, from + i * ldf + 2 * j), signs));
  };
  transpose_lines(rows, (columns + 1) / 2, line, to);
}

// a and b rounded to pairs of bfloat16, with a first.
REGARD_INLINE Vec round_pairs(Vec a, Vec b) {
  alignas(64) static constexpr uint16_t ORDER[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh rounded = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a));
  return reinterpret_cast<Vec>(
      _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), reinterpret_cast<__m512i>(rounded)));
}
#endif

// Numbers for the queries of a block, one per lane.
struct Lanes {
  float limit[QUERIES];      // limit of a score minus the reference; -inf before the first visible key
  float start[QUERIES];      // added to scores: the bias by query minus the reference, or plus the shift
  float bias[QUERIES];       // bias by query
  float sums[QUERIES];       // sums of weights
  float step_sums[QUERIES];  // sums of this step's weights
  float rounded[QUERIES];    // sums of weights as rounded for products
  float stretch[QUERIES];    // clipped softmax: (high - low) / sum; 0 if no key is visible
  int32_t low[QUERIES], high[QUERIES];  // range of visible ranks
  int32_t block[QUERIES];               // row of the block mask
  int32_t column[QUERIES];              // whether the mask's block in the current column is visible
};

// The data of one row of the batch.
struct Row {
  Pairs pairs;
  int32_t* before;  // (steps,) highest rank up to a step
  int32_t* after;   // (steps,) lowest rank from a step on
  int32_t* starts;  // (blocks + 1,) first query of each block
  int64_t blocks;
  bool counting;  // whether query ranks are consecutive
};

// A call, prepared once.
struct Problem {
  const regard_attention_args* args;
  Row* rows;
  bool one_row;  // whether all rows of the batch share their ranks
  int64_t most_blocks;
  float factor;                // factor of products of queries and keys; included in the queries unless PAIRED
  bool negative;               // whether PAIRED queries are negated, so that `factor` is positive
  int64_t key_line;            // numbers in a packed key
  int64_t value_line;          // numbers in a packed value
  const float* distances;      // (H|1, distance_line) from the last distance to the first, between zeros
  int64_t distance_line;
  float unit;  // of scores: -log2(e) for sigmoid; 1 for softmax, where rounding large scores to another unit would show
  bool softcap, pair_bias;

  const Row& row(int64_t b) const { return rows[one_row ? 0 : b]; }
};

// The block of queries that a thread is processing, and the thread's memory.
struct Block {
  const Problem* problem;
  const Row* row;
  Pairs pairs;
  int64_t b, h, begin;
  int count, vectors;  // queries, and vectors that hold them
  Lanes* lanes;
  float* queries;  // (width, QUERIES) scaled, or pairs (width / 2, QUERIES)
  float* weights;  // (STEP, QUERIES)
  float* pairs_of_weights;  // (2, STEP / 2, QUERIES) rounded weights, and the rounding residuals
  bool exact;               // whether products use both
  float* output;   // (QUERIES, output_line)
  int64_t output_line;
  float* added;  // (STEP, QUERIES) biases by pair
  Number* tail;  // (KEYS, key_line) the last keys, padded
  bool summing;  // whether only sums of softmax weights are wanted
  int step_begin;  // first row of weights that this step wrote
  // extremes of `low` and `high`, also for each vector
  int32_t least_low, most_low, least_high, most_high;
  int32_t vector_low[QUERIES / LANES], vector_high[QUERIES / LANES];
};

// Whether weights are those of a softmax whose reference may move.
inline bool running(const Block& block) { return block.summing || block.problem->args->rule == REGARD_SOFTMAX; }

enum class Finish { RAW, SOFTMAX, SIGMOID, CLIPPED };

// Pairwise biases of one step: those of its key i and the block's queries begin at first + i * line.
struct Added {
  const float* first;
  int64_t line;
};

void move_reference(Block& block, float* weights, int c, int vectors);

// The score from the product of a query and a key, plus a number.
REGARD_INLINE Vec score(Vec x, Vec factor, Vec added) { return PAIRED ? fma(x, factor, added) : x + added; }

// The clipped weight of a score minus the reference.
REGARD_INLINE Vec clipped(Vec x, Vec stretch, Vec low) {
  return minimum(broadcast(1.f), maximum(zero(), fma(power(x * LOG2_E), stretch, low)));
}

// A score with its bias; the bias and the reference may be large and cancel. A bias of -inf hides the pair.
REGARD_INLINE Vec biased_score(Vec x, Vec added, Vec unit, Vec start, Vec hidden) {
  x += fma(added, unit, start);
  return select(reinterpret_cast<IntVec>(added == -infinity()), hidden, x);
}

// Scores of KEYS keys with VECS vectors of queries from vector c on; then their weights, unless RAW.
template <int VECS, Finish FINISH, bool BIASED>
__attribute__((noinline)) void scores(Block& block, const Number* k, int64_t ldk, int c, Added added,
                                      float* weights) {
  const float* q = block.queries + c * LANES;
  const int64_t width = ceil_div(block.problem->args->width, PAIR);
  Vec sums[KEYS][VECS];
#pragma GCC unroll 8
  for (int j = 0; j < VECS; ++j) {
    const Vec first = FINISH == Finish::SIGMOID && !BIASED && !PAIRED ? load(block.lanes->start + (c + j) * LANES) : zero();
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i) sums[i][j] = first;
  }
  for (int64_t p = 0; p < width; ++p) {
    Vec line[VECS];
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) line[j] = load(q + p * QUERIES + j * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i) {
      const Vec x = broadcast_numbers(k + i * ldk + p * PAIR);
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sums[i][j] = multiply_add(x, line[j], sums[i][j]);
    }
  }
  float* to = weights + c * LANES;
  const Vec factor = broadcast(block.problem->factor);
  if (PAIRED && (BIASED || FINISH == Finish::RAW)) {
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sums[i][j] *= factor;
  }
  if (BIASED) {
    const Vec unit = broadcast(FINISH == Finish::SIGMOID ? -LOG2_E : 1.f);
    const Vec hidden = broadcast(FINISH == Finish::SIGMOID ? infinity() : -infinity());
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      const Vec first = load(block.lanes->start + (c + j) * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; ++i)
        sums[i][j] =
            biased_score(sums[i][j], load(added.first + i * added.line + (c + j) * LANES), unit, first, hidden);
    }
  }
  if (FINISH == Finish::SOFTMAX) {
    IntVec over{};
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      const Vec start = BIASED ? zero() : load(block.lanes->start + (c + j) * LANES);
      Vec top = sums[0][j];
#pragma GCC unroll 8
      for (int i = 1; i < KEYS; ++i) top = maximum(top, sums[i][j]);
      over |= compare(BIASED ? top : score(top, factor, start), load(block.lanes->limit + (c + j) * LANES));
    }
    if (__builtin_expect(any(over), 0)) {
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECS; ++j) {
          Vec start = BIASED ? load(block.lanes->start + (c + j) * LANES) : zero();
          if (BIASED) start = select(reinterpret_cast<IntVec>(start == -infinity()), zero(), start);
          store(to + i * QUERIES + j * LANES, BIASED ? sums[i][j] - start : score(sums[i][j], factor, zero()));
        }
      move_reference(block, weights, c, VECS);
      return;
    }
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      const Vec start = BIASED ? zero() : load(block.lanes->start + (c + j) * LANES);
      Vec total = load(block.lanes->step_sums + (c + j) * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < KEYS; ++i) {
        const Vec w = power((BIASED ? sums[i][j] : score(sums[i][j], factor, start)) * LOG2_E);
        total += w;
        store(to + i * QUERIES + j * LANES, w);
      }
      store(block.lanes->step_sums + (c + j) * LANES, total);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      Vec w = sums[i][j];
      if (PAIRED && FINISH == Finish::SIGMOID && !BIASED)
        w = score(w, factor, load(block.lanes->start + (c + j) * LANES));
      if (FINISH == Finish::CLIPPED && !BIASED) w = score(w, factor, load(block.lanes->start + (c + j) * LANES));
      if (FINISH == Finish::CLIPPED)
        w = clipped(w, load(block.lanes->stretch + (c + j) * LANES), broadcast(block.problem->args->low));
      if (FINISH == Finish::SIGMOID) w = reciprocal_or_zero(1.f + power(w));
      store(to + i * QUERIES + j * LANES, w);
    }
}

template <Finish FINISH, bool BIASED>
inline void scores_from(Block& block, const Number* k, int64_t ldk, int c, int end, Added added, float* weights) {
  for (; c + VECTORS <= end; c += VECTORS) scores<VECTORS, FINISH, BIASED>(block, k, ldk, c, added, weights);
  if (VECTORS > 2 && c + 2 <= end) scores<2, FINISH, BIASED>(block, k, ldk, c, added, weights), c += 2;
  for (; c < end; ++c) scores<1, FINISH, BIASED>(block, k, ldk, c, added, weights);
}

// Softmax weights from scores in `weights` (KEYS rows, `vectors` vectors from c on) when the reference may move:
// results relative to the old reference are rescaled to the new one.
__attribute__((noinline)) void move_reference(Block& block, float* weights, int c, int vectors) {
  Lanes& lanes = *block.lanes;
  for (; vectors > 0; --vectors, ++c) {
    float* to = weights + c * LANES;
    const Vec limit = load(lanes.limit + c * LANES);
    Vec start = load(lanes.start + c * LANES);
    Vec top = load(to);
    for (int i = 1; i < KEYS; ++i) top = maximum(top, load(to + i * QUERIES));
    const IntVec over = compare(top + start, limit);
    if (any(over)) {
      const IntVec seen = compare(limit, broadcast(-infinity()));
      const Vec factor = select(over & seen, power((-top - start) * LOG2_E), broadcast(1.f));
      start = select(over, -top, start);
      store(lanes.start + c * LANES, start);
      store(lanes.limit + c * LANES, select(over, broadcast(HEADROOM), limit));
      if (any(over & seen)) {
        store(lanes.sums + c * LANES, load(lanes.sums + c * LANES) * factor);
        store(lanes.step_sums + c * LANES, load(lanes.step_sums + c * LANES) * factor);
        if (PAIRED) store(lanes.rounded + c * LANES, load(lanes.rounded + c * LANES) * factor);
        for (float* w = block.weights + block.step_begin * QUERIES + c * LANES; w < to; w += QUERIES)
          store(w, load(w) * factor);
        for (int i = 0; i < LANES; ++i)
          if (factor[i] != 1.f) {
            float* line = block.output + (c * LANES + i) * block.output_line;
            for (int64_t p = 0; p < block.output_line; p += LANES) store(line + p, load(line + p) * factor[i]);
          }
      }
    }
    Vec total = load(lanes.step_sums + c * LANES);
    for (int i = 0; i < KEYS; ++i) {
      const Vec w = power((load(to + i * QUERIES) + start) * LOG2_E);
      total += w;
      store(to + i * QUERIES, w);
    }
    store(lanes.step_sums + c * LANES, total);
  }
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

// Biases of the block's queries and keys [from, to) of one step.
Added add_biases(Block& block, int64_t first, int from, int to, bool counting) {
  const Problem& problem = *block.problem;
  const regard_score_biases& biases = problem.args->biases;
  const int lanes = block.vectors * LANES;
  const int64_t last = biases.distances - 1;
  const float* table = nullptr;
  if (biases.distance != nullptr)
    table = problem.distances + (biases.distance_stride == 0 ? 0 : block.h) * problem.distance_line +
            TABLE_PADDING;
  // distances decrease by one from lane to lane, while the table begins with the last distance: its indices increase
  const auto place = [&](int j) {
    const int64_t distance = static_cast<int64_t>(block.pairs.keys[first + j]) - block.pairs.queries[block.begin];
    return last - (distance + biases.distance_zero);
  };
  const Added staged{block.added, QUERIES};
  if (problem.pair_bias) {
    const int64_t* strides = biases.bias_strides;
    const float* bias =
        biases.bias + block.b * strides[0] + block.h * strides[1] + block.begin * strides[2] + first * strides[3];
    if (strides[2] == 0) {
      for (int j = from; j < to; ++j) {
        const Vec x = broadcast(bias[j * strides[3]]);
        for (int c = 0; c < lanes; c += LANES) store(block.added + j * QUERIES + c, x);
      }
    } else if (strides[3] == 1) {
      transpose_scaled(block.count, to - from, bias + from, strides[2], 1.f, block.added + from * QUERIES);
    } else {
      for (int j = from; j < to; ++j)
        for (int i = 0; i < lanes; ++i)
          block.added[j * QUERIES + i] = i < block.count ? bias[i * strides[2] + j * strides[3]] : 0.f;
    }
    if (table == nullptr) return staged;
  } else {
    if (block.row->counting && counting) {
      const int64_t at = place(0);
      // hidden pairs at the edges of tiles read the table's padding
      if (at - to >= -TABLE_PADDING && at - from + QUERIES <= last + TABLE_PADDING) return Added{table + at, -1};
    }
    for (int j = from; j < to; ++j)
      for (int c = 0; c < lanes; c += LANES) store(block.added + j * QUERIES + c, zero());
  }
  for (int j = from; j < to; ++j) {
    float* line = block.added + j * QUERIES;
    const int64_t at = place(j);
    if (block.row->counting) {
      // the distance of a visible pair is in the table
      const float* here = table + least(most(at, static_cast<int64_t>(-QUERIES)), last + 1);
      for (int c = 0; c < lanes; c += LANES) store(line + c, load(line + c) + load(here + c));
    } else {
      for (int i = 0; i < block.count; ++i) {
        const int64_t mine = at + block.pairs.queries[block.begin + i] - block.pairs.queries[block.begin];
        line[i] += table[least(most(mine, static_cast<int64_t>(0)), last)];
      }
    }
  }
  return staged;
}

// Applies softcap, biases and visibility to KEYS rows of scores, of which `rows` are keys, and computes their weights.
__attribute__((noinline)) void finish_scores(Block& block, float* weights, int64_t key, int rows, int c, int end,
                                             bool masked, bool biased, Added biases) {
  const Problem& problem = *block.problem;
  const regard_attention_args& args = *problem.args;
  Lanes& lanes = *block.lanes;
  const bool softmax = running(block), sigmoid = args.rule == REGARD_SIGMOID;
  const Vec hidden = broadcast(sigmoid ? infinity() : -infinity());
  const float cap = args.softcap * problem.unit;
  int64_t column = -1;
  for (int i = 0; i < KEYS; ++i) {
    const bool there = i < rows;
    const int32_t rank = there ? block.pairs.keys[key + i] : Pairs::ABSENT;
    if (masked && there && block.pairs.blocks != nullptr && rank >= 0) {
      const int64_t here = rank / block.pairs.rule->block_size;
      if (here != column) {
        column = here;
        for (int q = 0; q < block.count; ++q)
          lanes.column[q] = block.pairs.block(lanes.block[q], static_cast<int32_t>(here)) ? -1 : 0;
      }
    }
    for (int v = c; v < end; ++v) {
      float* at = weights + i * QUERIES + v * LANES;
      if (!there) {
        store(at, hidden);
        continue;
      }
      Vec x = load(at);
      if (problem.softcap) x = tanh_of(x) * cap;
      const Vec start = softmax ? zero() : load(lanes.start + v * LANES);
      if (biased)
        x = biased_score(x, load(biases.first + i * biases.line + v * LANES), broadcast(problem.unit), start, hidden);
      else
        x += start;
      if (masked) {
        IntVec seen = (broadcast_int(rank) >= load(lanes.low + v * LANES)) &
                      (broadcast_int(rank) <= load(lanes.high + v * LANES));
        if (block.pairs.blocks != nullptr) seen &= load(lanes.column + v * LANES);
        x = select(seen, x, hidden);
      }
      store(at, x);
    }
  }
  if (softmax) {
    move_reference(block, weights, c, end - c);
    return;
  }
  const bool squared = args.rule == REGARD_RELU_SQUARED;
  for (int i = 0; i < KEYS; ++i)
    for (int v = c; v < end; ++v) {
      float* at = weights + i * QUERIES + v * LANES;
      Vec x = load(at);
      if (args.rule == REGARD_CLIPPED) {
        x = clipped(x, load(lanes.stretch + v * LANES), broadcast(args.low));
      } else if (sigmoid) {
        x = select(reinterpret_cast<IntVec>(x == hidden), zero(), reciprocal_or_zero(1.f + power(x)));
      } else {
        x = maximum(zero(), x);
        if (squared) x *= x;
      }
      store(at, x);
    }
}

#if defined(__AVX512BF16__)
// Rounds the weights of keys [from, to) for the product with values, and sums them. Rows up to a multiple of KEYS
// exist.
__attribute__((noinline)) void round_weights(Block& block, int from, int to) {
  Lanes& lanes = *block.lanes;
  const auto left = [](Vec x, IntVec rounded) {
    const Vec rest = x - reinterpret_cast<Vec>(rounded);
    return select(reinterpret_cast<IntVec>(rest == rest), rest, zero());  // infinity and NaN have no residual
  };
  const Vec ones = reinterpret_cast<Vec>(broadcast_int(0x3f803f80));
  for (int c = 0; c < block.vectors * LANES; c += LANES) {
    const float* weights = block.weights + c;
    float* pairs = block.pairs_of_weights + c;
    Vec rounded = load(lanes.rounded + c);
    for (int j = from; j < to; j += 2) {
      const Vec a = load(weights + j * QUERIES), b = load(weights + (j + 1) * QUERIES);
      const Vec pair = round_pairs(a, b);
      store(pairs + j / 2 * QUERIES, pair);
      rounded = multiply_add(pair, ones, rounded);
      if (block.exact) {
        const IntVec bits = reinterpret_cast<IntVec>(pair);
        const Vec rest = round_pairs(left(a, bits << 16), left(b, bits & -65536));
        store(pairs + (STEP + j) / 2 * QUERIES, rest);
        rounded = multiply_add(rest, ones, rounded);
      }
    }
    store(lanes.rounded + c, rounded);
  }
}

// C (ROWS x VECS vectors) += A B for `pairs` pairs of keys: a pair of A's row i at a[i + p * QUERIES].
template <int ROWS, int VECS>
REGARD_INLINE void pair_tile(int pairs, const float* a, const Number* b, int64_t ldb, float* c, int64_t ldc) {
  Vec sums[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) sums[i][j] = zero();
  for (int p = 0; p < pairs; ++p) {
    Vec row[VECS];
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) row[j] = reinterpret_cast<Vec>(_mm512_loadu_ps(b + p * ldb + 2 * j * LANES));
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = reinterpret_cast<Vec>(_mm512_set1_ps(a[i + p * QUERIES]));
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sums[i][j] = multiply_add(x, row[j], sums[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) {
      float* to = c + i * ldc + j * LANES;
      store(to, load(to) + sums[i][j]);
    }
}
#endif

// Adds weights times values of keys [ranges of each TILE_ROWS queries] to VECS vectors of the output.
template <int VECS>
inline void add_values(Block& block, const int (*ranges)[2], const Number* v, int64_t ldv, int column, int tail) {
  for (int i = 0, group = 0; i < block.count; i += TILE_ROWS, ++group) {
    const int from = ranges[group][0], keys = ranges[group][1] - from, rest = block.count - i;
    if (keys <= 0) continue;
    float* output = block.output + i * block.output_line + column;
    const int64_t line = block.output_line;
    const bool whole = rest > 4 || rest >= TILE_ROWS;
#if defined(__AVX512BF16__)
    static_cast<void>(tail);  // packed values are full vectors
    const int first = from / 2, pairs = (from + keys + 1) / 2 - first;
    const Number* values = v + first * ldv + 2 * column;
    for (int part = 0; part <= static_cast<int>(block.exact); ++part) {
      const float* weights = block.pairs_of_weights + (part * (STEP / 2) + first) * QUERIES + i;
      if (whole) {
        pair_tile<TILE_ROWS, VECS>(pairs, weights, values, ldv, output, line);
      } else {
        for (int r = 0; r < rest; r += 2)
          pair_tile<2, VECS>(pairs, weights + r, values, ldv, output + r * line, line);
      }
    }
#else
    const float* weights = block.weights + from * QUERIES + i;
    const float* values = v + from * ldv + column;
    if (whole) {
      product_tile<TILE_ROWS, VECS, Into::SUM>(keys, weights, 1, QUERIES, values, ldv, output, line, tail);
    } else {
      for (int r = 0; r < rest; r += 2)
        product_tile<2, VECS, Into::SUM>(keys, weights + r, 1, QUERIES, values, ldv, output + r * line, line, tail);
    }
#endif
  }
}

__attribute__((noinline)) void add_values(Block& block, const int (*ranges)[2], const Number* v, int64_t ldv,
                                          int width) {
  int j = 0;
  for (; j + TILE_VECTORS * LANES <= width; j += TILE_VECTORS * LANES)
    add_values<TILE_VECTORS>(block, ranges, v, ldv, j, LANES);
  for (; j + 2 * LANES <= width; j += 2 * LANES) add_values<2>(block, ranges, v, ldv, j, LANES);
  for (; j < width; j += LANES) add_values<1>(block, ranges, v, ldv, j, least(LANES, width - j));
}

// Keys and values of one kv head, packed or in place. PAIRED values are packed: line j / 2 interleaves those of keys j
// and j + 1.
struct Memory {
  const Number *k, *v;
  int64_t k_line, v_line;
  int v_width;  // numbers of a value that may be read as full vectors
};

// Attention of a block's queries to the keys of one step.
void attend_step(Block& block, const Memory& memory, int64_t step) {
  const Problem& problem = *block.problem;
  const regard_attention_args& args = *problem.args;
  const Pairs& pairs = block.pairs;
  const int64_t first = step * STEP;
  const int count = static_cast<int>(least(args.m - first, static_cast<int64_t>(STEP)));
  const int32_t low = pairs.lowest[step], high = pairs.highest[step];
  if (high < block.least_low || low > block.most_high) return;
  const bool counting = !pairs.gaps[step];
  bool all = true;  // whether all of the mask's blocks are visible
  int from = 0, to = count;
  if (counting) {
    from = most(from, block.least_low - low);
    to = static_cast<int>(least(static_cast<int64_t>(to), static_cast<int64_t>(block.most_high) - low + 1));
  }
  if (pairs.blocks != nullptr) {
    const int32_t size = static_cast<int32_t>(pairs.rule->block_size);
    const int32_t last = high / size;
    int32_t begin = INT32_MAX, end = -1;
    for (int32_t column = low / size; column <= last; ++column) {
      bool some = false;
      int32_t before = -1;
      for (int i = 0; i < block.count; ++i) {
        const int32_t line = block.lanes->block[i];
        if (line == before && i > 0) continue;
        before = line;
        const bool visible = pairs.block(line, column);
        some = some || visible;
        all = all && visible;
      }
      if (some) {
        begin = least(begin, column);
        end = column;
      }
    }
    if (end < 0) return;
    if (counting) {
      from = static_cast<int>(most(static_cast<int64_t>(from), static_cast<int64_t>(begin) * size - low));
      to = static_cast<int>(least(static_cast<int64_t>(to), (static_cast<int64_t>(end) + 1) * size - low));
    }
  }
  if (to <= from) return;
  from = from / KEYS * KEYS;
  to = static_cast<int>(least(round_up(to, KEYS), static_cast<int64_t>(count)));

  Lanes& lanes = *block.lanes;
  const bool softmax = running(block), sigmoid = args.rule == REGARD_SIGMOID;
  const bool biased = problem.pair_bias || args.biases.distance != nullptr;
  const bool plain = !problem.softcap && (softmax || sigmoid || args.rule == REGARD_CLIPPED);
  Added added{nullptr, 0};
  if (biased) added = add_biases(block, first, from, to, counting);
  block.step_begin = from;
  for (int v = 0; v < block.vectors; ++v) store(lanes.step_sums + v * LANES, zero());
  for (int j = from; j < to; j += KEYS) {
    const int rows = least(KEYS, to - j);
    const Number* k = memory.k + (first + j) * memory.k_line;
    int64_t ldk = memory.k_line;
    if (rows < KEYS) {
      for (int i = 0; i < rows; ++i)
        __builtin_memcpy(block.tail + i * problem.key_line, k + i * ldk,
                         static_cast<size_t>(args.width) * sizeof(Number));
      k = block.tail;
      ldk = problem.key_line;
    }
    float* weights = block.weights + j * QUERIES;
    bool masked = rows < KEYS || !counting || !all;
    int c = 0, end = block.vectors;
    if (counting) {
      const int32_t head = low + j, last = head + rows - 1;
      while (c < end && (block.vector_high[c] < head || block.vector_low[c] > last)) ++c;
      while (c < end && (block.vector_high[end - 1] < head || block.vector_low[end - 1] > last)) --end;
      masked = masked || head < block.most_low || last > block.least_high;
      if (c > 0 || end < block.vectors)
        for (int i = 0; i < KEYS; ++i)
          for (int v = 0; v < block.vectors; ++v)
            if (v < c || v >= end) store(weights + i * QUERIES + v * LANES, zero());
    }
    const Added here{added.first + j * added.line, added.line};
    if (!plain || masked) {
      scores_from<Finish::RAW, false>(block, k, ldk, c, end, here, weights);
      finish_scores(block, weights, first + j, rows, c, end, masked, biased, here);
    } else if (biased) {
      if (softmax)
        scores_from<Finish::SOFTMAX, true>(block, k, ldk, c, end, here, weights);
      else if (sigmoid)
        scores_from<Finish::SIGMOID, true>(block, k, ldk, c, end, here, weights);
      else
        scores_from<Finish::CLIPPED, true>(block, k, ldk, c, end, here, weights);
    } else {
      if (softmax)
        scores_from<Finish::SOFTMAX, false>(block, k, ldk, c, end, here, weights);
      else if (sigmoid)
        scores_from<Finish::SIGMOID, false>(block, k, ldk, c, end, here, weights);
      else
        scores_from<Finish::CLIPPED, false>(block, k, ldk, c, end, here, weights);
    }
  }
  if (softmax)
    for (int v = 0; v < block.vectors; ++v)
      store(lanes.sums + v * LANES, load(lanes.sums + v * LANES) + load(lanes.step_sums + v * LANES));
  if (block.summing) return;

  int ranges[QUERIES / TILE_ROWS][2];
  const bool inside = counting && (low + from < block.most_low || low + to - 1 > block.least_high);
  for (int group = 0; group * TILE_ROWS < block.count; ++group) {
    ranges[group][0] = from;
    ranges[group][1] = to;
    if (!inside) continue;
    int32_t begin = INT32_MAX, end = -1;
    for (int i = group * TILE_ROWS; i < least((group + 1) * TILE_ROWS, block.count); ++i) {
      begin = least(begin, lanes.low[i]);
      end = most(end, lanes.high[i]);
    }
    ranges[group][0] = static_cast<int>(most(static_cast<int64_t>(from), static_cast<int64_t>(begin) - low));
    ranges[group][1] = static_cast<int>(least(static_cast<int64_t>(to), static_cast<int64_t>(end) - low + 1));
  }
#if defined(__AVX512BF16__)
  round_weights(block, from, to);
#endif
  add_values(block, ranges, memory.v + first / PAIR * memory.v_line, memory.v_line, memory.v_width);
}

// The interval of ranks that a query of this rank may see.
void reach(const regard_visibility& rule, int64_t rank, int32_t* low, int32_t* high) {
  int64_t first = 0, last = INT32_MAX;
  if (rule.causal) last = least(last, rank);
  if (rule.left >= 0) first = most(first, rank - rule.left);
  if (rule.right >= 0) last = least(last, rank + rule.right);
  if (rule.block > 0) {
    const int64_t block = Pairs::floor_div(static_cast<int32_t>(rank), static_cast<int32_t>(rule.block));
    first = most(first, (block - rule.lookback) * rule.block);
    last = least(last, (block + rule.lookahead + 1) * rule.block - 1);
  }
  *low = static_cast<int32_t>(least(first, static_cast<int64_t>(INT32_MAX)));
  *high = static_cast<int32_t>(most(last, static_cast<int64_t>(-1)));
}

template <class T>
void begin_block(Block& block) {
  const Problem& problem = *block.problem;
  const regard_attention_args& args = *problem.args;
  Lanes& lanes = *block.lanes;
  const bool softmax = args.rule == REGARD_SOFTMAX;
  const T* q = static_cast<const T*>(args.q) + block.b * args.q_strides[0] + block.h * args.q_strides[1] +
               block.begin * args.q_strides[2];
#if defined(__AVX512BF16__)
  transpose_pairs(block.count, static_cast<int>(args.width), q, args.q_strides[2], problem.negative, block.queries);
#else
  transpose_scaled(block.count, static_cast<int>(args.width), q, args.q_strides[2], problem.factor, block.queries);
#endif

  const float* bias = nullptr;
  int64_t bias_stride = 0;
  if (args.biases.bias != nullptr && !problem.pair_bias) {
    const int64_t* strides = args.biases.bias_strides;
    bias = args.biases.bias + block.b * strides[0] + block.h * strides[1] + block.begin * strides[2];
    bias_stride = strides[2];
  }
  const bool by_blocks = block.pairs.blocks != nullptr;
  block.least_low = block.least_high = INT32_MAX;
  block.most_low = block.most_high = -1;
  for (int v = 0; v < block.vectors; ++v) {
    block.vector_low[v] = INT32_MAX;
    block.vector_high[v] = -1;
  }
  for (int i = 0; i < block.vectors * LANES; ++i) {
    const bool there = i < block.count;
    lanes.low[i] = INT32_MAX;
    lanes.high[i] = -1;
    lanes.bias[i] = 0;
    if (there) {
      const int32_t rank = block.pairs.queries[block.begin + i];
      reach(args.visibility, rank, &lanes.low[i], &lanes.high[i]);
      block.least_low = least(block.least_low, lanes.low[i]);
      block.most_low = most(block.most_low, lanes.low[i]);
      block.least_high = least(block.least_high, lanes.high[i]);
      block.most_high = most(block.most_high, lanes.high[i]);
      block.vector_low[i / LANES] = least(block.vector_low[i / LANES], lanes.low[i]);
      block.vector_high[i / LANES] = most(block.vector_high[i / LANES], lanes.high[i]);
      if (by_blocks) lanes.block[i] = Pairs::floor_div(rank, static_cast<int32_t>(args.visibility.block_size));
      if (bias != nullptr) lanes.bias[i] = bias[i * bias_stride];
    }
    lanes.limit[i] = there ? -infinity() : infinity();
    lanes.start[i] = ((softmax ? 0 : args.shift) + lanes.bias[i]) * problem.unit;
    lanes.sums[i] = 0;
    lanes.rounded[i] = 0;
    lanes.stretch[i] = 0;
    lanes.column[i] = 0;
  }
  if (PAIRED) {
    const int64_t steps = ceil_div(args.m, static_cast<int64_t>(STEP));
    const int32_t highest = steps == 0 ? -1 : block.row->before[steps - 1];
    block.exact = args.rule != REGARD_SOFTMAX;
    for (int i = 0; i < block.count; ++i)
      block.exact = block.exact || least(lanes.high[i], highest) - FEW_KEYS < lanes.low[i];
  }
  for (int64_t p = 0; p < block.vectors * LANES * block.output_line; p += LANES) store(block.output + p, zero());
}

// Whether query i of the block has seen no key.
inline bool empty(const Lanes& lanes, int i) {
  return lanes.limit[i] == -infinity() && !(lanes.sums[i] != lanes.sums[i]);
}

// Stores the log-sum-exps of the block.
void store_sums(const Block& block) {
  const regard_attention_args& args = *block.problem->args;
  const Lanes& lanes = *block.lanes;
  if (args.lse == nullptr) return;
  float* to = args.lse + (block.b * args.heads + block.h) * args.n + block.begin;
  for (int i = 0; i < block.count; ++i)
    to[i] = empty(lanes, i) ? -infinity() : lanes.bias[i] - lanes.start[i] + __builtin_logf(lanes.sums[i]);
}

template <class T>
void end_block(const Block& block) {
  const regard_attention_args& args = *block.problem->args;
  const Lanes& lanes = *block.lanes;
  T* out = static_cast<T*>(args.out) + block.b * args.out_strides[0] + block.h * args.out_strides[1] +
           block.begin * args.out_strides[2];
  const bool softmax = args.rule == REGARD_SOFTMAX;
  const int width = static_cast<int>(args.value_width);
  for (int i = 0; i < block.count; ++i) {
    float factor = lanes.bias[i] == -infinity() ? 0.f : 1.f;
    if (softmax) {
      const bool seen = !empty(lanes, i);
      float total = lanes.sums[i];
      if (args.sink != nullptr && seen) total += exp(args.sink[block.h] - (lanes.bias[i] - lanes.start[i]));
      factor = seen ? 1.f / total : 0.f;
      // rescale so that rounded weights keep their sum: then a single key's value is exact
      if (PAIRED && seen) factor *= lanes.sums[i] / lanes.rounded[i];
    } else if (args.rule == REGARD_CLIPPED && empty(lanes, i)) {
      factor = 0;
    }
    const float* from = block.output + i * block.output_line;
    T* to = out + i * args.out_strides[2];
    int p = 0;
    for (; p + LANES <= width; p += LANES) store(to + p, factor == 0.f ? zero() : load(from + p) * factor);
    if (p < width) store(to + p, factor == 0.f ? zero() : load(from + p) * factor, width - p);
  }
}

template <class T>
void attend(Block& block, const Memory& memory) {
  begin_block<T>(block);
  const int64_t steps = ceil_div(block.problem->args->m, static_cast<int64_t>(STEP));
  // from the first step that reaches the lowest visible rank to the last that begins below the highest
  int64_t first = 0, end = steps;
  for (int64_t size = steps; size > 0;) {
    const int64_t half = size / 2;
    if (block.row->before[first + half] < block.least_low) {
      first += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  int64_t last = first;
  for (int64_t size = end - first; size > 0;) {
    const int64_t half = size / 2;
    if (block.row->after[last + half] <= block.most_high) {
      last += half + 1;
      size -= half + 1;
    } else {
      size = half;
    }
  }
  const regard_attention_args& args = *block.problem->args;
  block.summing = args.rule == REGARD_CLIPPED;
  for (int64_t step = first; step < last; ++step) attend_step(block, memory, step);
  if (running(block)) store_sums(block);
  if (block.summing) {
    Lanes& lanes = *block.lanes;
    for (int i = 0; i < block.count; ++i)
      lanes.stretch[i] = empty(lanes, i) ? 0.f : (args.high - args.low) / lanes.sums[i];
    block.summing = false;
    for (int64_t step = first; step < last; ++step) attend_step(block, memory, step);
  }
  end_block<T>(block);
}

int64_t block_count(const regard_attention_args& args) {
  return ceil_div(args.n, static_cast<int64_t>(BLOCKED / 2)) + 2;
}

Row prepare_row(const regard_attention_args& args, int64_t b, void* space, int32_t* more) {
  const int64_t steps = ceil_div(args.m, static_cast<int64_t>(STEP));
  Row row{Pairs::of_row(&args.visibility, b, args.n, args.m, space), more, more + steps, more + 2 * steps, 0, true};
  for (int64_t step = 0, found = -1; step < steps; ++step) {
    found = most(found, static_cast<int64_t>(row.pairs.highest[step]));
    row.before[step] = static_cast<int32_t>(found);
  }
  for (int64_t step = steps - 1, found = INT32_MAX; step >= 0; --step) {
    found = least(found, static_cast<int64_t>(row.pairs.lowest[step]));
    row.after[step] = static_cast<int32_t>(found);
  }
  const regard_visibility& rule = args.visibility;
  const int64_t size = rule.blocks != nullptr ? rule.block_size : rule.block;
  const int64_t limit = size < BLOCKED ? QUERIES
                                       : least(static_cast<int64_t>(QUERIES),
                                               round_up(ceil_div(size, ceil_div(size, static_cast<int64_t>(QUERIES))),
                                                        static_cast<int64_t>(16)));
  const int32_t* ranks = row.pairs.queries;
  int64_t count = 0;
  for (int64_t i = 1; i < args.n; ++i) row.counting = row.counting && ranks[i] == ranks[i - 1] + 1;
  for (int64_t i = 0; i < args.n; ++count) {
    row.starts[count] = static_cast<int32_t>(i);
    int64_t end = least(args.n, i + limit);
    if (size >= BLOCKED && row.counting) {
      const int64_t block = Pairs::floor_div(ranks[i], static_cast<int32_t>(least(size, int64_t{INT32_MAX})));
      end = least(end, i + (block + 1) * size - ranks[i]);
    }
    i = end;
  }
  row.starts[count] = static_cast<int32_t>(args.n);
  row.blocks = count;
  return row;
}

// Packs the rows of one (batch, head) as numbers, `line` apart and padded with zeros after `width`.
template <class T>
void pack(const T* from, int64_t stride, int64_t rows, int64_t width, int64_t line, float* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += line) {
    int64_t p = 0;
    for (; p + LANES <= width; p += LANES) store(to + p, load(from + p));
    if (p < width) {
      const Vec rest = load(from + p, static_cast<int>(width - p));
      store(to + p, rest, static_cast<int>(least(line - p, static_cast<int64_t>(LANES))));
    }
  }
}

#if defined(__AVX512BF16__)
void pack(const bfloat16* from, int64_t stride, int64_t rows, int64_t width, int64_t line, bfloat16* to) {
  for (int64_t i = 0; i < rows; ++i, from += stride, to += line) {
    __builtin_memcpy(to, from, static_cast<size_t>(width) * 2);
    for (int64_t p = width; p < line; ++p) to[p] = 0;
  }
}

// Interleaves each pair of rows to a line of `line` pairs, padded with zeros.
void pack_pairs(const bfloat16* from, int64_t stride, int64_t rows, int64_t width, int64_t line, bfloat16* to) {
  for (int64_t i = 0; i < rows; i += 2, from += 2 * stride, to += 2 * line)
    for (int64_t p = 0; p < line; p += LANES) {
      const int count = static_cast<int>(least(width - p, static_cast<int64_t>(LANES)));
      const __mmask16 there = static_cast<__mmask16>((1u << count) - 1);
      const __m256i a = _mm256_maskz_loadu_epi16(there, from + p);
      const __m256i b = i + 1 < rows ? _mm256_maskz_loadu_epi16(there, from + stride + p) : _mm256_setzero_si256();
      const __m512i second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
      _mm512_storeu_si512(to + 2 * p, _mm512_or_si512(_mm512_cvtepu16_epi32(a), second));
    }
}
#endif

template <class T>
int run(const regard_attention_args& args) {
  using regard::Workspace;
  const int64_t batch = args.batch, heads = args.heads, n = args.n, m = args.m;
  const int64_t steps = ceil_div(m, static_cast<int64_t>(STEP));
  const int threads = static_cast<int>(most(args.threads, static_cast<int64_t>(1)));
  const int64_t groups = heads / args.kv_heads, pairs_of_kv = batch * args.kv_heads;

  Problem problem{};
  problem.args = &args;
  problem.unit = args.rule == REGARD_SIGMOID ? -LOG2_E : 1.f;
  problem.softcap = args.softcap > 0;
  problem.factor = problem.softcap ? args.scale * 2.f * LOG2_E / args.softcap : args.scale * problem.unit;
  if (PAIRED && problem.factor < 0) {
    problem.factor = -problem.factor;
    problem.negative = true;
  }
  problem.pair_bias = args.biases.bias != nullptr && (args.biases.bias_strides[3] != 0 || problem.softcap);
  problem.one_row = args.visibility.query_ranks_stride == 0 && args.visibility.key_ranks_stride == 0;
  const int64_t rows = problem.one_row ? 1 : batch;
  problem.most_blocks = block_count(args);

  // Keys and values are packed if they have another type, are far apart in memory, or have last lanes that are slow to
  // mask.
  const bool foreign = sizeof(T) != sizeof(Number);
  const bool pack_keys = foreign || args.width % PAIR != 0 || args.k_strides[2] > 2 * args.width;
  const bool pack_values = foreign || PAIRED || args.v_strides[2] > 2 * args.value_width ||
                           (LANES < 16 && args.value_width % LANES != 0);
  problem.key_line = round_up(args.width, PAIR);
  problem.value_line = round_up(args.value_width, static_cast<int64_t>(LANES));
  problem.distance_line = args.biases.distances + 2 * TABLE_PADDING;
  const int64_t tables = args.biases.distance == nullptr ? 0 : args.biases.distance_stride == 0 ? 1 : heads;

  const size_t pair_bytes = Pairs::bytes(n, m);
  const size_t more = static_cast<size_t>(2 * steps + problem.most_blocks + 1);
  const int64_t value_rows = round_up(m, PAIR);
  const size_t key_numbers = pack_keys ? static_cast<size_t>(pairs_of_kv * m * problem.key_line) : 0;
  const size_t value_numbers = pack_values ? static_cast<size_t>(pairs_of_kv * value_rows * problem.value_line) : 0;
  const size_t query_floats = static_cast<size_t>(problem.key_line / PAIR * QUERIES);
  const size_t output_floats = static_cast<size_t>(problem.value_line * QUERIES);
  const bool biased = problem.pair_bias || tables > 0;
  // `added` is padded because full vectors of keys are transposed at once
  const size_t added_floats = biased ? static_cast<size_t>((STEP + LANES) * QUERIES) : 0;
  const size_t pair_floats = PAIRED ? static_cast<size_t>((STEP + KEYS) * QUERIES) : 0;
  const size_t part_bytes = sizeof(Block) + 64 + Workspace::bytes_of<Lanes>(1) +
                            Workspace::bytes_of<float>(query_floats) +
                            Workspace::bytes_of<float>((STEP + KEYS) * QUERIES) +
                            Workspace::bytes_of<float>(output_floats) + Workspace::bytes_of<float>(added_floats) +
                            Workspace::bytes_of<float>(pair_floats) +
                            Workspace::bytes_of<Number>(static_cast<size_t>(KEYS * problem.key_line));
  Workspace space(static_cast<size_t>(rows) * (pair_bytes + Workspace::bytes_of<int32_t>(more)) +
                  Workspace::bytes_of<Row>(static_cast<size_t>(rows)) + Workspace::bytes_of<Number>(key_numbers) +
                  Workspace::bytes_of<Number>(value_numbers) +
                  Workspace::bytes_of<float>(static_cast<size_t>(tables * problem.distance_line)) +
                  static_cast<size_t>(threads) * part_bytes);
  if (!space) return REGARD_OUT_OF_MEMORY;

  problem.rows = space.take<Row>(static_cast<size_t>(rows));
  char* pair_space = space.take<char>(static_cast<size_t>(rows) * pair_bytes);
  for (int64_t b = 0; b < rows; ++b)
    problem.rows[b] = prepare_row(args, b, pair_space + static_cast<size_t>(b) * pair_bytes, space.take<int32_t>(more));

  float* tables_to = space.take<float>(static_cast<size_t>(tables * problem.distance_line));
  problem.distances = tables_to;
  for (int64_t h = 0; h < tables; ++h) {
    float* to = tables_to + h * problem.distance_line;
    const float* from = args.biases.distance + h * args.biases.distance_stride;
    for (int64_t i = 0; i < problem.distance_line; ++i) {
      const int64_t at = args.biases.distances - 1 - (i - TABLE_PADDING);
      to[i] = at >= 0 && at < args.biases.distances ? from[at] : 0.f;
    }
  }

  Number* keys = space.take<Number>(key_numbers);
  Number* values = space.take<Number>(value_numbers);
  if (pack_keys || pack_values) {
    const int64_t chunk = 256, chunks = ceil_div(m, chunk);
    parallel_tasks(threads, pairs_of_kv * chunks, [&](long task) {
      const int64_t pair = task / chunks, first = task % chunks * chunk, count = least(chunk, m - first);
      const int64_t b = pair / args.kv_heads, g = pair % args.kv_heads;
      if (pack_keys)
        pack(static_cast<const T*>(args.k) + b * args.k_strides[0] + g * args.k_strides[1] + first * args.k_strides[2],
             args.k_strides[2], count, args.width, problem.key_line, keys + (pair * m + first) * problem.key_line);
      if (pack_values) {
        const T* v = static_cast<const T*>(args.v) + b * args.v_strides[0] + g * args.v_strides[1] +
                     first * args.v_strides[2];
        Number* to = values + (pair * value_rows + first) * problem.value_line;
#if defined(__AVX512BF16__)
        pack_pairs(v, args.v_strides[2], count, args.value_width, problem.value_line, to);
#else
        pack(v, args.v_strides[2], count, args.value_width, problem.value_line, to);
#endif
      }
    });
  }

  int64_t most_blocks = 0;
  for (int64_t b = 0; b < rows; ++b) most_blocks = most(most_blocks, problem.rows[b].blocks);
  const int64_t tasks = most_blocks * batch * heads;
  char* parts_space = space.take<char>(static_cast<size_t>(threads) * part_bytes);
  long next = 0;
  const int parts = static_cast<int>(least(tasks, static_cast<int64_t>(threads)));
  parallel(parts, [&](int part) {
    char* mine = parts_space + static_cast<size_t>(part) * part_bytes;
    const auto take = [&mine](size_t bytes) {
      char* found = mine;
      mine += (bytes + 63) / 64 * 64;
      return reinterpret_cast<float*>(found);
    };
    Block block{};
    block.problem = &problem;
    block.lanes = reinterpret_cast<Lanes*>(take(sizeof(Lanes)));
    block.queries = take(query_floats * 4);
    block.weights = take((STEP + KEYS) * QUERIES * 4);
    block.output = take(output_floats * 4);
    block.output_line = problem.value_line;
    block.added = take(added_floats * 4);
    block.pairs_of_weights = take(pair_floats * 4);
    block.tail = reinterpret_cast<Number*>(take(static_cast<size_t>(KEYS * problem.key_line) * sizeof(Number)));
    for (int64_t i = 0; i < KEYS * problem.key_line; ++i) block.tail[i] = 0;
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      // one head after the other, while its keys are in cache; the last queries first: in causal attention they have
      // the most keys, and the shortest tasks should come last
      const int64_t index = most_blocks - 1 - task % most_blocks, head = task / most_blocks;
      block.b = head / heads;
      block.h = head % heads;
      block.row = &problem.row(block.b);
      if (index >= block.row->blocks) continue;
      block.pairs = block.row->pairs.of_head(block.b, block.h);
      block.begin = block.row->starts[index];
      block.count = static_cast<int>(block.row->starts[index + 1] - block.begin);
      block.vectors = static_cast<int>(ceil_div(block.count, static_cast<int64_t>(LANES)));
      const int64_t g = block.h / groups, pair = block.b * args.kv_heads + g;
      Memory memory{};
      memory.k_line = pack_keys ? problem.key_line : args.k_strides[2];
      memory.v_line = pack_values ? PAIR * problem.value_line : args.v_strides[2];
      memory.v_width = static_cast<int>(pack_values ? problem.value_line : args.value_width);
      memory.k = pack_keys ? keys + pair * m * problem.key_line
                           : static_cast<const Number*>(args.k) + block.b * args.k_strides[0] + g * args.k_strides[1];
      memory.v = pack_values ? values + pair * value_rows * problem.value_line
                             : static_cast<const Number*>(args.v) + block.b * args.v_strides[0] + g * args.v_strides[1];
      attend<T>(block, memory);
    }
  });
  return REGARD_OK;
}

}  // namespace

int attention(const regard_attention_args* args) {
  if (args->rule < REGARD_SOFTMAX || args->rule > REGARD_CLIPPED) return REGARD_BAD_ARGUMENT;
  if (args->rule == REGARD_CLIPPED && args->sink != nullptr) return REGARD_BAD_ARGUMENT;
  if (args->kv_heads < 1 || args->heads % args->kv_heads != 0 || args->width < 1) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->heads * args->n == 0 || args->value_width == 0) return REGARD_OK;
#if defined(__AVX512BF16__)
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : isa_avx512::attention(args);
#else
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : run<float>(*args);
#endif
}

}  // namespace REGARD_ISA
