// Softmax scan. Scores become three numbers for each token and query: the factor on all earlier weights (1 unless the
// maximum grew or there is decay), the token's own weight, and 1 / u. What remains is one pass over the values with w in
// registers. Backward recomputes these numbers from the scores, which are small compared with the values, and makes the
// same kind of pass from the last token to the first:
//
//     D_t = dO_t / u_t + a_{t+1} D_{t+1},    d_t = -(dO_t . o_t) / u_t + a_{t+1} d_{t+1},
//     dv_t = e_t D_t,    ds_t = e_t (D_t . v_t + d_t),    with e_t = exp(s_t - m_t) and a_t the factor at token t.
//
// No w_t is stored: dO_t . o_t is computed from the outputs, or with mix from a second scan of w.

#include "regard_softmax_scan.h"

#include "vector.h"

#include "parallel.h"
#include "running_softmax.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int PREFIX_VECTORS = 8;
constexpr int SWEEP_VECTORS = 4, SWEEP_QUERIES = REGISTERS >= 32 ? 4 : 2;

template <bool FULL, class T>
REGARD_INLINE Vec take(const T* p, int tail) {
  return FULL ? load(p) : load(p, tail);
}
template <bool FULL, class T>
REGARD_INLINE void put(T* p, Vec v, int tail) {
  if (FULL)
    store(p, v);
  else
    store(p, v, tail);
}

// w = a w + e v and out = w / u, token by token, for one query.
template <int VECTORS, bool FULL, class T>
void prefix_columns(int count, const float* a, const float* e, const float* inverse, const T* v,
                    int64_t v_token, T* out, int64_t out_token, float* w, int tail) {
  Vec state[VECTORS];
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) state[j] = take<FULL>(w + j * LANES, tail);
  for (int t = 0; t < count; ++t) {
    const Vec factor = broadcast(a[t]), weight = broadcast(e[t]), scale = broadcast(inverse[t]);
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) {
      state[j] = fma(factor, state[j], weight * take<FULL>(v + t * v_token + j * LANES, tail));
      put<FULL>(out + t * out_token + j * LANES, state[j] * scale, tail);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < VECTORS; ++j) put<FULL>(w + j * LANES, state[j], tail);
}

template <class T>
void prefixes(int count, int columns, const float* a, const float* e, const float* inverse, const T* v,
              int64_t v_token, T* out, int64_t out_token, float* w) {
  int j = 0;
  for (; j + PREFIX_VECTORS * LANES <= columns; j += PREFIX_VECTORS * LANES)
    prefix_columns<PREFIX_VECTORS, true>(count, a, e, inverse, v + j, v_token, out + j, out_token, w + j, 0);
  for (; j + 4 * LANES <= columns; j += 4 * LANES)
    prefix_columns<4, true>(count, a, e, inverse, v + j, v_token, out + j, out_token, w + j, 0);
  for (; j < columns; j += LANES)
    prefix_columns<1, false>(count, a, e, inverse, v + j, v_token, out + j, out_token, w + j,
                             least(LANES, columns - j));
}

// state_q = a_q state_q + x_q in, then sums += y_q state_q and dots_q += state_q . other, for tokens first, first + step...
// Coefficients and dots are [query][token], rows `row` apart; so is `rescaled`, [group of queries][token]. The rows of
// `sums` are padded to full vectors.
template <class T>
struct Sweep {
  int count, first, step;
  int columns;
  int64_t row;
  const float *a, *x, *y;
  const uint8_t* rescaled;
  const T* in;
  int64_t in_token;
  float* state;
  int64_t state_query;
  float* sums;
  int64_t sums_token;
  const T* other;
  int64_t other_token;
  float* dots;
};

