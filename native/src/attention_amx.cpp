// Blocked softmax attention in bfloat16 on tiles (AMX), forward. Cases that it does not support run in attention.cpp.
//
// A block of 32 queries visits groups of 32 keys. Scores are computed transposed, keys by queries: a tile multiplies
// keys in their own layout with pairs of features of queries; then values, transposed once, are multiplied with the
// rounded and paired weights. A query's data is in one lane throughout, and the output is kept transposed, too. The
// scores of a group are computed before the softmax of the previous group, so that tiles and vectors work at the same
// time. Softmax is relative to a reference, as in attention.cpp.

#include "regard_attention.h"

#include "vector.h"

#include "attention_pairs.h"
#include "parallel.h"
#include "workspace.h"

namespace isa_avx512_bf16 {
int attention(const regard_attention_args*);
}

namespace REGARD_ISA {
namespace {

constexpr int QUERIES = 32, GROUP = 32;   // queries in a block; keys in a group
constexpr int BATCH = 8;                  // groups whose weights are multiplied by values at once
constexpr int TILE = 512, FLOATS = 256;   // bfloat16 and float32 numbers in a tile: 16 rows of 64 bytes
constexpr int FEATURES = 32;              // features of queries and keys in a tile
constexpr float MOST_WEIGHT = 4.85e8f;    // e^20: the reference moves if a group's sum of weights exceeds it
constexpr int FEW_KEYS = 128;             // with fewer, weights are rounded to the sum of two bfloat16 numbers
static_assert(Pairs::STEP % GROUP == 0, "a group lies in one step");

REGARD_INLINE float infinity() { return __builtin_inff(); }
REGARD_INLINE __m512 m512(Vec x) { return reinterpret_cast<__m512>(x); }
REGARD_INLINE Vec vec(__m512 x) { return reinterpret_cast<Vec>(x); }
REGARD_INLINE __m512i load_bits(const void* p) { return _mm512_loadu_si512(p); }
REGARD_INLINE IntVec load_ints(const int32_t* p) { return reinterpret_cast<IntVec>(load_bits(p)); }

// Tile instructions do not tell the compiler which memory they read: earlier writes must have reached memory.
REGARD_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// Configures eight tiles of 16 rows of 64 bytes for this thread and the lifetime of this object. The previous
// configuration is restored, since other libraries (oneDNN) rely on theirs.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t wanted[64] = {};
    wanted[0] = 1;
    for (int i = 0; i < 8; ++i) {
      wanted[16 + 2 * i] = 64;
      wanted[48 + i] = 16;
    }
    _tile_storeconfig(before_);
    settle();
    _tile_loadconfig(wanted);
  }
  ~Tiles() {
    settle();
    _tile_loadconfig(before_);
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// 2^x for weights: relative error 3e-6, below that of a sum of two bfloat16 numbers.
REGARD_INLINE Vec power(Vec x) {
  const Vec r = vec(_mm512_reduce_ps(m512(x), 9));  // x - floor x; 0 for infinite x
  Vec p = broadcast(0.013534167781472206f);
  p = fma(p, r, broadcast(0.052011460065841675f));
  p = fma(p, r, broadcast(0.2414427548646927f));
  p = fma(p, r, broadcast(0.6930038332939148f));
  p = fma(p, r, broadcast(1.0000026226043701f));
  return vec(_mm512_scalef_ps(m512(p), m512(x)));
}

// Transposes a matrix of 16 x 16 32-bit numbers in place.
REGARD_INLINE void transpose(__m512i (&rows)[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __m512i turned[16];
  // each round moves one bit of the row's number into the lane's
#pragma GCC unroll 4
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) {
      turned[2 * r] = _mm512_permutex2var_epi32(rows[r], low, rows[r + 8]);
      turned[2 * r + 1] = _mm512_permutex2var_epi32(rows[r], high, rows[r + 8]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) rows[r] = turned[r];
  }
}

// Two vectors of weights as pairs of bfloat16, with a first: adds half a unit in the last place and truncates.
REGARD_INLINE __m512i round_pairs(Vec a, Vec b) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i upper = _mm512_set4_epi32(0x80800f0e, 0x80800b0a, 0x80800706, 0x80800302);
  const __m512i first = _mm512_shuffle_epi8(_mm512_add_epi32(reinterpret_cast<__m512i>(a), half), upper);
  const __m512i second = _mm512_add_epi32(reinterpret_cast<__m512i>(b), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaa, first, second);
}

// The rounding residual of x; 0 for infinity and NaN.
REGARD_INLINE Vec remainder(Vec x, __m512i rounded) {
  const Vec rest = x - reinterpret_cast<Vec>(rounded);
  return select(reinterpret_cast<IntVec>(rest == rest), rest, zero());
}

// Up to 32 numbers at p, padded with zeros.
REGARD_INLINE __m512i load_row(const bfloat16* p, int64_t count) {
  const int here = static_cast<int>(least(most(count, int64_t{0}), int64_t{32}));
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << here) - 1), p);
}

