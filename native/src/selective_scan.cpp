// Selective scan. Lanes are channels: a vector of them visits the tokens with several states of each in registers, in
// blocks of tokens, so that what all states share (steps, inputs, outputs) stays in the first-level cache. The
// exponential of every (token, channel, state) is most of the work.
//
// Backward only has the states before every block of tokens. It recomputes a block forward, storing each decay e_t and
// the decayed state p_t = e_t h_{t-1}, then goes back with the gradients r_t of p_t and g_t of h_t:
//
//     h_t = p_t + w_t b_t,    r_t = dy_t c_t + D_t,    D_{t-1} = e_t r_t,    dc_t = sum_channels dy_t h_t,
//     d(w_t) = g_t . b_t,     d(s_t) = (r_t p_t) . a + x_t d(w_t),    da = sum_t s_t r_t p_t,    db_t = sum_channels g_t w_t
//
// with w_t = s_t x_t, s_t the step, g_t = r_t if outputs read after the write and D_t if they read before it.

#include "regard_selective_scan.h"

#include "elementwise.h"
#include "vector.h"

#include "parallel.h"
#include "workspace.h"

#if defined(__FAST_MATH__)
#error "rounding by adding a large number does not survive -ffast-math"
#endif

namespace REGARD_ISA {
namespace {

using regard::Workspace;
using Args = regard_selective_scan_args;
using BackwardArgs = regard_selective_scan_backward_args;

constexpr int EVERY = REGARD_SELECTIVE_SCAN_EVERY;
constexpr int QUAD = 4;  // states are padded to multiples of this
constexpr int MANY = REGISTERS >= 32 ? 8 : 4;  // states in registers
constexpr int64_t PART_VECTORS = 8;
constexpr float LARGE = 1e18f;  // limits steps and rates in exponents: their product stays finite

// 2^x for any finite x: nothing needs to be limited before rounding.
REGARD_INLINE Vec power(Vec x) {
#if defined(__AVX512F__)
  const __m512 whole = _mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec r = x - reinterpret_cast<Vec>(whole);
#else
  // the lowest bits of a float of this size are an integer; with -127 the exponent bits of the result are 0
  constexpr float ROUNDER = 12582912.f;
  const Vec limited = minimum(broadcast(127.f), maximum(broadcast(-127.f), x));
  const Vec shifted = limited + ROUNDER;
  const Vec r = limited - (shifted - ROUNDER);
#endif
  Vec p = broadcast(EXP2_5);
  p = fma(p, r, broadcast(EXP2_4));
  p = fma(p, r, broadcast(EXP2_3));
  p = fma(p, r, broadcast(EXP2_2));
  p = fma(p, r, broadcast(EXP2_1));
  p = fma(p, r, broadcast(1.f));
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), whole));
#else
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
#endif
}

template <class T>
REGARD_INLINE Vec take(const T* p, int count) {
  return count == LANES ? load(p) : load(p, count);
}
template <class T>
REGARD_INLINE void put(T* p, Vec v, int count) {
  if (count == LANES)
    store(p, v);
  else
    store(p, v, count);
}

#if defined(__AVX512F__)
#define REGARD_QUADS(x, y, p, q, r, s)                                                                                \
  __builtin_shufflevector(x, y, p, q, r, s, p + 4, q + 4, r + 4, s + 4, p + 8, q + 8, r + 8, s + 8, p + 12, q + 12, \
                          r + 12, s + 12)
#elif defined(__AVX__)
#define REGARD_QUADS(x, y, p, q, r, s) __builtin_shufflevector(x, y, p, q, r, s, p + 4, q + 4, r + 4, s + 4)
#else
#define REGARD_QUADS(x, y, p, q, r, s) __builtin_shufflevector(x, y, p, q, r, s)
#endif

// Lane 4 j + i of the result is the sum of lanes 4 j to 4 j + 3 of the i-th vector.
REGARD_INLINE Vec sums_of_quads(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = REGARD_QUADS(a, b, 0, LANES, 1, LANES + 1) + REGARD_QUADS(a, b, 2, LANES + 2, 3, LANES + 3);
  const Vec cd = REGARD_QUADS(c, d, 0, LANES, 1, LANES + 1) + REGARD_QUADS(c, d, 2, LANES + 2, 3, LANES + 3);
  return REGARD_QUADS(ab, cd, 0, 1, LANES, LANES + 1) + REGARD_QUADS(ab, cd, 2, 3, LANES + 2, LANES + 3);
}

