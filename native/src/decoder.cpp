// Layers of a decoder for few tokens, each in two calls or all in one: at that size the overhead between operations
// exceeds the time of most operations.

#include "regard_attention.h"
#include "regard_decoder.h"
#include "regard_quantized_linear.h"
#include "regard_quest_attention.h"
#include "regard_recurrence.h"

#include "elementwise.h"
#include "feature_maps.h"

#include "parallel.h"
#include "rounded_attention.h"
#include "workspace.h"

namespace REGARD_ISA {

int quantized_linears(const regard_quantized_linear_args* args, int count);

namespace {

using regard::Workspace;

bool wrong(const regard_weight& w, int64_t k) { return w.k != k || w.n < 1 || w.codes == nullptr; }

bool same_scale(const regard_weight& a, const regard_weight& b) {
  if (a.input_scale == b.input_scale) return true;
  return a.input_scale != nullptr && b.input_scale != nullptr &&
         __builtin_memcmp(a.input_scale, b.input_scale, static_cast<size_t>(a.k) * sizeof(float)) == 0;
}

struct Product {
  const regard_weight* weight;
  float* y;
};

// Several products of one input. `scaled` has room for a copy of the input for each.
template <int COUNT>
int apply(int64_t threads, int64_t m, const float* x, float* scaled, const Product (&products)[COUNT]) {
  regard_quantized_linear_args all[COUNT] = {};
  for (int p = 0; p < COUNT; ++p) {
    const regard_weight& w = *products[p].weight;
    const bool like_last = p > 0 && same_scale(*products[p - 1].weight, w);
    const float* input = like_last ? all[p - 1].x : x;
    if (w.input_scale != nullptr && !like_last) {
      for (int64_t t = 0; t < m; ++t)
        over_vectors(w.k, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
          constexpr bool FULL = decltype(full)::value;
          put<FULL>(scaled + t * w.k + i, take<FULL>(x + t * w.k + i, count) * take<FULL>(w.input_scale + i, count), count);
        });
      input = scaled;
      scaled += m * w.k;
    }
    regard_quantized_linear_args& a = all[p];
    a.size = sizeof a;
    a.threads = threads;
    a.bits = w.bits;
    a.m = m;
    a.n = w.n;
    a.k = w.k;
    a.columns = w.columns;
    a.group = w.group;
    a.x = input;
    a.x_stride = w.k;
    a.codes = w.codes;
    a.scale = w.scale;
    a.offset = w.offset;
    a.bias = w.bias;
    a.rounded = w.rounded;
    a.y = products[p].y;
  }
  return quantized_linears(all, COUNT);
}

void normalise(int64_t m, int64_t width, float eps, const float* x, const float* weight, float* y) {
  for (int64_t t = 0; t < m; ++t, x += width, y += width) {
    Vec squares = zero();
    over_vectors(width, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      const Vec v = take<FULL>(x + i, count);
      squares = fma(v, v, squares);
    });
    const Vec factor = broadcast(1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + eps));
    over_vectors(width, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      put<FULL>(y + i, take<FULL>(x + i, count) * factor * take<FULL>(weight + i, count), count);
    });
  }
}

void turn(int64_t m, int64_t n, int64_t width, const float* cosine, const float* sine, float* y) {
  const int64_t half = width / 2;
  for (int64_t t = 0; t < m; ++t, cosine += width, sine += width)
    for (int64_t h = 0; h < n / width; ++h, y += width)
      over_vectors(half, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
        constexpr bool FULL = decltype(full)::value;
        const Vec a = take<FULL>(y + i, count), b = take<FULL>(y + half + i, count);
        put<FULL>(y + i, a * take<FULL>(cosine + i, count) - b * take<FULL>(sine + i, count), count);
        put<FULL>(y + half + i, b * take<FULL>(cosine + half + i, count) + a * take<FULL>(sine + half + i, count), count);
      });
}

void gate(int64_t count, float* gates, const float* values) {
  over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    const Vec g = take<FULL>(gates + i, lanes);
    put<FULL>(gates + i, g * sigmoid(g) * take<FULL>(values + i, lanes), lanes);
  });
}

void add(int64_t count, const float* x, float* y) {
  over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    put<FULL>(y + i, take<FULL>(x + i, lanes) + take<FULL>(y + i, lanes), lanes);
  });
}

int64_t fewer_in(const regard_decoder_layers_args& a, int64_t layer) { return a.fewer == nullptr ? 0 : a.fewer[layer]; }

int64_t slot_in(const regard_decoder_layers_args& a, int64_t layer) { return a.slots == nullptr ? -1 : a.slots[layer]; }

// The pages that a layer reads; NULL if it reads all keys.
const regard_decoder_reading* reading_in(const regard_decoder_layers_args& a, int64_t layer) {
  return a.reading == nullptr || a.reading[layer].low == nullptr ? nullptr : a.reading + layer;
}

// How a layer drops tokens; NULL if it does not.
const regard_decoder_eviction* eviction_in(const regard_decoder_layers_args& a, int64_t layer) {
  return a.evictions == nullptr || a.evictions[layer].capacity == 0 ? nullptr : a.evictions + layer;
}

// The tokens in 8 bits before those of a layer's cache; NULL if there are none.
const regard_decoder_rounded* rounded_in(const regard_decoder_layers_args& a, int64_t layer) {
  return a.rounded == nullptr || a.rounded[layer].count == 0 ? nullptr : a.rounded + layer;
}

