// The operations around a layer's matrix products. All are bound by memory or exponentials: one pass, no intermediate
// tensors.

#include "regard_layers.h"

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

constexpr int64_t FLUSH = 128;  // terms in a partial sum, so that sums of many terms stay accurate

// The derivative of x sigmoid(x), given s = sigmoid(x).
REGARD_INLINE Vec silu_slope(Vec x, Vec s) { return fma(x * s, 1.f - s, s); }

template <class T>
REGARD_INLINE void clear(T* p, int64_t count) {
  memset(p, 0, static_cast<size_t>(count) * sizeof(T));
}

// to += from; from = 0
void flush(float* from, float* to, int64_t count) {
  over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    put<FULL>(to + i, take<FULL>(to + i, lanes) + take<FULL>(from + i, lanes), lanes);
    put<FULL>(from + i, zero(), lanes);
  });
}

// ---- short convolution

using Convolution = regard_short_convolution_args;
using ConvolutionBackward = regard_short_convolution_backward_args;

constexpr int TILE = 4;  // tokens at a time, which share the loads of most inputs
constexpr int WIDEST = REGARD_SHORT_CONVOLUTION_WIDEST;
constexpr int64_t CHANNELS = 512, TOKENS = 64;  // largest task

// A row of the batch: where its tokens are, including those before the first and after the last.
template <class T>
struct Row {
  const T *x, *cache, *zeros;
  int64_t stride, length, channels;
  int kept;

  const T* token(int64_t t) const {
    if (t >= 0 && t < length) return x + t * stride;
    return t < 0 && cache != nullptr ? cache + (t + kept) * channels : zeros;
  }
};

template <class T>
Row<T> row_of(const Convolution& a, int64_t b, const T* zeros) {
  const int kept = static_cast<int>(a.width) - 1;
  const T* const cache = a.cache == nullptr ? nullptr : static_cast<const T*>(a.cache) + b * kept * a.channels;
  const int64_t length = a.lengths == nullptr ? a.n : most<int64_t>(0, least(a.lengths[b], a.n));
  return {static_cast<const T*>(a.x) + b * a.x_strides[0], cache, zeros, a.x_strides[1], length, a.channels, kept};
}

// Weights as (width, C).
void transpose_weight(const Convolution& a, float* to) {
  for (int64_t c = 0; c < a.channels; ++c)
    for (int64_t j = 0; j < a.width; ++j) to[j * a.channels + c] = a.weight[c * a.width + j];
}

// Computes TOKENS_ consecutive outputs of all channels; WIDTH = 0 for any width.
template <int TOKENS_, int WIDTH, class T>
void convolve(const Convolution& a, const float* weight, const T* const* x, T* y) {
  const int width = WIDTH ? WIDTH : static_cast<int>(a.width);
  over_vectors(a.channels, [&](int64_t c, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    Vec sums[TOKENS_];
    const Vec bias = a.bias == nullptr ? zero() : take<FULL>(a.bias + c, lanes);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS_; ++t) sums[t] = bias;
    if (WIDTH) {
      Vec w[WIDTH ? WIDTH : 1];
#pragma GCC unroll 8
      for (int j = 0; j < WIDTH; ++j) w[j] = take<FULL>(weight + j * a.channels + c, lanes);
#pragma GCC unroll 12
      for (int i = 0; i < TOKENS_ + WIDTH - 1; ++i) {
        const Vec v = take<FULL>(x[i] + c, lanes);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS_; ++t)
          if (i - t >= 0 && i - t < WIDTH) sums[t] = fma(v, w[i - t], sums[t]);
      }
    } else {
      for (int j = 0; j < width; ++j) {
        const Vec w = take<FULL>(weight + j * a.channels + c, lanes);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS_; ++t) sums[t] = fma(take<FULL>(x[t + j] + c, lanes), w, sums[t]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS_; ++t) put<FULL>(y + t * a.channels + c, a.silu ? sums[t] * sigmoid(sums[t]) : sums[t], lanes);
  });
}