template <int QUERIES, int VECTORS, bool SUM, bool DOT, class T>
void sweep_tile(const Sweep<T>& s, int query, int column, int tail) {
  constexpr bool FULL = VECTORS > 1;
  Vec state[QUERIES][VECTORS];
  float* const states = s.state + query * s.state_query + column;
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) state[q][j] = take<FULL>(states + q * s.state_query + j * LANES, tail);
  const float *const a = s.a + query * s.row, *const x = s.x + query * s.row, *const y = s.y + query * s.row;
  const uint8_t* const rescaled = s.rescaled + query / SWEEP_QUERIES * s.row;
  for (int i = 0, t = s.first; i < s.count; ++i, t += s.step) {
    if (rescaled[t]) {
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) state[q][j] *= a[q * s.row + t];
    }
    Vec dots[QUERIES];
#pragma GCC unroll 4
    for (int q = 0; q < QUERIES; ++q) dots[q] = zero();
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      const Vec in = take<FULL>(s.in + t * s.in_token + column + j * LANES, tail);
      Vec other = zero(), total = zero();
      if (DOT) other = take<FULL>(s.other + t * s.other_token + column + j * LANES, tail);
      float* const to = s.sums + t * s.sums_token + column + j * LANES;
      if (SUM) total = load(to);
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) {
        state[q][j] = fma(broadcast(x[q * s.row + t]), in, state[q][j]);
        if (SUM) total = fma(broadcast(y[q * s.row + t]), state[q][j], total);
        if (DOT) dots[q] = fma(state[q][j], other, dots[q]);
      }
      if (SUM) store(to, total);
    }
    if (DOT)
#pragma GCC unroll 4
      for (int q = 0; q < QUERIES; ++q) s.dots[(query + q) * s.row + t] += sum(dots[q]);
  }
#pragma GCC unroll 4
  for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) put<FULL>(states + q * s.state_query + j * LANES, state[q][j], tail);
}

// Sweeps over queries [begin, end).
template <bool SUM, bool DOT, class T>
void sweep(const Sweep<T>& s, int begin, int end) {
  int column = 0;
  for (; column + SWEEP_VECTORS * LANES <= s.columns; column += SWEEP_VECTORS * LANES) {
    int q = begin;
    for (; q + SWEEP_QUERIES <= end; q += SWEEP_QUERIES)
      sweep_tile<SWEEP_QUERIES, SWEEP_VECTORS, SUM, DOT>(s, q, column, 0);
    for (; q < end; ++q) sweep_tile<1, SWEEP_VECTORS, SUM, DOT>(s, q, column, 0);
  }
  for (; column < s.columns; column += LANES) {
    const int tail = least(LANES, s.columns - column);
    int q = begin;
    for (; q + SWEEP_QUERIES <= end; q += SWEEP_QUERIES) sweep_tile<SWEEP_QUERIES, 1, SUM, DOT>(s, q, column, tail);
    for (; q < end; ++q) sweep_tile<1, 1, SUM, DOT>(s, q, column, tail);
  }
}

template <class T>
void write_rows(int count, int columns, const float* from, int64_t from_row, T* to, int64_t to_row) {
  for (int t = 0; t < count; ++t) {
    int j = 0;
    for (; j + LANES <= columns; j += LANES) store(to + t * to_row + j, load(from + t * from_row + j));
    if (j < columns) store(to + t * to_row + j, load(from + t * from_row + j, columns - j), columns - j);
  }
}

template <class T>
float dot(int columns, const T* x, const T* y) {
  Vec total = zero();
  int j = 0;
  for (; j + LANES <= columns; j += LANES) total = fma(load(x + j), load(y + j), total);
  if (j < columns) total = fma(load(x + j, columns - j), load(y + j, columns - j), total);
  return sum(total);
}

