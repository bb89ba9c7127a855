// The delta rule's kernels against plain loops in double: outputs, states, and gradients by reverse recurrence.

#include "regard_delta_rule.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

struct Case {
  int batch, heads, n, width, values, gates;
  bool inclusive, read, state;
  int threads, dtype;
};

std::mt19937 generator(7);
int failures = 0;

std::vector<double> normal(size_t count, double scale = 1) {
  std::normal_distribution<double> distribution(0, scale);
  std::vector<double> x(count);
  for (double& value : x) value = distribution(generator);
  return x;
}

// Exactly as large as the tensor, so that the address sanitizer sees what lies outside.
struct Tensor {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  bool half;

  Tensor(std::vector<double>& values, bool as_half) : half(as_half) {
    for (double& value : values) {
      float x = static_cast<float>(value);
      if (half) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits &= 0xffff0000u;
        halves.push_back(static_cast<uint16_t>(bits >> 16));
        std::memcpy(&x, &bits, 4);
      } else {
        floats.push_back(x);
      }
      value = x;  // the loops see what the kernel sees
    }
  }
  Tensor(size_t count, bool as_half) : half(as_half) {
    if (half)
      halves.assign(count, 0xffff);
    else
      floats.assign(count, NAN);
  }
  void* data() { return half ? static_cast<void*>(halves.data()) : floats.data(); }
  float* numbers() { return floats.data(); }
  double at(size_t i) const {
    if (!half) return floats[i];
    const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
};

// `scale`: of the terms, for sums of few numbers that may cancel.
void compare(const char* name, const Case& c, const Tensor& found, const std::vector<double>& expected, double most,
             double scale = 1e-30) {
  double largest = scale, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::fmax(largest, std::fabs(expected[i]));
    const double difference = std::fabs(found.at(i) - expected[i]);
    error = difference <= error ? error : difference;  // NaN stays
  }
  if (!(error <= most * largest)) {
    std::printf("%s: error %.2e of the largest (n=%d width=%d values=%d gates=%d threads=%d dtype=%d set=%s)\n", name,
                error / largest, c.n, c.width, c.values, c.gates, c.threads, c.dtype, regard_instruction_set());
    ++failures;
  }
}

