// Softmax on two levels against plain loops in double, and its gradients against those of the same loops.

#include "regard_grouped_attention.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  size_t heads, kv_heads, n, m, width, value_width;
  size_t block;  // tokens before a landmark; 0: random landmarks
  bool causal, own, gaps, half;
  int64_t threads;
  float sharpness = 2;  // scale of queries
};

void check(const Case& c) {
  now("%s", c.name);
  const size_t B = 2, H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width;
  Tensor q(numbers(B * H * n * D, -c.sharpness, c.sharpness), c.half), k(numbers(B * G * m * D), c.half), v(numbers(B * G * m * V), c.half),
      grad(numbers(B * H * n * V), c.half);
  std::vector<int64_t> query_ranks(B * n), key_ranks(B * m), own(B * n);
  std::vector<uint8_t> landmark(B * m);
  for (size_t b = 0; b < B; ++b) {
    int64_t rank = 0;
    for (size_t j = 0; j < m; ++j) {
      const bool absent = c.gaps && j + 9 * b + 3 > m;
      landmark[b * m + j] = !absent && (c.block ? j % (c.block + 1) == c.block : uniform() > 0.6f);
      key_ranks[b * m + j] = absent ? -1 : rank++;
    }
    for (size_t i = 0; i < n; ++i) {
      query_ranks[b * n + i] = static_cast<int64_t>(i + m) - static_cast<int64_t>(n);
      for (size_t j = 0; j < m; ++j)
        own[b * n + i] += landmark[b * m + j] && key_ranks[b * m + j] < query_ranks[b * n + i];
    }
  }

  Doubles out(B * H * n * V), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
  const double scale = 0.7f;
  for (size_t b = 0; b < B; ++b)
    for (size_t h = 0; h < H; ++h)
      for (size_t i = 0; i < n; ++i) {
        const size_t query = (b * H + h) * n + i, keys = (b * G + h / (H / G)) * m;
        // logits of the weights: a token's score; in other groups plus their gate minus their log-sum-exp
        Doubles s(m), weights(m), share(m), slopes(m), ds(m), gates(m);
        double total = 0;
        for (size_t j = 0; j < m; ++j)
          for (size_t p = 0; p < D; ++p) s[j] += scale * q[query * D + p] * k[(keys + j) * D + p];
        const auto seen = [&](size_t j) {
          return key_ranks[b * m + j] >= 0 && (!c.causal || key_ranks[b * m + j] <= query_ranks[b * n + i]);
        };
        int64_t group = 0;
        for (size_t begin = 0, end; begin < m; begin = end + 1, ++group) {
          for (end = begin; end < m && !landmark[b * m + end];) ++end;
          double sum = 0;
          for (size_t j = begin; j < end; ++j) sum += seen(j) ? exp(s[j]) : 0;
          const bool mine = c.own && own[b * n + i] == group;
          const bool open = !mine && sum > 0 && end < m && seen(end);
          if (open) gates[end] = exp(s[end]);
          for (size_t j = begin; j < end; ++j) {
            share[j] = seen(j) && (mine || open) ? exp(s[j]) / (mine ? 1 : sum) : 0;
            weights[j] = share[j] * (mine ? 1 : open ? gates[end] : 0);
            total += weights[j];
          }
        }
        for (size_t j = 0; j < m && total > 0; ++j) weights[j] /= total, gates[j] /= total;
        double delta = 0;
        for (size_t j = 0; j < m; ++j)
          for (size_t p = 0; p < V; ++p) {
            out[query * V + p] += weights[j] * v[(keys + j) * V + p];
            slopes[j] += grad[query * V + p] * v[(keys + j) * V + p];
            grad_v[(keys + j) * V + p] += weights[j] * grad[query * V + p];
          }
        for (size_t j = 0; j < m; ++j) delta += weights[j] * slopes[j];
        group = 0;
        for (size_t begin = 0, end; begin < m; begin = end + 1, ++group) {
          for (end = begin; end < m && !landmark[b * m + end];) ++end;
          const bool mine = c.own && own[b * n + i] == group;
          double mean = 0;
          for (size_t j = begin; j < end; ++j) mean += mine ? 0 : share[j] * slopes[j];
          for (size_t j = begin; j < end; ++j) ds[j] = weights[j] * (slopes[j] - (mine ? delta : mean));
          if (end < m) ds[end] = gates[end] * (mean - delta);
        }
        for (size_t j = 0; j < m; ++j)
          for (size_t p = 0; p < D; ++p) {
            grad_q[query * D + p] += scale * ds[j] * k[(keys + j) * D + p];
            grad_k[(keys + j) * D + p] += scale * ds[j] * q[query * D + p];
          }
      }

  Tensor found(out.size(), c.half), found_q(q.size(), c.half), found_k(k.size(), c.half), found_v(v.size(), c.half);
  Floats lse(B * H * n);
  const auto strides_of = [](int64_t* to, int64_t heads, int64_t tokens, int64_t features) {
    to[0] = heads * tokens * features, to[1] = features, to[2] = heads * features;  // heads of a token side by side
  };
  const auto by_token = [](Tensor& x, size_t heads, size_t tokens, size_t features, bool back) {
    const Tensor copy = x;
    for (size_t b = 0; b < B; ++b)
      for (size_t h = 0; h < heads; ++h)
        for (size_t t = 0; t < tokens; ++t)
          for (size_t p = 0; p < features; ++p) {
            const size_t here = ((b * heads + h) * tokens + t) * features + p;
            const size_t there = ((b * tokens + t) * heads + h) * features + p;
            x.set(back ? here : there, static_cast<float>(copy[back ? there : here]));
          }
  };
  by_token(q, H, n, D, false), by_token(k, G, m, D, false), by_token(v, G, m, V, false), by_token(grad, H, n, V, false);
  regard_grouped_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = found.data();
  a.lse = lse.data();
  a.batch = B, a.heads = H, a.kv_heads = G, a.n = n, a.m = m, a.width = D, a.value_width = V;
  strides_of(a.q_strides, H, n, D), strides_of(a.k_strides, G, m, D);
  strides_of(a.v_strides, G, m, V), strides_of(a.out_strides, H, n, V);
  a.query_ranks = query_ranks.data(), a.key_ranks = key_ranks.data(), a.own = c.own ? own.data() : nullptr;
  a.landmark = landmark.data();
  a.query_ranks_stride = a.own_stride = a.n, a.key_ranks_stride = a.landmark_stride = a.m;
  a.scale = 0.7f;
  a.causal = c.causal;
  regard_grouped_attention_backward_args back{};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_out = grad.data(), back.grad_q = found_q.data(), back.grad_k = found_k.data(), back.grad_v = found_v.data();
  strides_of(back.grad_out_strides, H, n, V), strides_of(back.grad_q_strides, H, n, D);
  strides_of(back.grad_k_strides, G, m, D), strides_of(back.grad_v_strides, G, m, V);
  must("forward", regard_grouped_attention(&a));
  must("backward", regard_grouped_attention_backward(&back));
  by_token(found, H, n, V, true), by_token(found_q, H, n, D, true), by_token(found_k, G, m, D, true);
  by_token(found_v, G, m, V, true);
  const double exact = 5e-6 * c.sharpness;
  compare("output", found, out, c.half ? 8e-3 : exact, 1e-2);
  compare("gradient of q", found_q, grad_q, c.half ? 2e-2 : exact, 1e-2);
  compare("gradient of k", found_k, grad_k, c.half ? 2e-2 : exact, 1e-2);
  compare("gradient of v", found_v, grad_v, c.half ? 2e-2 : exact, 1e-2);
}

}  // namespace

