// A decoder's layer for few tokens, in two calls: at that size the way from one operation to the next takes longer than most
// operations.

#include "regard_decoder.h"
#include "regard_quantized_linear.h"

#include "elementwise.h"
#include "vector.h"

#include "workspace.h"

namespace REGARD_ISA {

int quantized_linear(const regard_quantized_linear_args* args);

namespace {

using regard::Workspace;

bool wrong(const regard_weight& w, int64_t k) { return w.k != k || w.n < 1 || w.codes == nullptr; }

// `scaled` has room for an input.
int apply(const regard_weight& w, int64_t threads, int64_t m, const float* x, float* scaled, float* y) {
  if (w.input_scale != nullptr) {
    for (int64_t t = 0; t < m; ++t)
      over_vectors(w.k, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
        constexpr bool FULL = decltype(full)::value;
        put<FULL>(scaled + t * w.k + i, take<FULL>(x + t * w.k + i, count) * take<FULL>(w.input_scale + i, count), count);
      });
    x = scaled;
  }
  regard_quantized_linear_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.bits = w.bits;
  a.m = m;
  a.n = w.n;
  a.k = w.k;
  a.columns = w.columns;
  a.group = w.group;
  a.x = x;
  a.x_stride = w.k;
  a.codes = w.codes;
  a.scale = w.scale;
  a.offset = w.offset;
  a.bias = w.bias;
  a.rounded = w.rounded;
  a.y = y;
  return quantized_linear(&a);
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

}  // namespace

int decoder_inputs(const regard_decoder_inputs_args* args) {
  const auto& a = *args;
  if (a.threads < 1 || a.m < 0 || a.width < 1 || a.head_width < 2 || a.head_width % 2) return REGARD_BAD_ARGUMENT;
  for (int i = 0; i < 3; ++i)
    if (wrong(a.projections[i], a.width) || (i < 2 && a.projections[i].n % a.head_width)) return REGARD_BAD_ARGUMENT;
  const size_t count = static_cast<size_t>(a.m * a.width);
  Workspace workspace(2 * Workspace::bytes_of<float>(count));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float *const normed = workspace.take<float>(count), *const scaled = workspace.take<float>(count);
  normalise(a.m, a.width, a.eps, a.x, a.norm, normed);
  for (int i = 0; i < 3; ++i) {
    const int status = apply(a.projections[i], a.threads, a.m, normed, scaled, a.outputs[i]);
    if (status != REGARD_OK) return status;
    if (i < 2) turn(a.m, a.projections[i].n, a.head_width, a.cosine, a.sine, a.outputs[i]);
  }
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
  const size_t widest = static_cast<size_t>(a.m * most(most(a.output.k, hidden), a.width));
  Workspace workspace(2 * Workspace::bytes_of<float>(count) + 2 * Workspace::bytes_of<float>(inner) +
                      Workspace::bytes_of<float>(widest));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  float *const sum = workspace.take<float>(count), *const normed = workspace.take<float>(count);
  float *const gates = workspace.take<float>(inner), *const values = workspace.take<float>(inner);
  float* const scaled = workspace.take<float>(widest);
  int status = apply(a.output, a.threads, a.m, a.attended, scaled, sum);
  if (status != REGARD_OK) return status;
  add(a.m * a.width, a.x, sum);
  normalise(a.m, a.width, a.eps, sum, a.norm, normed);
  status = apply(a.gate, a.threads, a.m, normed, scaled, gates);
  if (status == REGARD_OK) status = apply(a.up, a.threads, a.m, normed, scaled, values);
  if (status != REGARD_OK) return status;
  gate(a.m * hidden, gates, values);
  status = apply(a.down, a.threads, a.m, gates, scaled, a.y);
  if (status != REGARD_OK) return status;
  add(a.m * a.width, sum, a.y);
  return REGARD_OK;
}

}  // namespace REGARD_ISA