// Adds up the partial sums that sums_of_quads leaves.
void add_lanes(int count, const float* from, float* to) {
  for (int i = 0; i < count; i += QUAD, from += LANES)
    for (int k = 0; k < QUAD; ++k) {
      to[i + k] = from[k];
      for (int lane = QUAD; lane < LANES; lane += QUAD) to[i + k] += from[lane + k];
    }
}

// Conversion between (count channels, K) and vectors of channels for each of the padded states.
void load_states(const float* from, int count, int states, int padded, float* to) {
  for (int k = 0; k < padded; ++k) store(to + k * LANES, zero());
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < states; ++k) to[k * LANES + i] = from[i * states + k];
}
void store_states(const float* from, int count, int states, float* to) {
  for (int i = 0; i < count; ++i)
    for (int k = 0; k < states; ++k) to[i * states + k] = from[k * LANES + i];
}

// Some consecutive channels of a row, all of one group, as vectors of channels.
struct Part {
  int64_t row, group, first;
  int channels, vectors;
  int64_t length;

  int lanes(int vector) const { return least(LANES, channels - vector * LANES); }
};

struct Division {
  int64_t group_channels, part_channels, parts;

  explicit Division(const Args& x) {
    group_channels = x.channels / x.groups;
    const int64_t vectors = ceil_div(group_channels, LANES);
    // a few parts per thread, so that threads finish together, and none larger than the caches
    const int64_t wanted = least(vectors, ceil_div(4 * x.threads, x.batch * x.groups));
    part_channels = least(ceil_div(vectors, wanted), PART_VECTORS) * LANES;
    parts = ceil_div(group_channels, part_channels);
  }
};

Part part_of(const Args& x, const Division& division, int64_t number) {
  Part part;
  const int64_t within = number % division.parts * division.part_channels;
  part.group = number / division.parts % x.groups;
  part.row = number / division.parts / x.groups;
  part.first = part.group * division.group_channels + within;
  part.channels = static_cast<int>(least(division.part_channels, division.group_channels - within));
  part.vectors = static_cast<int>(ceil_div(part.channels, LANES));
  part.length = x.lengths == nullptr ? x.n : most<int64_t>(0, least(x.lengths[part.row], x.n));
  return part;
}

// The values that all states of a vector of channels share at one token.
struct Token {
  float step[LANES], write[LANES], y[LANES];  // y: outputs before the gate
};
struct BackwardToken : Token {
  float input[LANES], slope[LANES];  // slope: derivative of the step by dt
  float grad_y[LANES], grad_write[LANES], grad_step[LANES];
};

// b and c of consecutive tokens, `padded` floats each.
struct Keys {
  int padded;
  const float *b, *c;
};

// Prefetches one line of each tensor while a token is computed: rows in (B, N, C) are too far apart for the hardware
// prefetcher. Not used with `order`.
struct Ahead {
  static constexpr int MOST = 8;
  bool wanted;
  uintptr_t at[MOST];
  int64_t token[MOST];
  int tensors = 0;

  explicit Ahead(const Args& x) : wanted(x.order == nullptr) {}

  template <class T>
  void add(const T* first, int64_t stride) {
    if (!wanted || first == nullptr) return;
    at[tensors] = reinterpret_cast<uintptr_t>(first);
    token[tensors++] = stride * static_cast<int64_t>(sizeof(T));
  }
  REGARD_INLINE void fetch(int t, int64_t offset) const {
    for (int i = 0; i < tensors; ++i)
      __builtin_prefetch(reinterpret_cast<const void*>(at[i] + t * token[i] + offset), 0, 2);
  }
};

enum class Read { NOTHING, BEFORE, AFTER };

