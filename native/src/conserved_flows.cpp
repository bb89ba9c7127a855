// Conserved flows. Both pairs of flows are the same scan with different weights: running sums of two sequences, and the
// dot product of each sequence's vector with the other's sum. The second pair's weights come from the first pair, so
// both are computed block by block while the tokens are in cache. Backward has two such scans from the last token to
// the first, which sum the gradients from later tokens, and two forward scans, which recompute the sums; nothing is
// stored in between.

#include "regard_conserved_flows.h"

#include "vector.h"

#include "parallel.h"
#include "running_softmax.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int BLOCK = 32;
constexpr int VECTORS = 4;

// Some columns of two sequences of vectors.
struct Pair {
  const float *x, *y;
  int64_t x_token, y_token;
};

// A tile of columns in memory; lanes beyond the last column are zero, also in eps.
template <int COUNT>
struct Columns {
  int tail;
  Vec eps;

  Columns(int tail, float value) : tail(tail) {
    eps = broadcast(value);
    for (int i = 0; COUNT == 1 && i < LANES; ++i) eps[i] = i < tail ? value : 0.f;
  }
  REGARD_INLINE Vec read(const float* p) const { return COUNT > 1 ? load(p) : load(p, tail); }
  REGARD_INLINE void write(float* p, Vec v) const {
    if (COUNT > 1)
      store(p, v);
    else
      store(p, v, tail);
  }
  REGARD_INLINE void read_all(const float* p, Vec (&to)[COUNT]) const {
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) to[j] = read(p + j * LANES);
  }
  REGARD_INLINE void write_all(float* p, const Vec (&from)[COUNT]) const {
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) write(p + j * LANES, from[j]);
  }
};

// Calls f(tile, first column) for tiles of several full vectors, then for tiles of one vector or part of it.
template <class F>
REGARD_INLINE void for_columns(int width, float eps, F&& f) {
  int column = 0;
  for (; column + VECTORS * LANES <= width; column += VECTORS * LANES) f(Columns<VECTORS>(LANES, eps), column);
  for (; column < width; column += LANES) f(Columns<1>(least(LANES, width - column), eps), column);
}

// X += a_t x_t, Y += b_t y_t; x_flow_t += <x_t + eps, Y + eps>, y_flow_t += <y_t + eps, X + eps>.
template <int COUNT>
void flows_tile(const Columns<COUNT>& c, int count, const Pair& p, const float* a, const float* b, float* x_sum,
                float* y_sum, float* x_flow, float* y_flow) {
  Vec xs[COUNT], ys[COUNT];
  c.read_all(x_sum, xs);
  c.read_all(y_sum, ys);
  for (int t = 0; t < count; ++t) {
    Vec x_dot = zero(), y_dot = zero();
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) {
      const Vec x = c.read(p.x + t * p.x_token + j * LANES), y = c.read(p.y + t * p.y_token + j * LANES);
      xs[j] = fma(broadcast(a[t]), x, xs[j]);
      ys[j] = fma(broadcast(b[t]), y, ys[j]);
      x_dot = fma(x + c.eps, ys[j] + c.eps, x_dot);
      y_dot = fma(y + c.eps, xs[j] + c.eps, y_dot);
    }
    x_flow[t] += sum(x_dot);
    y_flow[t] += sum(y_dot);
  }
  c.write_all(x_sum, xs);
  c.write_all(y_sum, ys);
}

