// Gradients of blocked attention.
//
// A task is one key/value head of one row of the batch with all query heads that share it or, with fewer heads than
// threads, a share of its key blocks. For each query head it loops over key blocks and, inside, over query blocks. The
// gradients of a key block stay in cache; those of the queries are summed in a buffer of the head, and the shares'
// buffers are added in a fixed order at the end. Weights are recomputed from the log-sum-exp, with five products per
// tile:
//   S = Q K^T,  W = weight(S),  dV += W^T dO,  dW = dO V^T,  dS = weight'(S) dW,  dK += dS^T Q,  dQ += dS K.
//
// For softmax with a sink, whose share of the denominator leaves the fraction f_i to the keys of query i, the weights
// are f_i R_ij with R = exp(s - lse). With dO scaled by f_i beforehand, dV = R^T dO and
// dS = R (dW - f_i delta_i + grad_lse_i), delta_i = grad_out_i . out_i, hold for any sink, and f_i may vanish.
//
// For clipped softmax, W = clip(c R + low) with c = high - low, dS = R (c a dW - delta_i + grad_lse_i) where a is 1 for
// weights that are not clipped, bounds included, and 0 for others, and delta_i = sum over j of c a R dW. That sum
// cannot be computed from the output, so tasks first go over their tiles for it; both passes clip the same weights.

#include "regard_attention.h"

#include <math.h>
#include <string.h>

#include "vector.h"

#include "attention_pairs.h"
#include "parallel.h"
#include "product.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

constexpr int QUERIES = 64;  // of a tile
constexpr int KEYS = Pairs::STEP;
constexpr int PARTS = 4;  // into which the queries of a partly visible tile are divided

// Rows of features as float32 in panels of columns. The rows of a panel are contiguous, so that a tile does not occupy
// only a few sets of the cache, whatever the strides of the tensors. Columns are padded with zeros to full vectors.
struct Panels {
  int features, width, count;

  explicit Panels(int64_t all)
      : features(static_cast<int>(all)),
        width(all <= 96 ? static_cast<int>(most<int64_t>(LANES, round_up(all, LANES))) : 64),
        count(static_cast<int>(most<int64_t>(1, ceil_div(all, width)))) {}

  int used(int panel) const { return least(width, features - panel * width); }
  int padded(int panel) const { return static_cast<int>(round_up(used(panel), LANES)); }
  size_t floats(int64_t rows) const { return static_cast<size_t>(rows * width * count); }
};

// to = scale_i from_i by rows; `scales` nullptr for ones.
template <class T>
void pack(const Panels& panels, int64_t rows, const T* from, int64_t stride, const float* scales, float* to) {
  for (int panel = 0; panel < panels.count; ++panel)
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = from + i * stride + panel * panels.width;
      float* place = to + (panel * rows + i) * panels.width;
      const float scale = scales == nullptr ? 1.f : scales[i];
      const int used = panels.used(panel);
      int j = 0;
      for (; j + LANES <= used; j += LANES) store(place + j, load(row + j) * scale);
      if (j < used) store(place + j, load(row + j, used - j) * scale);
    }
}

// to = scale from, for the first `rows` of `from_rows` rows.
template <class T>
void unpack(const Panels& panels, int64_t rows, int64_t from_rows, const float* from, float scale, T* to,
            int64_t stride) {
  for (int panel = 0; panel < panels.count; ++panel)
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = from + (panel * from_rows + i) * panels.width;
      T* place = to + i * stride + panel * panels.width;
      const int used = panels.used(panel);
      int j = 0;
      for (; j + LANES <= used; j += LANES) store(place + j, load(row + j) * scale);
      if (j < used) store(place + j, load(row + j) * scale, used - j);
    }
}

// Transposes LANES vectors. Stage `step` exchanges elements whose row and column differ in that bit.
#if defined(__AVX512F__)
template <int STEP>
REGARD_INLINE void transpose_stage(Vec (&block)[LANES]) {
  alignas(64) int32_t below[LANES], above[LANES];
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES; ++lane) {
    below[lane] = (lane & STEP) ? LANES + lane - STEP : lane;
    above[lane] = (lane & STEP) ? LANES + lane : lane + STEP;
  }
  const __m512i first = _mm512_load_si512(below), second = _mm512_load_si512(above);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if ((i & STEP) == 0) {
      const __m512 a = reinterpret_cast<__m512>(block[i]), b = reinterpret_cast<__m512>(block[i + STEP]);
      block[i] = reinterpret_cast<Vec>(_mm512_permutex2var_ps(a, first, b));
      block[i + STEP] = reinterpret_cast<Vec>(_mm512_permutex2var_ps(a, second, b));
    }
}
REGARD_INLINE void transpose_lanes(Vec (&block)[LANES]) {
  transpose_stage<8>(block);
  transpose_stage<4>(block);
  transpose_stage<2>(block);
  transpose_stage<1>(block);
}
#else
REGARD_INLINE void transpose_lanes(Vec (&block)[LANES]) {
  for (int i = 0; i < LANES; ++i)
    for (int j = i + 1; j < LANES; ++j) {
      const float x = block[i][j];
      block[i][j] = block[j][i];
      block[j][i] = x;
    }
}
#endif

// Transposes each panel of a key block to (width, KEYS), with zeros for missing keys.
void transpose_block(const Panels& panels, int keys, const float* from, float* to) {
  for (int panel = 0; panel < panels.count; ++panel) {
    const float* source = from + static_cast<int64_t>(panel) * keys * panels.width;
    float* target = to + static_cast<int64_t>(panel) * panels.width * KEYS;
    for (int row = 0; row < KEYS; row += LANES)
      for (int column = 0; column < panels.padded(panel); column += LANES) {
        Vec block[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i)
          block[i] = row + i < keys ? load(source + (row + i) * panels.width + column) : zero();
        transpose_lanes(block);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(target + (column + i) * KEYS + row, block[i]);
      }
  }
}

