// Products with weights of 8 and 4 bits against plain loops in double, in buffers of exactly their size.

#include "regard_quantized_linear.h"
#include "testing.h"

namespace {

void check(int64_t bits, int64_t m, int64_t n, int64_t k, int64_t group, bool offsets, int64_t threads,
           float reach = 1, bool rounded = false) {
  const bool whole = bits != 4;  // whether rows have one scale, or none
  const int64_t columns = whole ? k : (k + group - 1) / group * group, own = whole ? k : group;
  const int64_t groups = whole ? 1 : columns / group;
  now("%d bits, %d x %d x %d, groups of %d", int(bits), int(m), int(n), int(k), int(own));
  const Floats x = numbers(m * k, -reach, reach), bias = numbers(n);
  Floats y = unwritten(m * n);
  const Floats floats = numbers(bits == 32 ? n * k : 0);
  std::vector<uint8_t> codes(bits == 32 ? 0 : bits == 8 ? n * columns : n * columns / 2);
  for (uint8_t& v : codes) v = static_cast<uint8_t>(128 * (uniform() + 1));
  Tensor scale(numbers(n * groups), true), offset(numbers(n * groups), true);
  regard_quantized_linear_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.bits = bits;
  a.m = m;
  a.n = n;
  a.k = k;
  a.columns = columns;
  a.group = own;
  a.x = x.data();
  a.x_stride = k;
  a.codes = bits == 32 ? static_cast<const void*>(floats.data()) : codes.data();
  a.scale = bits == 32 ? nullptr : static_cast<const uint16_t*>(scale.data());
  a.offset = offsets ? static_cast<const uint16_t*>(offset.data()) : nullptr;
  a.bias = bias.data();
  a.y = y.data();
  a.rounded = rounded;
  must("taken", regard_quantized_linear(&a));
  Floats steps(m, 1e-30f / 127);
  for (int64_t i = 0; i < m * k; ++i) steps[i / k] = fmaxf(steps[i / k], fabsf(x[i]) / 127);
  Doubles errors(y.size());
  for (int64_t t = 0; t < m; ++t)
    for (int64_t i = 0; i < n; ++i) {
      double expected = bias[i], size = 1;
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = i * groups + (whole ? 0 : j / group);
        double w = bits == 32 ? floats[i * k + j] : 0;
        if (bits != 32) {
          const uint8_t byte = codes[bits == 8 ? i * columns + j : (i * columns + j) / 2];
          const int code = bits == 8 ? static_cast<int8_t>(byte) : (j % 2 ? byte >> 4 : byte & 15) - 8;
          w = code * scale[at] + (offsets ? offset[at] : 0);
        }
        float input = x[t * k + j];
        if (rounded) input = rintf(input / steps[t]) * steps[t];
        expected += w * input;
        size += fabs(w * input);
      }
      errors[t * n + i] = (y[t * n + i] - expected) / size;
    }
  compare("errors of the terms", errors, Doubles(errors.size()), 1e-6, 1);
}

// NaN stays NaN, in its row only.
void check_special() {
  for (float special : {NAN, INFINITY}) {
    now("an input of %g", special);
    Floats x = numbers(2 * 64), y = unwritten(2 * 3);
    x[70] = special;
    std::vector<uint8_t> codes(3 * 32, 0x99);  // ones
    const std::vector<uint16_t> scale(3 * 2, 0x3f80);
    regard_quantized_linear_args a{};
    a.size = sizeof a;
    a.threads = 1;
    a.bits = 4;
    a.m = 2;
    a.n = 3;
    a.k = a.columns = a.x_stride = 64;
    a.group = 32;
    a.x = x.data();
    a.codes = codes.data();
    a.scale = scale.data();
    a.y = y.data();
    must("taken", regard_quantized_linear(&a));
    for (int i = 0; i < 6; ++i)
      if (i < 3 ? !isfinite(y[i]) : !(isnan(special) ? isnan(y[i]) : y[i] == special)) fail("an output", y[i], special);
  }
}

}  // namespace

int main() {
  regard_quantized_linear_args wrong{};
  wrong.size = sizeof wrong;
  wrong.threads = 1;
  wrong.bits = 5;
  must("five bits", regard_quantized_linear(&wrong), REGARD_BAD_ARGUMENT);
  return on_every_instruction_set([] {
    for (int64_t m : {0, 1, 2, 3, 7})
      for (int64_t threads : {1, 3}) {
        for (int64_t bits : {8, 32})
          for (int64_t k : {0, 1, 37, 300}) check(bits, m, 70, k, 0, false, threads);
        for (int64_t group : {32, 64, 128})
          for (bool offsets : {false, true}) check(4, m, 37, 200, group, offsets, threads);
        check(4, m, 33, 31, 32, true, threads);
      }
    for (float reach : {0.f, 1e-30f, 1e30f, 1.5e35f}) check(4, 2, 9, 200, 64, true, 1, reach);
    for (int64_t k : {1, 37, 64, 300})
      for (int64_t m : {1, 2, 3, 5, 9, 16}) check(8, m, 37, k, 0, false, 2, 1, true);
    check(8, 2, 9, 200, 0, false, 1, 0, true);
    check_special();
    check(8, 2, 600, 700, 0, false, 3);
    check(4, 2, 600, 700, 32, true, 3);
  });
}