void fill(int64_t count, float* x, float value) {
  for (int64_t i = 0; i < count; ++i) x[i] = value;
}
void copy(int64_t count, const float* from, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Tokens in a block, in full vectors: few enough for their coefficients and values to stay in the caches.
int block_of(int64_t n, int64_t queries) {
  const int64_t wanted = least<int64_t>(128, 1536 / most<int64_t>(queries, 1));
  return static_cast<int>(round_up(most<int64_t>(1, least(wanted, n)), 16));
}

// Division into tasks: a (row, head) and some of its value columns. Columns are split if there are fewer heads than
// threads.
struct Division {
  int64_t parts, columns;

  Division(const regard_softmax_scan_args& x) {
    const int64_t pairs = most<int64_t>(1, x.batch * x.heads);
    const int64_t vectors = most<int64_t>(1, ceil_div(x.width, LANES));
    parts = least(vectors, ceil_div(x.threads, pairs));
    columns = ceil_div(vectors, parts) * LANES;
    parts = most<int64_t>(1, ceil_div(x.width, columns));
  }
};

struct Task {
  int64_t part, b, h, pair, first;
  int columns;

  Task(const regard_softmax_scan_args& x, const Division& division, int64_t task) {
    part = task % division.parts;
    pair = task / division.parts;
    b = pair / x.heads;
    h = pair % x.heads;
    first = part * division.columns;
    columns = static_cast<int>(least(division.columns, x.width - first));
  }
};

Scores scores_of(const regard_softmax_scan_args& x, const Task& task, int64_t query) {
  Scores row;
  row.s = x.s + task.b * x.s_strides[0] + task.h * x.s_strides[1] + query * x.s_strides[3];
  row.token = x.s_strides[2];
  row.decay = x.log_decay;
  row.decay_token = 0;
  if (x.log_decay != nullptr) {
    row.decay += task.b * x.log_decay_strides[0] + task.h * x.log_decay_strides[1];
    row.decay_token = x.log_decay_strides[2];
  }
  return row;
}

// to *= mix, [query][token] with rows `row` apart.
void multiply_by_mix(const regard_softmax_scan_args& x, const Task& task, int64_t begin, int count, float* to,
                     int64_t row) {
  const float* mix = x.mix + task.b * x.mix_strides[0] + task.h * x.mix_strides[1] + begin * x.mix_strides[2];
  for (int64_t q = 0; q < x.queries; ++q)
    for (int t = 0; t < count; ++t) to[q * row + t] *= mix[t * x.mix_strides[2] + q * x.mix_strides[3]];
}

template <class T>
bool forward_task(const regard_softmax_scan_args& x, const Task& task) {
  const int queries = static_cast<int>(x.queries), block = block_of(x.n, queries);
  const int64_t each = static_cast<int64_t>(block) * queries, padded = round_up(task.columns, LANES);
  Workspace memory(2 * Workspace::bytes_of<float>(queries) + 3 * Workspace::bytes_of<float>(each) +
                   Workspace::bytes_of<float>(block * padded) + Workspace::bytes_of<uint8_t>(each));
  if (!memory) return false;
  float *m = memory.take<float>(queries), *u = memory.take<float>(queries);
  float *a = memory.take<float>(each), *e = memory.take<float>(each), *inverse = memory.take<float>(each);
  float* sums = memory.take<float>(block * padded);
  uint8_t* rescaled = memory.take<uint8_t>(each);

  const T* v = static_cast<const T*>(x.v) + task.b * x.v_strides[0] + task.h * x.v_strides[1] + task.first;
  T* out = static_cast<T*>(x.out) + task.pair * (x.mix == nullptr ? queries : 1) * x.n * x.width + task.first;
  float* w = x.w_out + task.pair * queries * x.width + task.first;
  const float* w_before = x.w + task.pair * queries * x.width + task.first;
  for (int q = 0; q < queries; ++q) copy(task.columns, w_before + q * x.width, w + q * x.width);
  copy(queries, x.m + task.pair * queries, m);
  copy(queries, x.u + task.pair * queries, u);

  for (int64_t begin = 0; begin < x.n; begin += block) {
    const int count = static_cast<int>(least<int64_t>(block, x.n - begin));
    memset(rescaled, 0, static_cast<size_t>(each));
    for (int q = 0; q < queries; ++q)
      weigh(scores_of(x, task, q), begin, count, m + q, u + q, a + q * block, e + q * block, inverse + q * block,
            rescaled + q / SWEEP_QUERIES * block, nullptr);
    const T* values = v + begin * x.v_strides[2];
    if (x.mix == nullptr) {
      for (int q = 0; q < queries; ++q) {
        invert(count, inverse + q * block);
        prefixes(count, task.columns, a + q * block, e + q * block, inverse + q * block, values, x.v_strides[2],
                 out + (q * x.n + begin) * x.width, x.width, w + q * x.width);
      }
    } else {
      for (int q = 0; q < queries; ++q) invert(count, inverse + q * block);
      multiply_by_mix(x, task, begin, count, inverse, block);
      fill(count * padded, sums, 0.f);
      Sweep<T> s{count, 0, 1, task.columns, block, a, e, inverse, rescaled, values, x.v_strides[2],
                 w, x.width, sums, padded, nullptr, 0, nullptr};
      sweep<true, false>(s, 0, queries);
      write_rows(count, task.columns, sums, padded, out + begin * x.width, x.width);
    }
  }
  if (task.part == 0)
    for (int q = 0; q < queries; ++q) {
      x.m_out[task.pair * queries + q] = u[q] == u[q] ? m[q] : u[q];
      x.u_out[task.pair * queries + q] = u[q];
    }
  return true;
}

// Destination of a task's share of the gradients that are sums over columns.
struct Shares {
  float* s;
  int64_t s_token, s_query;
  float *mix, *m, *u;
};

template <class T>
bool backward_task(const regard_softmax_scan_backward_args& g, const Task& task, const Shares& shares) {
  const regard_softmax_scan_args& x = *g.forward;
  const bool is_mixed = x.mix != nullptr;
  const int queries = static_cast<int>(x.queries), block = block_of(x.n, queries);
  const int64_t each = static_cast<int64_t>(block) * queries, row = round_up(x.n, 16) + 16, all = row * queries;
  const int64_t padded = round_up(task.columns, LANES), state_size = is_mixed ? queries * padded : 0;
  Workspace memory(3 * Workspace::bytes_of<float>(queries) + 4 * Workspace::bytes_of<float>(all) +
                   Workspace::bytes_of<float>(each) + Workspace::bytes_of<float>(state_size) +
                   Workspace::bytes_of<float>(block * padded) + Workspace::bytes_of<uint8_t>(all));
  if (!memory) return false;
  float *m = memory.take<float>(queries), *u = memory.take<float>(queries), *d = memory.take<float>(queries);
  // for all tokens, [query][token]: factors, weights, (mix) / u, and dot products
  float *a = memory.take<float>(all), *e = memory.take<float>(all), *scale = memory.take<float>(all);
  float *dots = memory.take<float>(all), *change = memory.take<float>(each);
  float *state = memory.take<float>(state_size), *sums = memory.take<float>(block * padded);
  uint8_t* rescaled = memory.take<uint8_t>(all);
  memset(rescaled, 0, static_cast<size_t>(all));

  const T* v = static_cast<const T*>(x.v) + task.b * x.v_strides[0] + task.h * x.v_strides[1] + task.first;
  const T* grad_out =
      static_cast<const T*>(g.grad_out) + task.b * g.grad_out_strides[0] + task.h * g.grad_out_strides[1] + task.first;
  const int64_t grad_token = g.grad_out_strides[3], carry_at = task.pair * queries;
  const float* w_before = x.w + carry_at * x.width + task.first;
  copy(queries, x.m + carry_at, m);
  copy(queries, x.u + carry_at, u);
  if (is_mixed)
    for (int q = 0; q < queries; ++q) copy(task.columns, w_before + q * x.width, state + q * padded);

  // forward once more; with mix, dots become dO_t . o_t
  for (int64_t begin = 0; begin < x.n; begin += block) {
    const int count = static_cast<int>(least<int64_t>(block, x.n - begin));
    for (int q = 0; q < queries; ++q) {
      const int64_t at = q * row + begin;
      weigh(scores_of(x, task, q), begin, count, m + q, u + q, a + at, e + at, scale + at,
            rescaled + q / SWEEP_QUERIES * row + begin, nullptr);
      invert(count, scale + at);
      fill(count, dots + at, 0.f);
    }
    if (!is_mixed) continue;
    Sweep<T> s{count, 0, 1, task.columns, row, a + begin, e + begin, e + begin, rescaled + begin,
               v + begin * x.v_strides[2], x.v_strides[2], state, padded, sums, padded,
               grad_out + begin * grad_token, grad_token, dots + begin};
    sweep<false, true>(s, 0, queries);
    for (int q = 0; q < queries; ++q)
      for (int64_t t = begin; t < begin + count; ++t) dots[q * row + t] *= scale[q * row + t];
    if (shares.mix != nullptr)
      for (int q = 0; q < queries; ++q)
        for (int64_t t = begin; t < begin + count; ++t) shares.mix[t * queries + q] = dots[q * row + t];
    multiply_by_mix(x, task, begin, count, scale + begin, row);
  }
  for (int q = 0; q < queries; ++q) {
    a[q * row + x.n] = 1.f;
    rescaled[q * row + x.n] = 0;
  }

  float* grad_w = g.grad_carry_w + carry_at * x.width + task.first;
  for (int q = 0; q < queries; ++q)
    copy(task.columns, g.grad_w + (carry_at + q) * x.width + task.first, grad_w + q * x.width);
  if (task.part == 0)
    copy(queries, g.grad_u + carry_at, d);
  else
    fill(queries, d, 0.f);
  for (int64_t begin = (x.n - 1) / block * block; begin >= 0 && x.n > 0; begin -= block) {
    const int count = static_cast<int>(least<int64_t>(block, x.n - begin));
    if (!is_mixed)
      for (int q = 0; q < queries; ++q) {
        const T* in = grad_out + q * g.grad_out_strides[2] + begin * grad_token;
        const T* out =
            static_cast<const T*>(x.out) + ((task.pair * queries + q) * x.n + begin) * x.width + task.first;
        for (int t = 0; t < count; ++t)
          dots[q * row + begin + t] = dot(task.columns, in + t * grad_token, out + t * x.width);
      }
    for (int q = 0; q < queries; ++q)
      for (int t = 0; t < count; ++t) {
        const int64_t at = q * row + begin + t;
        change[q * block + t] = -scale[at] * dots[at];
        dots[at] = 0.f;
      }
    // the factor of token t + 1 is between the states at t and t + 1
    const float* factors = a + begin + 1;
    int first = 0;
    for (; first + 4 <= queries; first += 4)
      recur_back<4>(count, factors + first * row, change + first * block, row, block, d + first);
    for (; first < queries; ++first)
      recur_back<1>(count, factors + first * row, change + first * block, row, block, d + first);

    fill(count * padded, sums, 0.f);
    Sweep<T> s{count, count - 1, -1, task.columns, row, factors, scale + begin, e + begin, rescaled + begin + 1,
               grad_out + begin * grad_token, grad_token, grad_w, x.width, sums, padded,
               v + begin * x.v_strides[2], x.v_strides[2], dots + begin};
    const int groups = is_mixed ? 1 : queries;
    for (int q = 0; q < groups; ++q) {
      if (!is_mixed) s.in = grad_out + q * g.grad_out_strides[2] + begin * grad_token;
      const int end = is_mixed ? queries : q + 1;
      if (g.grad_v == nullptr)
        sweep<false, true>(s, q, end);
      else if (shares.s == nullptr)
        sweep<true, false>(s, q, end);
      else
        sweep<true, true>(s, q, end);
    }
    if (shares.s != nullptr)
      for (int q = 0; q < queries; ++q)
        for (int t = 0; t < count; ++t)
          shares.s[(begin + t) * shares.s_token + q * shares.s_query] =
              e[q * row + begin + t] * (dots[q * row + begin + t] + change[q * block + t]);
    if (g.grad_v != nullptr)
      write_rows(count, task.columns, sums, padded,
                 static_cast<T*>(g.grad_v) + (task.pair * x.n + begin) * x.width + task.first, x.width);
  }
  for (int q = 0; q < queries; ++q) {
    float* to = grad_w + q * x.width;
    const float factor = a[q * row];
    for (int j = 0; j < task.columns; ++j) to[j] *= factor;
    shares.u[q] = d[q] * factor;
    shares.m[q] = shares.u[q] * x.u[carry_at + q] + dot(task.columns, to, w_before + q * x.width);
  }
  return true;
}

Shares whole_shares(const regard_softmax_scan_backward_args& g, const Task& task) {
  const regard_softmax_scan_args& x = *g.forward;
  const int64_t queries = x.queries;
  float* s = g.grad_s == nullptr ? nullptr : g.grad_s + task.b * g.grad_s_strides[0] + task.h * g.grad_s_strides[1];
  return Shares{s,
                g.grad_s_strides[2],
                g.grad_s_strides[3],
                g.grad_mix == nullptr ? nullptr : g.grad_mix + task.pair * x.n * queries,
                g.grad_carry_m + task.pair * queries,
                g.grad_carry_u + task.pair * queries};
}

void add(int64_t count, const float* from, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

template <class T>
int backward(const regard_softmax_scan_backward_args& g) {
  const regard_softmax_scan_args& x = *g.forward;
  const Division division(x);
  const int threads = static_cast<int>(x.threads);
  const int64_t pairs = x.batch * x.heads, all = x.n * x.queries;
  // the first part's shares are written in place, those of the other parts separately and then added
  const int64_t share = (g.grad_s == nullptr ? 0 : all) + (g.grad_mix == nullptr ? 0 : all) + 2 * x.queries;
  Workspace memory(Workspace::bytes_of<float>((division.parts - 1) * pairs * share));
  if (!memory) return REGARD_OUT_OF_MEMORY;
  float* others = memory.take<float>((division.parts - 1) * pairs * share);
  const auto shares_of = [&](const Task& task) {
    if (task.part == 0) return whole_shares(g, task);
    float* at = others + ((task.part - 1) * pairs + task.pair) * share;
    Shares found{nullptr, x.queries, 1, nullptr, at, at + x.queries};
    at += 2 * x.queries;
    if (g.grad_s != nullptr) {
      found.s = at;
      at += all;
    }
    if (g.grad_mix != nullptr) found.mix = at;
    return found;
  };
  int failed = 0;
  parallel_tasks(threads, pairs * division.parts, [&](int64_t number) {
    const Task task(x, division, number);
    if (!backward_task<T>(g, task, shares_of(task))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  if (failed) return REGARD_OUT_OF_MEMORY;
  for (int64_t number = 0; division.parts > 1 && number < pairs * division.parts; ++number) {
    const Task task(x, division, number);
    if (task.part == 0) continue;
    const Shares from = shares_of(task), to = whole_shares(g, task);
    add(x.queries, from.m, to.m);
    add(x.queries, from.u, to.u);
    if (from.mix != nullptr) add(all, from.mix, to.mix);
    if (from.s == nullptr) continue;
    for (int64_t t = 0; t < x.n; ++t)
      for (int64_t q = 0; q < x.queries; ++q)
        to.s[t * to.s_token + q * to.s_query] += from.s[t * from.s_token + q * from.s_query];
  }
  return REGARD_OK;
}

template <class T>
int forward(const regard_softmax_scan_args& x) {
  const Division division(x);
  int failed = 0;
  parallel_tasks(static_cast<int>(x.threads), x.batch * x.heads * division.parts, [&](int64_t number) {
    if (!forward_task<T>(x, Task(x, division, number))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed ? REGARD_OUT_OF_MEMORY : REGARD_OK;
}

bool well_formed(const regard_softmax_scan_args& x) {
  return x.threads >= 1 && x.batch >= 0 && x.heads >= 0 && x.n >= 0 && x.queries >= 0 && x.width >= 0 &&
         (x.dtype == REGARD_FLOAT32 || x.dtype == REGARD_BFLOAT16);
}

}  // namespace

int softmax_scan(const regard_softmax_scan_args* args) {
  if (!well_formed(*args)) return REGARD_BAD_ARGUMENT;
  return args->dtype == REGARD_FLOAT32 ? forward<float>(*args) : forward<bfloat16>(*args);
}

int softmax_scan_backward(const regard_softmax_scan_backward_args* args) {
  if (!well_formed(*args->forward)) return REGARD_BAD_ARGUMENT;
  return args->forward->dtype == REGARD_FLOAT32 ? backward<float>(*args) : backward<bfloat16>(*args);
}

}  // namespace REGARD_ISA