// tanh with a relative error of about 1e-7: a polynomial where 1 - 2 / (e^2x + 1) would cancel.
REGARD_INLINE Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p = broadcast(-0.005895155481994152f);
  p = fma(p, z, broadcast(0.020795969292521477f));
  p = fma(p, z, broadcast(-0.053783830255270004f));
  p = fma(p, z, broadcast(0.13331924378871918f));
  p = fma(p, z, broadcast(-0.33333298563957214f));
  const Vec size = select(reinterpret_cast<IntVec>(x < 0.f), -x, x);
  const Vec grown = exp(minimum(broadcast(20.f), size + size));
  const Vec far = 1.f - 2.f * reciprocal(grown + 1.f);
  const Vec signed_far = select(reinterpret_cast<IntVec>(x < 0.f), -far, far);
  return select(reinterpret_cast<IntVec>(z < 0.36f), fma(p * z, x, x), signed_far);
}

// 1 / (1 + e^-x), never less than 2^-126.
REGARD_INLINE Vec sigmoid(Vec x) { return reciprocal(1.f + exp2(minimum(broadcast(125.f), x * -LOG2_E))); }

REGARD_INLINE Vec square_root(Vec x) {
  float lanes[LANES];
  store(lanes, x);
  for (int i = 0; i < LANES; ++i) lanes[i] = __builtin_sqrtf(lanes[i]);
  return load(lanes);
}

struct Scratch {
  float* weights;  // (QUERIES, KEYS); of softmax exp(s - lse), before clipping, and negative if that changes them
  float* scores;   // (QUERIES, KEYS): gradient of the scores
  float* slopes;   // (QUERIES, KEYS): derivative of the softcap; nullptr without one
};

// Everything except q and k on which the weights of a tile depend.
struct Scores {
  const regard_attention_args* call;
  Pairs pairs;
  const float* bias;      // bias of this row and head, or nullptr
  const float* distance;  // distance table of this head, or nullptr
  const float* lse;       // (n,) log-sum-exp of softmax
  int64_t columns[KEYS];  // columns of the block mask for the keys of this block, -1 outside it
  int32_t ranks[KEYS];    // ranks of the keys of this block, -1 for missing keys
  int64_t first, keys;    // first slot and number of slots of this block
  bool consecutive;       // whether the ranks of its slots are consecutive

  void begin_block(int64_t step) {
    const regard_visibility* rule = pairs.rule;
    first = step * KEYS;
    keys = least<int64_t>(KEYS, call->m - first);
    consecutive = !pairs.gaps[step];
    for (int64_t j = 0; j < KEYS; ++j) ranks[j] = j < keys ? pairs.keys[first + j] : Pairs::ABSENT;
    if (pairs.blocks == nullptr) return;
    for (int64_t j = 0; j < KEYS; ++j) {
      const int64_t column = ranks[j] < 0 ? -1 : ranks[j] / rule->block_size;
      columns[j] = column < rule->blocks_columns ? column : -1;
    }
  }

  // The interval of key ranks that all visibility rules but the block mask allow a query to see.
  void interval(int64_t i, int32_t* low, int32_t* high) const {
    const regard_visibility* rule = pairs.rule;
    const int64_t rank = pairs.queries[i];
    int64_t from = 0, to = INT32_MAX;
    if (rule->causal) to = rank;
    if (rule->left >= 0) from = most(from, rank - rule->left);
    if (rule->right >= 0) to = least(to, rank + rule->right);
    if (rule->block > 0) {
      const int64_t block = Pairs::floor_div(static_cast<int32_t>(rank), static_cast<int32_t>(rule->block));
      from = most(from, (block - rule->lookback) * rule->block);
      to = least(to, (block + rule->lookahead + 1) * rule->block - 1);
    }
    *low = static_cast<int32_t>(least<int64_t>(from, INT32_MAX));
    *high = static_cast<int32_t>(most<int64_t>(to, -1));
  }

  // Number of keys of this block up to the last one that any of these queries may see.
  int reach(int64_t i, int64_t i_end) const {
    if (!consecutive) return static_cast<int>(keys);
    int64_t last = -1;
    for (; i < i_end; ++i) {
      int32_t low, high;
      interval(i, &low, &high);
      last = most<int64_t>(last, high);
    }
    return static_cast<int>(most<int64_t>(0, least<int64_t>(keys, last - ranks[0] + 1)));
  }

  // Mask of the keys of this block that query i sees: -1, or 0 for hidden keys.
  void visible(int64_t i, int32_t* mask) const {
    int32_t low, high;
    interval(i, &low, &high);
    const IntVec from = low - IntVec{}, to = high - IntVec{};
#pragma GCC unroll 16
    for (int j = 0; j < KEYS; j += LANES) {
      IntVec rank;
      __builtin_memcpy(&rank, ranks + j, sizeof rank);
      const IntVec seen = (rank >= from) & (rank <= to);
      __builtin_memcpy(mask + j, &seen, sizeof seen);
    }
    if (pairs.blocks == nullptr) return;
    const regard_visibility* rule = pairs.rule;
    const int32_t row = Pairs::floor_div(pairs.queries[i], static_cast<int32_t>(rule->block_size));
    const bool inside = row >= 0 && row < rule->blocks_rows;
    const uint8_t* blocks = inside ? pairs.blocks + row * rule->blocks_strides[2] : nullptr;
    for (int j = 0; j < KEYS; ++j)
      if (!inside || columns[j] < 0 || blocks[columns[j]] == 0) mask[j] = 0;
  }

