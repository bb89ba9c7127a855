// Convolution, norm, rotation and gate against plain loops in double, in buffers of exactly their size.

#include "regard_layers.h"
#include "testing.h"

namespace {

double dot(const Doubles& y, const Floats& grad) {
  double total = 0;
  for (size_t i = 0; i < y.size(); ++i) total += y[i] * grad[i];
  return total;
}

double sigmoid(double x) { return 1 / (1 + exp(-x)); }

Doubles wide(const Floats& x) { return Doubles(x.begin(), x.end()); }

struct Shape {
  int64_t batch, n, channels, width, after;
  bool lengths, cache;
  int threads;
};

// y, followed by the last inputs in causal form.
Doubles convolution(const Shape& s, const std::vector<int64_t>& lengths, const Doubles& x, const Doubles& w,
                    const Doubles& bias, const Doubles& cache) {
  const int64_t kept = s.width - 1;
  const auto token = [&](int64_t b, int64_t t, int64_t c) {
    if (t >= 0 && t < lengths[b]) return x[(b * s.n + t) * s.channels + c];
    return t < 0 && s.cache ? cache[(b * kept + t + kept) * s.channels + c] : 0.0;
  };
  Doubles y;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t t = 0; t < s.n; ++t)
      for (int64_t c = 0; c < s.channels; ++c) {
        double sum = bias[c];
        for (int64_t j = 0; j < s.width; ++j)
          sum += w[c * s.width + j] * token(b, t - (kept - s.after) + j, c);
        y.push_back(t < lengths[b] ? sum * sigmoid(sum) : 0);
      }
  if (s.after == 0)
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t i = 0; i < kept; ++i)
        for (int64_t c = 0; c < s.channels; ++c) y.push_back(token(b, lengths[b] - kept + i, c));
  return y;
}

void check_convolution(const Shape& s) {
  now("batch %d, n %d, channels %d, width %d", int(s.batch), int(s.n), int(s.channels), int(s.width));
  const int64_t kept = s.width - 1, count = s.batch * s.n * s.channels, last = s.after ? 0 : s.batch * kept * s.channels;
  const Floats x = numbers(count), w = numbers(s.channels * s.width), bias = numbers(s.channels);
  const Floats cache = numbers(s.cache ? s.batch * kept * s.channels : 0);
  std::vector<int64_t> lengths(s.batch, s.n);
  if (s.lengths) lengths[0] = s.n / 2, lengths.back() = s.n > 1 ? 1 : 0;
  Floats y = unwritten(x.size()), kept_inputs = unwritten(last);
  regard_short_convolution_args a = {};
  a.size = sizeof a;
  a.threads = s.threads;
  a.batch = s.batch, a.n = s.n, a.channels = s.channels, a.width = s.width, a.after = s.after, a.silu = 1;
  a.x = x.data(), a.x_strides[0] = s.n * s.channels, a.x_strides[1] = s.channels;
  a.weight = w.data(), a.bias = bias.data(), a.cache = s.cache ? cache.data() : nullptr, a.lengths = lengths.data();
  a.y = y.data(), a.last = s.after ? nullptr : kept_inputs.data();
  must("convolution", regard_short_convolution(&a));
  y.insert(y.end(), kept_inputs.begin(), kept_inputs.end());
  compare("convolution", y, convolution(s, lengths, wide(x), wide(w), wide(bias), wide(cache)), 1e-5, 0.1);

  const Floats grad = numbers(count + last), grad_y(grad.begin(), grad.begin() + count), grad_last(grad.begin() + count, grad.end());
  Floats dx = unwritten(x.size()), dw = unwritten(w.size()), db = unwritten(bias.size()), dc = unwritten(cache.size());
  regard_short_convolution_backward_args back = {};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_y = grad_y.data(), back.grad_y_strides[0] = s.n * s.channels, back.grad_y_strides[1] = s.channels;
  back.grad_last = s.after ? nullptr : grad_last.data();
  back.grad_x = dx.data(), back.grad_weight = dw.data(), back.grad_bias = db.data();
  back.grad_cache = s.cache ? dc.data() : nullptr;
  must("convolution backward", regard_short_convolution_backward(&back));
  const Doubles X = wide(x), W = wide(w), B = wide(bias), C = wide(cache);
  compare("grad x", dx, slope([&](const Doubles& v) { return dot(convolution(s, lengths, v, W, B, C), grad); }, wide(x)), 1e-5, 0.1);
  compare("grad weight", dw, slope([&](const Doubles& v) { return dot(convolution(s, lengths, X, v, B, C), grad); }, wide(w)), 1e-5, 0.1);
  compare("grad bias", db, slope([&](const Doubles& v) { return dot(convolution(s, lengths, X, W, v, C), grad); }, wide(bias)), 1e-5, 0.1);
  compare("grad cache", dc, slope([&](const Doubles& v) { return dot(convolution(s, lengths, X, W, B, v), grad); }, wide(cache)), 1e-5, 0.1);
}

