// Attention to the keys of chosen pixels against plain loops in double, and its gradients against those of the same loops.

#include <numeric>

#include "regard_pixel_attention.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  size_t heads, kv_heads, n, m, width, value_width, pixels;
  double top_k, oversample;
  bool causal, together, moved, half;
  int64_t threads;
  int mix = 0;        // 0: none, 1: a mean for each head, 2: running means after some tokens
  bool ties = false;    // whether the estimate has ties
  bool jitter = false;  // whether ranks are moved
};

void check(const Case& c) {
  now("%s", c.name);
  const size_t B = 2, H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width, K = c.pixels;
  Tensor q(numbers(B * H * n * D, -2, 2), c.half), k(numbers(B * G * m * D), c.half), v(numbers(B * G * m * V), c.half),
      grad(numbers(B * H * n * V), c.half);
  Floats e = numbers(B * H * n * K), row_logit = numbers(B * H * n), mix_logit = numbers(B * H * n),
         first = numbers(B * (c.mix == 1 ? H : G) * V);
  // ties within a head only: between heads the last bits of two logarithms would break them
  for (size_t i = 0; i < e.size(); ++i)
    e[i] = c.ties ? floorf(2 * e[i]) * (1 + 0.125f * static_cast<float>(i / (n * K) % H)) : 4 * e[i];
  std::vector<int64_t> totals(B * n), slots(B * m), before(B);
  Doubles jitter(B * m);
  for (size_t i = 0; i < jitter.size(); ++i) jitter[i] = c.jitter ? 0.75 * uniform() : 0;
  for (size_t b = 0; b < B; ++b) {
    before[b] = static_cast<int64_t>(m / 3);
    for (size_t i = 0; i < n; ++i)
      totals[b * n + i] = c.causal ? std::max<int64_t>(0, static_cast<int64_t>(i + m + 1) - static_cast<int64_t>(n))
                                   : static_cast<int64_t>(m);
    for (size_t j = 0; j < m; ++j) slots[b * m + j] = static_cast<int64_t>(c.moved ? (j * (b ? 7 : 1) + b) % m : j);
  }

  Doubles out(B * H * n * V), mixed(B * H * n * V), grad_q(q.size()), grad_k(k.size()), grad_v(v.size());
  // with the gates and the mean
  Doubles mixed_q(q.size()), mixed_k(k.size()), mixed_v(v.size()), grad_row(row_logit.size()),
      grad_mix(mix_logit.size()), grad_first(first.size());
  const double scale = 0.7f;
  for (size_t b = 0; b < B; ++b)
    for (size_t i = 0; i < n; ++i) {
      const int64_t total = totals[b * n + i];
      if (total <= 0) continue;
      Doubles logs(H * K);
      for (size_t h = 0; h < H; ++h) {
        double sum = 0;
        const float* row = e.data() + ((b * H + h) * n + i) * K;
        for (size_t p = 0; p < K; ++p) sum += exp(static_cast<double>(row[p]));
        for (size_t p = 0; p < K; ++p) logs[h * K + p] = row[p] - log(sum);
      }
      const double each = c.top_k * c.oversample * static_cast<double>(K) / static_cast<double>(total);
      std::vector<char> kept(H * K);
      const size_t ranked = c.together ? H : 1;
      for (size_t h = 0; h < H; h += ranked) {
        std::vector<size_t> order(ranked * K);
        std::iota(order.begin(), order.end(), h * K);
        std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return logs[x] > logs[y]; });
        const double budget = fmax(1, nearbyint(static_cast<double>(ranked) * each));
        for (size_t p = 0; p < order.size() && static_cast<double>(p) < budget; ++p) kept[order[p]] = 1;
      }
      for (size_t h = 0; h < H; ++h) {
        const size_t query = (b * H + h) * n + i, keys = (b * G + h / (H / G)) * m;
        Doubles s(m), weights(m), slopes(m);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < std::min<int64_t>(total, static_cast<int64_t>(m)); ++j) {
          const size_t slot = slots[b * m + j];
          const double all = static_cast<double>(total);
          const double place = (static_cast<double>(j) + jitter[b * m + slot] + 0.5) / all * static_cast<double>(K);
          const size_t pixel = std::min<size_t>(fmax(0, floor(place - 1e-4)), K - 1);
          const double parts = fmax(1, nearbyint(all / c.oversample)), scaled = static_cast<double>(j + 1) / all * parts;
          const double step = fmin(fmax(all, c.top_k), c.top_k * c.oversample) / c.top_k;
          if (!kept[h * K + pixel] || (c.oversample > 1 && fabs(scaled - nearbyint(scaled)) > 0.5 / step + 1e-4)) continue;
          for (size_t p = 0; p < D; ++p) s[slot] += scale * q[query * D + p] * k[(keys + slot) * D + p];
          weights[slot] = exp(s[slot]);
          sum += weights[slot];
        }
        for (size_t j = 0; j < m && sum > 0; ++j) weights[j] /= sum;
        for (size_t j = 0; j < m; ++j)
          for (size_t p = 0; p < V; ++p) {
            out[query * V + p] += weights[j] * v[(keys + j) * V + p];
            slopes[j] += grad[query * V + p] * v[(keys + j) * V + p];
            grad_v[(keys + j) * V + p] += weights[j] * grad[query * V + p];
          }
        for (size_t j = 0; j < m; ++j) delta += weights[j] * slopes[j];
        const double share = 1 / (1 + exp(-static_cast<double>(mix_logit[query])));
        const double row = 1 / (1 + exp(-static_cast<double>(row_logit[query])));
        for (size_t j = 0; j < m; ++j) {
          const double slope = scale * weights[j] * (slopes[j] - delta);
          for (size_t p = 0; p < D; ++p) {
            grad_q[query * D + p] += slope * k[(keys + j) * D + p];
            grad_k[(keys + j) * D + p] += slope * q[query * D + p];
            mixed_q[query * D + p] += share * row * slope * k[(keys + j) * D + p];
            mixed_k[(keys + j) * D + p] += share * row * slope * q[query * D + p];
          }
          for (size_t p = 0; p < V; ++p) mixed_v[(keys + j) * V + p] += share * row * weights[j] * grad[query * V + p];
        }
        grad_row[query] = share * row * (1 - row) * delta;
        grad_mix[query] = share * (1 - share) * row * delta;
        const size_t own = (b * (c.mix == 1 ? H : G) + (c.mix == 1 ? h : h / (H / G))) * V;
        const double part = c.mix == 2 ? 1 / static_cast<double>(total) : 1;
        for (size_t p = 0; p < V; ++p) {
          double mean = first[own + p];
          const double sent = (1 - share) * part * grad[query * V + p];
          grad_first[own + p] += sent;
          for (int64_t j = before[b]; c.mix == 2 && j < total; ++j) {
            mean += v[(keys + j) * V + p];
            mixed_v[(keys + j) * V + p] += sent;
          }
          mean *= part;
          mixed[query * V + p] = share * row * out[query * V + p] + (1 - share) * mean;
          grad_mix[query] -= share * (1 - share) * mean * grad[query * V + p];
        }
      }
    }

  Tensor found(out.size(), c.half), found_q(q.size(), c.half), found_k(k.size(), c.half), found_v(v.size(), c.half);
  Floats lse(B * H * n);
  std::vector<uint32_t> kept(B * H * n * ((K + 31) / 32));
  regard_pixel_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.out = found.data();
  a.lse = lse.data();
  a.batch = B, a.heads = H, a.kv_heads = G, a.n = n, a.m = m, a.width = D, a.value_width = V;
  strides(a.q_strides, H, n, D), strides(a.k_strides, G, m, D);
  strides(a.v_strides, G, m, V), strides(a.out_strides, H, n, V), strides(a.estimate_strides, H, n, K);
  a.estimate = e.data(), a.pixels = K;
  a.kept = kept.data();
  a.totals = totals.data(), a.totals_stride = a.n;
  a.slots = c.moved ? slots.data() : nullptr, a.slots_stride = c.moved ? a.m : 0;
  a.jitter = c.jitter ? jitter.data() : nullptr, a.jitter_stride = c.jitter ? a.m : 0;
  a.top_k = c.top_k, a.oversample = c.oversample;
  a.scale = 0.7f;
  a.together = c.together;
  regard_pixel_attention_backward_args back{};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_out = grad.data(), back.grad_q = found_q.data(), back.grad_k = found_k.data(), back.grad_v = found_v.data();
  strides(back.grad_out_strides, H, n, V), strides(back.grad_q_strides, H, n, D);
  strides(back.grad_k_strides, G, m, D), strides(back.grad_v_strides, G, m, V);
  must("forward", regard_pixel_attention(&a));
  must("backward", regard_pixel_attention_backward(&back));
  const double exact = c.half ? 8e-3 : 1e-5, exact_grad = c.half ? 2e-2 : 1e-5, least = 1e-2;
  compare("output", found, out, exact, least);
  compare("gradient of q", found_q, grad_q, exact_grad, least);
  compare("gradient of k", found_k, grad_k, exact_grad, least);
  compare("gradient of v", found_v, grad_v, exact_grad, least);
  if (c.mix == 0) return;
  Floats found_row(row_logit.size()), found_mix(mix_logit.size()), found_first(first.size());
  a.row_logit = row_logit.data(), a.mix_logit = mix_logit.data();
  a.first = first.data(), a.first_heads = c.mix == 1 ? H : G;
  a.before = c.mix == 2 ? before.data() : nullptr, a.count = c.mix == 2 ? a.m - before[0] : 0;
  back.grad_row_logit = found_row.data(), back.grad_mix_logit = found_mix.data(), back.grad_first = found_first.data();
  must("mixed forward", regard_pixel_attention(&a));
  must("mixed backward", regard_pixel_attention_backward(&back));
  compare("mixed output", found, mixed, exact, least);
  compare("mixed gradient of q", found_q, mixed_q, exact_grad, least);
  compare("mixed gradient of k", found_k, mixed_k, exact_grad, least);
  compare("mixed gradient of v", found_v, mixed_v, exact_grad, least);
  compare("gradient of the row's logit", found_row, grad_row, 1e-5, least);
  compare("gradient of the mean's logit", found_mix, grad_mix, 1e-5, least);
  compare("gradient of the mean", found_first, grad_first, 1e-5, least);
  a.lse = nullptr, a.kept = nullptr;
  must("mixed forward alone", regard_pixel_attention(&a));
  compare("mixed output alone", found, mixed, exact, least);
}

}  // namespace