// The rotation of a layer whose keys are stored as they are; NULL if they are rotated once.
const regard_decoder_rotation* rotation_in(const regard_decoder_layers_args& a, int64_t layer) {
  return a.rotations == nullptr || a.rotations[layer].cosine == nullptr ? nullptr : a.rotations + layer;
}

// Adds the weights exp(score - lse) of `heads` queries, whose scores are `line` apart, to `sums`.
void add_weights(int64_t count, int64_t heads, const float* scores, int64_t line, const float* lse, float* sums) {
  for (int64_t h = 0; h < heads; ++h, scores += line)
    over_vectors(count, [&](int64_t j, int lanes, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      put<FULL>(sums + j, take<FULL>(sums + j, lanes) + exp(take<FULL>(scores + j, lanes) - lse[h]), lanes);
    });
}

// Moves the token in the last of `held` slots of one head to the slot of the one that is dropped.
void drop(const regard_decoder_layers_args& a, const regard_decoder_layer& layer, const regard_decoder_eviction& e, int64_t b,
          int64_t g, int64_t held, const float* worth) {
  int64_t* const ranks = e.ranks + (b * (layer.weights[1].n / a.head_width) + g) * e.slots;
  const int64_t last = held - 1;
  int64_t dropped = 0;
  float least = __builtin_inff();
  for (int64_t j = 0; j < held; ++j)
    if (ranks[j] < e.kept_from && worth[j] < least) least = worth[j], dropped = j;
  const auto move = [&](float* x, const int64_t (&strides)[3]) {
    x += b * strides[0] + g * strides[1];
    __builtin_memmove(x + dropped * strides[2], x + last * strides[2], static_cast<size_t>(a.head_width) * sizeof(float));
  };
  move(layer.keys, layer.keys_strides);
  move(layer.values, layer.values_strides);
  ranks[dropped] = ranks[last];
  if (e.weights == nullptr) return;
  float* const weights = e.weights + (ranks - e.ranks);
  weights[dropped] = weights[last];
}

// Drops tokens of a layer by the scores of its new queries, (batch, heads, m); `sums` has room for m numbers.
void evict(const regard_decoder_layers_args& a, const regard_decoder_layer& layer, const regard_decoder_eviction& e,
           const int64_t* lengths, const float* scores, int64_t m, const float* lse, float* sums) {
  const int64_t heads = layer.weights[0].n / a.head_width, own = layer.weights[1].n / a.head_width;
  for (int64_t b = 0; b < a.batch; ++b, scores += heads * m, lse += heads) {
    const int64_t held = lengths[b], group = heads / own;
    const bool full = held > e.capacity;
    if (e.weights == nullptr && full) {
      __builtin_memset(sums, 0, static_cast<size_t>(held) * sizeof(float));
      add_weights(held, heads, scores, m, lse, sums);
    }
    for (int64_t g = 0; g < own; ++g) {
      float* const weights = e.weights == nullptr ? nullptr : e.weights + (b * own + g) * e.slots;
      if (weights != nullptr) {
        weights[held - 1] = 0;
        add_weights(held, group, scores + g * group * m, m, lse + g * group, weights);
      }
      if (full) drop(a, layer, e, b, g, held, weights == nullptr ? sums : weights);
    }
  }
}

// Writes new keys or values, (batch, n, heads, width), to the cache of a layer.
void put_tokens(const regard_decoder_layers_args& a, int64_t layer, const float* from, int64_t heads, float* to,
                const int64_t (&strides)[3]) {
  const int64_t fewer = fewer_in(a, layer), slot = slot_in(a, layer);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t i = 0; i < a.n; ++i) {
      const int64_t t = slot < 0 ? a.lengths[b] - fewer + i : slot;
      float* place = a.pages == nullptr ? to + b * strides[0] + t * strides[2]
                                        : to + a.pages[b * a.pages_stride + t / a.page_size] * strides[0] +
                                              t % a.page_size * strides[2];
      for (int64_t h = 0; h < heads; ++h, from += a.head_width)
        __builtin_memcpy(place + h * strides[1], from, static_cast<size_t>(a.head_width) * sizeof(float));
    }
}

// Rotates new queries, (batch, n, heads, width), in place, and the first `count` keys of each row to `to`, (batch, kv heads,
// count, width), by the angles of their slots.
void turn_slots(const regard_decoder_layers_args& a, int64_t i, const regard_decoder_rotation& rotation, int64_t count,
                const int64_t* lengths, float* q, float* to) {
  const regard_decoder_layer& layer = a.layers[i];
  const int64_t width = a.head_width, queries = layer.weights[0].n, own = layer.weights[1].n / width, slot = slot_in(a, i);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t t = 0; t < a.n; ++t, q += queries) {
      const int64_t at = (slot < 0 ? lengths[b] - a.n + t : slot) * width;
      turn(1, queries, width, rotation.cosine + at, rotation.sine + at, q);
    }
  parallel_tasks(static_cast<int>(a.threads), static_cast<long>(a.batch * own), [&](long task) {
    const FlushDenormals flush;
    const int64_t b = task / own, held = lengths[b];
    const float* from = layer.keys + b * layer.keys_strides[0] + task % own * layer.keys_strides[1];
    float* const head = to + task * count * width;
    for (int64_t s = 0; s < held; ++s)
      __builtin_memcpy(head + s * width, from + s * layer.keys_strides[2], static_cast<size_t>(width) * sizeof(float));
    turn(held, width, width, rotation.cosine, rotation.sine, head);
  });
}