// Tiles of a group of keys, [features][16 keys]: rows of a tile are keys.
void pack_keys(const bfloat16* from, int64_t stride, int64_t keys, int64_t width, bfloat16* to) {
  for (int64_t p = 0; p < width; p += FEATURES)
    for (int64_t j = 0; j < GROUP; ++j, to += FEATURES)
      _mm512_store_si512(to, j < keys ? load_row(from + j * stride + p, width - p) : _mm512_setzero_si512());
}

// Tiles of the values of a group of keys, [16 features]: rows of a tile are features. A feature of ones follows the last:
// its outputs are the sums of the rounded weights.
void pack_values(const bfloat16* from, int64_t stride, int64_t keys, int64_t width, bfloat16* to) {
  for (int64_t p = 0; p <= width; p += 16, to += TILE) {
    const int64_t count = least(width - p, int64_t{16});
    const __mmask16 ones = static_cast<__mmask16>(count < 16 ? 1 << count : 0);
    __m512i rows[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const bfloat16* at = from + 2 * j * stride + p;
      const __m512i a = 2 * j < keys ? load_row(at, count) : _mm512_setzero_si512();
      const __m512i b = 2 * j + 1 < keys ? load_row(at + stride, count) : _mm512_setzero_si512();
      const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(a));
      const __m512i second = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(b));
      const __m512i pairs = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
      rows[j] = _mm512_mask_mov_epi32(pairs, ones, _mm512_set1_epi32(0x3f803f80));
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_si512(to + r * 32, rows[r]);
  }
}

// Tiles of queries, [features][16 queries]: rows of a tile are pairs of features.
void pack_queries(const bfloat16* from, int64_t stride, int count, int64_t width, bfloat16* to) {
  for (int64_t p = 0; p < width; p += FEATURES)
    for (int c = 0; c < QUERIES; c += 16, to += TILE) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        rows[i] = c + i < count ? load_row(from + (c + i) * stride + p, width - p) : _mm512_setzero_si512();
      transpose(rows);
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(to + r * 32, rows[r]);
    }
}

// One row of the batch.
struct Row {
  Pairs pairs;
  int32_t* before;  // (steps,) highest rank up to a step
  int32_t* after;   // (steps,) lowest rank from a step on
};

struct Problem {
  const regard_attention_args* args;
  float factor;                             // turns products into scores in units of ln 2
  Row* rows;
  bool one_row;                             // whether all rows of the batch share their ranks
  int64_t groups, key_blocks, value_tiles;  // groups of keys; tiles of 32 key features; of 16 value features
  bfloat16 *keys, *values;                  // (pairs of row and kv head, groups) packed
};

// The block of queries that a thread is processing, and the thread's memory.
struct alignas(64) Block {
  float scores[2][4 * FLOATS];               // scores of a group and the next: [16 keys][16 queries]
  bfloat16 weights[2][BATCH][2 * TILE];      // rounded weights, and the rounding residuals: [16 queries]
  int64_t groups[BATCH];                     // groups in the current batch
  bool all[BATCH];                           // whether every query sees every key of the group
  int batch;                                 // number of groups in the batch
  float limit[QUERIES];                      // limit of a group's sum of weights; -inf before the first visible key
  float start[QUERIES];                      // minus the reference, in units of ln 2
  float sums[QUERIES];                       // sums of weights
  int32_t low[QUERIES], high[QUERIES];       // range of visible ranks
  int32_t line[QUERIES];                     // row of the block mask
  const Problem* problem;
  Pairs pairs;
  const Row* row;
  const bfloat16 *keys, *values;
  bfloat16* queries;                         // [features][16 queries]
  float* output;                             // [16 features][16 queries]
  int64_t b, h, begin;
  int count;
  bool exact;                                // whether residuals are multiplied, too
  int32_t least_low, most_low, least_high, most_high;
};