Doubles norm(int64_t rows, int64_t groups, int64_t width, int gate, const Doubles& x, const Doubles& z, const Doubles& w) {
  Doubles y;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const size_t at = (r * groups + g) * width, first = g * width;
      Doubles u(x.begin() + at, x.begin() + at + width);
      double squares = 0;
      for (size_t i = 0; i < u.size(); ++i) {
        if (gate == REGARD_GATE_BEFORE) u[i] *= z[at + i] * sigmoid(z[at + i]);
        squares += u[i] * u[i];
      }
      for (size_t i = 0; i < u.size(); ++i) {
        const double n = u[i] / sqrt(squares / static_cast<double>(width) + 1e-3) * w[first + i];
        y.push_back(gate == REGARD_GATE_AFTER ? n * z[at + i] * sigmoid(z[at + i]) : n);
      }
    }
  return y;
}

void check_norm(int64_t rows, int64_t groups, int64_t width, int gate, int threads) {
  now("rows %d, groups %d, width %d, gate %d", int(rows), int(groups), int(width), gate);
  const int64_t features = groups * width;
  const Floats x = numbers(rows * features), z = numbers(rows * features), w = numbers(features), grad = numbers(rows * features);
  Floats y = unwritten(x.size()), dx = y, dz = y, dw = unwritten(w.size());
  regard_rms_norm_args a = {};
  a.size = sizeof a;
  a.threads = threads;
  a.rows[0] = 1, a.rows[1] = rows, a.rows[2] = 1;
  a.groups = groups, a.width = width, a.gate = gate, a.eps = 1e-3f;
  a.x = x.data(), a.z = z.data(), a.weight = w.data(), a.y = y.data();
  a.x_strides[1] = a.z_strides[1] = features;
  must("norm", regard_rms_norm(&a));
  compare("norm", y, norm(rows, groups, width, gate, wide(x), wide(z), wide(w)), 1e-5, 0.1);
  regard_rms_norm_backward_args back = {};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_y = grad.data(), back.grad_y_strides[1] = features;
  back.grad_x = dx.data(), back.grad_weight = dw.data(), back.grad_z = gate == REGARD_NO_GATE ? nullptr : dz.data();
  must("norm backward", regard_rms_norm_backward(&back));
  const Doubles X = wide(x), Z = wide(z), W = wide(w);
  const auto loss = [&](const Doubles& p, const Doubles& q, const Doubles& r) {
    return dot(norm(rows, groups, width, gate, p, q, r), grad);
  };
  compare("norm grad x", dx, slope([&](const Doubles& v) { return loss(v, Z, W); }, wide(x)), 1e-5, 0.1);
  compare("norm grad weight", dw, slope([&](const Doubles& v) { return loss(X, Z, v); }, wide(w)), 1e-5, 0.1);
  if (gate != REGARD_NO_GATE) compare("norm grad z", dz, slope([&](const Doubles& v) { return loss(X, v, W); }, wide(z)), 1e-5, 0.1);
}