// Multiplies heads by `scale` and, unless eps is negative, divides them by their norms.
void scale_heads(int64_t count, int64_t width, float eps, float scale, float* x) {
  for (int64_t h = 0; h < count; ++h, x += width) {
    float factor = scale;
    if (eps >= 0) {
      Vec squares = zero();
      over_vectors(width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
        constexpr bool FULL = decltype(full)::value;
        const Vec v = take<FULL>(x + i, lanes);
        squares = fma(v, v, squares);
      });
      factor /= __builtin_sqrtf(sum(squares) + eps);
    }
    over_vectors(width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      put<FULL>(x + i, take<FULL>(x + i, lanes) * factor, lanes);
    });
  }
}

int64_t gates_of(const regard_decoder_recurrence& r) { return r.gates[1].n != 0 ? r.gates[1].n : r.gates[0].n; }

// Turns z, `each` numbers per head, into the logarithms of decays, in place, and multiplies values by their steps.
void decay(const regard_decoder_recurrence& r, int64_t m, int64_t heads, int64_t each, int64_t width, float* z, float* v) {
  const bool gated = gates_of(r) != 0;
  for (int64_t t = 0; r.gate_bias != nullptr && t < m; ++t) add(heads * each, r.gate_bias, z + t * heads * each);
  for (int64_t t = 0; t < m; ++t)
    for (int64_t h = 0; h < heads; ++h, z += each, v += width) {
      const float rate = exp(r.log_rates[h]);
      if (r.steps) scale_heads(1, width, -1.f, softplus(broadcast(r.sign * z[0])).value[0], v);
      over_vectors(each, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
        constexpr bool FULL = decltype(full)::value;
        const Vec strength = gated ? softplus(take<FULL>(z + i, lanes) * r.sign).value : broadcast(1.f);
        put<FULL>(z + i, maximum(broadcast(r.least), strength * -rate), lanes);
      });
    }
}

void map_numbers(int64_t map, int64_t count, float* x) {
  if (map <= REGARD_FEATURES_IDENTITY) return;
  with_feature_map(map, [&](auto phi) __attribute__((always_inline)) {
    over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      put<FULL>(x + i, feature<decltype(phi)::value>(take<FULL>(x + i, lanes)), lanes);
    });
  });
}

// [softmax(x W), softmax(-x W)] of one head.
void map_head(const float* x, int64_t width, const float* w, int64_t features, float* to) {
  over_vectors(features, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    Vec y = zero();
    for (int64_t d = 0; d < width; ++d) y = fma(broadcast(x[d]), take<FULL>(w + d * features + i, lanes), y);
    put<FULL>(to + i, y, lanes);
  });
  scale_heads(1, features, -1.f, 1.f / weigh(features, -1.f, to, to + features), to + features);
  scale_heads(1, features, -1.f, 1.f / weigh(features, 1.f, to, to), to);
}

// A query's sum of `count` values with weights factor exp(score - the largest), followed by the sum of the weights.
void attend_window(const float* q, int64_t width, float scale, float factor, int64_t count, const float* keys,
                   int64_t key_stride, const float* values, int64_t value_stride, float* scores, float* to) {
  for (int64_t j = 0; j < count; ++j) {
    Vec products = zero();
    over_vectors(width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      products = fma(take<FULL>(q + i, lanes), take<FULL>(keys + j * key_stride + i, lanes), products);
    });
    scores[j] = scale * sum(products);
  }
  to[width] = factor * weigh(count, 1.f, scores, scores);
  over_vectors(width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    Vec y = zero();
    for (int64_t j = 0; j < count; ++j)
      y = fma(broadcast(scores[j]), take<FULL>(values + j * value_stride + i, lanes), y);
    put<FULL>(to + i, y * factor, lanes);
  });
}

// Writes new keys or values, (batch, n, own heads, width), to their slots after the window, for each query head.
void put_behind(const regard_decoder_layers_args& a, int64_t window, const float* from, int64_t heads, int64_t own, float* to,
                const int64_t (&strides)[3]) {
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t t = 0; t < a.n; ++t)
      for (int64_t h = 0; h < heads; ++h)
        __builtin_memcpy(to + b * strides[0] + h * strides[1] + (window + t) * strides[2],
                         from + ((b * a.n + t) * own + h / (heads / own)) * a.head_width,
                         static_cast<size_t>(a.head_width) * sizeof(float));
}

// Queries, keys and values of new tokens, and room for the results of maps, normaliser and window: for each token and
// each of `writers` heads, `features` of queries and keys, and `columns` of values and of the window's output.
struct Prepared {
  const float *q, *k, *v;
  int64_t own, writers, features, columns;
  float *queries, *keys, *values, *near, *scores;
};