enum class Seen { NONE, SOME, ALL };

// Visibility of a group of keys for the block's queries.
Seen visible(const Block& block, int64_t group) {
  const Pairs& pairs = block.pairs;
  const int64_t first = group * GROUP, step = first / Pairs::STEP, keys = block.problem->args->m - first;
  int32_t low = pairs.lowest[step], high = pairs.highest[step];
  const bool counting = !pairs.gaps[step];
  if (counting) {
    low = pairs.keys[first];
    high = low + static_cast<int32_t>(least(keys, int64_t{GROUP})) - 1;
  }
  if (high == Pairs::ABSENT || high < block.least_low || low > block.most_high) return Seen::NONE;
  bool all = counting && keys >= GROUP && low >= block.most_low && high <= block.least_high;
  if (pairs.blocks != nullptr) {
    const int32_t size = static_cast<int32_t>(pairs.rule->block_size);
    bool some = false;
    for (int32_t column = low / size; column <= high / size; ++column)
      for (int i = 0; i < block.count; ++i) {
        if (i > 0 && block.line[i] == block.line[i - 1]) continue;
        const bool here = pairs.block(block.line[i], column);
        some = some || here;
        all = all && here;
      }
    if (!some) return Seen::NONE;
  }
  return all ? Seen::ALL : Seen::SOME;
}

// Products of the keys of a group in the batch and the block's queries.
void multiply_keys(Block& block, int place) {
  const int64_t blocks = block.problem->key_blocks;
  const bfloat16* k = block.keys + block.groups[place] * blocks * 2 * TILE;
  const bfloat16* q = block.queries;
  float* scores = block.scores[place % 2];
  settle();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t p = 0; p < blocks; ++p, k += 2 * TILE, q += 2 * TILE) {
    _tile_loadd(4, k, 64);
    _tile_loadd(6, q, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, q + TILE, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, k + TILE, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + FLOATS, 64);
  _tile_stored(2, scores + 2 * FLOATS, 64);
  _tile_stored(3, scores + 3 * FLOATS, 64);
}