void run(const Case& c) {
  const size_t pairs = static_cast<size_t>(c.batch) * c.heads, n = c.n, K = c.width, V = c.values, G = c.gates;
  const bool half = c.dtype == REGARD_BFLOAT16;
  auto q = normal(pairs * n * K, 0.3), k = normal(pairs * n * K, 1 / std::sqrt(double(K))), v = normal(pairs * n * V);
  auto g = normal(pairs * n * G), beta = normal(pairs * n), state = normal(pairs * K * V);
  auto grad_out = normal(pairs * n * V), grad_final = normal(pairs * K * V);
  for (double& x : g) x = x > 1.2 ? -INFINITY : -std::fabs(x);
  for (double& x : beta) x = 1 / (1 + std::exp(-x));
  Tensor q_(q, half), k_(k, half), v_(v, half), g_(g, false), beta_(beta, false), state_(state, false);
  Tensor grad_out_(grad_out, half), grad_final_(grad_final, false);
  Tensor out(pairs * n * V, half), final_state(pairs * K * V, false);
  const size_t segments = n == 0 ? 0 : (n - 1) / REGARD_DELTA_RULE_SEGMENT;
  Tensor kept(pairs * segments * K * V, false);

  regard_delta_rule_args args{};
  args.size = sizeof args;
  args.threads = c.threads;
  args.dtype = c.dtype;
  args.q = c.read ? q_.data() : nullptr;
  args.k = k_.data();
  args.v = v_.data();
  args.log_decay = G ? g_.numbers() : nullptr;
  args.beta = beta_.numbers();
  args.state = c.state ? state_.numbers() : nullptr;
  args.out = out.data();
  args.final_state = final_state.numbers();
  args.kept = kept.numbers();
  args.batch = c.batch;
  args.heads = c.heads;
  args.n = c.n;
  args.width = c.width;
  args.value_width = c.values;
  args.decay_width = c.gates;
  args.inclusive = c.inclusive;
  const auto strides = [&](int64_t* to, int64_t rows, int64_t features) {
    to[0] = c.heads * rows * features;
    to[1] = rows * features;
    to[2] = features;
  };
  strides(args.q_strides, c.n, c.width);
  strides(args.k_strides, c.n, c.width);
  strides(args.v_strides, c.n, c.values);
  strides(args.out_strides, c.n, c.values);
  strides(args.log_decay_strides, c.n, c.gates);
  strides(args.beta_strides, c.n, 1);
  strides(args.state_strides, c.width, c.values);
  if (regard_delta_rule(&args) != REGARD_OK) ++failures;

  Tensor grad_q(pairs * n * K, half), grad_k(pairs * n * K, half), grad_v(pairs * n * V, half);
  Tensor grad_g(pairs * n * G, false), grad_beta(pairs * n, false), grad_state(pairs * K * V, false);
  regard_delta_rule_backward_args back{};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_out = grad_out_.data();
  strides(back.grad_out_strides, c.n, c.values);
  back.grad_final_state = grad_final_.numbers();
  strides(back.grad_final_state_strides, c.width, c.values);
  back.grad_q = grad_q.data();
  back.grad_k = grad_k.data();
  back.grad_v = grad_v.data();
  back.grad_log_decay = G ? grad_g.numbers() : nullptr;
  back.grad_beta = grad_beta.numbers();
  back.grad_state = grad_state.numbers();
  if (regard_delta_rule_backward(&back) != REGARD_OK) ++failures;

  std::vector<double> o(pairs * n * V), last(pairs * K * V), dq(pairs * n * K), dk(pairs * n * K), dv(pairs * n * V),
      dg(pairs * n * G), dbeta(pairs * n), dstate(pairs * K * V);
  double beta_terms = 0;
  for (size_t pair = 0; pair < pairs; ++pair) {
    std::vector<std::vector<double>> befores, afters, errors;  // decayed and written states, v - prediction
    std::vector<double> s(K * V, 0.0);
    if (c.state) s.assign(state.begin() + pair * K * V, state.begin() + (pair + 1) * K * V);
    const std::vector<double> initial = s;
    const auto gate = [&](size_t t, size_t d) {
      return G == 0 ? 1.0 : std::exp(g[(pair * n + t) * G + (G == 1 ? 0 : d)]);
    };
    for (size_t t = 0; t < n; ++t) {
      const double* kt = &k[(pair * n + t) * K];
      std::vector<double> error(V);
      for (size_t d = 0; d < K; ++d)
        for (size_t e = 0; e < V; ++e) s[d * V + e] *= gate(t, d);
      befores.push_back(s);
      for (size_t e = 0; e < V; ++e) {
        error[e] = v[(pair * n + t) * V + e];
        for (size_t d = 0; d < K; ++d) error[e] -= s[d * V + e] * kt[d];
      }
      for (size_t d = 0; d < K; ++d)
        for (size_t e = 0; e < V; ++e) s[d * V + e] += kt[d] * beta[pair * n + t] * error[e];
      afters.push_back(s);
      errors.push_back(error);
      const std::vector<double>& seen = c.inclusive ? s : befores.back();
      for (size_t e = 0; e < V; ++e)
        for (size_t d = 0; d < K; ++d) o[(pair * n + t) * V + e] += seen[d * V + e] * q[(pair * n + t) * K + d];
    }
    std::copy(s.begin(), s.end(), last.begin() + pair * K * V);
    std::vector<double> ds(grad_final.begin() + pair * K * V, grad_final.begin() + (pair + 1) * K * V);
    for (size_t t = n; t-- > 0;) {
      const double *kt = &k[(pair * n + t) * K], *qt = &q[(pair * n + t) * K];
      const double* dot = &grad_out[(pair * n + t) * V];
      const double rate = beta[pair * n + t];
      const std::vector<double>& seen = c.inclusive ? afters[t] : befores[t];
      const auto read = [&] {
        for (size_t d = 0; d < K; ++d)
          for (size_t e = 0; e < V; ++e) ds[d * V + e] += qt[d] * dot[e];
      };
      if (c.read)
        for (size_t d = 0; d < K; ++d)
          for (size_t e = 0; e < V; ++e) dq[(pair * n + t) * K + d] += seen[d * V + e] * dot[e];
      if (c.read && c.inclusive) read();
      double terms = 0;
      for (size_t e = 0; e < V; ++e) {
        double du = 0;
        for (size_t d = 0; d < K; ++d) du += ds[d * V + e] * kt[d];
        dbeta[pair * n + t] += du * errors[t][e];
        terms += std::fabs(du * errors[t][e]);
        dv[(pair * n + t) * V + e] = rate * du;
        for (size_t d = 0; d < K; ++d) {
          dk[(pair * n + t) * K + d] += ds[d * V + e] * rate * errors[t][e] - befores[t][d * V + e] * rate * du;
          ds[d * V + e] -= kt[d] * rate * du;
        }
      }
      beta_terms = std::fmax(beta_terms, terms);
      if (c.read && !c.inclusive) read();
      for (size_t d = 0; d < K; ++d)
        for (size_t e = 0; e < V; ++e) {
          if (G) dg[(pair * n + t) * G + (G == 1 ? 0 : d)] += ds[d * V + e] * befores[t][d * V + e];
          ds[d * V + e] *= gate(t, d);
        }
    }
    std::copy(ds.begin(), ds.end(), dstate.begin() + pair * K * V);
  }
  const double most = half ? 8e-3 : 1e-5;
  if (c.read) compare("out", c, out, o, most);
  compare("final state", c, final_state, last, 1e-5);
  compare("grad q", c, grad_q, dq, most);
  compare("grad k", c, grad_k, dk, most);
  compare("grad v", c, grad_v, dv, most);
  compare("grad log decay", c, grad_g, dg, 1e-5);
  compare("grad beta", c, grad_beta, dbeta, 2e-6, beta_terms);
  compare("grad state", c, grad_state, dstate, 1e-5);
}

}  // namespace

int main() {
  regard_set_poison(1);
  const std::string sets = regard_instruction_sets();
  for (size_t at = 0; at <= sets.size();) {
    const size_t end = std::min(sets.find(',', at), sets.size());
    regard_set_instruction_set(sets.substr(at, end - at).c_str());
    at = end + 1;
    for (int gates : {0, 1, -1})
      for (int n : {0, 1, 15, 33, 64, 270}) {
        const int width = n == 270 ? 16 : 13, values = n == 270 ? 40 : 19;
        const int decay = gates < 0 ? width : gates;
        run({1, 2, n, width, values, decay, true, true, true, 1, REGARD_FLOAT32});
        run({1, 1, n, width, values, decay, n % 2 == 0, true, n == 33, 3, REGARD_FLOAT32});
        run({2, 1, n, values, width, gates < 0 ? values : gates, true, n != 33, true, 2, REGARD_BFLOAT16});
      }
  }
  if (failures == 0) std::printf("delta rule: all right\n");
  return failures == 0 ? 0 : 1;
}