void check_rotary(int64_t batch, int64_t heads, int64_t n, int64_t width, int64_t rotated, int threads) {
  now("n %d, width %d, rotated %d", int(n), int(width), int(rotated));
  const Floats x = numbers(batch * heads * n * width);
  Floats y = unwritten(x.size()), again = y;
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < batch * n; ++i) positions.push_back(i * 7919 % 1000003);
  Doubles frequencies, expected(x.size());
  for (int64_t i = 0; i < rotated; i += 2)
    frequencies.push_back(pow(1e4, -static_cast<double>(i) / static_cast<double>(rotated)) / (2 * M_PI));
  regard_rotary_args a = {};
  a.size = sizeof a;
  a.threads = threads;
  a.batch = batch, a.heads = heads, a.n = n, a.width = width, a.rotated = rotated;
  a.x = x.data(), a.positions = positions.data(), a.frequencies = frequencies.data(), a.y = y.data();
  a.positions_strides[0] = n, a.positions_strides[1] = 1;
  strides(a.x_strides, heads, n, width), strides(a.y_strides, heads, n, width);
  must("rotary", regard_rotary(&a));
  for (int64_t row = 0; row < batch * heads * n; ++row) {
    const double position = static_cast<double>(positions[row / (heads * n) * n + row % n]);
    const size_t at = row * width, half = rotated / 2;
    for (int64_t i = rotated; i < width; ++i) expected[at + i] = x[at + i];
    for (size_t i = 0; i < half; ++i) {
      const double angle = 2 * M_PI * fmod(position * frequencies[i], 1), c = cos(angle), s = sin(angle);
      expected[at + i] = x[at + i] * c - x[at + half + i] * s;
      expected[at + half + i] = x[at + i] * s + x[at + half + i] * c;
    }
  }
  compare("rotary", y, expected, 1e-6, 0.1);
  a.x = y.data(), a.y = again.data(), a.reverse = 1;
  must("rotary back", regard_rotary(&a));
  compare("rotary there and back", again, wide(x), 1e-6, 0.1);
}

void check_product(int64_t rows, int64_t width, int function, int threads) {
  now("rows %d, width %d, function %d", int(rows), int(width), function);
  const Floats x = numbers(rows * width), z = numbers(rows * width), grad = numbers(rows * width);
  Floats y = unwritten(x.size()), dx = y, dz = y;
  regard_gated_product_args a = {};
  a.size = sizeof a;
  a.threads = threads;
  a.rows = rows, a.width = width, a.function = function;
  a.x = x.data(), a.gate = z.data(), a.x_stride = a.gate_stride = a.grad_y_stride = width;
  a.y = y.data();
  must("product", regard_gated_product(&a));
  a.grad_y = grad.data(), a.grad_x = dx.data(), a.grad_gate = dz.data();
  must("product backward", regard_gated_product(&a));
  const auto product = [&](const Doubles& p, const Doubles& q) {
    Doubles found;
    for (size_t i = 0; i < p.size(); ++i)
      found.push_back(p[i] * sigmoid(q[i]) * (function == REGARD_GATE_BY_SILU ? q[i] : 1));
    return found;
  };
  const Doubles X = wide(x), Z = wide(z);
  compare("product", y, product(X, Z), 1e-5, 0.1);
  compare("product grad x", dx, slope([&](const Doubles& v) { return dot(product(v, Z), grad); }, wide(x)), 1e-5, 0.1);
  compare("product grad gate", dz, slope([&](const Doubles& v) { return dot(product(X, v), grad); }, wide(z)), 1e-5, 0.1);
}

void refuse() {
  regard_short_convolution_args a = {};
  a.size = sizeof a;
  a.threads = 1, a.batch = 1, a.n = 1, a.channels = 1, a.width = REGARD_SHORT_CONVOLUTION_WIDEST + 1;
  must("a wide filter", regard_short_convolution(&a), REGARD_BAD_ARGUMENT);
  a.size = 8;
  must("another struct", regard_short_convolution(&a), REGARD_WRONG_SIZE);
}

}  // namespace

int main() {
  refuse();
  return on_every_instruction_set([] {
    for (int threads : {1, 2}) {
      check_convolution({2, 5, 3, 4, 0, true, true, threads});
      check_convolution({2, 9, 17, 4, 0, false, false, threads});
      check_convolution({1, 6, 35, 3, 1, true, false, threads});
      check_convolution({3, 2, 5, 7, 0, true, true, threads});
      check_convolution({1, 1, 1, 1, 0, false, false, threads});
      for (int gate : {REGARD_NO_GATE, REGARD_GATE_BEFORE, REGARD_GATE_AFTER}) {
        check_norm(3, 1, 33, gate, threads);
        check_norm(2, 3, 7, gate, threads);
      }
      check_rotary(2, 3, 5, 33, 20, threads);
      check_rotary(1, 2, 70, 64, 64, threads);
      check_product(3, 37, REGARD_GATE_BY_SILU, threads);
      check_product(1, 16, REGARD_GATE_BY_SIGMOID, threads);
    }
  });
}
