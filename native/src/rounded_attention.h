// Attention of one token per row to tokens whose keys and values are in 8 bits, followed by those of a cache in float32.
//
// Scores of a block's keys multiply codes by the query times the steps of its channels; the softmax's weights times the
// steps of the values then multiply the values' codes, which lie channel by channel. Codes become float32 in registers.
#pragma once

#include "regard_decoder.h"

#include "elementwise.h"
#include "lane_sums.h"
#include "lanes.h"
#include "parallel.h"
#include "token_blocks.h"

namespace REGARD_ISA {
namespace {

// to = exp(sign x - max(sign x)), where `to` may be x; returns the sum.
float weigh(int64_t count, float sign, const float* x, float* to) {
  Vec top = broadcast(-__builtin_inff()), total = zero();
  over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    const Vec v = take<FULL>(x + i, lanes) * sign;
    top = maximum(top, FULL ? v : select(lane_numbers() < lanes, v, top));
  });
  const Vec highest = broadcast(largest(top));
  over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    const Vec e = exp(take<FULL>(x + i, lanes) * sign - highest);
    put<FULL>(to + i, e, lanes);
    total += FULL ? e : select(lane_numbers() < lanes, e, zero());
  });
  return sum(total);
}

struct RoundedCall {
  const regard_decoder_layer* layer;
  const regard_decoder_rounded* rounded;
  int64_t batch, heads, kv_heads, width;
  const int64_t* lengths;  // (batch,) tokens in the layer's cache
  const float* q;          // (batch, heads, width)
  float* out;              // (batch, heads, width)
  float* scores;           // (batch, heads, line)
  int64_t line;            // at least the tokens of all blocks and of the longest row
  float* room;             // room_for_rounded() numbers

  int64_t group() const { return heads / kv_heads; }
  int64_t padded() const { return round_up(width, static_cast<int64_t>(LANES)); }
  int64_t parts() const { return rounded->count + 1; }  // blocks, and the cache
  float* row(int64_t b, int64_t h) const { return scores + (b * heads + h) * line; }
};

// Number of the tokens of the first `blocks` blocks.
int64_t tokens_in(const regard_decoder_rounded& rounded, int64_t blocks) {
  int64_t found = 0;
  for (int64_t i = 0; i < blocks; ++i) found += rounded.blocks[i].tokens;
  return found;
}

int64_t room_for_rounded(int64_t batch, int64_t heads, int64_t kv_heads, int64_t width, int64_t blocks) {
  const int64_t tasks = batch * kv_heads * (blocks + 1);
  return tasks * (heads / kv_heads) * round_up(width, static_cast<int64_t>(LANES));
}

REGARD_INLINE Vec codes_at(const int8_t* p, int count) {
  if (count == LANES) return __builtin_convertvector(signed_bytes(p), Vec);
  int8_t some[LANES] = {};
  __builtin_memcpy(some, p, static_cast<size_t>(count));
  return __builtin_convertvector(signed_bytes(some), Vec);
}

constexpr int KEYS = 4, MOST_ROWS = LANES / KEYS;  // keys and queries whose products are summed at once

// Scores of `count` keys, at most KEYS, for ROWS queries, to be written `line` apart.
template <int ROWS>
void score_codes(const int8_t* codes, int64_t count, int64_t width, const float* queries, int64_t padded, float* to,
                 int64_t line) {
  Vec products[LANES] = {};
  over_vectors(width, [&](int64_t d, int lanes, auto full) __attribute__((always_inline)) {
    Vec q[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) q[r] = load(queries + r * padded + d);
#pragma GCC unroll 4
    for (int i = 0; i < KEYS; ++i) {
      const Vec x = codes_at(codes + least(static_cast<int64_t>(i), count - 1) * width + d, decltype(full)::value ? LANES : lanes);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) products[r * KEYS + i] = fma(q[r], x, products[r * KEYS + i]);
    }
  });
  float sums[LANES];
  store(sums, sums_of(products));
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
    __builtin_memcpy(to + r * line, sums + r * KEYS, static_cast<size_t>(count) * sizeof(float));
}

