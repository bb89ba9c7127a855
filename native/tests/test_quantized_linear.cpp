// Products with weights of 8 and 4 bits against plain loops in double, in buffers of exactly their size.

#include "regard_quantized_linear.h"
#include "testing.h"

namespace {

void check(int64_t bits, int64_t m, int64_t n, int64_t k, int64_t group, bool offsets, int64_t threads) {
  const int64_t columns = bits == 8 ? k : (k + group - 1) / group * group, own = bits == 8 ? k : group;
  const int64_t groups = bits == 8 ? 1 : columns / group;
  now("%d bits, %d x %d x %d, groups of %d", int(bits), int(m), int(n), int(k), int(own));
  const Floats x = numbers(m * k), bias = numbers(n);
  Floats y = unwritten(m * n);
  std::vector<uint8_t> codes(bits == 8 ? n * columns : n * columns / 2);
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
  a.codes = codes.data();
  a.scale = static_cast<const uint16_t*>(scale.data());
  a.offset = offsets ? static_cast<const uint16_t*>(offset.data()) : nullptr;
  a.bias = bias.data();
  a.y = y.data();
  must("taken", regard_quantized_linear(&a));
  Doubles errors(y.size());
  for (int64_t t = 0; t < m; ++t)
    for (int64_t i = 0; i < n; ++i) {
      double expected = bias[i], size = 1;
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = i * groups + (bits == 8 ? 0 : j / group);
        const uint8_t byte = codes[bits == 8 ? i * columns + j : (i * columns + j) / 2];
        const int code = bits == 8 ? static_cast<int8_t>(byte) : (j % 2 ? byte >> 4 : byte & 15) - 8;
        const double w = code * scale[at] + (offsets ? offset[at] : 0);
        expected += w * x[t * k + j];
        size += fabs(w * x[t * k + j]);
      }
      errors[t * n + i] = (y[t * n + i] - expected) / size;
    }
  compare("errors of the terms", errors, Doubles(errors.size()), 1e-6, 1);
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
        for (int64_t k : {0, 1, 37, 300}) check(8, m, 70, k, 0, false, threads);
        for (int64_t group : {32, 64, 128})
          for (bool offsets : {false, true}) check(4, m, 37, 200, group, offsets, threads);
        check(4, m, 33, 31, 32, true, threads);
      }
    check(8, 2, 600, 700, 0, false, 3);
    check(4, 2, 600, 700, 32, true, 3);
  });
}
