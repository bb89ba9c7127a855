// The selective scan's kernels against plain loops in double: outputs, states, and gradients by reverse recurrence.

#include "regard_selective_scan.h"
#include "testing.h"

namespace {

struct Case {
  int batch, n, channels, groups, states;
  bool inclusive, read, surrounded, ragged;
  int threads, dtype;
};

double sigmoid(double x) { return 1 / (1 + exp(-x)); }

void run(const Case& c) {
  const bool half = c.dtype == REGARD_BFLOAT16;
  const size_t B = c.batch, N = c.n, C = c.channels, G = c.groups, K = c.states;
  const size_t tokens = B * N * C, keys = B * N * G * K, states = B * C * K;
  now("n %d, channels %d, groups %d, states %d, threads %d, dtype %d", c.n, c.channels, c.groups, c.states, c.threads,
      c.dtype);
  Floats steps = normal(tokens), a = normal(C * K, 3), skip = normal(C), bias = normal(C), state = normal(states),
         grad_last = normal(states);
  for (float& value : a) value = -fabsf(value);
  for (float& value : steps) value = c.surrounded ? value : fabsf(value);
  Tensor x(normal(tokens), half), dt(steps, half), z(normal(tokens), half), b(normal(keys), half), cc(normal(keys), half),
      grad_y(normal(tokens), half);
  std::vector<int64_t> lengths(B);
  for (size_t row = 0; row < B; ++row) lengths[row] = c.ragged ? static_cast<int64_t>(row * N / 2) : c.n;

  const bool ordered = !c.ragged && c.n % 2 == 1;
  std::vector<int64_t> order(N);  // in reverse order, from the middle
  for (size_t t = 0; t < N; ++t) order[t] = ordered ? static_cast<int64_t>((N / 2 + N - t) % N) : static_cast<int64_t>(t);

  const int64_t every = REGARD_SELECTIVE_SCAN_EVERY;
  Tensor y(tokens, half);
  Floats last = unwritten(states), kept = unwritten(B * ((N + every - 1) / every) * C * K);
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
  args.a = a.data();
  args.b = b.data();
  args.c = c.read ? cc.data() : nullptr;
  args.skip = c.surrounded ? skip.data() : nullptr;
  args.dt_bias = c.surrounded ? bias.data() : nullptr;
  args.z = c.surrounded ? z.data() : nullptr;
  args.state = c.surrounded ? state.data() : nullptr;
  args.lengths = c.ragged ? lengths.data() : nullptr;
  args.order = ordered ? order.data() : nullptr;
  args.y = c.read ? y.data() : nullptr;
  args.last = last.data();
  args.kept = kept.data();
  for (int64_t* strides : {args.x_strides, args.dt_strides, args.z_strides}) {
    strides[0] = N * C, strides[1] = C;
  }
  for (int64_t* strides : {args.b_strides, args.c_strides}) {
    strides[0] = N * G * K, strides[1] = G * K, strides[2] = K;
  }
  Tensor gx(tokens, half), gdt(tokens, half), gz(tokens, half), gb(keys, half), gc(keys, half);
  Floats ga = unwritten(C * K), gskip = unwritten(C), gbias = unwritten(C), gstate = unwritten(states);
  regard_selective_scan_backward_args back = {};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_y = c.read ? grad_y.data() : nullptr;
  back.grad_y_strides[0] = N * C, back.grad_y_strides[1] = C;
  back.grad_last = grad_last.data();
  back.grad_x = gx.data();
  back.grad_dt = gdt.data();
  back.grad_a = ga.data();
  back.grad_b = gb.data();
  back.grad_c = c.read ? gc.data() : nullptr;
  back.grad_skip = c.surrounded ? gskip.data() : nullptr;
  back.grad_dt_bias = c.surrounded ? gbias.data() : nullptr;
  back.grad_z = c.surrounded && c.read ? gz.data() : nullptr;
  back.grad_state = gstate.data();
  must("forward", regard_selective_scan(&args));
  must("backward", regard_selective_scan_backward(&back));

  Doubles ey(tokens), el(states), ex(tokens), edt(tokens), ez(tokens), ea(C * K), eb(keys), ec(keys), eskip(C),
      ebias(C), estate(states);
  for (size_t row = 0; row < B; ++row)
    for (size_t e = 0; e < C; ++e) {
      const size_t length = lengths[row], group = e / (C / G);
      Doubles h(K), before(length * K), after(length * K), sums(length);
      for (size_t k = 0; k < K; ++k) h[k] = c.surrounded ? state[(row * C + e) * K + k] : 0;
      const auto step_of = [&](size_t i) { return c.surrounded ? log1p(exp(dt[i] + bias[e])) : dt[i]; };
      for (size_t t = 0; t < length; ++t) {
        const size_t token = row * N + order[t], i = token * C + e, key = (token * G + group) * K;
        const double step = step_of(i);
        for (size_t k = 0; k < K; ++k) {
          before[t * K + k] = exp(step * a[e * K + k]) * h[k];
          after[t * K + k] = h[k] = before[t * K + k] + step * x[i] * b[key + k];
          sums[t] += cc[key + k] * (c.inclusive ? after : before)[t * K + k];
        }
        if (c.surrounded) sums[t] += skip[e] * x[i];
        ey[i] = sums[t] * (c.surrounded ? z[i] * sigmoid(z[i]) : 1);
      }
      Doubles d(K);
      for (size_t k = 0; k < K; ++k) {
        el[(row * C + e) * K + k] = h[k];
        d[k] = grad_last[(row * C + e) * K + k];
      }
      for (size_t t = length; t-- > 0;) {
        const size_t token = row * N + order[t], i = token * C + e, key = (token * G + group) * K;
        const double step = step_of(i), s = sigmoid(z[i]), gate = c.surrounded ? z[i] * s : 1;
        const double gy = c.read ? grad_y[i] * gate : 0;
        double dw = 0, ds = 0;
        if (c.read) ez[i] = grad_y[i] * sums[t] * s * (1 + z[i] * (1 - s));
        for (size_t k = 0; k < K; ++k) {
          const double rate = a[e * K + k], q = d[k] + gy * cc[key + k], g = c.inclusive ? q : d[k];
          ec[key + k] += gy * (c.inclusive ? after : before)[t * K + k];
          eb[key + k] += g * step * x[i];
          dw += g * b[key + k];
          ds += q * before[t * K + k] * rate;
          ea[e * K + k] += q * before[t * K + k] * step;
          d[k] = exp(step * rate) * q;
        }
        ds += dw * x[i];
        edt[i] = c.surrounded ? ds * sigmoid(dt[i] + bias[e]) : ds;
        ebias[e] += edt[i];
        ex[i] = dw * step + (c.surrounded ? gy * skip[e] : 0);
        eskip[e] += gy * x[i];
      }
      for (size_t k = 0; k < K; ++k) estate[(row * C + e) * K + k] = d[k];
    }
  const double most = half ? 8e-3 : 2e-5;
  if (c.read) compare("y", y, ey, most);
  compare("last state", last, el, 2e-5);
  compare("grad x", gx, ex, most);
  compare("grad dt", gdt, edt, most);
  compare("grad a", ga, ea, 2e-5);
  compare("grad b", gb, eb, most);
  if (c.read) compare("grad c", gc, ec, most);
  if (c.surrounded) {
    compare("grad skip", gskip, eskip, 2e-5);
    compare("grad dt_bias", gbias, ebias, 2e-5);
    if (c.read) compare("grad z", gz, ez, most);
  }
  compare("grad state", gstate, estate, 2e-5);
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int n : {0, 1, 63, 64, 65, 200}) {
      run({1, n, 40, 1, 16, true, true, true, false, 1, REGARD_FLOAT32});
      run({3, n, 36, 2, 5, n % 2 == 0, true, true, true, 3, REGARD_FLOAT32});
      run({2, n, 12, 12, 1, false, true, false, false, 2, REGARD_FLOAT32});
      run({2, n, 33, 1, 12, true, n == 64, n != 65, true, 2, REGARD_BFLOAT16});
    }
    run({1, 70, 300, 1, 3, true, true, true, false, 3, REGARD_FLOAT32});
  });
}