  // The biases added to the scores of query i; a bias of -inf (or NaN, as in torch) hides the pair.
  void add_biases(int64_t i, int32_t* mask, float* added) const {
    for (int j = 0; j < KEYS; ++j) added[j] = 0;
    if (bias != nullptr) {
      const int64_t* strides = call->biases.bias_strides;
      const float* row = bias + i * strides[2] + first * strides[3];
      for (int64_t j = 0; j < keys; ++j) added[j] = row[j * strides[3]];
    }
    if (distance != nullptr) {
      const int64_t zero_at = call->biases.distance_zero - pairs.queries[i];
      if (consecutive) {
        // only hidden pairs may be outside the table
        const int64_t at = zero_at + ranks[0];
        const int64_t from = most<int64_t>(0, -at), to = least(keys, call->biases.distances - at);
        for (int64_t j = from; j < to; ++j) added[j] += distance[at + j];
      } else {
        for (int64_t j = 0; j < keys; ++j)
          if (mask[j]) added[j] += distance[zero_at + ranks[j]];
      }
    }
    for (int j = 0; j < KEYS; ++j) mask[j] &= added[j] > -INFINITY ? -1 : 0;
  }
};

// A weight from a score minus the log-sum-exp: at most 1, even if the difference of large numbers is rounded up.
REGARD_INLINE Vec share(Vec x) { return exp(minimum(zero(), x)); }

// W from S = Q K^T in place, for softmax without softcap and biases.
template <bool MASKED>
void plain_weights(const Scores& scores, int64_t i0, int queries, int padded, float* weights) {
  const Vec scale = broadcast(scores.call->scale);
  alignas(64) int32_t mask[KEYS];
  for (int i = 0; i < queries; ++i) {
    // subtracted before the change to base 2, so that exact large numbers stay exact
    const Vec lse = broadcast(-scores.lse[i0 + i]);
    float* row = weights + i * KEYS;
    if (MASKED) scores.visible(i0 + i, mask);
    for (int j = 0; j < padded; j += LANES) {
      Vec w = share(fma(load(row + j), scale, lse));
      if (MASKED) {
        IntVec seen;
        __builtin_memcpy(&seen, mask + j, sizeof seen);
        w = select(seen, w, zero());
      }
      store(row + j, w);
    }
  }
}

// Whether weights are relative to a log-sum-exp.
inline bool normalised(const regard_attention_args& call) {
  return call.rule == REGARD_SOFTMAX || call.rule == REGARD_CLIPPED;
}

// W from S = Q K^T in place, for any rule, with softcap and biases.
void any_weights(const Scores& scores, int64_t i0, int queries, int padded, bool masked, const Scratch& tile) {
  const regard_attention_args& call = *scores.call;
  const bool biased = scores.bias != nullptr || scores.distance != nullptr;
  alignas(64) int32_t mask[KEYS];
  alignas(64) float added[KEYS];
  for (int j = 0; j < KEYS; ++j) mask[j] = -1;
  for (int i = 0; i < queries; ++i) {
    float* row = tile.weights + i * KEYS;
    if (masked)
      scores.visible(i0 + i, mask);
    else if (biased)
      for (int j = 0; j < KEYS; ++j) mask[j] = -1;
    if (biased) scores.add_biases(i0 + i, mask, added);
    const Vec lse = broadcast(normalised(call) ? -scores.lse[i0 + i] : 0.f);
    for (int j = 0; j < padded; j += LANES) {
      Vec s = load(row + j) * call.scale;
      if (call.softcap > 0) {
        const Vec u = tanh(s / call.softcap);
        store(tile.slopes + i * KEYS + j, 1.f - u * u);
        s = u * call.softcap;
      }
      if (biased) s += load(added + j);
      Vec w;
      if (normalised(call)) {
        w = share(s + lse);
      } else if (call.rule == REGARD_SIGMOID) {
        w = sigmoid(s + call.shift);
      } else {
        w = maximum(zero(), s + call.shift);
        if (call.rule == REGARD_RELU_SQUARED) w *= w;
      }
      IntVec seen;
      __builtin_memcpy(&seen, mask + j, sizeof seen);
      w = select(seen, w, zero());
      if (call.rule == REGARD_CLIPPED) {
        const Vec stretched = fma(w, broadcast(call.high - call.low), broadcast(call.low));
        w = select(reinterpret_cast<IntVec>(stretched >= 0.f) & reinterpret_cast<IntVec>(stretched <= 1.f), w, -w);
      }
      store(row + j, w);
    }
  }
}

// dS from dW in place, for softmax without softcap; `offsets` (n,) are the terms added to dW at the head of this file.
// With HIDE, pairs of weight 0 have gradient 0 even if dW is not finite.
template <bool HIDE>
void plain_gradients(const float* offsets, int64_t i0, int queries, int padded, const Scratch& tile) {
  for (int i = 0; i < queries; ++i) {
    const Vec offset = broadcast(offsets[i0 + i]);
    for (int j = 0; j < padded; j += LANES) {
      const Vec w = load(tile.weights + i * KEYS + j);
      Vec ds = w * (load(tile.scores + i * KEYS + j) + offset);
      if (HIDE) ds = select(reinterpret_cast<IntVec>(w == 0.f), zero(), ds);
      store(tile.scores + i * KEYS + j, ds);
    }
  }
}

void any_gradients(int32_t rule, const float* offsets, int64_t i0, int queries, int padded, const Scratch& tile) {
  for (int i = 0; i < queries; ++i) {
    const Vec offset = broadcast(rule == REGARD_SOFTMAX ? offsets[i0 + i] : 0.f);
    for (int j = 0; j < padded; j += LANES) {
      const Vec w = load(tile.weights + i * KEYS + j);
      Vec ds = load(tile.scores + i * KEYS + j);
      if (rule == REGARD_SOFTMAX)
        ds = w * (ds + offset);
      else if (rule == REGARD_SIGMOID)
        ds *= w * (1.f - w);
      else if (rule == REGARD_RELU_SQUARED)
        ds *= 2.f * square_root(w);
      ds = select(reinterpret_cast<IntVec>(w == 0.f), zero(), ds);
      store(tile.scores + i * KEYS + j, ds);
    }
  }
}

