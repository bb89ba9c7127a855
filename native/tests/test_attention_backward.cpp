// Gradients of blocked attention against plain loops in double.

#include "regard_attention.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int32_t rule;
  int64_t causal, left, right, block, block_size, threads;
  float softcap;
  bool sink, bias, distance, grad_lse, gaps;
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
double weight_slope(int32_t rule, double x) {
  switch (rule) {
    case REGARD_SIGMOID:
      return weight(rule, x) * (1 - weight(rule, x));
    case REGARD_RELU:
      return x > 0;
    default:
      return x > 0 ? 2 * x : 0;
  }
}

void run(const Case& c) {
  now("%s", c.name);
  const int64_t B = c.batch, H = c.heads, G = c.kv_heads, N = c.n, M = c.m, D = c.width, E = c.value_width;
  // just enough distances for visible pairs: the ranks of queries end where those of keys do
  const int64_t zero = c.left >= 0 ? c.left : M, right = c.causal ? 0 : c.right >= 0 ? c.right : N;
  const int64_t distances = zero + right + 1;
  auto q = numbers(B * H * N * D), k = numbers(B * G * M * D), v = numbers(B * G * M * E);
  auto grad_out = numbers(B * H * N * E), grad_lse = numbers(B * H * N), sink = numbers(H);
  auto bias = numbers(B * H * N * M), distance = numbers(H * distances);
  for (size_t i = 0; i < bias.size(); i += 7) bias[i] = -INFINITY;
  std::vector<int64_t> query_ranks(B * N), key_ranks(B * M);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < N; ++i) query_ranks[b * N + i] = i + (M - N);
    for (int64_t j = 0; j < M; ++j) key_ranks[b * M + j] = c.gaps && (j % 5 == 1 || b == 1) ? -1 : j;
  }
  const int64_t rows = c.block_size > 0 ? N / c.block_size + 1 : 0, columns = c.block_size > 0 ? M / c.block_size : 0;
  std::vector<uint8_t> blocks(rows * columns);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = uniform() > 0;
  Floats out(B * H * N * E), lse(B * H * N);
  const bool clipped = c.rule == REGARD_CLIPPED, softmax = c.rule == REGARD_SOFTMAX || clipped;
  const float scale = 0.4f, shift = softmax ? 0.f : 0.2f, low = -0.02f, high = 6.f;

  Doubles want_q(q.size()), want_k(k.size()), want_v(v.size()), want_sink(H), want_bias(bias.size()),
      want_distance(distance.size());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < N; ++i) {
        const int64_t at = (b * H + h) * N + i, group = b * G + h / (H / G);
        const int64_t rank = query_ranks[b * N + i];
        Doubles score(M), cap_slope(M, 1.0), weights(M), gradient(M);
        std::vector<bool> seen(M);
        double top = -INFINITY, total = 0;
        for (int64_t j = 0; j < M; ++j) {
          const int64_t other = key_ranks[b * M + j];
          bool visible = other >= 0;
          if (c.causal) visible = visible && other <= rank;
          if (c.left >= 0) visible = visible && rank - other <= c.left;
          if (c.right >= 0) visible = visible && other - rank <= c.right;
          const auto floored = [](int64_t x, int64_t size) { return x >= 0 ? x / size : -((-x + size - 1) / size); };
          if (c.block > 0) {
            const int64_t apart = floored(rank, c.block) - floored(other, c.block);
            visible = visible && apart <= 1 && apart >= -1;
          }
          if (c.block_size > 0 && visible) {
            const int64_t row = floored(rank, c.block_size), column = floored(other, c.block_size);
            visible = row >= 0 && row < rows && column < columns && blocks[row * columns + column];
          }
          if (c.bias) visible = visible && bias[at * M + j] > -INFINITY;
          seen[j] = visible;
          if (!visible) continue;
          double s = 0;
          for (int64_t d = 0; d < D; ++d)
            s += static_cast<double>(q[at * D + d]) * static_cast<double>(k[(group * M + j) * D + d]);
          s *= scale;
          if (c.softcap > 0) {
            const double u = tanh(s / c.softcap);
            cap_slope[j] = 1 - u * u;
            s = c.softcap * u;
          }
          if (c.bias) s += bias[at * M + j];
          if (c.distance) s += distance[h * distances + other - rank + zero];
          score[j] = s;
          top = fmax(top, s);
        }
        double sink_weight = 0;
        if (softmax) {
          for (int64_t j = 0; j < M; ++j) total += seen[j] ? exp(score[j] - top) : 0;
          lse[at] = total > 0 ? static_cast<float>(top + log(total)) : -INFINITY;
          double all = total;
          if (c.sink) all += exp(sink[h] - (total > 0 ? top : 0));
          for (int64_t j = 0; j < M; ++j) weights[j] = seen[j] ? exp(score[j] - top) / all : 0;
          if (c.sink && total > 0) sink_weight = exp(sink[h] - top) / all;
        } else {
          for (int64_t j = 0; j < M; ++j) weights[j] = seen[j] ? weight(c.rule, score[j] + shift) : 0;
        }
        Doubles shares = weights, clip_slope(M, 1.0);
        for (int64_t j = 0; clipped && j < M; ++j) {
          const double stretched = seen[j] ? (static_cast<double>(high) - low) * shares[j] + low : -1;
          clip_slope[j] = stretched >= 0 && stretched <= 1 ? static_cast<double>(high) - low : 0;
          weights[j] = fmin(1, fmax(0, stretched));
        }
        double delta = 0;
        for (int64_t e = 0; e < E; ++e) {
          double sum = 0, slope = 0;
          for (int64_t j = 0; j < M; ++j) {
            sum += weights[j] * v[(group * M + j) * E + e];
            slope += shares[j] * clip_slope[j] * v[(group * M + j) * E + e];
          }
          out[at * E + e] = static_cast<float>(sum);
          delta += slope * grad_out[at * E + e];
        }
        want_sink[h] -= sink_weight * delta;
        for (int64_t j = 0; j < M; ++j) {
          if (!seen[j]) continue;
          double dw = 0;
          for (int64_t e = 0; e < E; ++e) {
            dw += static_cast<double>(grad_out[at * E + e]) * v[(group * M + j) * E + e];
            want_v[(group * M + j) * E + e] += weights[j] * grad_out[at * E + e];
          }
          double ds = softmax ? shares[j] * (clip_slope[j] * dw - delta) : weight_slope(c.rule, score[j] + shift) * dw;
          if (c.grad_lse) ds += exp(score[j] - top) / total * grad_lse[at];
          want_bias[at * M + j] = ds;
          if (c.distance) want_distance[h * distances + key_ranks[b * M + j] - rank + zero] += ds;
          ds *= cap_slope[j] * scale;
          for (int64_t d = 0; d < D; ++d) {
            want_q[at * D + d] += ds * k[(group * M + j) * D + d];
            want_k[(group * M + j) * D + d] += ds * q[at * D + d];
          }
        }
      }

  regard_attention_args f{};
  f.size = sizeof f;
  f.threads = c.threads;
  f.q = q.data(), f.k = k.data(), f.v = v.data(), f.out = out.data(), f.lse = softmax ? lse.data() : nullptr;
  f.batch = B, f.heads = H, f.kv_heads = G, f.n = N, f.m = M, f.width = D, f.value_width = E;
  strides(f.q_strides, H, N, D), strides(f.k_strides, G, M, D), strides(f.v_strides, G, M, E);
  strides(f.out_strides, H, N, E);
  f.scale = scale, f.shift = shift, f.softcap = c.softcap, f.rule = c.rule;
  f.low = low, f.high = high;
  f.sink = c.sink ? sink.data() : nullptr;
  f.visibility.query_ranks = query_ranks.data(), f.visibility.query_ranks_stride = N;
  f.visibility.key_ranks = key_ranks.data(), f.visibility.key_ranks_stride = M;
  f.visibility.causal = c.causal, f.visibility.left = c.left, f.visibility.right = c.right;
  f.visibility.block = c.block, f.visibility.lookback = f.visibility.lookahead = 1;
  if (c.block_size > 0) {
    f.visibility.blocks = blocks.data(), f.visibility.blocks_strides[2] = columns;
    f.visibility.blocks_rows = rows, f.visibility.blocks_columns = columns, f.visibility.block_size = c.block_size;
  }
  if (c.bias) {
    f.biases.bias = bias.data();
    f.biases.bias_strides[0] = H * N * M, f.biases.bias_strides[1] = N * M, f.biases.bias_strides[2] = M;
    f.biases.bias_strides[3] = 1;
  }
  if (c.distance) {
    f.biases.distance = distance.data(), f.biases.distance_stride = distances;
    f.biases.distance_zero = zero, f.biases.distances = distances;
  }
  Floats grad_q(q.size()), grad_k(k.size()), grad_v(v.size()), grad_sink(H), grad_bias(bias.size()),
      grad_distance(distance.size());
  regard_attention_backward_args a{};
  a.size = sizeof a;
  a.forward = &f;
  a.grad_out = grad_out.data();
  memcpy(a.grad_out_strides, f.out_strides, sizeof a.grad_out_strides);
  a.grad_lse = c.grad_lse ? grad_lse.data() : nullptr;
  a.grad_q = grad_q.data(), a.grad_k = grad_k.data(), a.grad_v = grad_v.data();
  memcpy(a.grad_q_strides, f.q_strides, sizeof a.grad_q_strides);
  memcpy(a.grad_k_strides, f.k_strides, sizeof a.grad_k_strides);
  memcpy(a.grad_v_strides, f.v_strides, sizeof a.grad_v_strides);
  a.grad_sink = c.sink ? grad_sink.data() : nullptr;
  a.grad_bias = c.bias ? grad_bias.data() : nullptr;
  a.grad_bias_queries = N, a.grad_bias_keys = M;
  a.grad_distance = c.distance ? grad_distance.data() : nullptr;
  must("taken", regard_attention_backward(&a));
  const double most = 5e-6, least = 1e-3;
  compare("gradient of q", grad_q, want_q, most, least);
  compare("gradient of k", grad_k, want_k, most, least);
  compare("gradient of v", grad_v, want_v, most, least);
  if (c.sink) compare("gradient of the sink", grad_sink, want_sink, most, least);
  if (c.bias) compare("gradient of the bias", grad_bias, want_bias, most, least);
  if (c.distance) compare("gradient of distances", grad_distance, want_distance, most, least);
  for (int axes = 0; c.bias && axes < 3; ++axes) {  // gradients of a bias that queries, keys or both share
    const int64_t rows = axes == 1 ? N : 1, columns = axes == 0 ? M : 1;
    Floats found = unwritten(B * H * rows * columns);
    Doubles wanted(found.size());
    for (int64_t at = 0; at < B * H; ++at)
      for (int64_t i = 0; i < N; ++i)
        for (int64_t j = 0; j < M; ++j)
          wanted[(at * rows + (rows > 1 ? i : 0)) * columns + (columns > 1 ? j : 0)] += want_bias[(at * N + i) * M + j];
    regard_attention_backward_args shared = a;
    shared.grad_bias = found.data(), shared.grad_bias_queries = rows, shared.grad_bias_keys = columns;
    must("shared bias", regard_attention_backward(&shared));
    compare("gradient of a shared bias", found, wanted, most, least);
  }
  const Floats before = grad_q;  // a second run gives the same, whichever thread runs what
  must("taken again", regard_attention_backward(&a));
  if (before != grad_q) fail("not repeated");
}

}  // namespace