// Adds weights times values of the batch's groups from `place` to the end.
__attribute__((noinline)) void add_values(const Block& block, int place, int end) {
  if (place == end) return;
  const int64_t tiles = block.problem->value_tiles;
  float* output = block.output;
  settle();
  for (int64_t p = 0; p < tiles; p += 2, output += 4 * FLOATS) {
    const bool two = p + 1 < tiles;
    _tile_loadd(0, output, 64);
    _tile_loadd(1, output + FLOATS, 64);
    if (two) {
      _tile_loadd(2, output + 2 * FLOATS, 64);
      _tile_loadd(3, output + 3 * FLOATS, 64);
    }
    for (int part = 0; part <= static_cast<int>(block.exact); ++part)
      for (int i = place; i < end; ++i) {
        const bfloat16* v = block.values + (block.groups[i] * tiles + p) * TILE;
        const bfloat16* w = block.weights[part][i];
        _tile_loadd(4, v, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, w + TILE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
          _tile_loadd(5, v + TILE, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    _tile_stored(0, output, 64);
    _tile_stored(1, output + FLOATS, 64);
    if (two) {
      _tile_stored(2, output + 2 * FLOATS, 64);
      _tile_stored(3, output + 3 * FLOATS, 64);
    }
  }
}

// For one key after the other, which of 16 queries from c on see it.
struct Sight {
  const Block& block;
  const IntVec low, high;
  const int c;
  int32_t column = -1;  // column of the block mask, whose bits are `bits`
  __mmask16 bits = 0xffff;
  __mmask16 some = 0;  // queries that have seen a key

  Sight(const Block& block, int c)
      : block(block), low(load_ints(block.low + c)), high(load_ints(block.high + c)), c(c) {}

  __mmask16 of(int64_t key) {
    const Pairs& pairs = block.pairs;
    const int32_t rank = key < block.problem->args->m ? pairs.keys[key] : Pairs::ABSENT;
    if (rank == Pairs::ABSENT) return 0;
    if (pairs.blocks != nullptr && rank / pairs.rule->block_size != column) {
      column = static_cast<int32_t>(rank / pairs.rule->block_size);
      bits = 0;
      for (int i = 0; i < 16; ++i)
        bits = static_cast<__mmask16>(bits | (c + i < block.count && pairs.block(block.line[c + i], column)) << i);
    }
    const __m512i ranks = _mm512_set1_epi32(rank);
    const __mmask16 seen = bits & _mm512_cmple_epi32_mask(reinterpret_cast<__m512i>(low), ranks) &
                           _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(high), ranks);
    some |= seen;
    return seen;
  }
};

// Moves the references of 16 queries from c on to their highest scores in a group, where these are higher, and rescales
// the sums to the new references.
__attribute__((noinline)) void move_reference(Block& block, int place, int c) {
  const float* scores = block.scores[place % 2] + c / 16 * FLOATS;
  const Vec factor = broadcast(block.problem->factor);
  Sight sight(block, c);
  Vec top = broadcast(-infinity());
  for (int j = 0; j < GROUP; ++j) {
    const __mmask16 seen = block.all[place] ? __mmask16{0xffff} : sight.of(block.groups[place] * GROUP + j);
    const Vec x = load(scores + j / 16 * 2 * FLOATS + j % 16 * 16) * factor;
    top = vec(_mm512_mask_max_ps(m512(top), seen, m512(x), m512(top)));
  }
  const Vec limit = load(block.limit + c), start = load(block.start + c);
  const IntVec before = reinterpret_cast<IntVec>(limit > -infinity());
  const IntVec over = reinterpret_cast<IntVec>(top > select(before, -start, broadcast(-infinity())));
  const Vec shrink = select(before & over, exp2(-top - start), broadcast(1.f));
  store(block.start + c, select(over, -top, start));
  store(block.limit + c, select(over, broadcast(MOST_WEIGHT), limit));
  store(block.sums + c, load(block.sums + c) * shrink);
  float* output = block.output + c / 16 * FLOATS;
  for (int64_t p = 0; p < block.problem->value_tiles; ++p, output += 2 * FLOATS)
    for (int r = 0; r < FLOATS; r += 16) store(output + r, load(output + r) * shrink);
}

// Weights of a group from its scores, for 16 queries from c on, added to their sums. Returns which queries exceed their
// limit.
template <bool MASKED, bool EXACT>
REGARD_INLINE __mmask16 weigh(Block& block, int place, int c, Vec& sum) {
  const Vec factor = broadcast(block.problem->factor), start = load(block.start + c);
  const float* scores = block.scores[place % 2] + c / 16 * FLOATS;
  bfloat16* to = block.weights[0][place] + c / 16 * TILE;
  Sight sight(block, c);
  int64_t key = block.groups[place] * GROUP;
  const auto weight = [&](const float* at) {
    const Vec w = power(fma(load(at), factor, start));
    return MASKED ? vec(_mm512_maskz_mov_ps(sight.of(key++), m512(w))) : w;
  };
  Vec total = zero();
  for (int tile = 0; tile < 2; ++tile, scores += 2 * FLOATS)
#pragma GCC unroll 8
    for (int j = 0; j < FLOATS; j += 32, to += 32) {
      const Vec a = weight(scores + j), b = weight(scores + j + 16);
      const __m512i pairs = round_pairs(a, b);
      total += a + b;
      _mm512_store_si512(to, pairs);
      if (EXACT)
        _mm512_store_si512(to + BATCH * 2 * TILE,
                           round_pairs(remainder(a, _mm512_slli_epi32(pairs, 16)),
                                       remainder(b, _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))));
    }
  sum = load(block.sums + c) + total;
  const __mmask16 over = _mm512_cmp_ps_mask(m512(total), m512(load(block.limit + c)), _CMP_GT_OQ);
  return MASKED ? over & sight.some : over;
}

// Weights of a group in a batch, of which the groups from `added` on have not been multiplied by values yet.
template <bool MASKED, bool EXACT>
__attribute__((noinline)) void weigh(Block& block, int place, int& added) {
  Vec sums[2];
  __mmask16 over = weigh<MASKED, EXACT>(block, place, 0, sums[0]);
  over |= weigh<MASKED, EXACT>(block, place, 16, sums[1]);
  if (__builtin_expect(over != 0, 0)) {
    add_values(block, added, place);
    added = place;
    for (int half = 0; half < 2; ++half) {
      move_reference(block, place, 16 * half);
      weigh<MASKED, EXACT>(block, place, 16 * half, sums[half]);
    }
  }
  store(block.sums, sums[0]);
  store(block.sums + 16, sums[1]);
}

// Attention of the block's queries to a batch of groups.
void attend_batch(Block& block) {
  if (block.batch == 0) return;
  multiply_keys(block, 0);
  int added = 0;
  for (int i = 0; i < block.batch; ++i) {
    if (i + 1 < block.batch) multiply_keys(block, i + 1);
    if (block.exact)
      block.all[i] ? weigh<false, true>(block, i, added) : weigh<true, true>(block, i, added);
    else
      block.all[i] ? weigh<false, false>(block, i, added) : weigh<true, false>(block, i, added);
  }
  add_values(block, added, block.batch);
  block.batch = 0;
}

// The first position in [begin, end) at which `holds` is true, by bisection.
template <class Holds>
int64_t first_place(int64_t begin, int64_t end, Holds holds) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (holds(middle))
      end = middle;
    else
      begin = middle + 1;
  }
  return begin;
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
  *low = static_cast<int32_t>(least(first, int64_t{INT32_MAX}));
  *high = static_cast<int32_t>(most(last, int64_t{-1}));
}