template <class T>
int run_convolution(const Convolution& a) {
  const int64_t C = a.channels, kept = a.width - 1;
  Workspace workspace(Workspace::bytes_of<float>(static_cast<size_t>(a.width * C)) +
                      Workspace::bytes_of<T>(static_cast<size_t>(C)));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float* const weight = workspace.take<float>(static_cast<size_t>(a.width * C));
  T* const zeros = workspace.take<T>(static_cast<size_t>(C));
  transpose_weight(a, weight);
  clear(zeros, C);
  const int64_t blocks = most<int64_t>(1, ceil_div(a.n, TOKENS));
  parallel_tasks(static_cast<int>(a.threads), a.batch * blocks, [&](long task) {
    const int64_t b = task / blocks, begin = task % blocks * TOKENS, end = least(begin + TOKENS, a.n);
    const Row<T> row = row_of(a, b, static_cast<const T*>(zeros));
    const int64_t left = kept - a.after, last = most(begin, least(end, row.length));
    T* const y = static_cast<T*>(a.y) + b * a.n * C;
    const T* x[TILE + WIDEST - 1];
    int64_t t = begin;
    for (; t + TILE <= last; t += TILE) {
      for (int64_t i = 0; i < TILE + kept; ++i) x[i] = row.token(t - left + i);
      (a.width == 4 ? convolve<TILE, 4, T> : convolve<TILE, 0, T>)(a, weight, x, y + t * C);
    }
    for (; t < last; ++t) {
      for (int64_t i = 0; i < 1 + kept; ++i) x[i] = row.token(t - left + i);
      (a.width == 4 ? convolve<1, 4, T> : convolve<1, 0, T>)(a, weight, x, y + t * C);
    }
    if (t < end) clear(y + t * C, (end - t) * C);
    if (a.last != nullptr && begin == 0)
      for (int64_t i = 0; i < kept; ++i)
        memcpy(static_cast<T*>(a.last) + (b * kept + i) * C, row.token(row.length - kept + i), static_cast<size_t>(C) * sizeof(T));
  });
  return REGARD_OK;
}

// Carried from tile to tile in backward, for a block of channels: the gradients of the last width - 1 sums before the
// activation, and sums over tokens for weights and bias.
struct Carried {
  float *before, *sums, *totals;
};

// One tile of `count` channels from `first` on: the gradients of the sums at TILE tokens, and of the inputs `kept -
// after` tokens earlier. `x` are the inputs of the sums, grad_y the outputs' gradients; `more` is added to the inputs'
// gradients.
template <int WIDTH, class T>
void convolve_back(const Convolution& a, const float* weight, int64_t first, int64_t count, const Carried& carried,
                   const T* const* x, const T* const* grad_y, const T* const* more, T* const* grad_x) {
  const int width = WIDTH ? WIDTH : static_cast<int>(a.width), kept = width - 1;
  over_vectors(count, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    constexpr int MOST = WIDTH ? WIDTH : WIDEST;
    const int64_t c = first + i;
    Vec w[MOST] = {}, v[TILE + MOST - 1] = {}, d[TILE + MOST - 1] = {};  // d: gradients of sums, the carried ones first
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) w[j] = take<FULL>(weight + j * a.channels + c, lanes);
#pragma GCC unroll 20
    for (int j = 0; j < TILE + kept; ++j) v[j] = take<FULL>(x[j] + c, lanes);
#pragma GCC unroll 16
    for (int j = 0; j < kept; ++j) d[j] = take<FULL>(carried.before + j * count + i, lanes);
    const Vec bias = a.bias == nullptr ? zero() : take<FULL>(a.bias + c, lanes);
    Vec all = zero();
#pragma GCC unroll 4
    for (int t = 0; t < TILE; ++t) {
      Vec grad = take<FULL>(grad_y[t] + c, lanes);
      if (a.silu) {
        Vec sum = bias;
#pragma GCC unroll 16
        for (int j = 0; j < width; ++j) sum = fma(v[t + j], w[j], sum);
        grad *= silu_slope(sum, sigmoid(sum));
      }
      d[kept + t] = grad;
      all += grad;
    }
#pragma GCC unroll 16
    for (int j = 0; j < width; ++j) {
      Vec sum = take<FULL>(carried.sums + j * count + i, lanes);
#pragma GCC unroll 4
      for (int t = 0; t < TILE; ++t) sum = fma(v[t + j], d[kept + t], sum);
      put<FULL>(carried.sums + j * count + i, sum, lanes);
    }
    float* const bias_sum = carried.sums + width * count + i;
    put<FULL>(bias_sum, take<FULL>(bias_sum, lanes) + all, lanes);
#pragma GCC unroll 4
    for (int t = 0; t < TILE; ++t) {
      if (grad_x[t] == nullptr) continue;
      Vec sum = more[t] == nullptr ? zero() : take<FULL>(more[t] + c, lanes);
#pragma GCC unroll 16
      for (int j = 0; j < width; ++j) sum = fma(w[kept - j], d[t + j], sum);
      put<FULL>(grad_x[t] + c, sum, lanes);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kept; ++j) put<FULL>(carried.before + j * count + i, d[TILE + j], lanes);
  });
}

