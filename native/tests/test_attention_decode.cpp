// Decoding attention against a loop in double, in one tensor and in pages. Buffers have exactly the necessary size, so
// that a sanitizer detects accesses beyond them.

#include "regard_attention.h"
#include "testing.h"

namespace {

struct Case {
  int64_t batch, kv_heads, groups, n, m, width, value_width;
  int bfloat16, threads;
  int64_t left, page;  // -1 for no limit; 0 for no pages
  bool ragged, extras;
};

void run(const Case& c) {
  now("batch %d, heads %d x %d, n %d, m %d, width %d, values %d", int(c.batch), int(c.kv_heads), int(c.groups), int(c.n),
      int(c.m), int(c.width), int(c.value_width));
  const int64_t heads = c.kv_heads * c.groups, per_row = c.page ? (c.m + c.page - 1) / c.page : 0;
  const int64_t slots = c.page ? c.page : c.m, held = c.page ? c.batch * per_row : c.batch;
  const bool half = c.bfloat16 != 0;
  Tensor q(numbers(c.batch * heads * c.n * c.width), half), k(numbers(held * c.kv_heads * slots * c.width), half);
  Tensor v(numbers(held * c.kv_heads * slots * c.value_width), half), out(c.batch * heads * c.n * c.value_width, half);
  Floats lse = unwritten(c.batch * heads * c.n);
  std::vector<int64_t> query_ranks(c.batch * c.n), key_ranks(c.batch * c.m);
  std::vector<int64_t> lengths(c.batch), pages(c.batch * per_row);
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t length = c.ragged ? static_cast<int64_t>((uniform() + 1) / 2 * static_cast<double>(c.m)) : c.m;
    lengths[b] = length;
    for (int64_t i = 0; i < c.n; ++i) query_ranks[b * c.n + i] = length - c.n + i;
    for (int64_t j = 0; j < c.m; ++j) key_ranks[b * c.m + j] = j < length ? j : -1;
    for (int64_t p = 0; p < per_row; ++p)  // in reverse order, and invalid where the row has no key
      pages[b * per_row + p] = p * c.page < length ? (b + 1) * per_row - 1 - p : int64_t{1} << 40;
  }
  Floats sink = numbers(heads), bias = numbers(heads * c.m), distance = numbers(c.m + 1);
  for (float& x : bias)
    if (x > 0.8f) x = -INFINITY;

  regard_attention_args args{};
  args.size = sizeof args;
  args.threads = c.threads;
  args.dtype = c.bfloat16;
  args.q = q.data(), args.k = k.data(), args.v = v.data(), args.out = out.data();
  args.lse = lse.data();
  args.batch = c.batch, args.heads = heads, args.kv_heads = c.kv_heads;
  args.n = c.n, args.m = c.m, args.width = c.width, args.value_width = c.value_width;
  strides(args.q_strides, heads, c.n, c.width), strides(args.k_strides, c.kv_heads, slots, c.width);
  strides(args.v_strides, c.kv_heads, slots, c.value_width), strides(args.out_strides, heads, c.n, c.value_width);
  args.scale = 0.5f;
  args.visibility.query_ranks = query_ranks.data();
  args.visibility.query_ranks_stride = c.n;
  args.visibility.causal = 1;
  args.visibility.left = c.left, args.visibility.right = -1;
  if (c.extras) {
    args.softcap = 2;
    args.sink = sink.data();
    args.biases.bias = bias.data();
    args.biases.bias_strides[1] = c.m, args.biases.bias_strides[3] = 1;
    args.biases.distance = distance.data();
    args.biases.distances = c.m + 1, args.biases.distance_zero = c.m;
  }
  regard_attention_decode_args decode{};
  decode.size = sizeof decode;
  decode.forward = &args;
  if (c.page) {
    decode.pages = pages.data();
    decode.pages_stride = per_row;
    decode.page_size = c.page;
    decode.lengths = lengths.data();
  } else {
    args.visibility.key_ranks = key_ranks.data();
    args.visibility.key_ranks_stride = c.m;
  }
  must("taken", regard_attention_decode(&decode));

  Doubles weights(c.m), expected(out.size()), expected_lse(lse.size(), -INFINITY);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < c.n; ++i) {
        const int64_t g = h / c.groups, rank = query_ranks[b * c.n + i];
        const auto place = [&](int64_t j) {
          if (!c.page) return (b * c.kv_heads + g) * slots + j;
          const int64_t page = pages[b * per_row + j / c.page];
          return (page * c.kv_heads + g) * slots + j % c.page;
        };
        const int64_t query = (b * heads + h) * c.n + i;
        double top = -INFINITY, total = 0;
        for (int64_t j = 0; j < c.m; ++j) {
          double& s = weights[j];
          s = -INFINITY;
          if (j >= lengths[b] || j > rank || (c.left >= 0 && rank - j > c.left)) continue;
          s = 0;
          for (int64_t p = 0; p < c.width; ++p) s += q[query * c.width + p] * k[place(j) * c.width + p];
          s *= 0.5;
          if (c.extras)
            s = 2 * tanh(s / 2) + bias[h * c.m + j] + distance[j - rank + c.m];
          if (s > top) top = s;
        }
        for (int64_t j = 0; j < c.m; ++j) total += top > -INFINITY ? exp(weights[j] - top) : 0;
        if (total == 0) continue;
        expected_lse[query] = top + log(total);
        const double all = total + (c.extras ? exp(sink[h] - top) : 0);
        for (int64_t j = 0; j < c.m; ++j)
          for (int64_t p = 0; weights[j] > -INFINITY && p < c.value_width; ++p)
            expected[query * c.value_width + p] += exp(weights[j] - top) / all * v[place(j) * c.value_width + p];
      }
  compare("output", out, expected, half ? 6e-3 : 5e-6, 1);
  compare("lse", lse, expected_lse, 1e-5, 10);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 1, 8, 8, 0, 1, -1, 0, false, false},     {1, 2, 1, 1, 513, 64, 64, 0, 2, -1, 0, false, false},
      {3, 2, 3, 1, 300, 7, 33, 0, 3, -1, 0, true, true},    {2, 1, 4, 2, 700, 16, 40, 0, 5, 90, 0, true, false},
      {2, 2, 2, 5, 260, 24, 17, 1, 2, -1, 0, true, true},   {1, 1, 8, 3, 650, 33, 64, 1, 4, -1, 0, false, false},
      {3, 2, 1, 1, 256, 64, 64, 0, 3, -1, 16, true, false}, {2, 1, 2, 2, 200, 20, 9, 1, 2, 50, 24, true, true},
      {2, 1, 20, 1, 333, 16, 16, 0, 2, -1, 5, true, false}, {2, 3, 1, 2, 0, 8, 8, 0, 2, -1, 0, false, false},
  };
  return on_every_instruction_set([&] {
    for (const Case& c : cases) run(c);
  });
}