void begin_block(Block& block) {
  const Problem& problem = *block.problem;
  const regard_attention_args& args = *problem.args;
  const bfloat16* q = static_cast<const bfloat16*>(args.q) + block.b * args.q_strides[0] +
                      block.h * args.q_strides[1] + block.begin * args.q_strides[2];
  pack_queries(q, args.q_strides[2], block.count, args.width, block.queries);
  const int64_t steps = ceil_div(args.m, int64_t{Pairs::STEP});
  const int32_t highest = steps == 0 ? Pairs::ABSENT : block.row->before[steps - 1];
  block.least_low = block.least_high = INT32_MAX;
  block.most_low = block.most_high = -1;
  block.exact = false;
  block.batch = 0;
  for (int i = 0; i < QUERIES; ++i) {
    block.low[i] = INT32_MAX;
    block.high[i] = -1;
    block.limit[i] = infinity();
    block.start[i] = block.sums[i] = 0;
    if (i >= block.count) continue;
    const int32_t rank = block.pairs.queries[block.begin + i];
    reach(args.visibility, rank, &block.low[i], &block.high[i]);
    block.least_low = least(block.least_low, block.low[i]);
    block.most_low = most(block.most_low, block.low[i]);
    block.least_high = least(block.least_high, block.high[i]);
    block.most_high = most(block.most_high, block.high[i]);
    block.exact = block.exact || least(block.high[i], highest) - FEW_KEYS < block.low[i];
    block.limit[i] = -infinity();
    if (block.pairs.blocks != nullptr)
      block.line[i] = Pairs::floor_div(rank, static_cast<int32_t>(args.visibility.block_size));
  }
  for (int64_t i = 0; i < problem.value_tiles * 2 * FLOATS; i += LANES) store(block.output + i, zero());
}