// Scans `count` tokens with states [first, first + STATES). With STORE, `decayed` gets [token][state][2] vectors: the
// decay and the decayed state.
template <int STATES, Read READ, bool STORE, class Tokens>
void scan(int count, Tokens* tokens, const Keys& keys, int first, const float* rates, float* h, float* decayed,
          const Ahead& ahead, int64_t offset) {
  Vec state[STATES];
#pragma GCC unroll 8
  for (int k = 0; k < STATES; ++k) state[k] = load(h + (first + k) * LANES);
  const float *b = keys.b + first, *c = keys.c + first, *rate = rates + first * LANES;
  for (int t = 0; t < count; ++t, b += keys.padded, c += keys.padded) {
    if (first == 0) ahead.fetch(t, offset);
    const Vec step = load(tokens[t].step), write = load(tokens[t].write);
    const Vec exponent = minimum(broadcast(LARGE), step);
    Vec y = zero();
    if (READ != Read::NOTHING) y = load(tokens[t].y);
#pragma GCC unroll 8
    for (int k = 0; k < STATES; ++k) {
      const Vec decay = power(exponent * load(rate + k * LANES)), before = decay * state[k];
      if (STORE) {
        store(decayed + (2 * k) * LANES, decay);
        store(decayed + (2 * k + 1) * LANES, before);
      }
      state[k] = fma(write, broadcast(b[k]), before);
      if (READ == Read::BEFORE) y = fma(before, broadcast(c[k]), y);
      if (READ == Read::AFTER) y = fma(state[k], broadcast(c[k]), y);
    }
    if (STORE) decayed += 2 * STATES * LANES;
    if (READ != Read::NOTHING) store(tokens[t].y, y);
  }
#pragma GCC unroll 8
  for (int k = 0; k < STATES; ++k) store(h + (first + k) * LANES, state[k]);
}

template <Read READ>
void scan_all(int count, Token* tokens, const Keys& keys, const float* rates, float* h, const Ahead& ahead,
              int64_t offset) {
  int k = 0;
  for (; k + MANY <= keys.padded; k += MANY)
    scan<MANY, READ, false>(count, tokens, keys, k, rates, h, nullptr, ahead, offset);
  for (; k < keys.padded; k += QUAD)
    scan<QUAD, READ, false>(count, tokens, keys, k, rates, h, nullptr, ahead, offset);
}

// Scans back from the last token to the first. grad_step gets its part through the decays, with rates in powers of 2;
// grad_b and grad_c get the partial sums of sums_of_quads for each quad of states.
template <int STATES, bool INCLUSIVE, bool KEYS>
void go_back(int count, BackwardToken* tokens, const Keys& keys, int first, const float* rates, const float* decayed,
             float* grad_h, float* grad_a, float* grad_b, float* grad_c) {
  Vec carry[STATES], grad_rate[STATES];
#pragma GCC unroll 8
  for (int k = 0; k < STATES; ++k) {
    carry[k] = load(grad_h + (first + k) * LANES);
    grad_rate[k] = zero();
  }
  const float* rate = rates + first * LANES;
  for (int t = count - 1; t >= 0; --t) {
    BackwardToken& token = tokens[t];
    const float *b = keys.b + t * keys.padded + first, *c = keys.c + t * keys.padded + first;
    const Vec step = load(token.step), write = load(token.write), grad_y = load(token.grad_y);
    Vec grad_write = load(token.grad_write), grad_step = load(token.grad_step);
    const float* decay = decayed + t * 2 * STATES * LANES;
#pragma GCC unroll 2
    for (int quad = 0; quad < STATES; quad += QUAD) {
      Vec to_b[QUAD], to_c[QUAD];
#pragma GCC unroll 4
      for (int i = 0; i < QUAD; ++i) {
        const int k = quad + i;
        const Vec p = load(decay + (2 * k + 1) * LANES);
        const Vec read = fma(grad_y, broadcast(c[k]), carry[k]), written = INCLUSIVE ? read : carry[k];
        const Vec change = read * p;
        grad_write = fma(written, broadcast(b[k]), grad_write);
        grad_step = fma(change, load(rate + k * LANES), grad_step);
        grad_rate[k] = fma(change, step, grad_rate[k]);
        carry[k] = load(decay + 2 * k * LANES) * read;
        if (KEYS) {
          to_b[i] = written * write;
          to_c[i] = grad_y * (INCLUSIVE ? fma(write, broadcast(b[k]), p) : p);
        }
      }
      if (KEYS) {
        const int64_t at = (t * keys.padded + first + quad) / QUAD * LANES;
        store(grad_b + at, load(grad_b + at) + sums_of_quads(to_b[0], to_b[1], to_b[2], to_b[3]));
        store(grad_c + at, load(grad_c + at) + sums_of_quads(to_c[0], to_c[1], to_c[2], to_c[3]));
      }
    }
    store(token.grad_write, grad_write);
    store(token.grad_step, grad_step);
  }
#pragma GCC unroll 8
  for (int k = 0; k < STATES; ++k) {
    float* const total = grad_a + (first + k) * LANES;
    store(total, load(total) + grad_rate[k]);
    store(grad_h + (first + k) * LANES, carry[k]);
  }
}

// Whether outputs are recomputed, whether they read after the write, and whether gradients of b or c are wanted.
struct Option {
  bool read, inclusive, keys;
};

