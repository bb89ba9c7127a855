// Attention to the keys of chosen pixels against plain loops in double, and its gradients against those of the same loops.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "regard_pixel_attention.h"

namespace {

// Exactly as many elements as given, so that a sanitizer sees what is touched beyond them.
template <class T>
struct Array {
  explicit Array(size_t count) : count(count), data(new T[count]()) {}
  T* get() const { return count == 0 ? nullptr : data.get(); }
  T& operator[](size_t i) const { return data[i]; }
  size_t count;
  std::unique_ptr<T[]> data;
};

unsigned state = 1;
float uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.f;
}
Array<float> random_array(size_t count) {
  Array<float> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = uniform();
  return x;
}

float from_bits(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
// Rounds to bfloat16 in place, and gives the bits.
Array<uint16_t> to_bits(const Array<float>& x) {
  Array<uint16_t> y(x.count);
  for (size_t i = 0; i < x.count; ++i) {
    uint32_t bits;
    memcpy(&bits, &x[i], 4);
    y[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
    x[i] = from_bits(y[i]);
  }
  return y;
}

struct Case {
  const char* name;
  size_t heads, kv_heads, n, m, width, value_width, pixels;
  double top_k, oversample;
  bool causal, together, moved, half;
  int64_t threads;
  int mix = 0;        // 0: none, 1: a mean for each head, 2: running means after some tokens
  bool ties = false;    // of the estimate
  bool jitter = false;  // of the ranks
};

int failures = 0;

void compare(const Case& c, const char* what, const Array<float>& found, const std::vector<double>& expected,
             double tolerance) {
  double largest = 1e-2, error = 0;
  for (double x : expected) largest = fmax(largest, fabs(x));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double each = fabs(found[i] - expected[i]);
    error = each <= error ? error : each;  // NaN stays
  }
  if (error <= tolerance * largest) return;
  printf("%s, %s (%s): error %g of %g\n", c.name, what, regard_instruction_set(), error, largest);
  ++failures;
}

void check(const Case& c) {
  const size_t B = 2, H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width, K = c.pixels;
  const Array<float> q = random_array(B * H * n * D), k = random_array(B * G * m * D), v = random_array(B * G * m * V),
                     grad = random_array(B * H * n * V), e = random_array(B * H * n * K),
                     row_logit = random_array(B * H * n), mix_logit = random_array(B * H * n),
                     first = random_array(B * (c.mix == 1 ? H : G) * V);
  // of a head alone: the last bits of two logarithms would tell those of two heads apart
  for (size_t i = 0; i < e.count; ++i)
    e[i] = c.ties ? floorf(2 * e[i]) * (1 + 0.125f * static_cast<float>(i / (n * K) % H)) : 4 * e[i];
  for (size_t i = 0; i < q.count; ++i) q[i] *= 2;
  const Array<uint16_t> q_bits = to_bits(q), k_bits = to_bits(k), v_bits = to_bits(v), grad_bits = to_bits(grad);
  Array<int64_t> totals(B * n), slots(B * m), before(B);
  Array<double> jitter(B * m);
  for (size_t i = 0; i < jitter.count; ++i) jitter[i] = c.jitter ? 0.75 * uniform() : 0;
  for (size_t b = 0; b < B; ++b) {
    before[b] = static_cast<int64_t>(m / 3);
    for (size_t i = 0; i < n; ++i)
      totals[b * n + i] = c.causal ? std::max<int64_t>(0, static_cast<int64_t>(i + m + 1) - static_cast<int64_t>(n))
                                   : static_cast<int64_t>(m);
    for (size_t j = 0; j < m; ++j) slots[b * m + j] = static_cast<int64_t>(c.moved ? (j * (b ? 7 : 1) + b) % m : j);
  }

  std::vector<double> out(B * H * n * V), mixed(B * H * n * V), grad_q(q.count), grad_k(k.count), grad_v(v.count);
  // with the gates and the mean
  std::vector<double> mixed_q(q.count), mixed_k(k.count), mixed_v(v.count), grad_row(row_logit.count),
      grad_mix(mix_logit.count), grad_first(first.count);
  const double scale = 0.7f;
  for (size_t b = 0; b < B; ++b)
    for (size_t i = 0; i < n; ++i) {
      const int64_t total = totals[b * n + i];
      if (total <= 0) continue;
      std::vector<double> logs(H * K);
      for (size_t h = 0; h < H; ++h) {
        double sum = 0;
        const float* row = e.get() + ((b * H + h) * n + i) * K;
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
        std::vector<double> s(m), weights(m), slopes(m);
        double sum = 0, delta = 0;
        for (int64_t j = 0; j < std::min<int64_t>(total, static_cast<int64_t>(m)); ++j) {
          const size_t slot = static_cast<size_t>(slots[b * m + static_cast<size_t>(j)]);
          const double all = static_cast<double>(total);
          const double place = (static_cast<double>(j) + jitter[b * m + slot] + 0.5) / all * static_cast<double>(K);
          const size_t pixel = std::min(static_cast<size_t>(fmax(0, floor(place - 1e-4))), K - 1);
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
            mean += v[(keys + static_cast<size_t>(j)) * V + p];
            mixed_v[(keys + static_cast<size_t>(j)) * V + p] += sent;
          }
          mean *= part;
          mixed[query * V + p] = share * row * out[query * V + p] + (1 - share) * mean;
          grad_mix[query] -= share * (1 - share) * mean * grad[query * V + p];
        }
      }
    }

  Array<float> found(B * H * n * V), lse(B * H * n), found_q(q.count), found_k(k.count), found_v(v.count);
  Array<uint16_t> found_bits(found.count), q_found(q.count), k_found(k.count), v_found(v.count);
  Array<uint32_t> kept(B * H * n * ((K + 31) / 32));
  for (size_t i = 0; i < found.count; ++i) found[i] = NAN;
  const auto strides = [](int64_t* to, size_t heads, size_t tokens, size_t features) {
    to[0] = static_cast<int64_t>(heads * tokens * features);
    to[1] = static_cast<int64_t>(tokens * features);
    to[2] = static_cast<int64_t>(features);
  };
  const auto pick = [&](const Array<float>& x, const Array<uint16_t>& bits) {
    return c.half ? static_cast<void*>(bits.get()) : x.get();
  };
  regard_pixel_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = pick(q, q_bits), a.k = pick(k, k_bits), a.v = pick(v, v_bits), a.out = pick(found, found_bits);
  a.lse = lse.get();
  a.batch = B, a.heads = static_cast<int64_t>(H), a.kv_heads = static_cast<int64_t>(G), a.n = static_cast<int64_t>(n);
  a.m = static_cast<int64_t>(m), a.width = static_cast<int64_t>(D), a.value_width = static_cast<int64_t>(V);
  strides(a.q_strides, H, n, D), strides(a.k_strides, G, m, D);
  strides(a.v_strides, G, m, V), strides(a.out_strides, H, n, V), strides(a.estimate_strides, H, n, K);
  a.estimate = e.get(), a.pixels = static_cast<int64_t>(K);
  a.kept = kept.get();
  a.totals = totals.get(), a.totals_stride = a.n;
  a.slots = c.moved ? slots.get() : nullptr, a.slots_stride = c.moved ? a.m : 0;
  a.jitter = c.jitter ? jitter.get() : nullptr, a.jitter_stride = c.jitter ? a.m : 0;
  a.top_k = c.top_k, a.oversample = c.oversample;
  a.scale = 0.7f;
  a.together = c.together;
  regard_pixel_attention_backward_args back{};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_out = pick(grad, grad_bits);
  back.grad_q = pick(found_q, q_found), back.grad_k = pick(found_k, k_found), back.grad_v = pick(found_v, v_found);
  strides(back.grad_out_strides, H, n, V), strides(back.grad_q_strides, H, n, D);
  strides(back.grad_k_strides, G, m, D), strides(back.grad_v_strides, G, m, V);
  if (regard_pixel_attention(&a) != REGARD_OK || regard_pixel_attention_backward(&back) != REGARD_OK) {
    printf("%s: refused\n", c.name);
    ++failures;
  }
  const auto read = [&](const Array<float>& x, const Array<uint16_t>& bits) {
    for (size_t i = 0; c.half && i < x.count; ++i) x[i] = from_bits(bits[i]);
  };
  read(found, found_bits), read(found_q, q_found), read(found_k, k_found), read(found_v, v_found);
  compare(c, "output", found, out, c.half ? 8e-3 : 1e-5);
  compare(c, "gradient of q", found_q, grad_q, c.half ? 2e-2 : 1e-5);
  compare(c, "gradient of k", found_k, grad_k, c.half ? 2e-2 : 1e-5);
  compare(c, "gradient of v", found_v, grad_v, c.half ? 2e-2 : 1e-5);
  if (c.mix == 0) return;
  Array<float> found_row(row_logit.count), found_mix(mix_logit.count), found_first(first.count);
  a.row_logit = row_logit.get(), a.mix_logit = mix_logit.get();
  a.first = first.get(), a.first_heads = static_cast<int64_t>(c.mix == 1 ? H : G);
  a.before = c.mix == 2 ? before.get() : nullptr, a.count = c.mix == 2 ? a.m - before[0] : 0;
  back.grad_row_logit = found_row.get(), back.grad_mix_logit = found_mix.get(), back.grad_first = found_first.get();
  if (regard_pixel_attention(&a) != REGARD_OK || regard_pixel_attention_backward(&back) != REGARD_OK) ++failures;
  read(found, found_bits), read(found_q, q_found), read(found_k, k_found), read(found_v, v_found);
  compare(c, "mixed output", found, mixed, c.half ? 8e-3 : 1e-5);
  compare(c, "mixed gradient of q", found_q, mixed_q, c.half ? 2e-2 : 1e-5);
  compare(c, "mixed gradient of k", found_k, mixed_k, c.half ? 2e-2 : 1e-5);
  compare(c, "mixed gradient of v", found_v, mixed_v, c.half ? 2e-2 : 1e-5);
  compare(c, "gradient of the row's logit", found_row, grad_row, 1e-5);
  compare(c, "gradient of the mean's logit", found_mix, grad_mix, 1e-5);
  compare(c, "gradient of the mean", found_first, grad_first, 1e-5);
  a.lse = nullptr, a.kept = nullptr;
  if (regard_pixel_attention(&a) != REGARD_OK) ++failures;
  read(found, found_bits);
  compare(c, "mixed output alone", found, mixed, c.half ? 8e-3 : 1e-5);
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
  regard_set_poison(1);
  std::string sets = std::string(regard_instruction_sets()) + ",";
  for (size_t comma; (comma = sets.find(',')) != std::string::npos; sets.erase(0, comma + 1)) {
    regard_set_instruction_set(sets.substr(0, comma).c_str());
    for (const Case& c : cases) check(c);
  }
  return failures != 0;
}