// From the last token: X += a_t (x_t + eps), Y += b_t (y_t + eps); x_to_t += v_t Y, y_to_t += w_t X (set where FIRST);
// x_dot_t += <x_t, Y>, y_dot_t += <y_t, X>.
template <bool FIRST, int COUNT>
void gather_tile(const Columns<COUNT>& c, int count, const Pair& p, const float* a, const float* b, float* x_sum,
                 float* y_sum, const float* v, const float* w, float* x_to, float* y_to, int64_t to_token,
                 float* x_dots, float* y_dots) {
  Vec xs[COUNT], ys[COUNT];
  c.read_all(x_sum, xs);
  c.read_all(y_sum, ys);
  for (int t = count - 1; t >= 0; --t) {
    Vec x_dot = zero(), y_dot = zero();
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) {
      const Vec x = c.read(p.x + t * p.x_token + j * LANES), y = c.read(p.y + t * p.y_token + j * LANES);
      xs[j] = fma(broadcast(a[t]), x + c.eps, xs[j]);
      ys[j] = fma(broadcast(b[t]), y + c.eps, ys[j]);
      float *const x_at = x_to + t * to_token + j * LANES, *const y_at = y_to + t * to_token + j * LANES;
      if (FIRST) {
        c.write(x_at, broadcast(v[t]) * ys[j]);
        c.write(y_at, broadcast(w[t]) * xs[j]);
        x_dot = fma(x, ys[j], x_dot);
        y_dot = fma(y, xs[j], y_dot);
      } else {
        c.write(x_at, fma(broadcast(v[t]), ys[j], c.read(x_at)));
        c.write(y_at, fma(broadcast(w[t]), xs[j], c.read(y_at)));
      }
    }
    if (FIRST) {
      x_dots[t] += sum(x_dot);
      y_dots[t] += sum(y_dot);
    }
  }
  c.write_all(x_sum, xs);
  c.write_all(y_sum, ys);
}

// X += a_t x_t, Y += b_t y_t; x_to_t += v_t (Y + eps), y_to_t += w_t (X + eps).
template <int COUNT>
void spread_tile(const Columns<COUNT>& c, int count, const Pair& p, const float* a, const float* b, float* x_sum,
                 float* y_sum, const float* v, const float* w, float* x_to, float* y_to, int64_t to_token) {
  Vec xs[COUNT], ys[COUNT];
  c.read_all(x_sum, xs);
  c.read_all(y_sum, ys);
  for (int t = 0; t < count; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < COUNT; ++j) {
      xs[j] = fma(broadcast(a[t]), c.read(p.x + t * p.x_token + j * LANES), xs[j]);
      ys[j] = fma(broadcast(b[t]), c.read(p.y + t * p.y_token + j * LANES), ys[j]);
      float *const x_at = x_to + t * to_token + j * LANES, *const y_at = y_to + t * to_token + j * LANES;
      c.write(x_at, fma(broadcast(v[t]), ys[j] + c.eps, c.read(x_at)));
      c.write(y_at, fma(broadcast(w[t]), xs[j] + c.eps, c.read(y_at)));
    }
  }
  c.write_all(x_sum, xs);
  c.write_all(y_sum, ys);
}