// Prepares token i / writers, head i % writers: the key and value to write, the mapped query, and the window's output.
void prepare(const regard_decoder_layers_args& a, const regard_decoder_layer& layer, const regard_decoder_state& state,
             const Prepared& p, int64_t i) {
  const FlushDenormals flush;
  const regard_decoder_recurrence& r = *layer.recurrence;
  const int64_t width = a.head_width, token = i / p.writers, h = i % p.writers, b = token / a.n, t = token % a.n;
  const int64_t from = (token * p.own + h / (p.writers / p.own)) * width;
  const float *key = p.k + from, *value = p.v + from;
  bool there = true;
  if (r.window != 0) {
    const auto slot = [&](const float* x, const int64_t (&strides)[3], int64_t j) {
      return x + b * strides[0] + h * strides[1] + j * strides[2];
    };
    const int64_t first = r.window - state.lengths[b], seen = most(t + 1, first);
    const float factor = r.log_window_weights == nullptr ? 1.f : exp(r.log_window_weights[h]);
    attend_window(p.q + i * width, width, layer.scale, factor, t + 1 + r.window - seen,
                  slot(state.keys, state.keys_strides, seen), state.keys_strides[2],
                  slot(state.values, state.values_strides, seen), state.values_strides[2], p.scores + i * r.window,
                  p.near + i * p.columns);
    key = slot(state.keys, state.keys_strides, t);
    value = slot(state.values, state.values_strides, t);
    there = t >= first;
  }
  float *const key_features = p.keys + i * p.features, *const columns = p.values + i * p.columns;
  if (r.maps[0] != nullptr) {
    const int64_t map = h * width * r.features;
    map_head(p.q + i * width, width, r.maps[0] + map, r.features, p.queries + i * p.features);
    if (there) map_head(key, width, r.maps[1] + map, r.features, key_features);
  }
  if (r.normalized) {
    if (there) __builtin_memcpy(columns, value, static_cast<size_t>(width) * sizeof(float));
    columns[width] = 1;
  }
  if (there) return;
  __builtin_memset(key_features, 0, static_cast<size_t>(p.features) * sizeof(float));
  __builtin_memset(columns, 0, static_cast<size_t>(p.columns) * sizeof(float));
}

// Updates a layer's state by the new tokens, and computes what its heads read from it; q, k and v are changed.
int recur(const regard_decoder_layers_args& a, const regard_decoder_layer& layer, const regard_decoder_state& state,
          const float* normed, float* q, float* k, float* v, float* read) {
  const regard_decoder_recurrence& r = *layer.recurrence;
  const int64_t tokens = a.batch * a.n, heads = layer.weights[0].n / a.head_width, own = layer.weights[1].n / a.head_width;
  const int64_t each = most<int64_t>(1, gates_of(r) / own), width = a.head_width;
  const bool mapped = r.maps[0] != nullptr, normalized = r.normalized != 0;
  const int64_t writers = mapped ? heads : own, features = mapped ? 2 * r.features : width, columns = width + normalized;
  enum { BETWEEN, GATES, RATES, SCALED, QUERIES, KEYS, VALUES, SUMS, NEAR, SCORES, PARTS };
  const int64_t sizes[PARTS] = {tokens * r.gates[0].n,
                                tokens * own * each,
                                tokens * own,
                                tokens * most(a.width, r.gates[0].n),
                                mapped ? tokens * heads * features : 0,
                                mapped ? tokens * heads * features : 0,
                                normalized ? tokens * writers * columns : 0,
                                normalized ? tokens * heads * columns : 0,
                                r.window != 0 ? tokens * heads * columns : 0,
                                tokens * heads * r.window};
  size_t bytes = 0;
  for (const int64_t size : sizes) bytes += Workspace::bytes_of<float>(static_cast<size_t>(size));
  Workspace workspace(bytes);
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float* parts[PARTS];
  for (int i = 0; i < PARTS; ++i) parts[i] = workspace.take<float>(static_cast<size_t>(sizes[i]));
  float *const g = parts[GATES], *const beta = parts[RATES], *const scaled = parts[SCALED], *const near = parts[NEAR];
  int status = REGARD_OK;
  if (r.gates[0].n != 0) {
    const bool two = r.gates[1].n != 0;
    status = apply(a.threads, tokens, normed, scaled, {Product{&r.gates[0], two ? parts[BETWEEN] : g}});
    if (status == REGARD_OK && two) status = apply(a.threads, tokens, parts[BETWEEN], scaled, {Product{&r.gates[1], g}});
  }
  if (status == REGARD_OK && r.beta.n != 0) status = apply(a.threads, tokens, normed, scaled, {Product{&r.beta, beta}});
  if (status != REGARD_OK) return status;
  if (r.log_rates != nullptr) decay(r, tokens, own, each, width, g, v);
  if (r.beta.n != 0)
    over_vectors(tokens * own, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      put<FULL>(beta + i, sigmoid(take<FULL>(beta + i, lanes)) * r.most_beta, lanes);
    });

  if (r.window != 0) {
    put_behind(a, r.window, k, heads, own, state.keys, state.keys_strides);
    put_behind(a, r.window, v, heads, own, state.values, state.values_strides);
  }
  const Prepared prepared{q, k, v, own, writers, features, columns, parts[QUERIES], parts[KEYS], parts[VALUES],
                          near, parts[SCORES]};
  if (mapped || normalized)  // otherwise it would only be a copy
    parallel_tasks(mapped ? static_cast<int>(a.threads) : 1, static_cast<long>(tokens * writers),
                   [&](long i) { prepare(a, layer, state, prepared, i); });
  if (mapped) q = parts[QUERIES], k = parts[KEYS];
  if (normalized) v = parts[VALUES];
  map_numbers(r.feature_map, tokens * heads * features, q);
  map_numbers(r.feature_map, tokens * writers * features, k);
  if (r.eps[0] >= 0 || r.scale != 1.f) scale_heads(tokens * heads, features, r.eps[0], r.scale, q);
  if (r.eps[1] >= 0) scale_heads(tokens * own, features, r.eps[1], 1.f, k);

  float* const sums = normalized ? parts[SUMS] : read;
  regard_gated_recurrence_step_args step{};
  step.size = sizeof step;
  step.threads = a.threads;
  step.batch = a.batch;
  step.heads = heads;
  step.key_width = features;
  step.value_width = columns;
  step.decay = r.log_rates == nullptr ? REGARD_DECAY_NONE : each == 1 ? REGARD_DECAY_SCALAR : REGARD_DECAY_VECTOR;
  step.new_state = state.after;
  for (int64_t t = 0; t < a.n; ++t) {
    const auto rows = [&](float* x, int64_t count, int64_t size) {
      return regard_sequence{x + t * count * size, REGARD_FLOAT32, count, a.n * count * size, size, 0};
    };
    step.q = rows(q, heads, features);
    step.k = rows(k, writers, features);
    step.v = rows(v, normalized ? writers : own, columns);
    step.o = rows(sums, heads, columns);
    if (r.log_rates != nullptr) step.g = rows(g, own, each);
    if (r.beta.n != 0) step.beta = rows(beta, own, 1);
    step.state = t == 0 ? state.before : state.after;
    status = regard_gated_recurrence_step(&step);
    if (status != REGARD_OK) return status;
  }
  for (int64_t i = 0; normalized && i < tokens * heads; ++i) {
    if (r.window != 0) add(columns, near + i * columns, sums + i * columns);
    const float total = sums[i * columns + width] + r.divisor;
    __builtin_memcpy(read + i * width, sums + i * columns, static_cast<size_t>(width) * sizeof(float));
    scale_heads(1, width, -1.f, total == 0 ? 0.f : 1.f / total, read + i * width);
  }
  return REGARD_OK;
}