void end_block(Block& block) {
  const regard_attention_args& args = *block.problem->args;
  bfloat16* out = static_cast<bfloat16*>(args.out) + block.b * args.out_strides[0] + block.h * args.out_strides[1] +
                  block.begin * args.out_strides[2];
  const int64_t width = args.value_width;
  const float* rounded = block.output + width / 16 * 2 * FLOATS + width % 16 * 16;  // sums of rounded weights
  alignas(64) float factors[QUERIES] = {};
  for (int i = 0; i < block.count; ++i) {
    const float reference = -block.start[i];
    float total = block.sums[i];
    const bool empty = block.limit[i] == -infinity() && total == total;
    if (args.lse != nullptr)
      args.lse[(block.b * args.heads + block.h) * args.n + block.begin + i] =
          empty ? -infinity() : reference * LN_2 + __builtin_logf(total);
    if (empty) continue;
    if (args.sink != nullptr) total += exp2(args.sink[block.h] * LOG2_E - reference);
    // rescale so that rounded weights keep their sum: then a single key's value is exact
    factors[i] = block.sums[i] / total / rounded[i / 16 * FLOATS + i % 16];
  }
  for (int c = 0; c < block.count; c += 16) {
    const Vec factor = load(factors + c);
    const __mmask16 some = _mm512_cmp_ps_mask(m512(factor), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const int count = least(16, block.count - c);
    for (int64_t p = 0; p < width; p += 16) {
      const float* from = block.output + (p / 16 * 2 + c / 16) * FLOATS;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r)
        rows[r] = _mm512_castps_si512(_mm512_maskz_mul_ps(some, m512(load(from + r * 16)), m512(factor)));
      transpose(rows);
      const int64_t here = least(width - p, int64_t{16});
      const __mmask16 there = static_cast<__mmask16>((1u << here) - 1);
      bfloat16* to = out + c * args.out_strides[2] + p;
      alignas(64) float lines[FLOATS];
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) _mm512_store_si512(lines + 16 * r, rows[r]);
      for (int i = 0; i < count; ++i, to += args.out_strides[2])
        _mm256_mask_storeu_epi16(to, there, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(m512(load(lines + 16 * i)))));
    }
  }
}

void attend(Block& block) {
  begin_block(block);
  const Row& row = *block.row;
  const int64_t groups = block.problem->groups, steps = ceil_div(block.problem->args->m, int64_t{Pairs::STEP});
  const int64_t first = first_place(0, steps, [&](int64_t step) { return row.before[step] >= block.least_low; });
  const int64_t last = first_place(first, steps, [&](int64_t step) { return row.after[step] > block.most_high; });
  const int64_t end = least(last * (Pairs::STEP / GROUP), groups);
  for (int64_t group = first * (Pairs::STEP / GROUP); group < end; ++group) {
    const Seen seen = visible(block, group);
    if (seen == Seen::NONE) continue;
    block.all[block.batch] = seen == Seen::ALL;
    block.groups[block.batch++] = group;
    if (block.batch == BATCH) attend_batch(block);
  }
  attend_batch(block);
  end_block(block);
}

Row prepare_row(const regard_attention_args& args, int64_t b, void* space, int32_t* more) {
  const int64_t steps = ceil_div(args.m, int64_t{Pairs::STEP});
  Row row{Pairs::of_row(&args.visibility, b, args.n, args.m, space), more, more + steps};
  for (int64_t step = 0, found = -1; step < steps; ++step) {
    found = most(found, static_cast<int64_t>(row.pairs.highest[step]));
    row.before[step] = static_cast<int32_t>(found);
  }
  for (int64_t step = steps - 1, found = INT32_MAX; step >= 0; --step) {
    found = least(found, static_cast<int64_t>(row.pairs.lowest[step]));
    row.after[step] = static_cast<int32_t>(found);
  }
  return row;
}