template <class T>
int run_convolution_backward(const ConvolutionBackward& back) {
  const Convolution& a = *back.forward;
  const int64_t C = a.channels, kept = a.width - 1, left = kept - a.after;
  // few enough channels for the cache and for all threads to have work; whole cache lines
  const int64_t each = most<int64_t>(32, least(CHANNELS, round_up(ceil_div(C, 2 * a.threads), 32)));
  const int64_t blocks = ceil_div(C, each), numbers = each * (kept + 2 * (a.width + 1));
  const int64_t parts = least(a.threads, blocks);
  Workspace workspace(Workspace::bytes_of<float>(static_cast<size_t>(a.width * C)) +
                      Workspace::bytes_of<T>(static_cast<size_t>(C)) +
                      static_cast<size_t>(parts) * Workspace::bytes_of<float>(static_cast<size_t>(numbers)));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float* const weight = workspace.take<float>(static_cast<size_t>(a.width * C));
  T* const zeros = workspace.take<T>(static_cast<size_t>(C));
  float* memory[64];
  for (int64_t p = 0; p < parts; ++p) memory[p] = workspace.take<float>(static_cast<size_t>(numbers));
  transpose_weight(a, weight);
  clear(zeros, C);
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    for (;;) {
      const long task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= blocks) return;
      const int64_t first = task * each, count = least(each, C - first);
      const Carried carried{memory[part], memory[part] + kept * count, memory[part] + (kept + a.width + 1) * count};
      clear(carried.sums, 2 * (a.width + 1) * count);
      for (int64_t b = 0; b < a.batch; ++b) {
        const Row<T> row = row_of(a, b, static_cast<const T*>(zeros));
        const T* const grad_y = static_cast<const T*>(back.grad_y) + b * back.grad_y_strides[0];
        const T* const grad_last = back.grad_last == nullptr ? nullptr : static_cast<const T*>(back.grad_last) + b * kept * C;
        T* const grad_x = back.grad_x == nullptr ? nullptr : static_cast<T*>(back.grad_x) + b * a.n * C;
        T* const grad_cache = back.grad_cache == nullptr ? nullptr : static_cast<T*>(back.grad_cache) + b * kept * C;
        clear(carried.before, kept * count);
        int64_t flushed = 0;
        // inputs are up to `left` tokens before the first sums that read them
        for (int64_t t = 0; t < row.length + left; t += TILE) {
          const T *x[TILE + WIDEST - 1], *grads[TILE], *more[TILE];
          T* to[TILE];
          for (int64_t i = 0; i < TILE + kept; ++i) x[i] = row.token(t - left + i);
          for (int64_t i = 0; i < TILE; ++i) {
            grads[i] = t + i < row.length ? grad_y + (t + i) * back.grad_y_strides[1] : zeros;
            const int64_t s = t + i - left, among_last = s - (row.length - kept);
            more[i] = grad_last != nullptr && among_last >= 0 && among_last < kept ? grad_last + among_last * C : nullptr;
            to[i] = nullptr;
            if (s >= 0 && s < row.length && grad_x != nullptr) to[i] = grad_x + s * C;
            if (s < 0 && grad_cache != nullptr) to[i] = grad_cache + (s + kept) * C;
          }
          (a.width == 4 ? convolve_back<4, T> : convolve_back<0, T>)(a, weight, first, count, carried, x, grads, more, to);
          if (t - flushed >= FLUSH) {
            flush(carried.sums, carried.totals, (a.width + 1) * count);
            flushed = t;
          }
        }
        flush(carried.sums, carried.totals, (a.width + 1) * count);
        if (grad_x != nullptr)
          for (int64_t t = row.length; t < a.n; ++t) clear(grad_x + t * C + first, count);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; back.grad_weight != nullptr && j < a.width; ++j)
          back.grad_weight[(first + i) * a.width + j] = carried.totals[j * count + i];
        if (back.grad_bias != nullptr) back.grad_bias[first + i] = carried.totals[a.width * count + i];
      }
    }
  });
  return REGARD_OK;
}