template <int STATES>
void again_and_back(const Option& option, int count, BackwardToken* tokens, const Keys& keys, int first,
                    const float* rates, float* h, float* decayed, float* grad_h, float* grad_a, float* grad_b,
                    float* grad_c, const Ahead& ahead, int64_t offset) {
  auto* const again = !option.read       ? scan<STATES, Read::NOTHING, true, BackwardToken>
                      : option.inclusive ? scan<STATES, Read::AFTER, true, BackwardToken>
                                         : scan<STATES, Read::BEFORE, true, BackwardToken>;
  again(count, tokens, keys, first, rates, h, decayed, ahead, offset);
  auto* const back = option.inclusive ? (option.keys ? go_back<STATES, true, true> : go_back<STATES, true, false>)
                                      : (option.keys ? go_back<STATES, false, true> : go_back<STATES, false, false>);
  back(count, tokens, keys, first, rates, decayed, grad_h, grad_a, grad_b, grad_c);
}

// Loads rates of decay, as exponents of 2, for all vectors of a part.
void load_rates(const Args& x, const Part& part, int padded, float* rates) {
  const int states = static_cast<int>(x.states);
  for (int j = 0; j < part.vectors; ++j) {
    float* const to = rates + j * padded * LANES;
    load_states(x.a + (part.first + j * LANES) * states, part.lanes(j), states, padded, to);
    for (int k = 0; k < padded; ++k) {
      const Vec limited = maximum(broadcast(-LARGE), minimum(broadcast(LARGE), load(to + k * LANES) * LOG2_E));
      store(to + k * LANES, limited);
    }
  }
}

// Loads and stores a part's vectors of a (B, C, K) tensor.
void load_all_states(const Args& x, const Part& part, const float* from, int padded, float* to) {
  const int states = static_cast<int>(x.states);
  for (int j = 0; j < part.vectors; ++j) {
    if (from == nullptr)
      for (int k = 0; k < padded; ++k) store(to + (j * padded + k) * LANES, zero());
    else
      load_states(from + (part.first + j * LANES) * states, part.lanes(j), states, padded, to + j * padded * LANES);
  }
}
void store_all_states(const Args& x, const Part& part, const float* from, int padded, float* to) {
  const int states = static_cast<int>(x.states);
  for (int j = 0; j < part.vectors; ++j)
    store_states(from + j * padded * LANES, part.lanes(j), states, to + (part.first + j * LANES) * states);
}

// Position of the t-th token in visiting order.
REGARD_INLINE int64_t place(const Args& x, int64_t t) { return x.order == nullptr ? t : x.order[t]; }

// Loads b or c of some tokens, as float32 padded to full quads of states.
template <class T>
void load_keys(const Args& x, const void* keys, const int64_t* strides, const Part& part, int64_t begin, int count,
               int padded, float* to) {
  const int states = static_cast<int>(x.states);
  const T* const all = static_cast<const T*>(keys) + part.row * strides[0] + part.group * strides[2];
  for (int t = 0; t < count; ++t, to += padded) {
    const T* const from = all + place(x, begin + t) * strides[1];
    int k = 0;
    for (; k + LANES <= states; k += LANES) store(to + k, load(from + k));
    for (; k < states; ++k) to[k] = to_float(from[k]);
    for (; k < padded; ++k) to[k] = 0.f;
  }
}
// A part's channels at the t-th token of a (B, N, C) tensor; nullptr for no tensor.
template <class T>
const T* channels_of(const Args& x, const void* tensor, const int64_t* strides, const Part& part, int64_t t) {
  if (tensor == nullptr) return nullptr;
  return static_cast<const T*>(tensor) + part.row * strides[0] + place(x, t) * strides[1] + part.first;
}
template <class T>
T* result_of(const Args& x, void* tensor, const Part& part, int64_t t) {
  if (tensor == nullptr) return nullptr;
  return static_cast<T*>(tensor) + (part.row * x.n + place(x, t)) * x.channels + part.first;
}

// Loads skip or dt_bias of a part in full vectors; zeros if absent.
void load_parameters(const float* all, const Part& part, float* to) {
  for (int j = 0; j < part.vectors; ++j)
    store(to + j * LANES, all == nullptr ? zero() : take(all + part.first + j * LANES, part.lanes(j)));
}

template <class T>
void clear_beyond(const Args& x, const Part& part, void* tensor) {
  if (tensor == nullptr) return;
  for (int64_t t = part.length; t < x.n; ++t) memset(result_of<T>(x, tensor, part, t), 0, part.channels * sizeof(T));
}

