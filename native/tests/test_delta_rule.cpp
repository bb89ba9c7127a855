// The delta rule's kernels against plain loops in double: outputs, states, and gradients by reverse recurrence.

#include "regard_delta_rule.h"
#include "testing.h"

namespace {

struct Case {
  int batch, heads, n, width, values, gates;
  bool inclusive, read, state;
  int threads, dtype;
};

void run(const Case& c) {
  const size_t pairs = static_cast<size_t>(c.batch) * c.heads, n = c.n, K = c.width, V = c.values, G = c.gates;
  const bool half = c.dtype == REGARD_BFLOAT16;
  now("n %d, width %d, values %d, gates %d, threads %d, dtype %d", c.n, c.width, c.values, c.gates, c.threads, c.dtype);
  Tensor q(normal(pairs * n * K, 0.3f), half), k(normal(pairs * n * K, 1 / sqrtf(K)), half), v(normal(pairs * n * V), half);
  Floats g = normal(pairs * n * G), beta = normal(pairs * n), state = normal(pairs * K * V);
  Tensor grad_out(normal(pairs * n * V), half);
  Floats grad_final = normal(pairs * K * V);
  for (float& x : g) x = x > 1.2f ? -INFINITY : -fabsf(x);
  for (float& x : beta) x = 1 / (1 + expf(-x));
  Tensor out(pairs * n * V, half);
  Floats final_state = unwritten(pairs * K * V);
  const size_t segments = n == 0 ? 0 : (n - 1) / REGARD_DELTA_RULE_SEGMENT;
  Floats kept = unwritten(pairs * segments * K * V);

  regard_delta_rule_args args{};
  args.size = sizeof args;
  args.threads = c.threads;
  args.dtype = c.dtype;
  args.q = c.read ? q.data() : nullptr;
  args.k = k.data();
  args.v = v.data();
  args.log_decay = G ? g.data() : nullptr;
  args.beta = beta.data();
  args.state = c.state ? state.data() : nullptr;
  args.out = out.data();
  args.final_state = final_state.data();
  args.kept = kept.data();
  args.batch = c.batch;
  args.heads = c.heads;
  args.n = c.n;
  args.width = c.width;
  args.value_width = c.values;
  args.decay_width = c.gates;
  args.inclusive = c.inclusive;
  strides(args.q_strides, c.heads, c.n, c.width);
  strides(args.k_strides, c.heads, c.n, c.width);
  strides(args.v_strides, c.heads, c.n, c.values);
  strides(args.out_strides, c.heads, c.n, c.values);
  strides(args.log_decay_strides, c.heads, c.n, c.gates);
  strides(args.beta_strides, c.heads, c.n, 1);
  strides(args.state_strides, c.heads, c.width, c.values);
  must("forward", regard_delta_rule(&args));

  Tensor grad_q(pairs * n * K, half), grad_k(pairs * n * K, half), grad_v(pairs * n * V, half);
  Floats grad_g = unwritten(g.size()), grad_beta = unwritten(beta.size()), grad_state = unwritten(state.size());
  regard_delta_rule_backward_args back{};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_out = grad_out.data();
  strides(back.grad_out_strides, c.heads, c.n, c.values);
  back.grad_final_state = grad_final.data();
  strides(back.grad_final_state_strides, c.heads, c.width, c.values);
  back.grad_q = grad_q.data();
  back.grad_k = grad_k.data();
  back.grad_v = grad_v.data();
  back.grad_log_decay = G ? grad_g.data() : nullptr;
  back.grad_beta = grad_beta.data();
  back.grad_state = grad_state.data();
  must("backward", regard_delta_rule_backward(&back));

  Doubles o(pairs * n * V), last(pairs * K * V), dq(pairs * n * K), dk(pairs * n * K), dv(pairs * n * V),
      dg(pairs * n * G), dbeta(pairs * n), dstate(pairs * K * V);
  double beta_terms = 0;
  for (size_t pair = 0; pair < pairs; ++pair) {
    std::vector<Doubles> befores, afters, errors;  // decayed and written states, v - prediction
    Doubles s(K * V, 0.0);
    if (c.state) s.assign(state.begin() + pair * K * V, state.begin() + (pair + 1) * K * V);
    const Doubles initial = s;
    const auto gate = [&](size_t t, size_t d) {
      return G == 0 ? 1.0 : exp(g[(pair * n + t) * G + (G == 1 ? 0 : d)]);
    };
    for (size_t t = 0; t < n; ++t) {
      const auto kt = [&](size_t d) { return k[(pair * n + t) * K + d]; };
      Doubles error(V);
      for (size_t d = 0; d < K; ++d) {
        const double kept = gate(t, d);
        for (size_t e = 0; e < V; ++e) s[d * V + e] *= kept;
      }
      befores.push_back(s);
      for (size_t e = 0; e < V; ++e) {
        error[e] = v[(pair * n + t) * V + e];
        for (size_t d = 0; d < K; ++d) error[e] -= s[d * V + e] * kt(d);
      }
      for (size_t d = 0; d < K; ++d)
        for (size_t e = 0; e < V; ++e) s[d * V + e] += kt(d) * beta[pair * n + t] * error[e];
      afters.push_back(s);
      errors.push_back(error);
      const Doubles& seen = c.inclusive ? s : befores.back();
      for (size_t e = 0; e < V; ++e)
        for (size_t d = 0; d < K; ++d) o[(pair * n + t) * V + e] += seen[d * V + e] * q[(pair * n + t) * K + d];
    }
    std::copy(s.begin(), s.end(), last.begin() + pair * K * V);
    Doubles ds(grad_final.begin() + pair * K * V, grad_final.begin() + (pair + 1) * K * V);
    for (size_t t = n; t-- > 0;) {
      const auto kt = [&](size_t d) { return k[(pair * n + t) * K + d]; };
      const auto dot = [&](size_t e) { return grad_out[(pair * n + t) * V + e]; };
      const double rate = beta[pair * n + t];
      const Doubles& seen = c.inclusive ? afters[t] : befores[t];
      const auto read = [&] {
        for (size_t d = 0; d < K; ++d)
          for (size_t e = 0; e < V; ++e) ds[d * V + e] += q[(pair * n + t) * K + d] * dot(e);
      };
      if (c.read)
        for (size_t d = 0; d < K; ++d)
          for (size_t e = 0; e < V; ++e) dq[(pair * n + t) * K + d] += seen[d * V + e] * dot(e);
      if (c.read && c.inclusive) read();
      double terms = 0;
      for (size_t e = 0; e < V; ++e) {
        double du = 0;
        for (size_t d = 0; d < K; ++d) du += ds[d * V + e] * kt(d);
        dbeta[pair * n + t] += du * errors[t][e];
        terms += fabs(du * errors[t][e]);
        dv[(pair * n + t) * V + e] = rate * du;
        for (size_t d = 0; d < K; ++d) {
          dk[(pair * n + t) * K + d] += ds[d * V + e] * rate * errors[t][e] - befores[t][d * V + e] * rate * du;
          ds[d * V + e] -= kt(d) * rate * du;
        }
      }
      beta_terms = fmax(beta_terms, terms);
      if (c.read && !c.inclusive) read();
      for (size_t d = 0; d < K; ++d) {
        const double kept = gate(t, d);
        for (size_t e = 0; e < V; ++e) {
          if (G) dg[(pair * n + t) * G + (G == 1 ? 0 : d)] += ds[d * V + e] * befores[t][d * V + e];
          ds[d * V + e] *= kept;
        }
      }
    }
    std::copy(ds.begin(), ds.end(), dstate.begin() + pair * K * V);
  }
  const double most = half ? 8e-3 : 1e-5;
  if (c.read) compare("out", out, o, most);
  compare("final state", final_state, last, 1e-5);
  compare("grad q", grad_q, dq, most);
  compare("grad k", grad_k, dk, most);
  compare("grad v", grad_v, dv, most);
  compare("grad log decay", grad_g, dg, 1e-5);
  compare("grad beta", grad_beta, dbeta, 2e-6, beta_terms);
  compare("grad state", grad_state, dstate, 1e-5);
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int gates : {0, 1, -1})
      for (int n : {0, 1, 15, 33, 64, 270}) {
        const int width = n == 270 ? 16 : 13, values = n == 270 ? 40 : 19;
        const int decay = gates < 0 ? width : gates;
        run({1, 2, n, width, values, decay, true, true, true, 1, REGARD_FLOAT32});
        run({1, 1, n, width, values, decay, n % 2 == 0, true, n == 33, 3, REGARD_FLOAT32});
        run({2, 1, n, values, width, gates < 0 ? values : gates, true, n != 33, true, 2, REGARD_BFLOAT16});
      }
  });
}
