// Products with weights of 8 and 4 bits against plain loops in double, in buffers of exactly their size.

#include "regard_quantized_linear.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

int failures = 0;
unsigned seed = 1;

unsigned draw() {
  seed = seed * 1664525u + 1013904223u;
  return seed >> 8;
}
float number() { return static_cast<float>(static_cast<double>(draw()) / (1 << 23) - 1); }

uint16_t half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}
double whole(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

void check(int64_t bits, int64_t m, int64_t n, int64_t k, int64_t group, bool offsets, int64_t threads) {
  const int64_t columns = bits == 8 ? k : (k + group - 1) / group * group, own = bits == 8 ? k : group;
  const int64_t groups = bits == 8 ? 1 : columns / group;
  std::vector<float> x(static_cast<size_t>(m * k)), bias(static_cast<size_t>(n)), y(static_cast<size_t>(m * n), NAN);
  std::vector<uint8_t> codes(static_cast<size_t>(bits == 8 ? n * columns : n * columns / 2));
  std::vector<uint16_t> scale(static_cast<size_t>(n * groups)), offset(scale.size());
  for (float& v : x) v = number();
  for (float& v : bias) v = number();
  for (uint8_t& v : codes) v = static_cast<uint8_t>(draw());
  for (uint16_t& v : scale) v = half(number());
  for (uint16_t& v : offset) v = half(number());
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
  a.scale = scale.data();
  a.offset = offsets ? offset.data() : nullptr;
  a.bias = bias.data();
  a.y = y.data();
  const int status = regard_quantized_linear(&a);
  double error = status == REGARD_OK ? 0 : 1;
  for (int64_t t = 0; t < m; ++t)
    for (int64_t i = 0; i < n; ++i) {
      double expected = bias[static_cast<size_t>(i)], size = 1;
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = static_cast<size_t>(i * groups + (bits == 8 ? 0 : j / group));
        const uint8_t byte = codes[static_cast<size_t>(bits == 8 ? i * columns + j : (i * columns + j) / 2)];
        const int code = bits == 8 ? static_cast<int8_t>(byte) : (j % 2 ? byte >> 4 : byte & 15) - 8;
        const double w = code * whole(scale[at]) + (offsets ? whole(offset[at]) : 0);
        expected += w * x[static_cast<size_t>(t * k + j)];
        size += std::fabs(w * x[static_cast<size_t>(t * k + j)]);
      }
      const double difference = std::fabs(y[static_cast<size_t>(t * n + i)] - expected) / size;
      if (!(difference <= error)) error = difference;
    }
  if (!(error <= 1e-6)) {
    std::printf("%d bits, %d x %d x %d, groups of %d: error %g (%s)\n", static_cast<int>(bits), static_cast<int>(m),
                static_cast<int>(n), static_cast<int>(k), static_cast<int>(own), error, regard_instruction_set());
    ++failures;
  }
}

}  // namespace

int main() {
  std::string sets = regard_instruction_sets();
  while (!sets.empty()) {
    const size_t end = sets.find(',');
    regard_set_instruction_set(sets.substr(0, end).c_str());
    sets = end == std::string::npos ? "" : sets.substr(end + 1);
    for (int64_t m : {0, 1, 2, 3, 7})
      for (int64_t threads : {1, 3}) {
        for (int64_t k : {0, 1, 37, 300}) check(8, m, 70, k, 0, false, threads);
        for (int64_t group : {32, 64, 128})
          for (bool offsets : {false, true}) check(4, m, 37, 200, group, offsets, threads);
        check(4, m, 33, 31, 32, true, threads);
      }
    check(8, 2, 600, 700, 0, false, 3);
    check(4, 2, 600, 700, 32, true, 3);
  }
  regard_quantized_linear_args wrong{};
  wrong.size = sizeof wrong;
  wrong.threads = 1;
  wrong.bits = 5;
  if (regard_quantized_linear(&wrong) != REGARD_BAD_ARGUMENT) ++failures;
  return failures == 0 ? 0 : 1;
}