template <class T>
bool forward_part(const Args& x, const Part& part) {
  const int states = static_cast<int>(x.states), padded = static_cast<int>(round_up(states, QUAD));
  const int tokens = static_cast<int>(least<int64_t>(EVERY, part.length));
  const size_t one = static_cast<size_t>(padded) * LANES, channels = static_cast<size_t>(part.vectors) * LANES,
               of_keys = static_cast<size_t>(tokens) * padded;
  Workspace memory(2 * Workspace::bytes_of<float>(part.vectors * one) + 2 * Workspace::bytes_of<float>(of_keys) +
                   2 * Workspace::bytes_of<float>(channels) + Workspace::bytes_of<Token>(part.vectors * tokens));
  if (!memory) return false;
  float *rates = memory.take<float>(part.vectors * one), *h = memory.take<float>(part.vectors * one);
  float *b = memory.take<float>(of_keys), *c = memory.take<float>(of_keys);
  float *bias = memory.take<float>(channels), *skip = memory.take<float>(channels);
  Token* all = memory.take<Token>(part.vectors * tokens);

  const int64_t whole = x.channels * states, blocks = ceil_div(x.n, EVERY);
  load_rates(x, part, padded, rates);
  load_all_states(x, part, x.state == nullptr ? nullptr : x.state + part.row * whole, padded, h);
  load_parameters(x.dt_bias, part, bias);
  load_parameters(x.skip, part, skip);
  const Keys keys{padded, b, c};
  const void* const z = x.c == nullptr ? nullptr : x.z;
  for (int64_t begin = 0; begin < part.length; begin += EVERY) {
    const int count = static_cast<int>(least<int64_t>(EVERY, part.length - begin));
    if (x.kept != nullptr)
      store_all_states(x, part, h, padded, x.kept + (part.row * blocks + begin / EVERY) * whole);
    load_keys<T>(x, x.b, x.b_strides, part, begin, count, padded, b);
    if (x.c != nullptr) load_keys<T>(x, x.c, x.c_strides, part, begin, count, padded, c);
    for (int t = 0; t < count; ++t) {
      const T* const inputs = channels_of<T>(x, x.x, x.x_strides, part, begin + t);
      const T* const dts = channels_of<T>(x, x.dt, x.dt_strides, part, begin + t);
      for (int j = 0; j < part.vectors; ++j) {
        Token& token = all[j * tokens + t];
        const Vec input = take(inputs + j * LANES, part.lanes(j));
        Vec step = take(dts + j * LANES, part.lanes(j));
        if (x.dt_bias != nullptr) step = softplus(step + load(bias + j * LANES)).value;
        store(token.step, step);
        store(token.write, step * input);
        store(token.y, x.skip == nullptr ? zero() : load(skip + j * LANES) * input);
      }
    }
    Ahead ahead(x);
    ahead.add(channels_of<T>(x, z, x.z_strides, part, begin), x.z_strides[1]);
    ahead.add(result_of<T>(x, x.y, part, begin), x.channels);
    if (begin + EVERY < part.length) {
      ahead.add(channels_of<T>(x, x.x, x.x_strides, part, begin + EVERY), x.x_strides[1]);
      ahead.add(channels_of<T>(x, x.dt, x.dt_strides, part, begin + EVERY), x.dt_strides[1]);
    }
    auto* const run = x.c == nullptr ? scan_all<Read::NOTHING>
                      : x.inclusive  ? scan_all<Read::AFTER>
                                     : scan_all<Read::BEFORE>;
    for (int j = 0; j < part.vectors; ++j)
      run(count, all + j * tokens, keys, rates + j * one, h + j * one, ahead, j * LANES * sizeof(T));
    for (int t = 0; x.c != nullptr && t < count; ++t) {
      const T* const zs = channels_of<T>(x, z, x.z_strides, part, begin + t);
      T* const to = result_of<T>(x, x.y, part, begin + t);
      for (int j = 0; j < part.vectors; ++j) {
        Vec y = load(all[j * tokens + t].y);
        if (zs != nullptr) {
          const Vec z = take(zs + j * LANES, part.lanes(j));
          y *= z * sigmoid(z);
        }
        put(to + j * LANES, y, part.lanes(j));
      }
    }
  }
  clear_beyond<T>(x, part, x.y);
  store_all_states(x, part, h, padded, x.last + part.row * whole);
  return true;
}

