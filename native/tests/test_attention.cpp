// Blocked attention against plain loops in double.

#include "regard_attention.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int32_t rule;
  int64_t causal, left, right, block, block_size, threads;
  float softcap;
  bool sink, bias, distance, gaps, by_token, half;
};

double weight(int32_t rule, double x) {
  switch (rule) {
    case REGARD_SIGMOID:
      return 1 / (1 + exp(-x));
    case REGARD_RELU:
      return x > 0 ? x : 0;
    default:
      return x > 0 ? x * x : 0;
  }
}

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

void run(const Case& c) {
  now("%s", c.name);
  const size_t B = c.batch, H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width;
  Tensor q(numbers(B * H * n * D), c.half), k(numbers(B * G * m * D), c.half), v(numbers(B * G * m * V), c.half);
  const int64_t zero = c.n + c.m, distances = 2 * zero + 1;
  Floats sink = numbers(H), bias = numbers(H * n * m), distance = numbers(H * distances), lse = unwritten(B * H * n);
  for (size_t i = 0; i < bias.size(); i += 5) bias[i] = -INFINITY;
  std::vector<int64_t> query_ranks(B * n), key_ranks(B * m);
  for (size_t b = 0; b < B; ++b) {
    for (size_t i = 0; i < n; ++i) query_ranks[b * n + i] = static_cast<int64_t>(i + m - n + b);
    for (size_t j = 0, rank = 0; j < m; ++j) {
      const bool absent = c.gaps && (j % 7 == 3 || j + 10 * b > m);
      key_ranks[b * m + j] = absent ? -1 : static_cast<int64_t>(rank++);
    }
  }
  const int64_t side = c.block_size ? (c.n + c.m) / c.block_size + 1 : 1;
  std::vector<uint8_t> blocks(H * side * side);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = uniform() > 0;

  Tensor out(B * H * n * V, c.half);
  const auto strides_of = [&](int64_t* to, int64_t heads, int64_t tokens, int64_t features) {
    strides(to, heads, tokens, features);
    if (c.by_token) to[1] = features, to[2] = heads * features;
  };
  regard_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = out.data();
  const bool clipped = c.rule == REGARD_CLIPPED, softmax = c.rule == REGARD_SOFTMAX || clipped;
  a.lse = softmax ? lse.data() : nullptr;
  a.batch = c.batch, a.heads = c.heads, a.kv_heads = c.kv_heads, a.n = c.n, a.m = c.m;
  a.width = c.width, a.value_width = c.value_width;
  strides_of(a.q_strides, H, n, D), strides_of(a.k_strides, G, m, D);
  strides_of(a.v_strides, G, m, V), strides_of(a.out_strides, H, n, V);
  a.scale = 1.3f;
  a.shift = softmax ? 0.f : -0.2f;
  a.low = -0.02f, a.high = 4.f;
  a.softcap = c.softcap;
  a.rule = c.rule;
  a.sink = c.sink ? sink.data() : nullptr;
  regard_visibility& see = a.visibility;
  see.query_ranks = query_ranks.data(), see.key_ranks = key_ranks.data();
  see.query_ranks_stride = c.n, see.key_ranks_stride = c.m;
  see.causal = c.causal, see.left = c.left, see.right = c.right;
  see.block = c.block, see.lookback = 1, see.lookahead = 0;
  if (c.block_size) {
    see.blocks = blocks.data();
    see.blocks_strides[1] = side * side, see.blocks_strides[2] = side;
    see.blocks_rows = see.blocks_columns = side, see.block_size = c.block_size;
  }
  if (c.bias) {
    a.biases.bias = bias.data();
    a.biases.bias_strides[1] = c.n * c.m, a.biases.bias_strides[2] = c.m, a.biases.bias_strides[3] = 1;
  }
  if (c.distance) {
    a.biases.distance = distance.data();
    a.biases.distance_stride = distances, a.biases.distance_zero = zero, a.biases.distances = distances;
  }
  must("taken", regard_attention(&a));

  // Rounding the output costs half a unit in the last place. With many keys weights are also rounded to bfloat16, on
  // processors that multiply it: that error is measured separately, and is up to 3e-3 of the largest output
  // (docs/kernels.md).
  const bool rounded = c.half && c.rule == REGARD_SOFTMAX && c.m >= 128;
  Doubles scores(m), expected(out.size()), expected_lse(lse.size(), -INFINITY), found(out.size());
  for (size_t b = 0; b < B; ++b)
    for (size_t h = 0; h < H; ++h)
      for (size_t i = 0; i < n; ++i) {
        const size_t g = h / (H / G);
        const int64_t rank = query_ranks[b * n + i];
        double top = -INFINITY;
        for (size_t j = 0; j < m; ++j) {
          const int64_t key = key_ranks[b * m + j];
          double s = 0;
          for (size_t p = 0; p < D; ++p)
            s += q[b * a.q_strides[0] + h * a.q_strides[1] + i * a.q_strides[2] + p] *
                 k[b * a.k_strides[0] + g * a.k_strides[1] + j * a.k_strides[2] + p];
          s *= a.scale;
          if (c.softcap > 0) s = c.softcap * tanh(s / c.softcap);
          bool seen = key >= 0 && (!c.causal || key <= rank) && (c.left < 0 || rank - key <= c.left) &&
                      (c.right < 0 || key - rank <= c.right);
          if (seen && c.block) {
            const int64_t apart = floor_div(rank, c.block) - key / c.block;
            seen = apart <= 1 && apart >= 0;
          }
          if (seen && c.block_size) {
            const int64_t row = floor_div(rank, c.block_size), column = key / c.block_size;
            seen = row >= 0 && row < side && column < side && blocks[h * side * side + row * side + column];
          }
          if (c.bias) s += bias[(h * n + i) * m + j];
          if (c.distance && seen) s += distance[h * distances + key - rank + zero];
          scores[j] = seen ? s : -INFINITY;
          top = scores[j] > top ? scores[j] : top;
        }
        double total = 0;
        for (size_t j = 0; j < m; ++j) {
          const bool seen = scores[j] > -INFINITY;
          scores[j] = !seen ? 0 : softmax ? exp(scores[j] - top) : weight(c.rule, scores[j] + a.shift);
          total += scores[j];
        }
        double norm = 1;
        if (softmax && top > -INFINITY) {
          norm = 1 / (total + (c.sink ? exp(sink[h] - top) : 0));
          expected_lse[(b * H + h) * n + i] = top + log(total);
        }
        if (clipped && top > -INFINITY)
          for (size_t j = 0; j < m; ++j)
            scores[j] = fmin(1, fmax(0, (a.high - a.low) * scores[j] * norm + a.low)) / norm;
        for (size_t p = 0; p < V; ++p) {
          double sum = 0;
          for (size_t j = 0; j < m; ++j)
            sum += scores[j] * norm * v[b * a.v_strides[0] + g * a.v_strides[1] + j * a.v_strides[2] + p];
          const size_t at = b * a.out_strides[0] + h * a.out_strides[1] + i * a.out_strides[2] + p;
          const double half = rounded && sum != 0 ? ldexp(1, ilogb(sum) - 8) : 0;
          expected[at] = sum;
          found[at] = out[at] + fmin(half, fmax(-half, sum - out[at]));
        }
      }
  compare("output", found, expected, rounded ? 3e-3 : c.half ? 4e-3 : 2e-6, 1e-3);
  if (softmax) compare("lse", lse, expected_lse, 5e-7, 10);
}

}  // namespace