// The same for `rows` queries, at most MOST_ROWS, and any number of keys.
void score_block(const int8_t* codes, int64_t tokens, int64_t width, const float* queries, int64_t padded, int64_t rows,
                 float* to, int64_t line) {
  for (int64_t j = 0; j < tokens; j += KEYS) {
    const int64_t count = least(static_cast<int64_t>(KEYS), tokens - j);
    const int8_t* const at = codes + j * width;
    if (rows == 1)
      score_codes<1>(at, count, width, queries, padded, to + j, line);
    else if (rows == 2)
      score_codes<(2 < MOST_ROWS ? 2 : MOST_ROWS)>(at, count, width, queries, padded, to + j, line);
    else if (rows == 3)
      score_codes<(3 < MOST_ROWS ? 3 : MOST_ROWS)>(at, count, width, queries, padded, to + j, line);
    else
      score_codes<MOST_ROWS>(at, count, width, queries, padded, to + j, line);
  }
}

// Scores of the keys of one block, or of the cache, for the queries of one kv head.
void score_part(const RoundedCall& call, int64_t task) {
  const int64_t part = task % call.parts(), pair = task / call.parts(), b = pair / call.kv_heads, g = pair % call.kv_heads;
  const int64_t padded = call.padded(), group = call.group(), width = call.width;
  float* const queries = call.room + task * group * padded;
  const bool own = part == call.rounded->count;
  const regard_decoder_block* const block = own ? nullptr : call.rounded->blocks + part;
  const int64_t first = tokens_in(*call.rounded, part);
  for (int64_t r = 0; r < group; ++r) {
    const float* const q = call.q + (b * call.heads + g * group + r) * width;
    for (int64_t d = 0; d < padded; ++d)
      queries[r * padded + d] = d < width ? call.layer->scale * q[d] * (own ? 1.f : block->k_step[pair * width + d]) : 0.f;
  }
  if (!own) {
    const int8_t* const codes = block->k + pair * block->tokens * width;
    for (int64_t r = 0; r < group; r += MOST_ROWS)
      score_block(codes, block->tokens, width, queries + r * padded, padded,
                  least(static_cast<int64_t>(MOST_ROWS), group - r), call.row(b, g * group + r) + first, call.line);
    return;
  }
  const int64_t stride = call.layer->keys_strides[2], tokens = call.lengths[b];
  const float* const keys = call.layer->keys + b * call.layer->keys_strides[0] + g * call.layer->keys_strides[1];
  for (int64_t j = 0; j < tokens; j += LANES) {
    const int here = static_cast<int>(least(static_cast<int64_t>(LANES), tokens - j));
    for (int64_t r = 0; r < group; ++r) {
      float* const to = call.row(b, g * group + r) + first + j;
      if (here == LANES)
        store(to, dots<false>(keys + j * stride, stride, LANES, queries + r * padded, width));
      else
        store(to, dots<true>(keys + j * stride, stride, here, queries + r * padded, width), here);
    }
  }
}

// Turns one query's scores into weights, those of rounded tokens times the steps of their values.
void weigh_rounded(const RoundedCall& call, int64_t task) {
  const int64_t b = task / call.heads, h = task % call.heads, pair = b * call.kv_heads + h / call.group();
  const int64_t before = tokens_in(*call.rounded, call.rounded->count), total = before + call.lengths[b];
  float* weights = call.row(b, h);
  const float share = 1.f / weigh(total, 1.f, weights, weights);
  for (int64_t i = 0; i < call.rounded->count; ++i) {
    const regard_decoder_block& block = call.rounded->blocks[i];
    const float* const steps = block.v_step + pair * block.tokens;
    over_vectors(block.tokens, [&](int64_t t, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      put<FULL>(weights + t, take<FULL>(weights + t, count) * take<FULL>(steps + t, count) * share, count);
    });
    weights += block.tokens;
  }
  over_vectors(call.lengths[b], [&](int64_t t, int count, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    put<FULL>(weights + t, take<FULL>(weights + t, count) * share, count);
  });
}

