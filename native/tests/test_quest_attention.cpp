// Attention to chosen pages against loops in double. Buffers have exactly the necessary size, so that a sanitizer
// detects accesses beyond them; bounds of incomplete pages are NaN.

#include "regard_quest_attention.h"
#include "testing.h"

namespace {

struct Case {
  int64_t batch, kv_heads, groups, slots, page, chosen, width, value_width;
  int shared, threads;
};

void run(const Case& c) {
  now("batch %d, heads %d x %d, slots %d, page %d", int(c.batch), int(c.kv_heads), int(c.groups), int(c.slots), int(c.page));
  const int64_t heads = c.kv_heads * c.groups, units = c.batch * c.kv_heads, held = c.slots / c.page;
  const auto q = numbers(c.batch * heads * c.width), k = numbers(units * c.slots * c.width);
  const auto v = numbers(units * c.slots * c.value_width);
  Floats out = unwritten(c.batch * heads * c.value_width), low = unwritten(units * held * c.width), high = low;
  std::vector<int64_t> counts(units);
  for (int64_t u = 0; u < units; ++u) {
    const int64_t count = u == 0 ? c.slots : static_cast<int64_t>((uniform() + 1) / 2 * static_cast<float>(c.slots));
    counts[u] = count;
    for (int64_t p = 0; (p + 1) * c.page <= count; ++p)
      for (int64_t d = 0; d < c.width; ++d) {
        const size_t at = (u * held + p) * c.width + d;
        for (int64_t j = p * c.page; j < (p + 1) * c.page; ++j) {
          const float x = k[(u * c.slots + j) * c.width + d];
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
  strides(args.q_strides, heads, 1, c.width), strides(args.out_strides, heads, 1, c.value_width);
  args.low = low.data(), args.high = high.data(), args.counts = counts.data();
  args.page_size = c.page, args.chosen = c.chosen, args.shared = c.shared;
  args.scale = 0.7f;
  must("taken", regard_quest_attention(&args));

  Doubles expected(out.size());
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t u = b * c.kv_heads + h / c.groups, count = counts[u];
      const int64_t past = count == 0 ? 0 : (count - 1) / c.page;
      std::vector<std::pair<double, int64_t>> pages;
      for (int64_t p = 0; p < past; ++p) {
        double bound = 0;
        for (int64_t other = 0; other < heads; ++other) {
          if (c.shared ? other / c.groups != h / c.groups : other != h) continue;
          for (int64_t d = 0; d < c.width; ++d) {
            const double x = q[(b * heads + other) * c.width + d];
            const size_t at = (u * held + p) * c.width + d;
            bound += std::max(x * low[at], x * high[at]);
          }
        }
        pages.push_back({-bound, p});
      }
      std::sort(pages.begin(), pages.end());
      std::vector<bool> read(held);
      for (int64_t i = 0; i < std::min(c.chosen, past); ++i) read[pages[i].second] = true;
      read[past] = true;
      double* wanted = expected.data() + (b * heads + h) * c.value_width;
      double total = 0;
      for (int64_t j = 0; j < count; ++j) {
        if (!read[j / c.page]) continue;
        double s = 0;
        for (int64_t d = 0; d < c.width; ++d)
          s += q[(b * heads + h) * c.width + d] *
               static_cast<double>(k[(u * c.slots + j) * c.width + d]);
        const double w = exp(0.7 * s);
        total += w;
        for (int64_t e = 0; e < c.value_width; ++e)
          wanted[e] += w * v[(u * c.slots + j) * c.value_width + e];
      }
      for (int64_t e = 0; e < c.value_width && total > 0; ++e) wanted[e] /= total;
    }
  compare("output", out, expected, 5e-6, 1);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 3, 3, 640, 16, 5, 64, 64, 1, 1}, {2, 2, 4, 320, 8, 3, 17, 33, 0, 3},  {3, 1, 2, 64, 1, 9, 5, 8, 1, 2},
      {2, 2, 1, 48, 16, 9, 8, 8, 1, 2},    {1, 2, 2, 4096, 8, 40, 40, 8, 0, 4}, {1, 1, 1, 16, 16, 0, 8, 8, 1, 1},
      {0, 2, 2, 32, 16, 1, 8, 8, 1, 1},
  };
  return on_every_instruction_set([&] {
    for (const Case& c : cases) run(c);
  });
}
