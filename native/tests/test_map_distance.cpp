// The distance of an estimated map from exact attention against plain loops in double, and its gradients against finite
// differences of the same loops.

#include <functional>

#include "regard_map_distance.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  size_t heads, kv_heads, n, m, width, pixels;
  bool causal, target, moved, jitter;
  int64_t threads;
};

const size_t B = 2;
const double SCALE = 0.7f;

struct Inputs {
  Doubles q, k, e;
};

double weight_of_result(size_t i) { return 0.3 + static_cast<double>(i % 7) / 7; }

void check(const Case& c) {
  now("%s", c.name);
  const size_t H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, K = c.pixels;
  Floats q = numbers(B * H * n * D, -2, 2), k = numbers(B * G * m * D), e = numbers(B * H * n * K, -2, 2),
         target = numbers(B * H * n * m);
  std::vector<int64_t> totals(B * n), slots(B * m);
  Doubles jitter(B * m);
  for (size_t b = 0; b < B; ++b) {
    for (size_t i = 0; i < n; ++i)
      totals[b * n + i] = c.causal ? static_cast<int64_t>(i + m + 1) - static_cast<int64_t>(n) : static_cast<int64_t>(m);
    for (size_t j = 0; j < m; ++j) {
      slots[b * m + j] = static_cast<int64_t>(c.moved ? (j * (b ? 7 : 1) + b) % m : j);
      jitter[b * m + j] = c.jitter && b == 1 ? 0.75 * uniform() : 0;
    }
  }
  for (size_t i = 0; i < target.size(); ++i) target[i] = target[i] < -0.6f ? 0.f : (target[i] + 1) / static_cast<float>(m);

  // kl and squares of one query
  const auto results = [&](const Inputs& x, const Doubles* exact, size_t b, size_t h, size_t i, double* kl,
                           double* squares) {
    const size_t seen = std::max<int64_t>(0, totals[b * n + i]), query = (b * H + h) * n + i;
    Doubles s(seen), r(seen), p(seen);
    double sum = 0, sum_r = 0;
    *kl = *squares = 0;
    for (size_t j = 0; j < seen; ++j) {
      const size_t slot = slots[b * m + j];
      const double all = static_cast<double>(seen);
      const double place = (static_cast<double>(j) + jitter[b * m + slot] + 0.5) / all * static_cast<double>(K);
      const size_t pixel = std::min<size_t>(fmax(0, floor(place - 1e-4)), K - 1);
      double score = 0;
      for (size_t d = 0; d < D; ++d) score += SCALE * x.q[query * D + d] * x.k[((b * G + h / (H / G)) * m + slot) * D + d];
      s[j] = exp(score), r[j] = exp(x.e[query * K + pixel]);
      p[j] = c.target ? target[query * m + slot] : 0;
      sum += s[j], sum_r += r[j];
    }
    for (size_t j = 0; j < seen; ++j) {
      s[j] /= sum, r[j] /= sum_r;
      if (!c.target) p[j] = exact == nullptr ? s[j] : (*exact)[j];
      *kl += p[j] > 0 ? p[j] * log(p[j] / r[j]) : 0;
      *squares += (p[j] - r[j]) * (p[j] - r[j]);
      if (!c.target) continue;
      *kl += p[j] > 0 ? p[j] * log(p[j] / s[j]) : 0;
      *squares += (p[j] - s[j]) * (p[j] - s[j]);
    }
    return s;
  };

  Inputs x{Doubles(q.begin(), q.end()), Doubles(k.begin(), k.end()), Doubles(e.begin(), e.end())};
  Doubles kl(B * H * n), squares(kl.size());
  std::vector<Doubles> weights(kl.size());
  for (size_t at = 0; at < kl.size(); ++at)
    weights[at] = results(x, nullptr, at / (H * n), at / n % H, at % n, &kl[at], &squares[at]);
  // the weighted sum of all results that depend on an input; without a target exact weights are constant
  const auto slope = [&](double& moved, const std::function<bool(size_t)>& reached) {
    const double before = moved;
    double sums[2] = {0, 0};
    for (int side = 0; side < 2; ++side) {
      moved = before + (side ? 1e-4 : -1e-4);
      for (size_t at = 0; at < kl.size(); ++at) {
        if (!reached(at)) continue;
        double here = 0, apart = 0;
        results(x, &weights[at], at / (H * n), at / n % H, at % n, &here, &apart);
        sums[side] += weight_of_result(at) * here + weight_of_result(at + 3) * apart;
      }
    }
    moved = before;
    return (sums[1] - sums[0]) / 2e-4;
  };
  Doubles grad_e(e.size()), grad_q(q.size()), grad_k(k.size());
  for (size_t i = 0; i < e.size(); ++i) grad_e[i] = slope(x.e[i], [&](size_t at) { return at == i / K; });
  for (size_t i = 0; c.target && i < q.size(); ++i) grad_q[i] = slope(x.q[i], [&](size_t at) { return at == i / D; });
  for (size_t i = 0; c.target && i < k.size(); ++i)
    grad_k[i] = slope(x.k[i], [&](size_t at) { return at / (H / G * n) == i / (m * D); });

  // the reference takes most of the time, and is the same for all
  each_instruction_set([&] {
    Floats found_kl = unwritten(kl.size()), found_squares = unwritten(kl.size()), mass(e.size()), rows(3 * kl.size()),
           grad_kl(kl.size()), grad_squares(kl.size()), found_e = unwritten(e.size()), found_q(q.size()), found_k(k.size());
    for (size_t i = 0; i < kl.size(); ++i) {
      grad_kl[i] = static_cast<float>(weight_of_result(i));
      grad_squares[i] = static_cast<float>(weight_of_result(i + 3));
    }
    regard_map_distance_args a{};
    a.size = sizeof a;
    a.threads = c.threads;
    a.dtype = REGARD_FLOAT32;
    a.q = q.data(), a.k = k.data();
    a.batch = B, a.heads = H, a.kv_heads = G, a.n = n, a.m = m, a.width = D;
    strides(a.q_strides, H, n, D), strides(a.k_strides, G, m, D), strides(a.estimate_strides, H, n, K);
    a.estimate = e.data(), a.pixels = K;
    a.target = c.target ? target.data() : nullptr;
    strides(a.target_strides, H, n, m);
    a.totals = totals.data(), a.totals_stride = a.n;
    a.slots = c.moved ? slots.data() : nullptr, a.slots_stride = c.moved ? a.m : 0;
    a.jitter = c.jitter ? jitter.data() : nullptr, a.jitter_stride = c.jitter ? a.m : 0;
    a.scale = 0.7f;
    a.kl = found_kl.data(), a.squares = found_squares.data(), a.mass = mass.data(), a.rows = c.target ? rows.data() : nullptr;
    regard_map_distance_backward_args back{};
    back.size = sizeof back;
    back.forward = &a;
    back.grad_kl = grad_kl.data(), back.grad_squares = grad_squares.data();
    back.grad_estimate = found_e.data();
    if (c.target) back.grad_q = found_q.data(), back.grad_k = found_k.data();
    strides(back.grad_q_strides, H, n, D), strides(back.grad_k_strides, G, m, D);
    must("forward", regard_map_distance(&a));
    must("backward", regard_map_distance_backward(&back));
    compare("kl", found_kl, kl, 1e-5, 1e-2);
    compare("squares", found_squares, squares, 1e-5, 1e-2);
    compare("gradient of the estimate", found_e, grad_e, 2e-5, 1e-2);
    compare("gradient of q", found_q, grad_q, 2e-5, 1e-2);
    compare("gradient of k", found_k, grad_k, 2e-5, 1e-2);
    if (!c.target) {
      back.grad_q = found_q.data();
      must("gradient of q without a target", regard_map_distance_backward(&back), REGARD_BAD_ARGUMENT);
    }
  });
}

}  // namespace