// Adds to sums[r * LANES + e] what the rounded values of CHANNELS channels from `first` on give to the output of ROWS queries,
// whose weights are `line` apart.
template <int ROWS, int CHANNELS>
void sum_codes(const RoundedCall& call, int64_t pair, int64_t first, const float* weights, float* sums) {
  Vec totals[ROWS][CHANNELS] = {};
  for (int64_t i = 0; i < call.rounded->count; ++i) {
    const regard_decoder_block& block = call.rounded->blocks[i];
    const int64_t tokens = block.tokens, line = call.line;
    const int8_t* const codes = block.v + (pair * call.width + first) * tokens;
    over_vectors(tokens, [&](int64_t t, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      Vec w[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) w[r] = take<FULL>(weights + r * line + t, count);
#pragma GCC unroll 4
      for (int e = 0; e < CHANNELS; ++e) {
        const Vec x = codes_at(codes + e * tokens + t, FULL ? LANES : count);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) totals[r][e] = fma(w[r], x, totals[r][e]);
      }
    });
    weights += tokens;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int e = 0; e < CHANNELS; ++e) sums[r * LANES + e] += sum(totals[r][e]);
}

// A vector of channels of the output of ROWS queries from query h on.
template <int ROWS>
void sum_channels(const RoundedCall& call, int64_t b, int64_t h, int64_t first) {
  const int64_t g = h / call.group(), pair = b * call.kv_heads + g, width = call.width;
  const int channels = static_cast<int>(least(static_cast<int64_t>(LANES), width - first));
  const int64_t before = tokens_in(*call.rounded, call.rounded->count), stride = call.layer->values_strides[2];
  const float* const weights = call.row(b, h);
  const float* const values =
      call.layer->values + b * call.layer->values_strides[0] + g * call.layer->values_strides[1] + first;
  Vec own[ROWS] = {};
  for (int64_t j = 0; j < call.lengths[b]; ++j) {
    const Vec v = channels == LANES ? load(values + j * stride) : load(values + j * stride, channels);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) own[r] = fma(broadcast(weights[r * call.line + before + j]), v, own[r]);
  }
  float sums[ROWS][LANES];
  for (int r = 0; r < ROWS; ++r) store(sums[r], own[r]);
  int e = 0;
  for (; e + 4 <= channels; e += 4) sum_codes<ROWS, 4>(call, pair, first + e, weights, sums[0] + e);
  for (; e < channels; ++e) sum_codes<ROWS, 1>(call, pair, first + e, weights, sums[0] + e);
  for (int r = 0; r < ROWS; ++r)
    __builtin_memcpy(call.out + (b * call.heads + h + r) * width + first, sums[r],
                     static_cast<size_t>(channels) * sizeof(float));
}

void attend_rounded(const RoundedCall& call, int threads) {
  const int64_t pairs = call.batch * call.kv_heads, vectors = call.padded() / LANES;
  parallel_tasks(threads, static_cast<long>(pairs * call.parts()), [&](long task) {
    const FlushDenormals flush;
    score_part(call, task);
  });
  parallel_tasks(threads, static_cast<long>(call.batch * call.heads), [&](long task) {
    const FlushDenormals flush;
    weigh_rounded(call, task);
  });
  parallel_tasks(threads, static_cast<long>(pairs * vectors), [&](long task) {
    const FlushDenormals flush;
    const int64_t pair = task / vectors, channel = task % vectors * LANES, b = pair / call.kv_heads;
    const int64_t begin = pair % call.kv_heads * call.group(), end = begin + call.group();
    int64_t h = begin;
    for (; h + 3 <= end; h += 3) sum_channels<3>(call, b, h, channel);
    for (; h < end; ++h) sum_channels<1>(call, b, h, channel);
  });
}

}  // namespace
}  // namespace REGARD_ISA