bool wrong(const regard_decoder_recurrence& r, int64_t width, int64_t heads, int64_t head_width) {
  const int64_t gates = gates_of(r);
  if (r.gates[0].n != 0 ? wrong(r.gates[0], width) : gates != 0) return true;
  if (r.gates[1].n != 0 && wrong(r.gates[1], r.gates[0].n)) return true;
  if (gates != 0 && gates != heads && gates != heads * head_width) return true;
  if (gates == 0 && r.gate_bias != nullptr) return true;
  if (r.log_rates == nullptr ? gates != 0 || r.steps : r.steps && gates != heads) return true;
  if (r.beta.n != 0 && (wrong(r.beta, width) || r.beta.n != heads)) return true;
  const bool mapped = r.maps[0] != nullptr, plain = r.feature_map <= REGARD_FEATURES_IDENTITY;
  if (r.feature_map < REGARD_FEATURES_AS_THEY_ARE || r.feature_map > REGARD_FEATURES_SILU) return true;
  if (mapped != (r.maps[1] != nullptr) || (mapped && (r.features < 1 || !plain))) return true;
  if (mapped && (r.log_rates != nullptr || r.beta.n != 0 || r.eps[1] >= 0)) return true;
  return r.window < 0 || (r.window > 0 && !(mapped && r.normalized));
}

bool wrong(const regard_decoder_recurrence& r, const regard_decoder_state& state) {
  if (state.before == nullptr || state.after == nullptr) return true;
  return r.window > 0 && (state.keys == nullptr || state.values == nullptr || state.lengths == nullptr);
}

bool wrong(const regard_decoder_reading& reading, const regard_decoder_layer& layer, int64_t n, int64_t heads, int64_t width) {
  if (n != 1 || reading.high == nullptr || layer.left >= 0 || reading.chosen < 0) return true;
  if (reading.page_size < 1 || reading.slots < reading.page_size || reading.slots % reading.page_size) return true;
  const int64_t each = reading.slots * width, contiguous[3] = {heads * each, each, width};
  for (int j = 0; j < 3; ++j)
    if (layer.keys_strides[j] != contiguous[j] || layer.values_strides[j] != contiguous[j]) return true;
  return false;
}

bool wrong(const regard_decoder_layers_args& a, const regard_decoder_eviction& e, int64_t layer) {
  if (a.n != 1 || e.ranks == nullptr || e.capacity < 0 || a.layers[layer].left >= 0) return true;
  if (slot_in(a, layer) >= 0 || reading_in(a, layer) != nullptr) return true;
  for (int64_t b = 0; b < a.batch; ++b)
    if (a.lengths[b] - fewer_in(a, layer) >= e.slots) return true;
  return false;
}

bool wrong(const regard_decoder_layers_args& a, const regard_decoder_rounded& rounded, int64_t layer) {
  if (a.n != 1 || rounded.count < 0 || rounded.blocks == nullptr || a.layers[layer].left >= 0) return true;
  if (slot_in(a, layer) >= 0 || reading_in(a, layer) != nullptr || eviction_in(a, layer) != nullptr) return true;
  for (int64_t i = 0; i < rounded.count; ++i) {
    const regard_decoder_block& block = rounded.blocks[i];
    if (block.tokens < 1 || block.k == nullptr || block.v == nullptr) return true;
    if (block.k_step == nullptr || block.v_step == nullptr) return true;
  }
  return false;
}

bool wrong(const regard_decoder_layers_args& a, const regard_decoder_rotation& rotation, int64_t layer) {
  if (rotation.sine == nullptr || a.layers[layer].recurrence != nullptr) return true;
  if (reading_in(a, layer) != nullptr || eviction_in(a, layer) != nullptr || rounded_in(a, layer) != nullptr) return true;
  for (int64_t b = 0; b < a.batch; ++b)
    if (a.lengths[b] - fewer_in(a, layer) + a.n > rotation.slots) return true;
  return false;
}