int main() {
  const Case cases[] = {
      // name, B, H, G, N, M, D, E, rule, causal, left, right, block, mask's, threads, cap, sink, bias, dist, lse, gaps
      {"plain", 1, 2, 2, 70, 70, 16, 16, 0, 0, -1, -1, 0, 0, 1, 0, false, false, false, false, false},
      {"causal", 2, 2, 2, 130, 130, 64, 64, 0, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, false},
      {"shares of a head", 1, 1, 1, 150, 200, 13, 7, 0, 1, -1, -1, 0, 0, 4, 0, true, false, false, true, false},
      {"grouped", 1, 6, 2, 67, 141, 24, 40, 0, 1, -1, -1, 0, 0, 3, 0, true, false, true, true, false},
      {"wide", 1, 1, 1, 33, 65, 130, 97, 0, 0, -1, -1, 0, 0, 2, 0, false, false, false, false, false},
      {"biases", 2, 2, 1, 65, 71, 8, 8, 0, 1, -1, -1, 0, 0, 2, 1.5f, true, true, true, true, true},
      {"window", 1, 1, 1, 200, 200, 8, 8, 0, 1, 40, -1, 0, 0, 2, 0, false, false, true, false, false},
      {"both sides", 1, 2, 2, 90, 200, 8, 8, 0, 0, 30, 9, 0, 0, 1, 0, false, false, true, false, false},
      {"local blocks", 1, 1, 1, 140, 150, 8, 8, 0, 0, -1, -1, 24, 0, 1, 0, false, false, false, false, false},
      {"block mask", 2, 2, 2, 140, 130, 8, 8, 0, 1, -1, -1, 0, 16, 2, 0, false, false, false, false, true},
      {"gaps", 2, 2, 2, 60, 140, 9, 5, 0, 0, -1, -1, 0, 0, 1, 0, true, false, true, true, true},
      {"more queries than keys", 1, 1, 1, 140, 60, 9, 5, 0, 1, -1, -1, 0, 0, 2, 0, true, false, false, true, false},
      {"sigmoid", 1, 2, 2, 70, 80, 16, 16, 1, 1, -1, -1, 0, 0, 2, 0, false, false, false, false, true},
      {"relu", 1, 2, 1, 70, 80, 16, 16, 2, 1, -1, -1, 0, 0, 2, 2.f, false, true, false, false, false},
      {"relu squared", 1, 2, 2, 70, 80, 16, 16, 3, 0, -1, -1, 0, 0, 1, 0, false, false, true, false, false},
      {"clipped", 1, 2, 2, 130, 130, 16, 24, 4, 1, -1, -1, 0, 0, 1, 0, false, false, false, true, false},
      {"clipped biases", 2, 4, 2, 65, 71, 9, 7, 4, 1, -1, -1, 0, 0, 2, 1.5f, false, true, true, true, true},
      {"shares of a clipped head", 1, 1, 1, 150, 200, 13, 7, 4, 1, 90, -1, 0, 0, 4, 0, false, false, false, false, false},
      {"clipped blocks", 1, 2, 2, 140, 130, 8, 8, 4, 0, -1, -1, 0, 16, 2, 0, false, false, false, false, false},
      {"no queries", 1, 2, 2, 0, 70, 16, 16, 0, 0, -1, -1, 0, 0, 2, 0, true, false, false, false, false},
      {"no keys", 1, 2, 2, 70, 0, 16, 16, 0, 0, -1, -1, 0, 0, 2, 0, true, false, false, false, false},
      {"one pair", 1, 1, 1, 1, 1, 1, 1, 0, 0, -1, -1, 0, 0, 2, 0, true, false, false, false, false},
  };
  return on_every_instruction_set([&] {
    for (const Case& c : cases) run(c);
  });
}