int main() {
  // batch heads kv n m width value rule | causal left right block block_size threads | softcap sink bias distance gaps
  // by_token half
  const Case cases[] = {
      {"causal", 1, 2, 2, 130, 130, 16, 16, 0, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, false, false},
      {"odd", 2, 2, 1, 53, 71, 7, 13, 0, 0, -1, -1, 0, 0, 1, 0, true, false, false, false, false, false},
      {"bfloat16", 1, 4, 2, 67, 67, 17, 24, 0, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, true, true},
      {"many bfloat16", 1, 2, 1, 50, 301, 19, 33, 0, 0, -1, -1, 0, 0, 2, 0, true, false, false, false, true, true},
      {"bfloat16 window", 1, 2, 2, 400, 400, 40, 48, 0, 1, 300, -1, 0, 0, 2, 0, false, false, false, false, true, true},
      {"bfloat16 blocks", 1, 2, 2, 300, 300, 64, 64, 0, 0, -1, -1, 0, 48, 2, 0, false, false, false, false, false, true},
      {"bfloat16 gaps", 2, 2, 1, 70, 310, 33, 31, 0, 1, -1, -1, 0, 0, 2, 0, true, false, false, true, false, true},
      {"window", 1, 1, 1, 300, 300, 8, 8, 0, 1, 40, -1, 0, 0, 2, 0, false, false, false, false, false, false},
      {"two-sided", 1, 1, 1, 200, 200, 8, 5, 1, 0, 20, 30, 0, 0, 1, 0, false, false, false, false, true, false},
      {"local blocks", 1, 2, 1, 150, 150, 8, 8, 0, 1, -1, -1, 48, 0, 1, 0, false, false, false, false, false, false},
      {"block mask", 1, 2, 2, 200, 200, 8, 8, 0, 0, -1, -1, 0, 64, 2, 0, false, false, false, false, false, false},
      {"small blocks", 1, 2, 2, 90, 90, 8, 8, 1, 1, -1, -1, 0, 5, 2, 0, false, false, false, false, false, false},
      {"gaps", 3, 2, 2, 40, 150, 8, 8, 0, 1, -1, -1, 0, 0, 2, 0, true, false, true, true, false, false},
      {"biases", 2, 2, 2, 66, 90, 8, 8, 0, 1, -1, -1, 0, 0, 1, 2.f, true, true, true, false, false, false},
      {"sigmoid", 2, 2, 1, 100, 100, 16, 8, 1, 1, -1, -1, 0, 0, 2, 0, false, true, false, true, false, false},
      {"distances", 1, 2, 2, 100, 130, 16, 8, 1, 0, -1, -1, 0, 0, 2, 0, false, false, true, false, false, false},
      {"relu", 1, 2, 2, 70, 70, 9, 8, 2, 1, -1, -1, 0, 0, 1, 3.f, false, true, false, false, false, true},
      {"relu squared", 1, 2, 2, 70, 70, 9, 8, 3, 1, -1, -1, 0, 0, 1, 0, false, false, true, false, false, false},
      {"clipped", 1, 4, 2, 130, 130, 16, 24, 4, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, true, false},
      {"clipped biases", 2, 2, 1, 53, 171, 7, 13, 4, 1, 90, -1, 0, 0, 2, 2.f, false, true, true, true, false, false},
      {"clipped bfloat16", 2, 2, 2, 67, 210, 17, 33, 4, 0, -1, -1, 0, 64, 1, 0, false, false, false, true, true, true},
      {"one of each", 1, 1, 1, 1, 1, 1, 1, 0, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, false, false},
      {"no keys", 2, 2, 1, 5, 0, 8, 8, 0, 1, -1, -1, 0, 0, 2, 0, true, false, false, false, false, false},
      {"no queries", 1, 1, 1, 0, 9, 8, 8, 0, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, false, false},
  };
  regard_attention_args wrong{};
  wrong.size = 8;
  must("another struct", regard_attention(&wrong), REGARD_WRONG_SIZE);
  return on_every_instruction_set([&] {
    for (const Case& c : cases) run(c);
  });
}