// dS from dW in place for clipped softmax; also clips the weights.
void clipped_gradients(const regard_attention_args& call, const float* offsets, int64_t i0, int queries, int padded,
                       const Scratch& tile) {
  const Vec range = broadcast(call.high - call.low), low = broadcast(call.low);
  for (int i = 0; i < queries; ++i) {
    const Vec offset = broadcast(offsets[i0 + i]);
    for (int j = 0; j < padded; j += LANES) {
      float *weights = tile.weights + i * KEYS + j, *scores = tile.scores + i * KEYS + j;
      const Vec kept = load(weights), w = select(reinterpret_cast<IntVec>(kept < 0.f), -kept, kept);
      const Vec dw = select(reinterpret_cast<IntVec>(kept > 0.f), load(scores) * range, zero());
      store(scores, select(reinterpret_cast<IntVec>(w == 0.f), zero(), w * (dw + offset)));
      store(weights, minimum(broadcast(1.f), maximum(zero(), fma(w, range, low))));
    }
  }
}

// Adds the keys of a tile to the sums delta_i of clipped softmax, `sums` (n,).
void add_clipped_sums(const regard_attention_args& call, int64_t i0, int queries, int padded, const Scratch& tile,
                      float* sums) {
  for (int i = 0; i < queries; ++i) {
    Vec total = zero();
    for (int j = 0; j < padded; j += LANES) {
      const Vec kept = load(tile.weights + i * KEYS + j);
      total += select(reinterpret_cast<IntVec>(kept > 0.f), kept * load(tile.scores + i * KEYS + j), zero());
    }
    sums[i0 + i] += (call.high - call.low) * sum(total);
  }
}

// Where a task adds the gradients of a head's biases; nullptr if not wanted. For a bias that all keys share, `sums`
// holds the task's sums over keys.
struct BiasGradients {
  float* pairs;     // (n|1, m)
  double* sums;     // (n|1,)
  float* distance;  // (distances,)
  bool by_query;    // whether each query has its own biases

  bool wanted() const { return pairs != nullptr || sums != nullptr || distance != nullptr; }
};

// A call, with the data that all tasks share.
struct Backward {
  const regard_attention_backward_args* args;
  const regard_attention_args* call;
  Panels width, value_width;
  int64_t group, splits, blocks;  // query heads per key head; shares of its key blocks; key blocks
  float* shares;                  // (splits, batch, heads) gradients of the queries; nullptr with one share
  float* sinks;                   // (batch, heads)
  float* distances;               // (batch * splits, heads, distances)
  double* bias_sums;              // (batch * splits, heads, n|1) for a bias that all keys share
  float* clipped_sums;            // (splits, batch, heads, n) delta_i of clipped softmax

  static int64_t offset(const int64_t* strides, int64_t row, int64_t head, int64_t token = 0) {
    return row * strides[0] + head * strides[1] + token * strides[2];
  }
};

// Buffers of a task.
struct Buffers {
  float *q, *grad_out, *grad_q;           // of a head, in panels
  float *offsets, *fractions;             // of a head, (n,)
  float *k, *k_turned, *v, *v_turned;     // of a key block
  float *grad_k, *grad_v;                 // of a key block, or with grouped heads of all the task's blocks
  Scratch tile;
  void* pairs;

  // Lays the buffers out in `space`, or with nullptr only counts bytes.
  size_t lay_out(const Backward& b, char* space) {
    size_t used = 0;
    const auto take = [&](auto** place, size_t count) {
      using T = typename RemoveReference<decltype(**place)>::type;
      *place = space == nullptr ? nullptr : reinterpret_cast<T*>(space + used);
      used += (count * sizeof(T) + 63) / 64 * 64;
    };
    const regard_attention_args& call = *b.call;
    const int64_t kept = b.group > 1 ? ceil_div(b.blocks, b.splits) : 1;
    take(&q, b.width.floats(call.n));
    take(&grad_out, b.value_width.floats(call.n));
    take(&grad_q, b.splits > 1 ? 0 : b.width.floats(call.n));
    take(&offsets, static_cast<size_t>(call.n));
    take(&fractions, static_cast<size_t>(call.n));
    take(&k, b.width.floats(KEYS));
    take(&k_turned, b.width.floats(KEYS));
    take(&v, b.value_width.floats(KEYS));
    take(&v_turned, b.value_width.floats(KEYS));
    take(&grad_k, b.width.floats(KEYS * kept));
    take(&grad_v, b.value_width.floats(KEYS * kept));
    take(&tile.weights, QUERIES * KEYS);
    take(&tile.scores, QUERIES * KEYS);
    take(&tile.slopes, call.softcap > 0 ? QUERIES * KEYS : 0);
    char* place = nullptr;
    take(&place, Pairs::bytes(call.n, call.m));
    pairs = place;
    return used;
  }
};