void copy(int64_t count, const float* from, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// One (row, head).
struct Head {
  const regard_conserved_flows_args& x;
  int64_t at, pairs;
  Pair whole;
  float before;
  int64_t valid;

  Head(const regard_conserved_flows_args& x, int64_t at) : x(x), at(at), pairs(x.batch * x.heads) {
    const int64_t b = at / x.heads, h = at % x.heads;
    whole.x = x.sinks + b * x.sinks_strides[0] + h * x.sinks_strides[1];
    whole.y = x.sources + b * x.sources_strides[0] + h * x.sources_strides[1];
    whole.x_token = x.sinks_strides[2];
    whole.y_token = x.sources_strides[2];
    before = static_cast<float>(x.lengths[b]);
    valid = x.valid == nullptr ? x.n : least(x.valid[b], x.n);
  }
  Pair from(int64_t token, int column) const {
    return Pair{whole.x + token * whole.x_token + column, whole.y + token * whole.y_token + column, whole.x_token,
                whole.y_token};
  }
  template <class F>
  F* flow(F* flows, int which) const {
    return flows + (which * pairs + at) * x.n;
  }
  template <class F>
  F* total(F* totals, int which) const {
    return totals + (which * pairs + at) * x.width;
  }
  float count_at(int64_t token) const { return before + static_cast<float>(token + 1); }
  // n_t / flow_t
  void weights(int64_t begin, int count, const float* flow, float* to) const {
    for (int t = 0; t < count; ++t) to[t] = count_at(begin + t) / flow[t];
  }
  // The competing logits l_t; -inf at tokens that do not exist.
  void logits(int64_t begin, int count, const float* flow, float* to) const {
    for (int t = 0; t < count; ++t) {
      const float each = flow[t] / count_at(begin + t);
      const float kept = each < x.low ? x.low : each > x.high ? x.high : each;
      to[t] = begin + t < valid ? kept / x.temperature : -INFINITE;
    }
  }
};

enum { INCOMING, OUTGOING, CONSERVED_SINKS, CONSERVED_SOURCES };
enum { SOURCES, SINKS, CONSERVED_KEYS, CONSERVED_QUERIES };  // of totals

void sigmoid(int count, float* p) {
  for (int i = 0; i < count; i += LANES) store(p + i, 1.f / (1.f + exp(-load(p + i))));
}

void forward_head(const Head& head) {
  const regard_conserved_flows_args& x = head.x;
  const int width = static_cast<int>(x.width);
  float ones[BLOCK], a[BLOCK] = {}, b[BLOCK], logits[BLOCK], weights[BLOCK], sums[BLOCK];
  float m = x.maximum[head.at], u = x.normalizer[head.at];
  for (int t = 0; t < BLOCK; ++t) ones[t] = 1.f;
  for (int which = 0; which < 4; ++which) copy(width, head.total(x.totals, which), head.total(x.totals_out, which));
  for (int64_t begin = 0; begin < x.n; begin += BLOCK) {
    const int count = static_cast<int>(least<int64_t>(BLOCK, x.n - begin));
    float* flows[4];
    for (int which = 0; which < 4; ++which) {
      flows[which] = head.flow(x.flows, which) + begin;
      for (int t = 0; t < count; ++t) flows[which][t] = 0.f;
    }
    const auto pass = [&](const float* a, const float* b, int x_sum, int y_sum, float* x_flow, float* y_flow) {
      for_columns(width, x.eps, [&](const auto& columns, int column) {
        flows_tile(columns, count, head.from(begin, column), a, b, head.total(x.totals_out, x_sum) + column,
                   head.total(x.totals_out, y_sum) + column, x_flow, y_flow);
      });
    };
    pass(ones, ones, SINKS, SOURCES, flows[INCOMING], flows[OUTGOING]);
    head.weights(begin, count, flows[INCOMING], a);
    head.weights(begin, count, flows[OUTGOING], b);
    pass(a, b, CONSERVED_QUERIES, CONSERVED_KEYS, flows[CONSERVED_SINKS], flows[CONSERVED_SOURCES]);

    float *competition = x.competition + head.at * x.n + begin, *acceptance = x.acceptance + head.at * x.n + begin;
    if (x.compete) {
      head.logits(begin, count, flows[CONSERVED_SOURCES], logits);
      weigh(Scores{logits, 1, nullptr, 0}, 0, count, &m, &u, b, weights, sums, nullptr, nullptr);
      invert(count, sums);
    }
    for (int t = 0; t < count; ++t)
      competition[t] = x.compete ? head.count_at(begin + t) * (weights[t] * sums[t]) : 1.f;
    for (int t = 0; t < count; ++t) a[t] = flows[CONSERVED_SINKS][t] / head.count_at(begin + t);
    sigmoid(count, a);
    for (int t = 0; t < count; ++t) acceptance[t] = (x.allocate ? a[t] : 1.f) / flows[INCOMING][t];
  }
  x.maximum_out[head.at] = u == u ? m : u;
  x.normalizer_out[head.at] = u;
}

// Gradients of flows 0, 2 and 3 from competition and acceptance, for all tokens; flow 1 is not used directly.
struct Scalars {
  float *of_incoming, *of_sinks, *of_sources;
};

bool backward_scalars(const regard_conserved_flows_backward_args& g, const Head& head, const Scalars& to) {
  const regard_conserved_flows_args& x = head.x;
  const int64_t all = round_up(x.n, 16) + 16;
  Workspace memory(5 * Workspace::bytes_of<float>(all));
  if (!memory) return false;
  float *factors = memory.take<float>(all), *weights = memory.take<float>(all), *inverse = memory.take<float>(all);
  float *logits = memory.take<float>(all), *change = memory.take<float>(all);
  const int n = static_cast<int>(x.n);
  const float *incoming = head.flow(x.flows, INCOMING), *sinks = head.flow(x.flows, CONSERVED_SINKS);
  const float *sources = head.flow(x.flows, CONSERVED_SOURCES);
  const float *of_competition = g.grad_competition + head.at * x.n, *of_acceptance = g.grad_acceptance + head.at * x.n;

  for (int t = 0; t < n; ++t) logits[t] = sinks[t] / head.count_at(t);
  for (int t = n; t < all; ++t) logits[t] = 0.f;
  sigmoid(n, logits);
  for (int t = 0; t < n; ++t) {
    const float part = x.allocate ? logits[t] : 1.f, given = of_acceptance[t] / incoming[t];
    to.of_incoming[t] = -given * part / incoming[t];
    to.of_sinks[t] = x.allocate ? given * part * (1.f - part) / head.count_at(t) : 0.f;
  }
  float d = g.grad_normalizer_out[head.at];
  if (!x.compete) {
    for (int t = 0; t < n; ++t) to.of_sources[t] = 0.f;
    g.grad_normalizer[head.at] = d;
    g.grad_maximum[head.at] = 0.f;
    return true;
  }
  float m = x.maximum[head.at], u = x.normalizer[head.at];
  head.logits(0, n, sources, logits);
  weigh(Scores{logits, 1, nullptr, 0}, 0, n, &m, &u, factors, weights, inverse, nullptr, nullptr);
  invert(n, inverse);
  // gradient of u_t: from its own use, and from later tokens through the factors between them
  factors[n] = 1.f;
  for (int t = 0; t < n; ++t) {
    const float given = of_competition[t] * head.count_at(t) * inverse[t];
    change[t] = -given * weights[t] * inverse[t];
    to.of_sources[t] = given;
  }
  recur_back<1>(n, factors + 1, change, 0, 0, &d);
  for (int t = 0; t < n; ++t) {
    const float each = sources[t] / head.count_at(t);
    const bool passes = !(each < x.low) && !(each > x.high) && t < head.valid;
    const float given = weights[t] * (to.of_sources[t] + change[t]);
    to.of_sources[t] = passes ? given / x.temperature / head.count_at(t) : 0.f;
  }
  g.grad_normalizer[head.at] = d * factors[0];
  g.grad_maximum[head.at] = d * factors[0] * x.normalizer[head.at];
  return true;
}

bool backward_head(const regard_conserved_flows_backward_args& g, const Head& head) {
  const regard_conserved_flows_args& x = head.x;
  const int width = static_cast<int>(x.width);
  Workspace memory(4 * Workspace::bytes_of<float>(x.n) + 4 * Workspace::bytes_of<float>(width));
  if (!memory) return false;
  // total gradients of incoming and outgoing flows
  float *grad_in = memory.take<float>(x.n), *grad_out = memory.take<float>(x.n);
  float *of_sinks = memory.take<float>(x.n), *of_sources = memory.take<float>(x.n);
  if (!backward_scalars(g, head, Scalars{grad_in, of_sinks, of_sources})) return false;
  float* sums[4];
  for (int which = 0; which < 4; ++which) {
    sums[which] = memory.take<float>(width);
    copy(width, head.total(x.totals, which), sums[which]);
    copy(width, head.total(g.grad_totals_out, which), head.total(g.grad_totals, which));
  }
  float ones[BLOCK], a[BLOCK], b[BLOCK], x_dots[BLOCK], y_dots[BLOCK];
  for (int t = 0; t < BLOCK; ++t) ones[t] = 1.f;
  const float *incoming = head.flow(x.flows, INCOMING), *outgoing = head.flow(x.flows, OUTGOING);
  float *x_to = g.grad_sinks + head.at * x.n * width, *y_to = g.grad_sources + head.at * x.n * width;

  for (int64_t begin = (x.n - 1) / BLOCK * BLOCK; begin >= 0 && x.n > 0; begin -= BLOCK) {
    const int count = static_cast<int>(least<int64_t>(BLOCK, x.n - begin));
    head.weights(begin, count, incoming + begin, a);
    head.weights(begin, count, outgoing + begin, b);
    for (int t = 0; t < count; ++t) x_dots[t] = y_dots[t] = 0.f;
    // X sums the gradient of the sources' weighted sum, so it is the gradient of CONSERVED_KEYS, and so on crosswise
    for_columns(width, x.eps, [&](const auto& columns, int column) {
      gather_tile<true>(columns, count, head.from(begin, column), of_sinks + begin, of_sources + begin,
                        head.total(g.grad_totals, CONSERVED_KEYS) + column,
                        head.total(g.grad_totals, CONSERVED_QUERIES) + column, a, b, x_to + begin * width + column,
                        y_to + begin * width + column, width, x_dots, y_dots);
    });
    for (int t = 0; t < count; ++t) {
      const int64_t at = begin + t;
      grad_in[at] = grad_in[at] - a[t] / incoming[at] * x_dots[t];
      grad_out[at] = -b[t] / outgoing[at] * y_dots[t];
    }
    for_columns(width, x.eps, [&](const auto& columns, int column) {
      gather_tile<false>(columns, count, head.from(begin, column), grad_in + begin, grad_out + begin,
                         head.total(g.grad_totals, SOURCES) + column, head.total(g.grad_totals, SINKS) + column, ones,
                         ones, x_to + begin * width + column, y_to + begin * width + column, width, nullptr, nullptr);
    });
  }
  for (int64_t begin = 0; begin < x.n; begin += BLOCK) {
    const int count = static_cast<int>(least<int64_t>(BLOCK, x.n - begin));
    head.weights(begin, count, incoming + begin, a);
    head.weights(begin, count, outgoing + begin, b);
    for_columns(width, x.eps, [&](const auto& columns, int column) {
      float *x_at = x_to + begin * width + column, *y_at = y_to + begin * width + column;
      spread_tile(columns, count, head.from(begin, column), ones, ones, sums[SINKS] + column, sums[SOURCES] + column,
                  grad_in + begin, grad_out + begin, x_at, y_at, width);
      spread_tile(columns, count, head.from(begin, column), a, b, sums[CONSERVED_QUERIES] + column,
                  sums[CONSERVED_KEYS] + column, of_sinks + begin, of_sources + begin, x_at, y_at, width);
    });
  }
  return true;
}

bool well_formed(const regard_conserved_flows_args& x) {
  return x.threads >= 1 && x.batch >= 0 && x.heads >= 0 && x.n >= 0 && x.width >= 0;
}

}  // namespace

int conserved_flows(const regard_conserved_flows_args* args) {
  if (!well_formed(*args)) return REGARD_BAD_ARGUMENT;
  parallel_tasks(static_cast<int>(args->threads), args->batch * args->heads,
                 [&](int64_t at) { forward_head(Head(*args, at)); });
  return REGARD_OK;
}

int conserved_flows_backward(const regard_conserved_flows_backward_args* args) {
  const regard_conserved_flows_args& x = *args->forward;
  if (!well_formed(x)) return REGARD_BAD_ARGUMENT;
  int failed = 0;
  parallel_tasks(static_cast<int>(x.threads), x.batch * x.heads, [&](int64_t at) {
    if (!backward_head(*args, Head(x, at))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed ? REGARD_OUT_OF_MEMORY : REGARD_OK;
}

}  // namespace REGARD_ISA