bool wrong(const Convolution& a) {
  return a.threads < 1 || a.batch < 0 || a.n < 0 || a.channels < 0 || a.width < 1 || a.width > WIDEST || a.after < 0 ||
         a.after >= a.width || (a.after != 0 && a.cache != nullptr);
}

// ---- RMSNorm

using Norm = regard_rms_norm_args;
using NormBackward = regard_rms_norm_backward_args;

struct Places {
  int64_t middle, inner;

  explicit Places(const int64_t* rows) : middle(rows[1]), inner(rows[2]) {}
  int64_t offset(int64_t row, const int64_t* strides) const {
    return row / (middle * inner) * strides[0] + row / inner % middle * strides[1] + row % inner * strides[2];
  }
};

template <int GATE, class T>
void norm_row(const Norm& a, const T* x, const T* z, const float* weight, T* y, float* kept) {
  const int64_t width = a.width;
  Vec first = zero(), second = zero(), third = zero(), fourth = zero();
  const auto value = [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    Vec u = take<FULL>(x + i, lanes);
    if (GATE == REGARD_GATE_BEFORE) {
      const Vec g = take<FULL>(z + i, lanes);
      u *= g * sigmoid(g);
      put<FULL>(kept + i, u, lanes);
    }
    return u;
  };
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) {
    const Vec p = value(i, LANES, Full{}), q = value(i + LANES, LANES, Full{});
    const Vec r = value(i + 2 * LANES, LANES, Full{}), s = value(i + 3 * LANES, LANES, Full{});
    first = fma(p, p, first), second = fma(q, q, second), third = fma(r, r, third), fourth = fma(s, s, fourth);
  }
  for (; i + LANES <= width; i += LANES) {
    const Vec p = value(i, LANES, Full{});
    first = fma(p, p, first);
  }
  if (i < width) {
    const Vec p = value(i, static_cast<int>(width - i), Partial{});
    first = fma(p, p, first);
  }
  const float squares = sum((first + second) + (third + fourth));
  const Vec scale = broadcast(1.f / __builtin_sqrtf(squares / static_cast<float>(width) + a.eps));
  over_vectors(width, [&](int64_t k, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    Vec n = (GATE == REGARD_GATE_BEFORE ? take<FULL>(kept + k, lanes) : take<FULL>(x + k, lanes)) * scale;
    if (weight != nullptr) n *= take<FULL>(weight + k, lanes);
    if (GATE == REGARD_GATE_AFTER) {
      const Vec g = take<FULL>(z + k, lanes);
      n *= g * sigmoid(g);
    }
    put<FULL>(y + k, n, lanes);
  });
}