int main() {
  const Case cases[] = {
      {"plain", 1, 1, 70, 70, 16, 16, 10, true, true, false, false, 1},
      {"odd widths, gaps", 2, 1, 67, 67, 5, 19, 4, true, true, true, false, 2},
      {"random landmarks", 2, 2, 81, 81, 8, 8, 0, true, true, false, false, 2},
      {"noncausal", 2, 1, 65, 65, 17, 3, 7, false, true, true, false, 1},
      {"across", 1, 1, 9, 131, 8, 40, 20, false, false, true, false, 3},
      {"causal across", 1, 1, 30, 20, 8, 8, 3, true, true, false, false, 1},
      {"later queries", 1, 1, 5, 90, 8, 8, 12, true, true, false, false, 3},
      {"long groups", 1, 1, 150, 150, 8, 8, 100, true, true, false, false, 2},
      {"one group", 1, 1, 130, 130, 8, 8, 1000, true, true, false, false, 1},
      {"large scores", 1, 1, 90, 90, 16, 8, 10, true, true, false, false, 1, 60},
      {"bfloat16", 2, 1, 70, 70, 16, 24, 10, true, true, false, true, 2},
      {"one token", 1, 1, 1, 1, 1, 1, 3, true, true, false, false, 2},
      {"no keys", 1, 1, 3, 0, 4, 4, 3, false, false, false, false, 1},
      {"no queries", 1, 1, 0, 5, 4, 4, 3, true, true, false, false, 1},
  };
  return on_every_instruction_set([&] {
    for (const Case& c : cases) check(c);
  });
}