// Prepares what depends on a single query: the keys' fraction of softmax's denominator, and the offset added to dW.
// Returns the gradient of the head's sink.
template <class T>
float prepare_queries(const Backward& b, int64_t row, int64_t head, const Buffers& to) {
  const regard_attention_args& call = *b.call;
  const bool softmax = call.rule == REGARD_SOFTMAX;
  const T* q = static_cast<const T*>(call.q) + Backward::offset(call.q_strides, row, head);
  const T* grad_out = static_cast<const T*>(b.args->grad_out) + Backward::offset(b.args->grad_out_strides, row, head);
  pack(b.width, call.n, q, call.q_strides[2], nullptr, to.q);
  double sink_total = 0;
  if (softmax) {
    const T* out = static_cast<const T*>(call.out) + Backward::offset(call.out_strides, row, head);
    const int64_t at = (row * call.heads + head) * call.n;
    // limited so that the log-sum-exp stays finite, as in the torch backend
    const float sink = call.sink == nullptr ? 0.f : least(FLT_MAX / 2, most(-FLT_MAX / 2, call.sink[head]));
    for (int64_t i = 0; i < call.n; ++i) {
      const T* x = out + i * call.out_strides[2];
      const T* y = grad_out + i * b.args->grad_out_strides[2];
      Vec sums = zero();
      int64_t j = 0;
      for (; j + LANES <= call.value_width; j += LANES) sums = fma(load(x + j), load(y + j), sums);
      const int rest = static_cast<int>(call.value_width - j);
      if (rest > 0) sums = fma(load(x + j, rest), load(y + j, rest), sums);
      const float delta = sum(sums), lse = call.lse[at + i];
      float fraction = 1;
      if (call.sink != nullptr) {
        // both shares are 1 / (1 + e^x); the head's sink has the score `sink` and the value 0
        fraction = 1.f / (1.f + expf(sink - lse));
        if (lse != -INFINITY) sink_total -= 1.f / (1.f + expf(lse - sink)) * static_cast<double>(delta);
      }
      to.fractions[i] = fraction;
      to.offsets[i] = -fraction * delta + (b.args->grad_lse == nullptr ? 0.f : b.args->grad_lse[at + i]);
    }
  }
  if (call.rule == REGARD_CLIPPED) {
    const int64_t at = (row * call.heads + head) * call.n, apart = call.batch * call.heads * call.n;
    for (int64_t i = 0; i < call.n; ++i) {
      float total = 0;
      for (int64_t split = 0; split < b.splits; ++split) total += b.clipped_sums[split * apart + at + i];
      to.offsets[i] = (b.args->grad_lse == nullptr ? 0.f : b.args->grad_lse[at + i]) - total;
    }
  }
  pack(b.value_width, call.n, grad_out, b.args->grad_out_strides[2],
       softmax && call.sink != nullptr ? to.fractions : nullptr, to.grad_out);
  return static_cast<float>(sink_total);
}

// Adds a tile's score gradients to those of the biases.
void add_bias_gradients(const Scores& scores, int64_t i0, int queries, int keys, const Scratch& tile,
                        const BiasGradients& to) {
  const regard_attention_args& call = *scores.call;
  for (int i = 0; i < queries; ++i) {
    const float* row = tile.scores + i * KEYS;
    if (to.pairs != nullptr) {
      float* place = to.pairs + (to.by_query ? (i0 + i) * call.m : 0) + scores.first;
      int j = 0;
      for (; j + LANES <= keys; j += LANES) store(place + j, load(place + j) + load(row + j));
      for (; j < keys; ++j) place[j] += row[j];
    }
    if (to.sums != nullptr) {
      Vec total = zero();
      int j = 0;
      for (; j + LANES <= keys; j += LANES) total += load(row + j);
      if (j < keys) total += load(row + j, keys - j);
      to.sums[to.by_query ? i0 + i : 0] += static_cast<double>(sum(total));
    }
    if (to.distance != nullptr) {
      // gradients of hidden pairs are 0, and their distances may be outside the table
      const int64_t zero_at = call.biases.distance_zero - scores.pairs.queries[i0 + i];
      if (scores.consecutive) {
        const int64_t at = zero_at + scores.ranks[0];
        const int64_t from = most<int64_t>(0, -at), end = least<int64_t>(keys, call.biases.distances - at);
        for (int64_t j = from; j < end; ++j) to.distance[at + j] += row[j];
      } else {
        for (int j = 0; j < keys; ++j)
          if (row[j] != 0) to.distance[zero_at + scores.ranks[j]] += row[j];
      }
    }
  }
}

// to (rows x columns of a panel) += A from, where A (rows x inner) is a tile or its transpose and `from` has the same
// panels as `to`.
void add_product(const Panels& panels, int rows, int inner, const float* a, int64_t ai, int64_t ap, const float* from,
                 int64_t from_rows, float* to, int64_t to_rows) {
  for (int panel = 0; panel < panels.count; ++panel)
    product<Into::SUM>(rows, panels.padded(panel), inner, a, ai, ap, from + panel * from_rows * panels.width,
                       panels.width, to + panel * to_rows * panels.width, panels.width);
}

// to (queries x padded) = rows of `x` times the transposed key block `y`.
void tile_product(const Panels& panels, int queries, int padded, const float* x, int64_t x_rows, const float* y,
                  float* to) {
  product<Into::ZERO>(queries, padded, panels.used(0), x, panels.width, 1, y, KEYS, to, KEYS);
  for (int panel = 1; panel < panels.count; ++panel)
    product<Into::SUM>(queries, padded, panels.used(panel), x + panel * x_rows * panels.width, panels.width, 1,
                       y + static_cast<int64_t>(panel) * panels.width * KEYS, KEYS, to, KEYS);
}