template <class T>
int forward(const Args& x) {
  const Division division(x);
  int failed = 0;
  parallel_tasks(static_cast<int>(x.threads), x.batch * x.groups * division.parts, [&](int64_t number) {
    if (!forward_part<T>(x, part_of(x, division, number))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  return failed ? REGARD_OUT_OF_MEMORY : REGARD_OK;
}

// A part's contributions to gradients that are summed later: over rows for a (B, C, K), skip and dt_bias (B, C); over a
// group's parts for b and c, by token and padded state.
struct Shares {
  float *a, *skip, *bias;
  float *b, *c;
};

template <class T>
bool backward_part(const BackwardArgs& g, const Part& part, const Shares& shares) {
  const Args& x = *g.forward;
  const int states = static_cast<int>(x.states), padded = static_cast<int>(round_up(states, QUAD));
  const int tokens = static_cast<int>(least<int64_t>(EVERY, part.length));
  const size_t one = static_cast<size_t>(padded) * LANES, channels = static_cast<size_t>(part.vectors) * LANES,
               of_keys = static_cast<size_t>(tokens) * padded, of_sums = of_keys / QUAD * LANES,
               of_decays = static_cast<size_t>(tokens) * 2 * MANY * LANES;
  Workspace memory(3 * Workspace::bytes_of<float>(part.vectors * one) + Workspace::bytes_of<float>(one) +
                   2 * Workspace::bytes_of<float>(of_keys) + 4 * Workspace::bytes_of<float>(channels) +
                   Workspace::bytes_of<BackwardToken>(part.vectors * tokens) +
                   Workspace::bytes_of<float>(of_decays) + 2 * Workspace::bytes_of<float>(of_sums));
  if (!memory) return false;
  float *rates = memory.take<float>(part.vectors * one), *grad_h = memory.take<float>(part.vectors * one),
        *grad_a = memory.take<float>(part.vectors * one);
  float* h = memory.take<float>(one);
  float *b = memory.take<float>(of_keys), *c = memory.take<float>(of_keys);
  float *bias = memory.take<float>(channels), *skip = memory.take<float>(channels);
  float *grad_bias = memory.take<float>(channels), *grad_skip = memory.take<float>(channels);
  BackwardToken* all = memory.take<BackwardToken>(part.vectors * tokens);
  float* decayed = memory.take<float>(of_decays);
  float *grad_b = memory.take<float>(of_sums), *grad_c = memory.take<float>(of_sums);

  const int64_t whole = x.channels * states, blocks = ceil_div(x.n, EVERY);
  load_rates(x, part, padded, rates);
  load_all_states(x, part, g.grad_last + part.row * whole, padded, grad_h);
  load_parameters(x.dt_bias, part, bias);
  load_parameters(x.skip, part, skip);
  memset(grad_a, 0, part.vectors * one * sizeof(float));
  memset(grad_bias, 0, channels * sizeof(float));
  memset(grad_skip, 0, channels * sizeof(float));
  if (x.c == nullptr) memset(c, 0, of_keys * sizeof(float));
  const void* const z = x.c == nullptr ? nullptr : x.z;
  const Option option{z != nullptr && g.grad_z != nullptr, x.inclusive != 0, shares.b != nullptr};
  const Keys keys{padded, b, c};

  for (int64_t begin = (part.length - 1) / EVERY * EVERY; begin >= 0 && part.length > 0; begin -= EVERY) {
    const int count = static_cast<int>(least<int64_t>(EVERY, part.length - begin));
    const float* const kept = x.kept + (part.row * blocks + begin / EVERY) * whole + part.first * states;
    load_keys<T>(x, x.b, x.b_strides, part, begin, count, padded, b);
    if (x.c != nullptr) load_keys<T>(x, x.c, x.c_strides, part, begin, count, padded, c);
    if (option.keys) {
      memset(grad_b, 0, of_sums * sizeof(float));
      memset(grad_c, 0, of_sums * sizeof(float));
    }
    for (int t = 0; t < count; ++t) {
      const T* const inputs = channels_of<T>(x, x.x, x.x_strides, part, begin + t);
      const T* const dts = channels_of<T>(x, x.dt, x.dt_strides, part, begin + t);
      const T* const zs = channels_of<T>(x, z, x.z_strides, part, begin + t);
      const T* const grad_ys = channels_of<T>(x, g.grad_y, g.grad_y_strides, part, begin + t);
      for (int j = 0; j < part.vectors; ++j) {
        BackwardToken& token = all[j * tokens + t];
        const Vec input = take(inputs + j * LANES, part.lanes(j));
        Vec step = take(dts + j * LANES, part.lanes(j));
        if (x.dt_bias != nullptr) {
          const Softplus found = softplus(step + load(bias + j * LANES));
          step = found.value;
          store(token.slope, found.slope);
        }
        Vec grad_y = zero();
        if (grad_ys != nullptr) grad_y = take(grad_ys + j * LANES, part.lanes(j));
        if (zs != nullptr) {
          const Vec gate = take(zs + j * LANES, part.lanes(j));
          grad_y *= gate * sigmoid(gate);
        }
        store(token.step, step);
        store(token.write, step * input);
        store(token.y, load(skip + j * LANES) * input);
        store(token.input, input);
        store(token.grad_y, grad_y);
        store(token.grad_write, zero());
        store(token.grad_step, zero());
      }
    }
    Ahead ahead(x);
    ahead.add(result_of<T>(x, g.grad_x, part, begin), x.channels);
    ahead.add(result_of<T>(x, g.grad_dt, part, begin), x.channels);
    if (option.read) ahead.add(result_of<T>(x, g.grad_z, part, begin), x.channels);
    if (begin > 0) {
      ahead.add(channels_of<T>(x, x.x, x.x_strides, part, begin - EVERY), x.x_strides[1]);
      ahead.add(channels_of<T>(x, x.dt, x.dt_strides, part, begin - EVERY), x.dt_strides[1]);
      ahead.add(channels_of<T>(x, z, x.z_strides, part, begin - EVERY), x.z_strides[1]);
      ahead.add(channels_of<T>(x, g.grad_y, g.grad_y_strides, part, begin - EVERY), g.grad_y_strides[1]);
    }
    for (int j = 0; j < part.vectors; ++j) {
      load_states(kept + j * LANES * states, part.lanes(j), states, padded, h);
      for (int k = 0; k < padded;) {
        const bool many = k + MANY <= padded;
        auto* const run = many ? again_and_back<MANY> : again_and_back<QUAD>;
        run(option, count, all + j * tokens, keys, k, rates + j * one, h, decayed, grad_h + j * one, grad_a + j * one,
            grad_b, grad_c, ahead, j * LANES * sizeof(T));
        k += many ? MANY : QUAD;
      }
    }
    for (int t = 0; t < count; ++t) {
      const T* const zs = option.read ? channels_of<T>(x, z, x.z_strides, part, begin + t) : nullptr;
      const T* const grad_ys = channels_of<T>(x, g.grad_y, g.grad_y_strides, part, begin + t);
      T* const to_x = result_of<T>(x, g.grad_x, part, begin + t);
      T* const to_dt = result_of<T>(x, g.grad_dt, part, begin + t);
      T* const to_z = result_of<T>(x, g.grad_z, part, begin + t);
      for (int j = 0; j < part.vectors; ++j) {
        const BackwardToken& token = all[j * tokens + t];
        const int at = j * LANES, lanes = part.lanes(j);
        const Vec input = load(token.input), write = load(token.grad_write), grad_y = load(token.grad_y);
        Vec step = fma(write, input, load(token.grad_step) * LN_2);
        if (x.dt_bias != nullptr) step *= load(token.slope);
        store(grad_bias + at, load(grad_bias + at) + step);
        store(grad_skip + at, fma(grad_y, input, load(grad_skip + at)));
        if (to_dt != nullptr) put(to_dt + at, step, lanes);
        if (to_x != nullptr) put(to_x + at, fma(write, load(token.step), grad_y * load(skip + at)), lanes);
        if (zs != nullptr) {
          const Vec gate = take(zs + at, lanes), s = sigmoid(gate);
          const Vec slope = s * fma(gate, 1.f - s, broadcast(1.f));
          put(to_z + at, take(grad_ys + at, lanes) * load(token.y) * slope, lanes);
        }
      }
    }
    if (option.keys) {
      add_lanes(count * padded, grad_b, shares.b + begin * padded);
      add_lanes(count * padded, grad_c, shares.c + begin * padded);
    }
  }
  void* const by_channel[] = {g.grad_x, g.grad_dt, g.grad_z};
  for (void* tensor : by_channel) clear_beyond<T>(x, part, tensor);
  if (g.grad_state != nullptr) store_all_states(x, part, grad_h, padded, g.grad_state + part.row * whole);
  store_all_states(x, part, grad_a, padded, shares.a + part.row * whole);
  memcpy(shares.bias + part.row * x.channels + part.first, grad_bias, part.channels * sizeof(float));
  memcpy(shares.skip + part.row * x.channels + part.first, grad_skip, part.channels * sizeof(float));
  return true;
}

void add_rows(int64_t rows, int64_t count, const float* from, float* to) {
  if (to == nullptr) return;
  for (int64_t i = 0; i < count; ++i) to[i] = 0.f;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < count; ++i) to[i] += from[row * count + i];
}

template <class T>
int backward(const BackwardArgs& g) {
  const Args& x = *g.forward;
  const Division division(x);
  const int threads = static_cast<int>(x.threads);
  const int64_t padded = round_up(x.states, QUAD), share = x.n * padded, sums = x.batch * x.groups;
  const bool with_keys = (g.grad_b != nullptr || g.grad_c != nullptr) && share > 0;
  const size_t params = static_cast<size_t>(x.batch) * x.channels;
  const size_t all_keys = with_keys ? static_cast<size_t>(sums * division.parts * share) : 0;
  Workspace memory(Workspace::bytes_of<float>(params * x.states) + 2 * Workspace::bytes_of<float>(params) +
                   2 * Workspace::bytes_of<float>(all_keys));
  if (!memory) return REGARD_OUT_OF_MEMORY;
  const Shares shares{memory.take<float>(params * x.states), memory.take<float>(params), memory.take<float>(params),
                      memory.take<float>(all_keys), memory.take<float>(all_keys)};
  int failed = 0;
  parallel_tasks(threads, sums * division.parts, [&](int64_t number) {
    Shares own = shares;
    own.b = with_keys ? shares.b + number * share : nullptr;
    own.c = with_keys ? shares.c + number * share : nullptr;
    if (!backward_part<T>(g, part_of(x, division, number), own)) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  if (failed) return REGARD_OUT_OF_MEMORY;

  add_rows(x.batch, x.channels * x.states, shares.a, g.grad_a);
  add_rows(x.batch, x.channels, shares.skip, g.grad_skip);
  add_rows(x.batch, x.channels, shares.bias, g.grad_dt_bias);
  if (!with_keys) return REGARD_OK;
  constexpr int64_t TOKENS = 256;
  const int64_t slices = ceil_div(x.n, TOKENS);
  parallel_tasks(threads, sums * slices, [&](int64_t number) {
    const int64_t sum_number = number / slices, begin = number % slices * TOKENS;
    const Part part = part_of(x, division, sum_number * division.parts);
    for (int64_t t = begin; t < least(x.n, begin + TOKENS); ++t)
      for (int keys = 0; keys < 2; ++keys) {
        T* to = static_cast<T*>(keys == 0 ? g.grad_b : g.grad_c);
        if (to == nullptr) continue;
        to += ((part.row * x.n + place(x, t)) * x.groups + part.group) * x.states;
        const float* from = (keys == 0 ? shares.b : shares.c) + sum_number * division.parts * share + t * padded;
        for (int64_t k = 0; k < x.states; k += QUAD) {
          float total[QUAD] = {0.f, 0.f, 0.f, 0.f};
          for (int64_t other = 0; t < part.length && other < division.parts; ++other)
            for (int i = 0; i < QUAD; ++i) total[i] += from[other * share + k + i];
          for (int i = 0; i < least<int64_t>(QUAD, x.states - k); ++i) from_float(total[i], to + k + i);
        }
      }
  });
  return REGARD_OK;
}

bool well_formed(const Args& x) {
  return x.threads >= 1 && x.batch >= 0 && x.n >= 0 && x.channels >= 0 && x.groups >= 1 && x.states >= 0 &&
         x.channels % x.groups == 0 && (x.dtype == REGARD_FLOAT32 || x.dtype == REGARD_BFLOAT16);
}

bool empty(const Args& x) { return x.batch == 0 || x.channels == 0; }

}  // namespace

int selective_scan(const regard_selective_scan_args* args) {
  if (!well_formed(*args)) return REGARD_BAD_ARGUMENT;
  if (empty(*args)) return REGARD_OK;
  return args->dtype == REGARD_FLOAT32 ? forward<float>(*args) : forward<bfloat16>(*args);
}

int selective_scan_backward(const regard_selective_scan_backward_args* args) {
  if (!well_formed(*args->forward)) return REGARD_BAD_ARGUMENT;
  if (empty(*args->forward)) return REGARD_OK;
  return args->forward->dtype == REGARD_FLOAT32 ? backward<float>(*args) : backward<bfloat16>(*args);
}

}  // namespace REGARD_ISA