int run(const regard_attention_args& args) {
  using regard::Workspace;
  const int64_t heads = args.heads, n = args.n, m = args.m, pairs_of_kv = args.batch * args.kv_heads;
  const int64_t steps = ceil_div(m, int64_t{Pairs::STEP}), query_blocks = ceil_div(n, int64_t{QUERIES});
  const int threads = static_cast<int>(most(args.threads, int64_t{1}));
  Problem problem{};
  problem.args = &args;
  problem.one_row = args.visibility.query_ranks_stride == 0 && args.visibility.key_ranks_stride == 0;
  problem.groups = ceil_div(m, int64_t{GROUP});
  problem.key_blocks = ceil_div(args.width, int64_t{FEATURES});
  problem.value_tiles = args.value_width / 16 + 1;
  problem.factor = args.scale * LOG2_E;

  const size_t rows = static_cast<size_t>(problem.one_row ? 1 : args.batch), more = static_cast<size_t>(2 * steps);
  const size_t pair_bytes = Pairs::bytes(n, m), parts = static_cast<size_t>(threads);
  const size_t key_line = static_cast<size_t>(problem.key_blocks * 2 * TILE);
  const size_t value_line = static_cast<size_t>(problem.value_tiles * TILE);
  const size_t all_groups = static_cast<size_t>(pairs_of_kv * problem.groups);
  Workspace space(rows * (pair_bytes + Workspace::bytes_of<int32_t>(more)) + Workspace::bytes_of<Row>(rows) +
                  all_groups * 2 * (key_line + value_line) +
                  parts * (sizeof(Block) + 2 * key_line + 2 * 2 * value_line));
  if (!space) return REGARD_OUT_OF_MEMORY;
  problem.rows = space.take<Row>(rows);
  for (size_t b = 0; b < rows; ++b) {
    char* mine = space.take<char>(pair_bytes);
    problem.rows[b] = prepare_row(args, static_cast<int64_t>(b), mine, space.take<int32_t>(more));
  }
  problem.keys = space.take<bfloat16>(all_groups * key_line);
  problem.values = space.take<bfloat16>(all_groups * value_line);

  parallel_tasks(threads, static_cast<long>(all_groups), [&](long task) {
    const int64_t pair = task / problem.groups, first = task % problem.groups * GROUP;
    const int64_t b = pair / args.kv_heads, g = pair % args.kv_heads, count = least(m - first, int64_t{GROUP});
    pack_keys(static_cast<const bfloat16*>(args.k) + b * args.k_strides[0] + g * args.k_strides[1] +
                  first * args.k_strides[2],
              args.k_strides[2], count, args.width, problem.keys + static_cast<size_t>(task) * key_line);
    pack_values(static_cast<const bfloat16*>(args.v) + b * args.v_strides[0] + g * args.v_strides[1] +
                    first * args.v_strides[2],
                args.v_strides[2], count, args.value_width,
                problem.values + static_cast<size_t>(task) * value_line);
  });

  Block* blocks = space.take<Block>(parts);
  for (size_t part = 0; part < parts; ++part) {
    blocks[part].problem = &problem;
    blocks[part].queries = space.take<bfloat16>(key_line);
    blocks[part].output = space.take<float>(value_line);
  }
  const int64_t tasks = query_blocks * args.batch * heads;
  long next = 0;
  parallel(static_cast<int>(least(tasks, int64_t{threads})), [&](int part) {
    const Tiles tiles;
    Block& block = blocks[part];
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      // one head after the other, while its keys are in cache; the last queries first: in causal attention they have
      // the most keys, and the shortest tasks should come last
      const int64_t head = task / query_blocks;
      block.b = head / heads;
      block.h = head % heads;
      block.begin = (query_blocks - 1 - task % query_blocks) * QUERIES;
      block.count = static_cast<int>(least(n - block.begin, int64_t{QUERIES}));
      block.row = &problem.rows[problem.one_row ? 0 : block.b];
      block.pairs = block.row->pairs.of_head(block.b, block.h);
      const int64_t pair = block.b * args.kv_heads + block.h / (heads / args.kv_heads);
      block.keys = problem.keys + static_cast<size_t>(pair * problem.groups) * key_line;
      block.values = problem.values + static_cast<size_t>(pair * problem.groups) * value_line;
      attend(block);
    }
  });
  return REGARD_OK;
}

}  // namespace

int attention(const regard_attention_args* args) {
  const bool takes = args->dtype == REGARD_BFLOAT16 && args->rule == REGARD_SOFTMAX && !(args->softcap > 0) &&
                     args->biases.bias == nullptr && args->biases.distance == nullptr && args->kv_heads > 0 &&
                     args->heads % args->kv_heads == 0 && args->width > 0 && args->value_width > 0 &&
                     args->batch * args->heads * args->n > 0;
  return takes ? run(*args) : isa_avx512_bf16::attention(args);
}

}  // namespace REGARD_ISA