// One tile: `queries` from slot i0 on with the first `keys` of the key block in `of`, the only ones that they may see.
void run_tile(const Backward& b, const Scores& scores, bool plain, bool masked, int64_t i0, int queries, int keys,
              const Buffers& of, float* grad_q, float* grad_k, float* grad_v, const BiasGradients& biases) {
  const regard_attention_args& call = *b.call;
  const int padded = static_cast<int>(round_up(keys, LANES)), kept = static_cast<int>(scores.keys);
  const float* q = of.q + i0 * b.width.width;
  const float* grad_out = of.grad_out + i0 * b.value_width.width;
  const Scratch& tile = of.tile;
  tile_product(b.width, queries, padded, q, call.n, of.k_turned, tile.weights);
  if (!plain)
    any_weights(scores, i0, queries, padded, masked, tile);
  else if (masked)
    plain_weights<true>(scores, i0, queries, padded, tile.weights);
  else
    plain_weights<false>(scores, i0, queries, padded, tile.weights);
  const bool clipped = call.rule == REGARD_CLIPPED;
  if (!clipped) add_product(b.value_width, keys, queries, tile.weights, 1, KEYS, grad_out, call.n, grad_v, KEYS);

  tile_product(b.value_width, queries, padded, grad_out, call.n, of.v_turned, tile.scores);
  if (clipped) {
    clipped_gradients(call, of.offsets, i0, queries, padded, tile);
    add_product(b.value_width, keys, queries, tile.weights, 1, KEYS, grad_out, call.n, grad_v, KEYS);
  } else if (!plain)
    any_gradients(call.rule, of.offsets, i0, queries, padded, tile);
  else if (masked)
    plain_gradients<true>(of.offsets, i0, queries, padded, tile);
  else
    plain_gradients<false>(of.offsets, i0, queries, padded, tile);
  if (biases.wanted()) add_bias_gradients(scores, i0, queries, keys, tile, biases);
  if (call.softcap > 0)
    for (int at = 0; at < queries * KEYS; at += LANES)
      store(tile.scores + at, load(tile.scores + at) * load(tile.slopes + at));
  add_product(b.width, keys, queries, tile.scores, 1, KEYS, q, call.n, grad_k, KEYS);
  add_product(b.width, queries, keys, tile.scores, KEYS, 1, of.k, kept, grad_q + i0 * b.width.width, call.n);
}

// Calls visit(i0, queries, keys, masked) for all non-empty tiles of a key block: `queries` from slot i0 on may only see
// the first `keys` of its keys. The block has been loaded to `to` by then.
template <class T, class F>
void visit_tiles(const Backward& b, const Scores& scores, int64_t block, const T* k, const T* v, const Buffers& to,
                 F&& visit) {
  const regard_attention_args& call = *b.call;
  const int keys = static_cast<int>(scores.keys);
  bool begun = false;
  for (int64_t i0 = 0; i0 < call.n; i0 += QUERIES) {
    const int queries = static_cast<int>(least<int64_t>(QUERIES, call.n - i0));
    const Tile found = scores.pairs.classify(i0, i0 + queries, block);
    if (found == Tile::EMPTY) continue;
    const bool masked = found == Tile::PARTIAL;
    if (!begun) {
      begun = true;
      pack(b.width, keys, k + scores.first * call.k_strides[2], call.k_strides[2], nullptr, to.k);
      pack(b.value_width, keys, v + scores.first * call.v_strides[2], call.v_strides[2], nullptr, to.v);
      transpose_block(b.width, keys, to.k, to.k_turned);
      transpose_block(b.value_width, keys, to.v, to.v_turned);
    }
    // a tile across the diagonal is divided into parts, the first of which need fewer keys
    const int part = masked ? QUERIES / PARTS : QUERIES;
    for (int64_t i = i0; i < i0 + queries; i += part) {
      const int rows = static_cast<int>(least<int64_t>(part, i0 + queries - i));
      visit(i, rows, masked ? scores.reach(i, i + rows) : keys, masked);
    }
  }
}

// The `Scores` of a head of a row, before begin_block.
Scores scores_of(const regard_attention_args& call, const Pairs& pairs, int64_t row, int64_t head) {
  Scores scores;
  scores.call = &call;
  scores.pairs = pairs.of_head(row, head);
  scores.lse = call.lse + (row * call.heads + head) * call.n;
  const regard_score_biases& biases = call.biases;
  scores.bias =
      biases.bias == nullptr ? nullptr : biases.bias + row * biases.bias_strides[0] + head * biases.bias_strides[1];
  scores.distance = biases.distance == nullptr ? nullptr : biases.distance + head * biases.distance_stride;
  return scores;
}

// The sums delta_i of clipped softmax over a task's keys.
template <class T>
void sum_task(const Backward& b, int64_t row, int64_t kv_head, int64_t split, const Buffers& to) {
  const regard_attention_args& call = *b.call;
  const Pairs pairs = Pairs::of_row(&call.visibility, row, call.n, call.m, to.pairs);
  const T* k = static_cast<const T*>(call.k) + Backward::offset(call.k_strides, row, kv_head);
  const T* v = static_cast<const T*>(call.v) + Backward::offset(call.v_strides, row, kv_head);
  for (int64_t head = kv_head * b.group; head < (kv_head + 1) * b.group; ++head) {
    const T* q = static_cast<const T*>(call.q) + Backward::offset(call.q_strides, row, head);
    const T* grad_out = static_cast<const T*>(b.args->grad_out) + Backward::offset(b.args->grad_out_strides, row, head);
    pack(b.width, call.n, q, call.q_strides[2], nullptr, to.q);
    pack(b.value_width, call.n, grad_out, b.args->grad_out_strides[2], nullptr, to.grad_out);
    float* sums = b.clipped_sums + ((split * call.batch + row) * call.heads + head) * call.n;
    memset(sums, 0, static_cast<size_t>(call.n) * sizeof(float));
    Scores scores = scores_of(call, pairs, row, head);
    for (int64_t block = split; block < b.blocks; block += b.splits) {
      scores.begin_block(block);
      visit_tiles<T>(b, scores, block, k, v, to, [&](int64_t i0, int queries, int keys, bool masked) {
        const int padded = static_cast<int>(round_up(keys, LANES));
        tile_product(b.width, queries, padded, to.q + i0 * b.width.width, call.n, to.k_turned, to.tile.weights);
        any_weights(scores, i0, queries, padded, masked, to.tile);
        const float* grads = to.grad_out + i0 * b.value_width.width;
        tile_product(b.value_width, queries, padded, grads, call.n, to.v_turned, to.tile.scores);
        add_clipped_sums(call, i0, queries, padded, to.tile, sums);
      });
    }
  }
}