int main() {
  const Case cases[] = {
      {"plain", 2, 2, 70, 70, 16, 16, 8, 3, 1, true, true, false, false, 1, 2},
      {"odd widths, shared keys", 6, 2, 67, 67, 5, 19, 37, 2, 1, true, true, false, false, 2, 2},
      {"more pixels than keys", 2, 1, 40, 40, 17, 70, 100, 4, 1, true, true, false, false, 2, 1},
      {"each head its own", 3, 3, 45, 45, 8, 140, 33, 3, 1, true, false, false, false, 3},
      {"equal probabilities", 4, 2, 60, 60, 8, 8, 16, 3, 1, true, true, false, false, 2, 0, true},
      {"oversampled", 2, 2, 90, 90, 8, 8, 12, 4, 2.5, true, true, false, false, 2},
      {"moved keys", 2, 1, 30, 50, 16, 8, 10, 5, 1, true, true, true, false, 2},
      {"across", 4, 2, 9, 301, 8, 40, 20, 20, 1, false, true, false, false, 3, 1},
      {"long running means", 1, 1, 5, 450, 8, 33, 16, 9, 1, true, true, false, false, 2, 2},
      {"queries before all keys", 1, 1, 30, 20, 8, 8, 4, 3, 1, true, true, false, false, 1, 1},
      {"everything", 2, 1, 33, 33, 8, 8, 4, 100, 1, true, true, false, false, 1, 2},
      {"jitter", 4, 2, 70, 70, 8, 8, 16, 3, 1, true, true, false, false, 2, 2, false, true},
      {"jitter of moved keys beside narrow pixels", 2, 1, 20, 30, 8, 8, 50, 5, 2, true, true, true, false, 2, 0, false, true},
      {"bfloat16", 2, 1, 70, 70, 16, 24, 10, 6, 1, true, true, false, true, 2, 2},
      {"one token", 1, 1, 1, 1, 1, 1, 3, 1, 1, true, true, false, false, 2, 2},
      {"no keys", 1, 1, 3, 0, 4, 4, 3, 1, 1, false, true, false, false, 1},
      {"no queries", 1, 1, 0, 5, 4, 4, 3, 1, 1, true, true, false, false, 1},
  };
  return on_every_instruction_set([&] {
    for (const Case& c : cases) check(c);
  });
}
