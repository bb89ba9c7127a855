// The softmax scan against plain loops in double, in buffers of exactly their size.

#include "regard_softmax_scan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

int failures = 0;
unsigned seed = 1;

double uniform() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<double>(seed >> 8) / (1 << 24);
}

std::vector<float> numbers(int64_t count, double low, double high) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = static_cast<float>(low + (high - low) * uniform());
  return x;
}

void compare(const char* what, const std::vector<float>& found, const std::vector<double>& expected) {
  double largest = 0.1, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) largest = std::fmax(largest, std::fabs(expected[i]));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(found[i] - expected[i]);
    if (!(difference <= error)) error = difference;
  }
  if (!(error <= 1e-5 * largest)) {
    std::printf("%s: error %g of %g (%s)\n", what, error, largest, regard_instruction_set());
    ++failures;
  }
}

struct Sizes {
  int64_t batch, heads, n, queries, width;
  bool decay, mix;
  int threads;
};

// exp(s_j + decays after j up to t) for j <= t, and for what came before; all relative to 1.
void check(const Sizes& z) {
  const int64_t B = z.batch, H = z.heads, N = z.n, Q = z.queries, V = z.width, pairs = B * H;
  auto s = numbers(pairs * N * Q, -3, 3), v = numbers(pairs * N * V, -1, 1), gate = numbers(B * N, -0.5, 0);
  auto mix = numbers(pairs * N * Q, 0, 1), m = numbers(pairs * Q, -1, 1), u = numbers(pairs * Q, 0.5, 1);
  auto w = numbers(pairs * Q * V, -1, 1);
  if (N > 2) s[0] = s[static_cast<size_t>(Q)] = -INFINITY;
  const int64_t outs = z.mix ? pairs * N * V : pairs * Q * N * V;
  std::vector<float> out(static_cast<size_t>(outs), NAN), m_out(m.size(), NAN), u_out(u.size(), NAN), w_out(w.size(), NAN);
  auto grad_out = numbers(outs, -1, 1), grad_u = numbers(pairs * Q, -1, 1), grad_w = numbers(pairs * Q * V, -1, 1);
  std::vector<float> grad_s(s.size(), NAN), grad_v(v.size(), NAN), grad_mix(mix.size(), NAN), grad_m(m.size(), NAN),
      before_u(u.size(), NAN), before_w(w.size(), NAN);

  regard_softmax_scan_args args = {};
  args.size = sizeof args;
  args.threads = z.threads;
  args.dtype = REGARD_FLOAT32;
  args.batch = B, args.heads = H, args.n = N, args.queries = Q, args.width = V;
  args.s = s.data();
  const int64_t each[4] = {H * N * Q, N * Q, Q, 1}, values[3] = {H * N * V, N * V, V}, gates[3] = {N, 0, 1};
  for (int i = 0; i < 4; ++i) args.s_strides[i] = args.mix_strides[i] = each[i];
  for (int i = 0; i < 3; ++i) args.v_strides[i] = values[i], args.log_decay_strides[i] = gates[i];
  args.v = v.data();
  args.log_decay = z.decay ? gate.data() : nullptr;
  args.mix = z.mix ? mix.data() : nullptr;
  args.m = m.data(), args.u = u.data(), args.w = w.data();
  args.out = out.data(), args.m_out = m_out.data(), args.u_out = u_out.data(), args.w_out = w_out.data();
  if (regard_softmax_scan(&args) != REGARD_OK) std::printf("refused\n"), ++failures;

  regard_softmax_scan_backward_args back = {};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_out = grad_out.data();
  const int64_t plain[4] = {H * Q * N * V, Q * N * V, N * V, V}, mixed[4] = {H * N * V, N * V, 0, V};
  for (int i = 0; i < 4; ++i) back.grad_out_strides[i] = z.mix ? mixed[i] : plain[i], back.grad_s_strides[i] = each[i];
  back.grad_u = grad_u.data(), back.grad_w = grad_w.data();
  back.grad_s = grad_s.data(), back.grad_v = grad_v.data(), back.grad_mix = z.mix ? grad_mix.data() : nullptr;
  back.grad_carry_m = grad_m.data(), back.grad_carry_u = before_u.data(), back.grad_carry_w = before_w.data();
  if (regard_softmax_scan_backward(&back) != REGARD_OK) std::printf("refused\n"), ++failures;

  std::vector<double> e_out(out.size()), e_u(u.size()), e_w(w.size()), e_s(s.size()), e_v(v.size()), e_mix(mix.size()),
      e_m(m.size()), e_bu(u.size()), e_bw(w.size());
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t q = 0; q < Q; ++q) {
      const auto decayed = [&](int64_t from, int64_t to) {  // over tokens in [from, to]
        double total = 0;
        for (int64_t r = from; z.decay && r <= to; ++r) total += gate[static_cast<size_t>(p / H * N + r)];
        return std::exp(total);
      };
      // token -1 stands for the carry
      for (int64_t t = 0; t <= N; ++t) {
        const int64_t end = t < N ? t : N - 1;  // t == N: the carry out
        std::vector<double> weights(static_cast<size_t>(end + 2));
        double total = 0;
        std::vector<double> sum(static_cast<size_t>(V));
        const double shift = t < N ? 0 : m_out[static_cast<size_t>(p * Q + q)];
        for (int64_t j = -1; j <= end; ++j) {
          const double score = j < 0 ? m[static_cast<size_t>(p * Q + q)] : s[static_cast<size_t>((p * N + j) * Q + q)];
          const double weight = std::exp(score - shift) * decayed(j + 1, end);
          weights[static_cast<size_t>(j + 1)] = weight;
          total += j < 0 ? weight * u[static_cast<size_t>(p * Q + q)] : weight;
          for (int64_t c = 0; c < V; ++c)
            sum[static_cast<size_t>(c)] += weight * (j < 0 ? w[static_cast<size_t>((p * Q + q) * V + c)]
                                                           : v[static_cast<size_t>((p * N + j) * V + c)]);
        }
        // gradients of total and sum
        double d = 0;
        std::vector<double> D(static_cast<size_t>(V));
        if (t == N) {
          e_u[static_cast<size_t>(p * Q + q)] = total;
          d = grad_u[static_cast<size_t>(p * Q + q)];
          for (int64_t c = 0; c < V; ++c) {
            e_w[static_cast<size_t>((p * Q + q) * V + c)] = sum[static_cast<size_t>(c)];
            D[static_cast<size_t>(c)] = grad_w[static_cast<size_t>((p * Q + q) * V + c)];
          }
        } else {
          const size_t at = static_cast<size_t>((p * N + t) * Q + q);
          const double share = z.mix ? mix[at] : 1;
          for (int64_t c = 0; c < V; ++c) {
            const size_t to = static_cast<size_t>(z.mix ? (p * N + t) * V + c : ((p * Q + q) * N + t) * V + c);
            const double o = sum[static_cast<size_t>(c)] / total;
            e_out[to] += share * o;
            e_mix[at] += grad_out[to] * o;
            D[static_cast<size_t>(c)] = share * grad_out[to] / total;
            d -= share * grad_out[to] * o / total;
          }
        }
        for (int64_t j = -1; j <= end; ++j) {
          const double weight = weights[static_cast<size_t>(j + 1)];
          double change = j < 0 ? d * u[static_cast<size_t>(p * Q + q)] : d;
          for (int64_t c = 0; c < V; ++c) {
            const size_t carried = static_cast<size_t>((p * Q + q) * V + c), here = static_cast<size_t>((p * N + j) * V + c);
            change += D[static_cast<size_t>(c)] * (j < 0 ? w[carried] : v[here]);
            (j < 0 ? e_bw[carried] : e_v[here]) += weight * D[static_cast<size_t>(c)];
          }
          if (j < 0) {
            e_bu[static_cast<size_t>(p * Q + q)] += weight * d;
            e_m[static_cast<size_t>(p * Q + q)] += weight * change;
          } else {
            e_s[static_cast<size_t>((p * N + j) * Q + q)] += weight * change;
          }
        }
      }
    }
  compare("output", out, e_out);
  compare("u", u_out, e_u);
  compare("w", w_out, e_w);
  compare("grad_s", grad_s, e_s);
  compare("grad_v", grad_v, e_v);
  if (z.mix) compare("grad_mix", grad_mix, e_mix);
  compare("grad_m", grad_m, e_m);
  compare("grad_u", before_u, e_bu);
  compare("grad_w", before_w, e_bw);
}

}  // namespace

int main() {
  regard_set_poison(1);
  std::string sets = regard_instruction_sets();
  for (size_t begin = 0; begin < sets.size();) {
    const size_t end = std::min(sets.find(',', begin), sets.size());
    regard_set_instruction_set(sets.substr(begin, end - begin).c_str());
    begin = end + 1;
    for (int threads = 1; threads <= 3; threads += 2) {
      for (int options = 0; options < 4; ++options) {
        const bool decay = options & 1, mix = options & 2;
        check({1, 1, 1, 1, 1, decay, mix, threads});
        check({1, 2, 19, 1, 37, decay, mix, threads});
        check({2, 1, 40, 5, 16, decay, mix, threads});
        check({1, 1, 33, 9, 70, decay, mix, threads});
        check({1, 1, 0, 2, 5, decay, mix, threads});
      }
    }
  }
  if (failures == 0) std::printf("softmax scan: all equal\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