template <class T>
void run_task(const Backward& b, int64_t row, int64_t kv_head, int64_t split, Buffers& to) {
  const regard_attention_args& call = *b.call;
  const regard_attention_backward_args& args = *b.args;
  const bool plain = call.rule == REGARD_SOFTMAX && !(call.softcap > 0) && call.biases.bias == nullptr &&
                     call.biases.distance == nullptr;
  const Pairs pairs = Pairs::of_row(&call.visibility, row, call.n, call.m, to.pairs);
  const T* k = static_cast<const T*>(call.k) + Backward::offset(call.k_strides, row, kv_head);
  const T* v = static_cast<const T*>(call.v) + Backward::offset(call.v_strides, row, kv_head);
  for (int64_t member = 0; member < b.group; ++member) {
    const int64_t head = kv_head * b.group + member, place = row * call.heads + head;
    const float sink = prepare_queries<T>(b, row, head, to);
    if (split == 0 && b.sinks != nullptr) b.sinks[place] = sink;
    const size_t floats = b.width.floats(call.n);
    float* grad_q = b.splits > 1 ? b.shares + (split * call.batch * call.heads + place) * floats : to.grad_q;
    memset(grad_q, 0, floats * sizeof(float));
    const int64_t share = (row * b.splits + split) * call.heads + head, bias_rows = args.grad_bias_queries;
    BiasGradients biases{nullptr, nullptr, nullptr, bias_rows > 1};
    if (b.bias_sums != nullptr) {
      biases.sums = b.bias_sums + share * bias_rows;
      memset(biases.sums, 0, static_cast<size_t>(bias_rows) * sizeof(double));
    } else if (args.grad_bias != nullptr) {
      biases.pairs = args.grad_bias + place * bias_rows * call.m;
    }
    if (b.distances != nullptr) {
      biases.distance = b.distances + share * call.biases.distances;
      memset(biases.distance, 0, static_cast<size_t>(call.biases.distances) * sizeof(float));
    }
    Scores scores = scores_of(call, pairs, row, head);
    for (int64_t block = split, kept = 0; block < b.blocks; block += b.splits, kept += b.group > 1) {
      float* grad_k = to.grad_k + static_cast<size_t>(kept) * b.width.floats(KEYS);
      float* grad_v = to.grad_v + static_cast<size_t>(kept) * b.value_width.floats(KEYS);
      if (member == 0) {
        memset(grad_k, 0, b.width.floats(KEYS) * sizeof(float));
        memset(grad_v, 0, b.value_width.floats(KEYS) * sizeof(float));
      }
      scores.begin_block(block);
      const int keys = static_cast<int>(scores.keys);
      if (biases.pairs != nullptr)
        for (int64_t i = 0; i < bias_rows; ++i)
          memset(biases.pairs + i * call.m + scores.first, 0, static_cast<size_t>(keys) * sizeof(float));
      visit_tiles<T>(b, scores, block, k, v, to, [&](int64_t i0, int queries, int reach, bool masked) {
        run_tile(b, scores, plain, masked, i0, queries, reach, to, grad_q, grad_k, grad_v, biases);
      });
      if (member + 1 < b.group) continue;
      T* grad = static_cast<T*>(args.grad_k) + Backward::offset(args.grad_k_strides, row, kv_head, scores.first);
      unpack(b.width, keys, KEYS, grad_k, call.scale, grad, args.grad_k_strides[2]);
      grad = static_cast<T*>(args.grad_v) + Backward::offset(args.grad_v_strides, row, kv_head, scores.first);
      unpack(b.value_width, keys, KEYS, grad_v, 1.f, grad, args.grad_v_strides[2]);
    }
    if (b.splits > 1) continue;
    T* grad = static_cast<T*>(args.grad_q) + Backward::offset(args.grad_q_strides, row, head);
    unpack(b.width, call.n, call.n, grad_q, call.scale, grad, args.grad_q_strides[2]);
  }
}

// Adds up the shares of some queries' gradients in order.
template <class T>
void add_shares(const Backward& b, int64_t place, int64_t i0, int64_t rows) {
  const regard_attention_args& call = *b.call;
  const Panels& panels = b.width;
  const size_t floats = panels.floats(call.n), apart = floats * static_cast<size_t>(call.batch * call.heads);
  float* first = b.shares + place * floats;
  for (int panel = 0; panel < panels.count; ++panel) {
    float* to = first + (panel * call.n + i0) * panels.width;
    for (int64_t split = 1; split < b.splits; ++split) {
      const float* from = to + split * apart;
      for (int64_t at = 0; at < rows * panels.width; at += LANES) store(to + at, load(to + at) + load(from + at));
    }
  }
  T* grad = static_cast<T*>(b.args->grad_q) +
            Backward::offset(b.args->grad_q_strides, place / call.heads, place % call.heads, i0);
  unpack(panels, rows, call.n, first + i0 * panels.width, call.scale, grad, b.args->grad_q_strides[2]);
}

// Number of shares that keeps threads busy: the smallest that leaves few of them idle at the end, otherwise the best.
int64_t shares_of(int64_t tasks, int64_t blocks, int64_t threads) {
  int64_t best = 1;
  double most_busy = 0;
  for (int64_t shares = 1; shares <= least(blocks, threads); ++shares) {
    const double busy = static_cast<double>(tasks * shares) / (ceil_div(tasks * shares, threads) * threads);
    if (busy > most_busy) {
      most_busy = busy;
      best = shares;
    }
    if (most_busy > 0.85) break;
  }
  return best;
}