// With n = u r, r = 1 / sqrt(mean(u^2) + eps): du = r (dn - n mean(dn n)). `kept` is memory for a row's values.
template <int GATE, class T>
void norm_row_back(const Norm& a, const T* x, const T* z, const float* weight, const T* grad_y, T* grad_x, T* grad_z,
                   float* grad_weight, float* kept) {
  const int64_t width = a.width;
  float* const opened = kept + width;  // sigmoid(z)
  Vec squares = zero(), products = zero();
  over_vectors(width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    Vec u = take<FULL>(x + i, lanes), d = take<FULL>(grad_y + i, lanes);
    if (GATE != REGARD_NO_GATE) {
      const Vec g = take<FULL>(z + i, lanes), s = sigmoid(g);
      put<FULL>(opened + i, s, lanes);
      if (GATE == REGARD_GATE_BEFORE) {
        u *= g * s;
        put<FULL>(kept + i, u, lanes);
      } else {
        d *= g * s;
      }
    }
    if (weight != nullptr) d *= take<FULL>(weight + i, lanes);
    squares = fma(u, u, squares);
    products = fma(u, d, products);
  });
  const float inverse = 1.f / static_cast<float>(width);
  const float scale = 1.f / __builtin_sqrtf(sum(squares) / static_cast<float>(width) + a.eps);
  const Vec r = broadcast(scale), mean = broadcast(sum(products) * scale * inverse);
  over_vectors(width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
    constexpr bool FULL = decltype(full)::value;
    const Vec input = take<FULL>(x + i, lanes), d = take<FULL>(grad_y + i, lanes);
    const Vec n = (GATE == REGARD_GATE_BEFORE ? take<FULL>(kept + i, lanes) : input) * r;
    Vec g = zero(), s = zero(), dn = d;
    if (GATE != REGARD_NO_GATE) g = take<FULL>(z + i, lanes), s = take<FULL>(opened + i, lanes);
    if (GATE == REGARD_GATE_AFTER) dn *= g * s;
    if (grad_weight != nullptr) put<FULL>(grad_weight + i, fma(dn, n, take<FULL>(grad_weight + i, lanes)), lanes);
    const Vec w = weight == nullptr ? broadcast(1.f) : take<FULL>(weight + i, lanes);
    if (GATE == REGARD_GATE_AFTER && grad_z != nullptr) put<FULL>(grad_z + i, d * w * n * silu_slope(g, s), lanes);
    const Vec du = r * (dn * w - n * mean);
    if (grad_x != nullptr) put<FULL>(grad_x + i, GATE == REGARD_GATE_BEFORE ? du * g * s : du, lanes);
    if (GATE == REGARD_GATE_BEFORE && grad_z != nullptr) put<FULL>(grad_z + i, du * input * silu_slope(g, s), lanes);
  });
}

template <class T>
int run_norm(const Norm& a) {
  const int64_t rows = a.rows[0] * a.rows[1] * a.rows[2], features = a.groups * a.width;
  const int64_t parts = least(a.threads, most<int64_t>(1, rows * features / 4096));
  Workspace workspace(static_cast<size_t>(parts) * Workspace::bytes_of<float>(static_cast<size_t>(a.width)));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float* kept[64];
  for (int64_t p = 0; p < parts; ++p) kept[p] = workspace.take<float>(static_cast<size_t>(a.width));
  const Places places(a.rows);
  const auto row = a.gate == REGARD_NO_GATE       ? norm_row<REGARD_NO_GATE, T>
                   : a.gate == REGARD_GATE_BEFORE ? norm_row<REGARD_GATE_BEFORE, T>
                                                  : norm_row<REGARD_GATE_AFTER, T>;
  parallel(static_cast<int>(parts), [&](int part) {
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const T* const x = static_cast<const T*>(a.x) + places.offset(i, a.x_strides);
      const T* const z = a.gate == REGARD_NO_GATE ? nullptr : static_cast<const T*>(a.z) + places.offset(i, a.z_strides);
      for (int64_t g = 0; g < features; g += a.width)
        row(a, x + g, z == nullptr ? z : z + g, a.weight == nullptr ? nullptr : a.weight + g,
            static_cast<T*>(a.y) + i * features + g, kept[part]);
    }
  });
  return REGARD_OK;
}

