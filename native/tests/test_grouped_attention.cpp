// Softmax in two levels against plain loops in double, and its gradients against those of the same loops.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "regard_grouped_attention.h"

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
  size_t heads, kv_heads, n, m, width, value_width;
  size_t block;  // tokens before a landmark; 0: landmarks at random
  bool causal, own, gaps, half;
  int64_t threads;
  float sharpness = 2;  // of queries
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
  const size_t B = 2, H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width;
  const Array<float> q = random_array(B * H * n * D), k = random_array(B * G * m * D), v = random_array(B * G * m * V),
                     grad = random_array(B * H * n * V);
  for (size_t i = 0; i < q.count; ++i) q[i] *= c.sharpness;
  const Array<uint16_t> q_bits = to_bits(q), k_bits = to_bits(k), v_bits = to_bits(v), grad_bits = to_bits(grad);
  Array<int64_t> query_ranks(B * n), key_ranks(B * m), own(B * n);
  Array<uint8_t> landmark(B * m);
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

  std::vector<double> out(B * H * n * V), grad_q(q.count), grad_k(k.count), grad_v(v.count);
  const double scale = 0.7f;
  for (size_t b = 0; b < B; ++b)
    for (size_t h = 0; h < H; ++h)
      for (size_t i = 0; i < n; ++i) {
        const size_t query = (b * H + h) * n + i, keys = (b * G + h / (H / G)) * m;
        // logits whose softmax are the weights: a token's score, and of other groups its gate minus their log-sum-exp
        std::vector<double> s(m), weights(m), share(m), slopes(m), ds(m), gates(m);
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

  Array<float> found(B * H * n * V), lse(B * H * n), found_q(q.count), found_k(k.count), found_v(v.count);
  Array<uint16_t> found_bits(found.count), q_found(q.count), k_found(k.count), v_found(v.count);
  for (size_t i = 0; i < found.count; ++i) found[i] = NAN;
  const auto strides = [](int64_t* to, size_t heads, size_t tokens, size_t features) {
    to[0] = static_cast<int64_t>(heads * tokens * features);
    to[1] = static_cast<int64_t>(features);  // heads of a token side by side
    to[2] = static_cast<int64_t>(heads * features);
  };
  const auto by_token = [](const auto& x, size_t heads, size_t tokens, size_t features, bool back) {
    auto copy = std::vector<std::decay_t<decltype(x[0])>>(x.get(), x.get() + x.count);
    for (size_t b = 0; b < B; ++b)
      for (size_t h = 0; h < heads; ++h)
        for (size_t t = 0; t < tokens; ++t)
          for (size_t p = 0; p < features; ++p) {
            const size_t here = ((b * heads + h) * tokens + t) * features + p;
            const size_t there = ((b * tokens + t) * heads + h) * features + p;
            if (back)
              x[here] = copy[there];
            else
              x[there] = copy[here];
          }
  };
  by_token(q, H, n, D, false), by_token(k, G, m, D, false), by_token(v, G, m, V, false), by_token(grad, H, n, V, false);
  by_token(q_bits, H, n, D, false), by_token(k_bits, G, m, D, false), by_token(v_bits, G, m, V, false);
  by_token(grad_bits, H, n, V, false);
  const auto pick = [&](const Array<float>& x, const Array<uint16_t>& bits) {
    return c.half ? static_cast<void*>(bits.get()) : x.get();
  };
  regard_grouped_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = pick(q, q_bits), a.k = pick(k, k_bits), a.v = pick(v, v_bits), a.out = pick(found, found_bits);
  a.lse = lse.get();
  a.batch = B, a.heads = static_cast<int64_t>(H), a.kv_heads = static_cast<int64_t>(G), a.n = static_cast<int64_t>(n);
  a.m = static_cast<int64_t>(m), a.width = static_cast<int64_t>(D), a.value_width = static_cast<int64_t>(V);
  strides(a.q_strides, H, n, D), strides(a.k_strides, G, m, D);
  strides(a.v_strides, G, m, V), strides(a.out_strides, H, n, V);
  a.query_ranks = query_ranks.get(), a.key_ranks = key_ranks.get(), a.own = c.own ? own.get() : nullptr;
  a.landmark = landmark.get();
  a.query_ranks_stride = a.own_stride = a.n, a.key_ranks_stride = a.landmark_stride = a.m;
  a.scale = 0.7f;
  a.causal = c.causal;
  regard_grouped_attention_backward_args back{};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_out = pick(grad, grad_bits);
  back.grad_q = pick(found_q, q_found), back.grad_k = pick(found_k, k_found), back.grad_v = pick(found_v, v_found);
  strides(back.grad_out_strides, H, n, V), strides(back.grad_q_strides, H, n, D);
  strides(back.grad_k_strides, G, m, D), strides(back.grad_v_strides, G, m, V);
  if (regard_grouped_attention(&a) != REGARD_OK || regard_grouped_attention_backward(&back) != REGARD_OK) {
    printf("%s: refused\n", c.name);
    ++failures;
  }
  const auto read = [&](const Array<float>& x, const Array<uint16_t>& bits, size_t heads, size_t tokens,
                        size_t features) {
    for (size_t i = 0; c.half && i < x.count; ++i) x[i] = from_bits(bits[i]);
    by_token(x, heads, tokens, features, true);
  };
  read(found, found_bits, H, n, V), read(found_q, q_found, H, n, D);
  read(found_k, k_found, G, m, D), read(found_v, v_found, G, m, V);
  const double exact = 5e-6 * c.sharpness;
  compare(c, "output", found, out, c.half ? 8e-3 : exact);
  compare(c, "gradient of q", found_q, grad_q, c.half ? 2e-2 : exact);
  compare(c, "gradient of k", found_k, grad_k, c.half ? 2e-2 : exact);
  compare(c, "gradient of v", found_v, grad_v, c.half ? 2e-2 : exact);
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
  regard_set_poison(1);
  std::string sets = std::string(regard_instruction_sets()) + ",";
  for (size_t comma; (comma = sets.find(',')) != std::string::npos; sets.erase(0, comma + 1)) {
    regard_set_instruction_set(sets.substr(0, comma).c_str());
    for (const Case& c : cases) check(c);
  }
  return failures != 0;
}