bool wrong(const regard_decoder_layers_args& a) {
  if (a.threads < 1 || a.batch < 0 || a.n < 0 || a.count < 0 || a.width < 1 || a.head_width < 2 || a.head_width % 2) return true;
  if (a.pages != nullptr && (a.page_size < 1 || a.padding != nullptr)) return true;
  const bool whole = a.fewer == nullptr && a.slots == nullptr && a.reading == nullptr && a.evictions == nullptr &&
                     a.rounded == nullptr && a.rotations == nullptr;
  if (!whole && (a.pages != nullptr || a.padding != nullptr)) return true;
  const regard_decoder_state* state = a.states;
  for (int64_t i = 0; i < a.count; ++i) {
    const int64_t fewer = fewer_in(a, i), slot = slot_in(a, i);
    if (fewer < 0 || slot < -1 || (slot >= 0 && (a.n != 1 || a.layers[i].left >= 0))) return true;
    for (int64_t b = 0; b < a.batch; ++b)
      if (fewer > a.lengths[b] || slot > a.lengths[b] - fewer) return true;
    const regard_decoder_reading* reading = reading_in(a, i);
    for (int64_t b = 0; reading != nullptr && b < a.batch; ++b)
      if (a.lengths[b] - fewer >= reading->slots) return true;
    const auto& w = a.layers[i].weights;
    const int64_t heads = w[0].n / a.head_width, kv_heads = w[1].n / a.head_width;
    if (w[0].n % a.head_width || w[1].n % a.head_width || kv_heads < 1 || heads % kv_heads || w[2].n != w[1].n) return true;
    for (int j = 0; j < 6; ++j)
      if (j != 3 && wrong(w[j], a.width)) return true;
    if (wrong(w[3], w[0].n) || wrong(w[6], w[4].n) || w[3].n != a.width || w[5].n != w[4].n || w[6].n != a.width) return true;
    const regard_decoder_layer& layer = a.layers[i];
    if (layer.recurrence == nullptr && reading != nullptr && wrong(*reading, layer, a.n, kv_heads, a.head_width)) return true;
    const regard_decoder_eviction* eviction = eviction_in(a, i);
    if (layer.recurrence == nullptr && eviction != nullptr && wrong(a, *eviction, i)) return true;
    const regard_decoder_rounded* rounded = rounded_in(a, i);
    if (layer.recurrence == nullptr && rounded != nullptr && wrong(a, *rounded, i)) return true;
    const regard_decoder_rotation* rotation = rotation_in(a, i);
    if (rotation != nullptr && wrong(a, *rotation, i)) return true;
    if (layer.recurrence == nullptr) continue;
    if (a.n < 1 || a.states == nullptr || wrong(*layer.recurrence, a.width, kv_heads, a.head_width)) return true;
    if (wrong(*layer.recurrence, *state++)) return true;
  }
  return false;
}

}  // namespace

int decoder_inputs(const regard_decoder_inputs_args* args) {
  const auto& a = *args;
  if (a.threads < 1 || a.m < 0 || a.width < 1 || a.head_width < 2 || a.head_width % 2) return REGARD_BAD_ARGUMENT;
  for (int i = 0; i < 3; ++i)
    if (wrong(a.projections[i], a.width) || (i < 2 && a.projections[i].n % a.head_width)) return REGARD_BAD_ARGUMENT;
  const size_t count = static_cast<size_t>(a.m * a.width);
  Workspace workspace(Workspace::bytes_of<float>(count) + Workspace::bytes_of<float>(3 * count));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float *const room = workspace.take<float>(count), *const scaled = workspace.take<float>(3 * count);
  float* const normed = a.normed == nullptr ? room : a.normed;
  normalise(a.m, a.width, a.eps, a.x, a.norm, normed);
  const int status = apply(a.threads, a.m, normed, scaled,
                           {Product{a.projections, a.outputs[0]}, Product{a.projections + 1, a.outputs[1]},
                            Product{a.projections + 2, a.outputs[2]}});
  if (status != REGARD_OK) return status;
  for (int i = 0; a.cosine != nullptr && i < 2; ++i)
    turn(a.m, a.projections[i].n, a.head_width, a.cosine, a.sine, a.outputs[i]);
  return REGARD_OK;
}

int decoder_outputs(const regard_decoder_outputs_args* args) {
  const auto& a = *args;
  if (a.threads < 1 || a.m < 0 || a.width < 1) return REGARD_BAD_ARGUMENT;
  const int64_t hidden = a.gate.n;
  if (wrong(a.gate, a.width) || wrong(a.up, a.width) || wrong(a.down, hidden) || wrong(a.output, a.output.k))
    return REGARD_BAD_ARGUMENT;
  if (a.up.n != hidden || a.down.n != a.width || a.output.n != a.width) return REGARD_BAD_ARGUMENT;
  const size_t count = static_cast<size_t>(a.m * a.width), inner = static_cast<size_t>(a.m * hidden);
  const size_t widest = static_cast<size_t>(a.m * most(most(a.output.k, hidden), 2 * a.width));
  Workspace workspace(2 * Workspace::bytes_of<float>(count) + 2 * Workspace::bytes_of<float>(inner) +
                      Workspace::bytes_of<float>(widest));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float *const sum = workspace.take<float>(count), *const normed = workspace.take<float>(count);
  float *const gates = workspace.take<float>(inner), *const values = workspace.take<float>(inner);
  float* const scaled = workspace.take<float>(widest);
  int status = apply(a.threads, a.m, a.attended, scaled, {Product{&a.output, sum}});
  if (status != REGARD_OK) return status;
  add(a.m * a.width, a.x, sum);
  normalise(a.m, a.width, a.eps, sum, a.norm, normed);
  status = apply(a.threads, a.m, normed, scaled, {Product{&a.gate, gates}, Product{&a.up, values}});
  if (status != REGARD_OK) return status;
  gate(a.m * hidden, gates, values);
  status = apply(a.threads, a.m, gates, scaled, {Product{&a.down, a.y}});
  if (status != REGARD_OK) return status;
  add(a.m * a.width, sum, a.y);
  return REGARD_OK;
}