template <class T>
int run_norm_backward(const NormBackward& back) {
  const Norm& a = *back.forward;
  const int64_t rows = a.rows[0] * a.rows[1] * a.rows[2], features = a.groups * a.width;
  const int64_t parts = least(a.threads, most<int64_t>(1, rows * features / 4096));
  const int64_t numbers = 2 * a.width + 2 * features;  // a row's values; partial sums for the weight; totals
  Workspace workspace(static_cast<size_t>(parts) * Workspace::bytes_of<float>(static_cast<size_t>(numbers)));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float* memory[64];
  for (int64_t p = 0; p < parts; ++p) memory[p] = workspace.take<float>(static_cast<size_t>(numbers));
  const Places places(a.rows);
  const auto row = a.gate == REGARD_NO_GATE       ? norm_row_back<REGARD_NO_GATE, T>
                   : a.gate == REGARD_GATE_BEFORE ? norm_row_back<REGARD_GATE_BEFORE, T>
                                                  : norm_row_back<REGARD_GATE_AFTER, T>;
  parallel(static_cast<int>(parts), [&](int part) {
    float* const sums = memory[part] + 2 * a.width;
    clear(sums, 2 * features);
    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    for (int64_t i = begin; i < end; ++i) {
      const T* const x = static_cast<const T*>(a.x) + places.offset(i, a.x_strides);
      const T* const z = a.gate == REGARD_NO_GATE ? nullptr : static_cast<const T*>(a.z) + places.offset(i, a.z_strides);
      const T* const grad_y = static_cast<const T*>(back.grad_y) + places.offset(i, back.grad_y_strides);
      for (int64_t g = 0; g < features; g += a.width) {
        const int64_t at = i * features + g;
        row(a, x + g, z == nullptr ? z : z + g, a.weight == nullptr ? nullptr : a.weight + g, grad_y + g,
            back.grad_x == nullptr ? nullptr : static_cast<T*>(back.grad_x) + at,
            back.grad_z == nullptr ? nullptr : static_cast<T*>(back.grad_z) + at,
            back.grad_weight == nullptr ? nullptr : sums + g, memory[part]);
      }
      if (back.grad_weight != nullptr && (i + 1 - begin) % FLUSH == 0) flush(sums, sums + features, features);
    }
    if (back.grad_weight != nullptr) flush(sums, sums + features, features);
  });
  if (back.grad_weight != nullptr) {
    clear(back.grad_weight, features);
    for (int64_t p = 0; p < parts; ++p) flush(memory[p] + 2 * a.width + features, back.grad_weight, features);
  }
  return REGARD_OK;
}

bool wrong(const Norm& a) {
  return a.threads < 1 || a.rows[0] < 0 || a.rows[1] < 0 || a.rows[2] < 0 || a.groups < 0 || a.width < 1 || a.gate < 0 ||
         a.gate > REGARD_GATE_AFTER;
}

// ---- rotary positions

using Rotary = regard_rotary_args;

constexpr int PAIR = LANES / 2;
typedef double DoubleVec __attribute__((vector_size(PAIR * 8)));
typedef float HalfVec __attribute__((vector_size(PAIR * 4)));

REGARD_INLINE DoubleVec nearest(DoubleVec x) {
  constexpr double ROUNDER = 6755399441055744.0;  // doubles of this size are integers
  return (x + ROUNDER) - ROUNDER;
}

