// The selective scan's kernels against plain loops in double: outputs, states, and gradients by reverse recurrence.

#include "regard_selective_scan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace {

struct Case {
  int batch, n, channels, groups, states;
  bool inclusive, read, surrounded, ragged;
  int threads, dtype;
};

std::mt19937 generator(11);
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

void compare(const char* name, const Case& c, const Tensor& found, const std::vector<double>& expected, double most) {
  double largest = 1e-30, error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::fmax(largest, std::fabs(expected[i]));
    const double difference = std::fabs(found.at(i) - expected[i]);
    error = difference <= error ? error : difference;  // NaN stays
  }
  if (!(error <= most * largest)) {
    std::printf("%s: error %.2e of the largest (n=%d channels=%d groups=%d states=%d threads=%d dtype=%d set=%s)\n", name,
                error / largest, c.n, c.channels, c.groups, c.states, c.threads, c.dtype, regard_instruction_set());
    ++failures;
  }
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void run(const Case& c) {
  const bool half = c.dtype == REGARD_BFLOAT16;
  const size_t B = c.batch, N = c.n, C = c.channels, G = c.groups, K = c.states;
  const size_t tokens = B * N * C, keys = B * N * G * K, states = B * C * K;
  std::vector<double> x_ = normal(tokens), dt_ = normal(tokens), z_ = normal(tokens), a_ = normal(C * K, 3),
                      b_ = normal(keys), c_ = normal(keys), skip_ = normal(C), bias_ = normal(C), state_ = normal(states),
                      gy_ = normal(tokens), gl_ = normal(states);
  for (double& value : a_) value = -std::fabs(value);
  if (!c.surrounded)
    for (double& value : dt_) value = std::fabs(value);
  Tensor x(x_, half), dt(dt_, half), z(z_, half), a(a_, false), b(b_, half), cc(c_, half), skip(skip_, false),
      bias(bias_, false), state(state_, false), grad_y(gy_, half), grad_last(gl_, false);
  std::vector<int64_t> lengths(B);
  for (size_t row = 0; row < B; ++row) lengths[row] = c.ragged ? static_cast<int64_t>(row * N / 2) : c.n;

  const int64_t every = REGARD_SELECTIVE_SCAN_EVERY;
  Tensor y(tokens, half), last(states, false), kept(B * ((N + every - 1) / every) * C * K, false);
  regard_selective_scan_args args = {};
  args.size = sizeof args;
  args.threads = c.threads;
  args.dtype = c.dtype;
  args.batch = c.batch;
  args.n = c.n;
  args.channels = c.channels;
  args.groups = c.groups;
  args.states = c.states;
  args.inclusive = c.inclusive;
  args.x = x.data();
  args.dt = dt.data();
  args.a = a.numbers();
  args.b = b.data();
  args.c = c.read ? cc.data() : nullptr;
  args.skip = c.surrounded ? skip.numbers() : nullptr;
  args.dt_bias = c.surrounded ? bias.numbers() : nullptr;
  args.z = c.surrounded ? z.data() : nullptr;
  args.state = c.surrounded ? state.numbers() : nullptr;
  args.lengths = c.ragged ? lengths.data() : nullptr;
  args.y = c.read ? y.data() : nullptr;
  args.last = last.numbers();
  args.kept = kept.numbers();
  for (int64_t* strides : {args.x_strides, args.dt_strides, args.z_strides}) {
    strides[0] = static_cast<int64_t>(N * C);
    strides[1] = static_cast<int64_t>(C);
  }
  for (int64_t* strides : {args.b_strides, args.c_strides}) {
    strides[0] = static_cast<int64_t>(N * G * K);
    strides[1] = static_cast<int64_t>(G * K);
    strides[2] = static_cast<int64_t>(K);
  }
  Tensor gx(tokens, half), gdt(tokens, half), gz(tokens, half), ga(C * K, false), gb(keys, half), gc(keys, half),
      gskip(C, false), gbias(C, false), gstate(states, false);
  regard_selective_scan_backward_args back = {};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_y = c.read ? grad_y.data() : nullptr;
  back.grad_y_strides[0] = static_cast<int64_t>(N * C);
  back.grad_y_strides[1] = static_cast<int64_t>(C);
  back.grad_last = grad_last.numbers();
  back.grad_x = gx.data();
  back.grad_dt = gdt.data();
  back.grad_a = ga.numbers();
  back.grad_b = gb.data();
  back.grad_c = c.read ? gc.data() : nullptr;
  back.grad_skip = c.surrounded ? gskip.numbers() : nullptr;
  back.grad_dt_bias = c.surrounded ? gbias.numbers() : nullptr;
  back.grad_z = c.surrounded && c.read ? gz.data() : nullptr;
  back.grad_state = gstate.numbers();
  if (regard_selective_scan(&args) != REGARD_OK || regard_selective_scan_backward(&back) != REGARD_OK) {
    std::printf("a kernel refused\n");
    ++failures;
    return;
  }

  std::vector<double> ey(tokens), el(states), ex(tokens), edt(tokens), ez(tokens), ea(C * K), eb(keys), ec(keys), eskip(C),
      ebias(C), estate(states);
  for (size_t row = 0; row < B; ++row)
    for (size_t e = 0; e < C; ++e) {
      const size_t length = static_cast<size_t>(lengths[row]), group = e / (C / G);
      std::vector<double> h(K), before(length * K), after(length * K), sums(length);
      for (size_t k = 0; k < K; ++k) h[k] = c.surrounded ? state_[(row * C + e) * K + k] : 0;
      const auto step_of = [&](size_t i) { return c.surrounded ? std::log1p(std::exp(dt_[i] + bias_[e])) : dt_[i]; };
      for (size_t t = 0; t < length; ++t) {
        const size_t i = (row * N + t) * C + e, key = ((row * N + t) * G + group) * K;
        const double step = step_of(i);
        for (size_t k = 0; k < K; ++k) {
          before[t * K + k] = std::exp(step * a_[e * K + k]) * h[k];
          after[t * K + k] = h[k] = before[t * K + k] + step * x_[i] * b_[key + k];
          sums[t] += c_[key + k] * (c.inclusive ? after : before)[t * K + k];
        }
        if (c.surrounded) sums[t] += skip_[e] * x_[i];
        ey[i] = sums[t] * (c.surrounded ? z_[i] * sigmoid(z_[i]) : 1);
      }
      std::vector<double> d(K);
      for (size_t k = 0; k < K; ++k) {
        el[(row * C + e) * K + k] = h[k];
        d[k] = gl_[(row * C + e) * K + k];
      }
      for (size_t t = length; t-- > 0;) {
        const size_t i = (row * N + t) * C + e, key = ((row * N + t) * G + group) * K;
        const double step = step_of(i), s = sigmoid(z_[i]), gate = c.surrounded ? z_[i] * s : 1;
        const double gy = c.read ? gy_[i] * gate : 0;
        double dw = 0, ds = 0;
        if (c.read) ez[i] = gy_[i] * sums[t] * s * (1 + z_[i] * (1 - s));
        for (size_t k = 0; k < K; ++k) {
          const double rate = a_[e * K + k], q = d[k] + gy * c_[key + k], g = c.inclusive ? q : d[k];
          ec[key + k] += gy * (c.inclusive ? after : before)[t * K + k];
          eb[key + k] += g * step * x_[i];
          dw += g * b_[key + k];
          ds += q * before[t * K + k] * rate;
          ea[e * K + k] += q * before[t * K + k] * step;
          d[k] = std::exp(step * rate) * q;
        }
        ds += dw * x_[i];
        edt[i] = c.surrounded ? ds * sigmoid(dt_[i] + bias_[e]) : ds;
        ebias[e] += edt[i];
        ex[i] = dw * step + (c.surrounded ? gy * skip_[e] : 0);
        eskip[e] += gy * x_[i];
      }
      for (size_t k = 0; k < K; ++k) estate[(row * C + e) * K + k] = d[k];
    }
  const double most = half ? 8e-3 : 2e-5;
  if (c.read) compare("y", c, y, ey, most);
  compare("last state", c, last, el, 2e-5);
  compare("grad x", c, gx, ex, most);
  compare("grad dt", c, gdt, edt, most);
  compare("grad a", c, ga, ea, 2e-5);
  compare("grad b", c, gb, eb, most);
  if (c.read) compare("grad c", c, gc, ec, most);
  if (c.surrounded) {
    compare("grad skip", c, gskip, eskip, 2e-5);
    compare("grad dt_bias", c, gbias, ebias, 2e-5);
    if (c.read) compare("grad z", c, gz, ez, most);
  }
  compare("grad state", c, gstate, estate, 2e-5);
}

}  // namespace

int main() {
  regard_set_poison(1);
  const std::string sets = regard_instruction_sets();
  for (size_t at = 0; at <= sets.size();) {
    const size_t end = std::min(sets.find(',', at), sets.size());
    regard_set_instruction_set(sets.substr(at, end - at).c_str());
    at = end + 1;
    for (int n : {0, 1, 63, 64, 65, 200}) {
      run({1, n, 40, 1, 16, true, true, true, false, 1, REGARD_FLOAT32});
      run({3, n, 36, 2, 5, n % 2 == 0, true, true, true, 3, REGARD_FLOAT32});
      run({2, n, 12, 12, 1, false, true, false, false, 2, REGARD_FLOAT32});
      run({2, n, 33, 1, 12, true, n == 64, n != 65, true, 2, REGARD_BFLOAT16});
    }
    run({1, 70, 300, 1, 3, true, true, true, false, 3, REGARD_FLOAT32});
  }
  if (failures == 0) std::printf("selective scan: all right\n");
  return failures == 0 ? 0 : 1;
}
