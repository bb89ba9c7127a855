// The softmax scan against plain loops in double, in buffers of exactly their size.

#include "regard_softmax_scan.h"
#include "testing.h"

namespace {

struct Sizes {
  int64_t batch, heads, n, queries, width;
  bool decay, mix;
  int threads;
};

// exp(s_j + decays after j up to t) for j <= t, and for the carry; all relative to 1.
void check(const Sizes& z) {
  now("n %d, queries %d, width %d, decay %d, mix %d", int(z.n), int(z.queries), int(z.width), z.decay, z.mix);
  const int64_t B = z.batch, H = z.heads, N = z.n, Q = z.queries, V = z.width, pairs = B * H;
  auto s = numbers(pairs * N * Q, -3, 3), v = numbers(pairs * N * V, -1, 1), gate = numbers(B * N, -0.5, 0);
  auto mix = numbers(pairs * N * Q, 0, 1), m = numbers(pairs * Q, -1, 1), u = numbers(pairs * Q, 0.5, 1);
  auto w = numbers(pairs * Q * V, -1, 1);
  if (N > 2) s[0] = s[Q] = -INFINITY;
  const int64_t outs = z.mix ? pairs * N * V : pairs * Q * N * V;
  Floats out = unwritten(outs), m_out = unwritten(m.size()), u_out = unwritten(u.size()), w_out = unwritten(w.size());
  auto grad_out = numbers(outs, -1, 1), grad_u = numbers(pairs * Q, -1, 1), grad_w = numbers(pairs * Q * V, -1, 1);
  Floats grad_s = unwritten(s.size()), grad_v = unwritten(v.size()), grad_mix = unwritten(mix.size()), grad_m = unwritten(m.size()),
      before_u = unwritten(u.size()), before_w = unwritten(w.size());

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
  must("forward", regard_softmax_scan(&args));

  regard_softmax_scan_backward_args back = {};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_out = grad_out.data();
  const int64_t plain[4] = {H * Q * N * V, Q * N * V, N * V, V}, mixed[4] = {H * N * V, N * V, 0, V};
  for (int i = 0; i < 4; ++i) back.grad_out_strides[i] = z.mix ? mixed[i] : plain[i], back.grad_s_strides[i] = each[i];
  back.grad_u = grad_u.data(), back.grad_w = grad_w.data();
  back.grad_s = grad_s.data(), back.grad_v = grad_v.data(), back.grad_mix = z.mix ? grad_mix.data() : nullptr;
  back.grad_carry_m = grad_m.data(), back.grad_carry_u = before_u.data(), back.grad_carry_w = before_w.data();
  must("backward", regard_softmax_scan_backward(&back));

  Doubles e_out(out.size()), e_u(u.size()), e_w(w.size()), e_s(s.size()), e_v(v.size()), e_mix(mix.size()),
      e_m(m.size()), e_bu(u.size()), e_bw(w.size());
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t q = 0; q < Q; ++q) {
      const auto decayed = [&](int64_t from, int64_t to) {  // over tokens in [from, to]
        double total = 0;
        for (int64_t r = from; z.decay && r <= to; ++r) total += gate[p / H * N + r];
        return exp(total);
      };
      // token -1 stands for the carry
      for (int64_t t = 0; t <= N; ++t) {
        const int64_t end = t < N ? t : N - 1;  // t == N: the outgoing carry
        Doubles weights(end + 2);
        double total = 0;
        Doubles sum(V);
        const double shift = t < N ? 0 : m_out[p * Q + q];
        for (int64_t j = -1; j <= end; ++j) {
          const double score = j < 0 ? m[p * Q + q] : s[(p * N + j) * Q + q];
          const double weight = exp(score - shift) * decayed(j + 1, end);
          weights[j + 1] = weight;
          total += j < 0 ? weight * u[p * Q + q] : weight;
          for (int64_t c = 0; c < V; ++c)
            sum[c] += weight * (j < 0 ? w[(p * Q + q) * V + c]
                                                           : v[(p * N + j) * V + c]);
        }
        // gradients of total and sum
        double d = 0;
        Doubles D(V);
        if (t == N) {
          e_u[p * Q + q] = total;
          d = grad_u[p * Q + q];
          for (int64_t c = 0; c < V; ++c) {
            e_w[(p * Q + q) * V + c] = sum[c];
            D[c] = grad_w[(p * Q + q) * V + c];
          }
        } else {
          const size_t at = (p * N + t) * Q + q;
          const double share = z.mix ? mix[at] : 1;
          for (int64_t c = 0; c < V; ++c) {
            const size_t to = z.mix ? (p * N + t) * V + c : ((p * Q + q) * N + t) * V + c;
            const double o = sum[c] / total;
            e_out[to] += share * o;
            e_mix[at] += grad_out[to] * o;
            D[c] = share * grad_out[to] / total;
            d -= share * grad_out[to] * o / total;
          }
        }
        for (int64_t j = -1; j <= end; ++j) {
          const double weight = weights[j + 1];
          double change = j < 0 ? d * u[p * Q + q] : d;
          for (int64_t c = 0; c < V; ++c) {
            const size_t carried = (p * Q + q) * V + c, here = (p * N + j) * V + c;
            change += D[c] * (j < 0 ? w[carried] : v[here]);
            (j < 0 ? e_bw[carried] : e_v[here]) += weight * D[c];
          }
          if (j < 0) {
            e_bu[p * Q + q] += weight * d;
            e_m[p * Q + q] += weight * change;
          } else {
            e_s[(p * N + j) * Q + q] += weight * change;
          }
        }
      }
    }
  compare("output", out, e_out, 1e-5, 0.1);
  compare("u", u_out, e_u, 1e-5, 0.1);
  compare("w", w_out, e_w, 1e-5, 0.1);
  compare("grad_s", grad_s, e_s, 1e-5, 0.1);
  compare("grad_v", grad_v, e_v, 1e-5, 0.1);
  if (z.mix) compare("grad_mix", grad_mix, e_mix, 1e-5, 0.1);
  compare("grad_m", grad_m, e_m, 1e-5, 0.1);
  compare("grad_u", before_u, e_bu, 1e-5, 0.1);
  compare("grad_w", before_w, e_bw, 1e-5, 0.1);
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int threads : {1, 3}) {
      for (int options = 0; options < 4; ++options) {
        const bool decay = options & 1, mix = options & 2;
        check({1, 1, 1, 1, 1, decay, mix, threads});
        check({1, 2, 19, 1, 37, decay, mix, threads});
        check({2, 1, 40, 5, 16, decay, mix, threads});
        check({1, 1, 33, 9, 70, decay, mix, threads});
        check({1, 1, 0, 2, 5, decay, mix, threads});
      }
    }
  });
}