// cos and sin of LANES angles of position * frequency turns, by Taylor series within an eighth of a turn and whole
// quarters.
REGARD_INLINE void cosine_sine(double position, const double* frequencies, float* cosine, float* sine) {
  float rest[LANES], quarter[LANES];
#pragma GCC unroll 2
  for (int i = 0; i < LANES; i += PAIR) {
    DoubleVec turns;
    __builtin_memcpy(&turns, frequencies + i, sizeof turns);
    turns *= position;
    turns -= nearest(turns);
    const DoubleVec whole = nearest(4 * turns);
    const HalfVec angle = __builtin_convertvector((turns - 0.25 * whole) * 6.283185307179586, HalfVec);
    const HalfVec quarters = __builtin_convertvector(whole, HalfVec);
    __builtin_memcpy(rest + i, &angle, sizeof angle);
    __builtin_memcpy(quarter + i, &quarters, sizeof quarters);
  }
  const Vec x = load(rest), s = x * x;
  const IntVec q = __builtin_convertvector(load(quarter), IntVec);
  Vec odd = broadcast(1.f / 362880);
  odd = fma(odd, s, broadcast(-1.f / 5040));
  odd = fma(odd, s, broadcast(1.f / 120));
  odd = fma(odd, s, broadcast(-1.f / 6));
  odd = fma(odd * s, x, x);
  Vec even = broadcast(-1.f / 3628800);
  even = fma(even, s, broadcast(1.f / 40320));
  even = fma(even, s, broadcast(-1.f / 720));
  even = fma(even, s, broadcast(1.f / 24));
  even = fma(even, s, broadcast(-0.5f));
  even = fma(even, s, broadcast(1.f));
  const IntVec swapped = (q & 1) == 1;
  const IntVec sign_cosine = ((q + 1) & 2) << 30, sign_sine = (q & 2) << 30;
  store(cosine, reinterpret_cast<Vec>(reinterpret_cast<IntVec>(select(swapped, odd, even)) ^ sign_cosine));
  store(sine, reinterpret_cast<Vec>(reinterpret_cast<IntVec>(select(swapped, even, odd)) ^ sign_sine));
}

template <class T>
int run_rotary(const Rotary& a) {
  const int64_t pairs = a.rotated / 2, padded = round_up(pairs, LANES);
  const int64_t tasks = a.batch * ceil_div(a.n, TOKENS), parts = most<int64_t>(1, least(a.threads, tasks));
  Workspace workspace(static_cast<size_t>(parts) * 2 * Workspace::bytes_of<float>(static_cast<size_t>(padded)) +
                      Workspace::bytes_of<double>(static_cast<size_t>(padded)));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  double* const frequencies = workspace.take<double>(static_cast<size_t>(padded));
  for (int64_t i = 0; i < padded; ++i) frequencies[i] = i < pairs ? a.frequencies[i] : 0;
  float *cosines[64], *sines[64];
  for (int64_t p = 0; p < parts; ++p) {
    cosines[p] = workspace.take<float>(static_cast<size_t>(padded));
    sines[p] = workspace.take<float>(static_cast<size_t>(padded));
  }
  parallel(static_cast<int>(parts), [&](int part) {
    float *const cosine = cosines[part], *const sine = sines[part];
    for (int64_t row = a.batch * a.n * part / parts; row < a.batch * a.n * (part + 1) / parts; ++row) {
      const int64_t b = row / a.n, t = row % a.n;
      const double position =
          static_cast<double>(a.positions[b * a.positions_strides[0] + t * a.positions_strides[1]]);
      for (int64_t i = 0; i < padded; i += LANES) {
        cosine_sine(position, frequencies + i, cosine + i, sine + i);
        if (a.reverse) store(sine + i, -load(sine + i));
      }
      const T* x = static_cast<const T*>(a.x) + b * a.x_strides[0] + t * a.x_strides[2];
      T* y = static_cast<T*>(a.y) + b * a.y_strides[0] + t * a.y_strides[2];
      for (int64_t h = 0; h < a.heads; ++h, x += a.x_strides[1], y += a.y_strides[1]) {
        over_vectors(pairs, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
          constexpr bool FULL = decltype(full)::value;
          const Vec first = take<FULL>(x + i, lanes), second = take<FULL>(x + pairs + i, lanes);
          const Vec c = load(cosine + i), s = load(sine + i);
          put<FULL>(y + i, first * c - second * s, lanes);
          put<FULL>(y + pairs + i, first * s + second * c, lanes);
        });
        if (a.rotated < a.width)
          memcpy(y + a.rotated, x + a.rotated, static_cast<size_t>(a.width - a.rotated) * sizeof(T));
      }
    }
  });
  return REGARD_OK;
}

// ---- product with a gate

using Product = regard_gated_product_args;