int decoder_layers(const regard_decoder_layers_args* args) {
  const auto& a = *args;
  if (wrong(a)) return REGARD_BAD_ARGUMENT;
  const int64_t tokens = a.batch * a.n;
  int64_t queries = 0, keys = 0, longest = 0;
  bool recurrent = false;
  for (int64_t i = 0; i < a.count; ++i) {
    recurrent = recurrent || a.layers[i].recurrence != nullptr;
    queries = most(queries, a.layers[i].weights[0].n);
    keys = most(keys, a.layers[i].weights[1].n);
  }
  for (int64_t b = 0; b < a.batch; ++b) longest = most(longest, a.lengths[b] + a.n);
  const int64_t slots = a.padding == nullptr ? 0 : a.batch * longest;
  int64_t before_cache = 0, room = 0;  // most tokens in 8 bits, and most numbers that attention to them needs
  for (int64_t i = 0; i < a.count; ++i)
    if (const regard_decoder_rounded* rounded = rounded_in(a, i)) {
      const int64_t heads = a.layers[i].weights[0].n / a.head_width, own = a.layers[i].weights[1].n / a.head_width;
      before_cache = most(before_cache, tokens_in(*rounded, rounded->count));
      room = most(room, room_for_rounded(a.batch, heads, own, a.head_width, rounded->count));
    }
  int64_t turned = 0;  // most numbers in the rotated keys of a layer
  for (int64_t i = 0; i < a.count; ++i)
    if (rotation_in(a, i) != nullptr) turned = most(turned, a.batch * a.layers[i].weights[1].n * (longest - fewer_in(a, i)));
  const bool scores_kept = a.evictions != nullptr || a.rounded != nullptr;
  const size_t scored = scores_kept ? static_cast<size_t>(before_cache + longest) : 0;
  const size_t rows = scores_kept ? static_cast<size_t>(a.batch * queries / a.head_width) : 0;
  Workspace workspace(2 * Workspace::bytes_of<float>(static_cast<size_t>(tokens * queries)) +
                      2 * Workspace::bytes_of<float>(static_cast<size_t>(tokens * keys)) +
                      Workspace::bytes_of<float>(static_cast<size_t>(recurrent ? tokens * a.width : 0)) +
                      Workspace::bytes_of<int64_t>(static_cast<size_t>(tokens)) +
                      Workspace::bytes_of<int64_t>(static_cast<size_t>(a.batch)) +
                      Workspace::bytes_of<int64_t>(static_cast<size_t>(slots)) +
                      Workspace::bytes_of<int64_t>(static_cast<size_t>(a.batch * keys / a.head_width)) +
                      Workspace::bytes_of<float>(rows * scored) + Workspace::bytes_of<float>(rows) +
                      Workspace::bytes_of<float>(scored) + Workspace::bytes_of<float>(static_cast<size_t>(room)) +
                      Workspace::bytes_of<float>(static_cast<size_t>(turned)));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float *const q = workspace.take<float>(static_cast<size_t>(tokens * queries));
  float* const attended = workspace.take<float>(static_cast<size_t>(tokens * queries));
  float *const k = workspace.take<float>(static_cast<size_t>(tokens * keys));
  float* const v = workspace.take<float>(static_cast<size_t>(tokens * keys));
  float* const normed = workspace.take<float>(static_cast<size_t>(recurrent ? tokens * a.width : 0));
  int64_t* const ranks = workspace.take<int64_t>(static_cast<size_t>(tokens));
  int64_t* const lengths = workspace.take<int64_t>(static_cast<size_t>(a.batch));
  int64_t* const keys_there = workspace.take<int64_t>(static_cast<size_t>(slots));
  int64_t* const counts = workspace.take<int64_t>(static_cast<size_t>(a.batch * keys / a.head_width));
  float *const scores = workspace.take<float>(rows * scored), *const lse = workspace.take<float>(rows);
  float *const sums = workspace.take<float>(scored), *const space = workspace.take<float>(static_cast<size_t>(room));
  float* const turned_keys = workspace.take<float>(static_cast<size_t>(turned));
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t b = i / longest, slot = i % longest;
    keys_there[i] = slot < a.padding[b] || slot >= a.lengths[b] + a.n ? -1 : slot;
  }

  regard_decoder_inputs_args before{};
  before.size = sizeof before;
  before.threads = a.threads;
  before.m = tokens;
  before.width = a.width;
  before.head_width = a.head_width;
  before.x = a.x;
  before.sine = a.sine;
  before.outputs[0] = q;
  before.outputs[1] = k;
  before.outputs[2] = v;

  regard_attention_args attention{};
  attention.size = sizeof attention;
  attention.threads = a.threads;
  attention.dtype = REGARD_FLOAT32;
  attention.q = q;
  attention.out = attended;
  attention.batch = a.batch;
  attention.n = a.n;
  attention.width = attention.value_width = a.head_width;
  attention.rule = REGARD_SOFTMAX;
  attention.visibility.query_ranks = ranks;
  attention.visibility.query_ranks_stride = a.n;
  attention.visibility.causal = 1;
  attention.visibility.right = -1;
  regard_attention_decode_args decode{};
  decode.size = sizeof decode;
  decode.forward = &attention;
  decode.pages = a.pages;
  decode.pages_stride = a.pages_stride;
  decode.page_size = a.page_size;
  if (a.padding == nullptr) {
    decode.lengths = lengths;
  } else {
    attention.visibility.key_ranks = keys_there;
    attention.visibility.key_ranks_stride = longest;
  }

  regard_quest_attention_args few{};
  few.size = sizeof few;
  few.threads = a.threads;
  few.dtype = REGARD_FLOAT32;
  few.q = q;
  few.out = attended;
  few.batch = a.batch;
  few.n = 1;
  few.width = few.value_width = a.head_width;
  few.counts = counts;
  const auto read_few = [&](const regard_decoder_layer& layer, const regard_decoder_reading& reading) {
    few.heads = layer.weights[0].n / a.head_width;
    few.kv_heads = layer.weights[1].n / a.head_width;
    for (int64_t i = 0; i < a.batch * few.kv_heads; ++i) counts[i] = lengths[i / few.kv_heads];
    few.k = layer.keys;
    few.v = layer.values;
    few.m = reading.slots;
    few.low = reading.low;
    few.high = reading.high;
    few.page_size = reading.page_size;
    few.chosen = reading.chosen;
    few.shared = reading.shared;
    few.scale = layer.scale;
    few.q_strides[0] = few.out_strides[0] = layer.weights[0].n;
    few.q_strides[1] = few.out_strides[1] = few.q_strides[2] = few.out_strides[2] = a.head_width;
    return regard_quest_attention(&few);
  };

  const auto attend = [&](int64_t i) {
    const regard_decoder_layer& layer = a.layers[i];
    const int64_t fewer = fewer_in(a, i);
    for (int64_t b = 0; b < a.batch; ++b) {
      lengths[b] = a.lengths[b] - fewer + a.n;
      for (int64_t t = 0; t < a.n; ++t) ranks[b * a.n + t] = lengths[b] - a.n + t;
    }
    attention.m = longest - fewer;
    attention.heads = layer.weights[0].n / a.head_width;
    attention.kv_heads = layer.weights[1].n / a.head_width;
    put_tokens(a, i, k, attention.kv_heads, layer.keys, layer.keys_strides);
    put_tokens(a, i, v, attention.kv_heads, layer.values, layer.values_strides);
    if (const regard_decoder_reading* reading = reading_in(a, i)) return read_few(layer, *reading);
    if (const regard_decoder_rounded* rounded = rounded_in(a, i)) {
      attend_rounded({&layer, rounded, a.batch, attention.heads, attention.kv_heads, a.head_width, lengths, q, attended, scores,
                      static_cast<int64_t>(scored), space},
                     static_cast<int>(a.threads));
      return static_cast<int>(REGARD_OK);
    }
    attention.k = layer.keys;
    attention.v = layer.values;
    attention.q_strides[0] = attention.out_strides[0] = a.n * layer.weights[0].n;
    attention.q_strides[1] = attention.out_strides[1] = a.head_width;
    attention.q_strides[2] = attention.out_strides[2] = layer.weights[0].n;
    for (int j = 0; j < 3; ++j) {
      attention.k_strides[j] = layer.keys_strides[j];
      attention.v_strides[j] = layer.values_strides[j];
    }
    if (const regard_decoder_rotation* rotation = rotation_in(a, i)) {
      turn_slots(a, i, *rotation, attention.m, lengths, q, turned_keys);
      attention.k = turned_keys;
      attention.k_strides[0] = attention.m * layer.weights[1].n;
      attention.k_strides[1] = attention.m * a.head_width;
      attention.k_strides[2] = a.head_width;
    }
    attention.scale = layer.scale;
    attention.visibility.left = layer.left;
    const regard_decoder_eviction* eviction = eviction_in(a, i);
    attention.lse = eviction == nullptr ? nullptr : lse;
    decode.scores = eviction == nullptr ? nullptr : scores;
    const int status = regard_attention_decode(&decode);
    if (status == REGARD_OK && eviction != nullptr) evict(a, layer, *eviction, lengths, scores, attention.m, lse, sums);
    return status;
  };

  regard_decoder_outputs_args after{};
  after.size = sizeof after;
  after.threads = a.threads;
  after.m = tokens;
  after.width = a.width;
  after.x = a.x;
  after.attended = attended;
  after.y = a.x;

  const regard_decoder_state* state = a.states;
  for (int64_t i = 0; i < a.count; ++i) {
    const regard_decoder_layer& layer = a.layers[i];
    before.eps = layer.eps[0];
    before.norm = layer.norms[0];
    for (int j = 0; j < 3; ++j) before.projections[j] = layer.weights[j];
    before.normed = layer.recurrence == nullptr ? nullptr : normed;
    before.cosine = rotation_in(a, i) == nullptr ? a.cosine : nullptr;
    int status = decoder_inputs(&before);
    if (status != REGARD_OK) return status;
    status = layer.recurrence == nullptr ? attend(i) : recur(a, layer, *state++, normed, q, k, v, attended);
    if (status != REGARD_OK) return status;

    after.eps = layer.eps[1];
    after.norm = layer.norms[1];
    after.output = layer.weights[3];
    after.gate = layer.weights[4];
    after.up = layer.weights[5];
    after.down = layer.weights[6];
    status = decoder_outputs(&after);
    if (status != REGARD_OK) return status;
  }
  if (a.norm != nullptr) normalise(tokens, a.width, a.eps, a.x, a.norm, a.x);
  return REGARD_OK;
}

}  // namespace REGARD_ISA