template <class T>
int backward(Backward& b) {
  const regard_attention_args& call = *b.call;
  const int threads = static_cast<int>(call.threads);
  const int64_t heads = call.batch * call.heads, key_heads = call.batch * call.kv_heads;
  b.splits = shares_of(key_heads, b.blocks, threads);
  const bool sinks = call.rule == REGARD_SOFTMAX && call.sink != nullptr && b.args->grad_sink != nullptr;
  const int64_t distances = b.args->grad_distance == nullptr ? 0 : call.heads * call.biases.distances;
  const bool summed = b.args->grad_bias != nullptr && b.args->grad_bias_keys < call.m;
  const int64_t bias_sums = summed ? call.heads * b.args->grad_bias_queries : 0, parts = call.batch * b.splits;
  const size_t shares = b.splits > 1 ? static_cast<size_t>(b.splits * heads) * b.width.floats(call.n) : 0;
  const bool clipped = call.rule == REGARD_CLIPPED;
  const size_t sums = clipped ? static_cast<size_t>(b.splits * heads * call.n) : 0;
  using regard::Workspace;
  Workspace shared(Workspace::bytes_of<float>(shares) + Workspace::bytes_of<float>(static_cast<size_t>(heads)) +
                   Workspace::bytes_of<float>(static_cast<size_t>(parts * distances)) +
                   Workspace::bytes_of<float>(sums) +
                   Workspace::bytes_of<double>(static_cast<size_t>(parts * bias_sums)));
  if (!shared) return REGARD_OUT_OF_MEMORY;
  b.shares = shared.take<float>(shares);
  b.sinks = sinks ? shared.take<float>(static_cast<size_t>(heads)) : nullptr;
  b.distances = distances == 0 ? nullptr : shared.take<float>(static_cast<size_t>(parts * distances));
  b.bias_sums = bias_sums == 0 ? nullptr : shared.take<double>(static_cast<size_t>(parts * bias_sums));

  b.clipped_sums = shared.take<float>(sums);
  int status = REGARD_OK;
  const auto each_task = [&](auto task_of) {
    parallel_tasks(threads, static_cast<long>(key_heads * b.splits), [&](long task) {
      Buffers buffers;
      Workspace space(buffers.lay_out(b, nullptr));
      if (!space) {
        __atomic_store_n(&status, static_cast<int>(REGARD_OUT_OF_MEMORY), __ATOMIC_RELAXED);
        return;
      }
      buffers.lay_out(b, static_cast<char*>(space.memory));
      const int64_t place = task / b.splits;
      task_of(b, place / call.kv_heads, place % call.kv_heads, task % b.splits, buffers);
    });
  };
  if (clipped) each_task(sum_task<T>);
  if (status == REGARD_OK) each_task(run_task<T>);
  if (status != REGARD_OK) return status;

  if (b.splits > 1) {
    const int64_t pieces = ceil_div(call.n, QUERIES);
    parallel_tasks(threads, static_cast<long>(heads * pieces), [&](long task) {
      const int64_t i0 = task % pieces * QUERIES;
      add_shares<T>(b, task / pieces, i0, least<int64_t>(QUERIES, call.n - i0));
    });
  }
  if (b.args->grad_sink != nullptr)
    for (int64_t head = 0; head < call.heads; ++head) {
      double total = 0;
      for (int64_t row = 0; sinks && row < call.batch; ++row) total += b.sinks[row * call.heads + head];
      b.args->grad_sink[head] = static_cast<float>(total);
    }
  for (int64_t at = 0; at < distances; ++at) {
    double total = 0;
    for (int64_t part = 0; part < parts; ++part) total += b.distances[part * distances + at];
    b.args->grad_distance[at] = static_cast<float>(total);
  }
  for (int64_t row = 0; row < call.batch; ++row)
    for (int64_t at = 0; at < bias_sums; ++at) {
      double total = 0;
      for (int64_t split = 0; split < b.splits; ++split) total += b.bias_sums[(row * b.splits + split) * bias_sums + at];
      b.args->grad_bias[row * bias_sums + at] = static_cast<float>(total);
    }
  return REGARD_OK;
}

}  // namespace

int attention_backward(const regard_attention_backward_args* args) {
  const regard_attention_args* call = args->forward;
  if (call->size != static_cast<int64_t>(sizeof(regard_attention_args))) return REGARD_WRONG_SIZE;
  if (call->threads < 1 || call->rule < REGARD_SOFTMAX || call->rule > REGARD_CLIPPED) return REGARD_BAD_ARGUMENT;
  if (call->kv_heads < 1 || call->heads % call->kv_heads != 0) return REGARD_BAD_ARGUMENT;
  const bool softmax = call->rule == REGARD_SOFTMAX, clipped = call->rule == REGARD_CLIPPED;
  if (call->batch * call->heads * call->n > 0 &&
      (((softmax || clipped) && call->lse == nullptr) || (softmax && call->out == nullptr)))
    return REGARD_BAD_ARGUMENT;
  if (clipped && call->sink != nullptr) return REGARD_BAD_ARGUMENT;
  if (args->grad_distance != nullptr && call->biases.distance == nullptr) return REGARD_BAD_ARGUMENT;
  if (args->grad_bias != nullptr && ((args->grad_bias_queries != 1 && args->grad_bias_queries != call->n) ||
                                     (args->grad_bias_keys != 1 && args->grad_bias_keys != call->m)))
    return REGARD_BAD_ARGUMENT;
  Backward b{args, call, Panels(call->width), Panels(call->value_width), call->heads / call->kv_heads, 1,
             ceil_div(call->m, KEYS), nullptr, nullptr, nullptr, nullptr, nullptr};
  switch (call->dtype) {
    case REGARD_FLOAT32:
      return backward<float>(b);
    case REGARD_BFLOAT16:
      return backward<bfloat16>(b);
    default:
      return REGARD_BAD_ARGUMENT;
  }
}

}  // namespace REGARD_ISA