template <bool SILU, class T>
int run_product(const Product& a) {
  const int64_t parts = least(a.threads, most<int64_t>(1, a.rows * a.width / 4096));
  parallel(static_cast<int>(parts), [&](int part) {
    for (int64_t row = a.rows * part / parts; row < a.rows * (part + 1) / parts; ++row) {
      const T *const x = static_cast<const T*>(a.x) + row * a.x_stride, *const z = static_cast<const T*>(a.gate) + row * a.gate_stride;
      if (a.grad_y == nullptr) {
        T* const y = static_cast<T*>(a.y) + row * a.width;
        over_vectors(a.width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
          constexpr bool FULL = decltype(full)::value;
          const Vec g = take<FULL>(z + i, lanes), s = sigmoid(g);
          put<FULL>(y + i, take<FULL>(x + i, lanes) * (SILU ? g * s : s), lanes);
        });
        continue;
      }
      const T* const grad = static_cast<const T*>(a.grad_y) + row * a.grad_y_stride;
      T* const grad_x = a.grad_x == nullptr ? nullptr : static_cast<T*>(a.grad_x) + row * a.width;
      T* const grad_z = a.grad_gate == nullptr ? nullptr : static_cast<T*>(a.grad_gate) + row * a.width;
      over_vectors(a.width, [&](int64_t i, int lanes, auto full) __attribute__((always_inline)) {
        constexpr bool FULL = decltype(full)::value;
        const Vec d = take<FULL>(grad + i, lanes), g = take<FULL>(z + i, lanes), s = sigmoid(g);
        if (grad_x != nullptr) put<FULL>(grad_x + i, d * (SILU ? g * s : s), lanes);
        if (grad_z != nullptr)
          put<FULL>(grad_z + i, d * take<FULL>(x + i, lanes) * (SILU ? silu_slope(g, s) : s * (1.f - s)), lanes);
      });
    }
  });
  return REGARD_OK;
}

template <class A>
A limited(A args) {
  args.threads = least<int64_t>(args.threads, 64);
  return args;
}

}  // namespace

int short_convolution(const regard_short_convolution_args* args) {
  if (wrong(*args) || (args->after != 0 && args->last != nullptr)) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->channels == 0) return REGARD_OK;
  return (args->dtype == REGARD_FLOAT32 ? run_convolution<float> : run_convolution<bfloat16>)(*args);
}

int short_convolution_backward(const regard_short_convolution_backward_args* args) {
  if (wrong(*args->forward)) return REGARD_BAD_ARGUMENT;
  if (args->forward->channels == 0) return REGARD_OK;
  regard_short_convolution_backward_args back = *args;
  const regard_short_convolution_args forward = limited(*args->forward);
  back.forward = &forward;
  return (forward.dtype == REGARD_FLOAT32 ? run_convolution_backward<float> : run_convolution_backward<bfloat16>)(back);
}

int rms_norm(const regard_rms_norm_args* args) {
  if (wrong(*args)) return REGARD_BAD_ARGUMENT;
  return (args->dtype == REGARD_FLOAT32 ? run_norm<float> : run_norm<bfloat16>)(limited(*args));
}

int rms_norm_backward(const regard_rms_norm_backward_args* args) {
  if (wrong(*args->forward)) return REGARD_BAD_ARGUMENT;
  regard_rms_norm_backward_args back = *args;
  const regard_rms_norm_args forward = limited(*args->forward);
  back.forward = &forward;
  return (forward.dtype == REGARD_FLOAT32 ? run_norm_backward<float> : run_norm_backward<bfloat16>)(back);
}

int rotary(const regard_rotary_args* args) {
  if (args->threads < 1 || args->rotated < 0 || args->rotated % 2 != 0 || args->rotated > args->width)
    return REGARD_BAD_ARGUMENT;
  return (args->dtype == REGARD_FLOAT32 ? run_rotary<float> : run_rotary<bfloat16>)(limited(*args));
}

int gated_product(const regard_gated_product_args* args) {
  if (args->threads < 1 || args->function < 0 || args->function > REGARD_GATE_BY_SIGMOID) return REGARD_BAD_ARGUMENT;
  const bool silu = args->function == REGARD_GATE_BY_SILU;
  if (args->dtype == REGARD_FLOAT32) return (silu ? run_product<true, float> : run_product<false, float>)(*args);
  return (silu ? run_product<true, bfloat16> : run_product<false, bfloat16>)(*args);
}

}  // namespace REGARD_ISA