int main() {
  const Case cases[] = {
      {"plain", 2, 2, 70, 70, 16, 8, true, false, false, false, 1},
      {"odd widths, shared keys", 6, 2, 67, 67, 5, 37, true, false, false, false, 2},
      {"more pixels than keys", 2, 1, 40, 40, 17, 100, true, false, false, false, 2},
      {"moved keys", 2, 1, 30, 50, 16, 10, true, false, true, false, 2},
      {"jitter of moved keys", 2, 1, 70, 80, 8, 24, true, false, true, true, 3},
      {"across", 4, 2, 9, 301, 8, 20, false, false, false, true, 3},
      {"queries before all keys", 1, 1, 30, 20, 8, 4, true, false, false, false, 1},
      {"target", 4, 2, 40, 40, 6, 12, true, true, false, false, 2},
      {"target of moved keys, jitter", 1, 1, 30, 50, 5, 10, true, true, true, true, 3},
      {"target before all keys", 1, 1, 30, 20, 3, 40, true, true, false, false, 1},
      {"one token", 1, 1, 1, 1, 1, 3, true, true, false, false, 2},
      {"no keys", 1, 1, 3, 0, 4, 3, false, true, false, false, 1},
      {"no queries", 1, 1, 0, 5, 4, 3, true, true, false, false, 1},
  };
  for (const Case& c : cases) check(c);
  return told();
}
