// Attention to chosen pages against loops in double. Buffers are as large as they must be and no larger, so that a sanitizer
// sees reads and writes beyond them; bounds of pages that are not whole are NaN.

#include "regard_quest_attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

namespace {

int failures = 0;
unsigned seed = 1;

float uniform() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>((seed >> 8) / 16777216.0 * 2 - 1);
}

struct Case {
  int64_t batch, kv_heads, groups, slots, page, chosen, width, value_width;
  int shared, threads;
};

std::vector<float> numbers(int64_t count) {
  std::vector<float> made(static_cast<size_t>(count));
  for (auto& x : made) x = uniform();
  return made;
}

void run(const Case& c) {
  const int64_t heads = c.kv_heads * c.groups, units = c.batch * c.kv_heads, held = c.slots / c.page;
  const auto q = numbers(c.batch * heads * c.width), k = numbers(units * c.slots * c.width);
  const auto v = numbers(units * c.slots * c.value_width);
  std::vector<float> out(static_cast<size_t>(c.batch * heads * c.value_width));
  std::vector<float> low(static_cast<size_t>(units * held * c.width), NAN), high = low;
  std::vector<int64_t> counts(static_cast<size_t>(units));
  for (int64_t u = 0; u < units; ++u) {
    const int64_t count = u == 0 ? c.slots : static_cast<int64_t>((uniform() + 1) / 2 * static_cast<float>(c.slots));
    counts[static_cast<size_t>(u)] = count;
    for (int64_t p = 0; (p + 1) * c.page <= count; ++p)
      for (int64_t d = 0; d < c.width; ++d) {
        const size_t at = static_cast<size_t>((u * held + p) * c.width + d);
        for (int64_t j = p * c.page; j < (p + 1) * c.page; ++j) {
          const float x = k[static_cast<size_t>((u * c.slots + j) * c.width + d)];
          low[at] = j == p * c.page ? x : std::min(low[at], x);
          high[at] = j == p * c.page ? x : std::max(high[at], x);
        }
      }
  }
  regard_quest_attention_args args{};
  args.size = sizeof args;
  args.threads = c.threads;
  args.q = q.data(), args.k = k.data(), args.v = v.data(), args.out = out.data();
  args.batch = c.batch, args.heads = heads, args.kv_heads = c.kv_heads, args.n = 1, args.m = c.slots;
  args.width = c.width, args.value_width = c.value_width;
  const int64_t strides[2][3] = {{heads * c.width, c.width, 0}, {heads * c.value_width, c.value_width, 0}};
  memcpy(args.q_strides, strides[0], sizeof strides[0]);
  memcpy(args.out_strides, strides[1], sizeof strides[1]);
  args.low = low.data(), args.high = high.data(), args.counts = counts.data();
  args.page_size = c.page, args.chosen = c.chosen, args.shared = c.shared;
  args.scale = 0.7f;
  if (regard_quest_attention(&args) != REGARD_OK) {
    printf("refused\n");
    ++failures;
    return;
  }

  double worst = 0;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t u = b * c.kv_heads + h / c.groups, count = counts[static_cast<size_t>(u)];
      const int64_t past = count == 0 ? 0 : (count - 1) / c.page;
      std::vector<std::pair<double, int64_t>> pages;
      for (int64_t p = 0; p < past; ++p) {
        double bound = 0;
        for (int64_t other = 0; other < heads; ++other) {
          if (c.shared ? other / c.groups != h / c.groups : other != h) continue;
          for (int64_t d = 0; d < c.width; ++d) {
            const double x = q[static_cast<size_t>((b * heads + other) * c.width + d)];
            const size_t at = static_cast<size_t>((u * held + p) * c.width + d);
            bound += std::max(x * low[at], x * high[at]);
          }
        }
        pages.push_back({-bound, p});
      }
      std::sort(pages.begin(), pages.end());
      std::vector<bool> read(static_cast<size_t>(held));
      for (int64_t i = 0; i < std::min(c.chosen, past); ++i) read[static_cast<size_t>(pages[static_cast<size_t>(i)].second)] = true;
      read[static_cast<size_t>(past)] = true;
      std::vector<double> wanted(static_cast<size_t>(c.value_width));
      double total = 0;
      for (int64_t j = 0; j < count; ++j) {
        if (!read[static_cast<size_t>(j / c.page)]) continue;
        double s = 0;
        for (int64_t d = 0; d < c.width; ++d)
          s += q[static_cast<size_t>((b * heads + h) * c.width + d)] *
               static_cast<double>(k[static_cast<size_t>((u * c.slots + j) * c.width + d)]);
        const double w = exp(0.7 * s);
        total += w;
        for (int64_t e = 0; e < c.value_width; ++e)
          wanted[static_cast<size_t>(e)] += w * v[static_cast<size_t>((u * c.slots + j) * c.value_width + e)];
      }
      for (int64_t e = 0; e < c.value_width; ++e) {
        const double x = total == 0 ? 0 : wanted[static_cast<size_t>(e)] / total;
        const double error = fabs(out[static_cast<size_t>((b * heads + h) * c.value_width + e)] - x);
        if (!(error <= worst)) worst = error;
      }
    }
  if (!(worst < 5e-6)) {
    printf("b%ld g%ld x%ld m%ld page %ld: error %g\n", (long)c.batch, (long)c.kv_heads, (long)c.groups, (long)c.slots,
           (long)c.page, worst);
    ++failures;
  }
}

}  // namespace

int main() {
  const char* sets[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  const Case cases[] = {
      {1, 3, 3, 640, 16, 5, 64, 64, 1, 1}, {2, 2, 4, 320, 8, 3, 17, 33, 0, 3},  {3, 1, 2, 64, 1, 9, 5, 8, 1, 2},
      {2, 2, 1, 48, 16, 9, 8, 8, 1, 2},    {1, 2, 2, 4096, 8, 40, 40, 8, 0, 4}, {1, 1, 1, 16, 16, 0, 8, 8, 1, 1},
      {0, 2, 2, 32, 16, 1, 8, 8, 1, 1},
  };
  regard_set_poison(1);
  for (const char* set : sets) {
    if (regard_set_instruction_set(set) != REGARD_OK) continue;
    for (const Case& c : cases) run(c);
  }
  if (failures) printf("%d failures\n", failures);
  return failures != 0;
}
