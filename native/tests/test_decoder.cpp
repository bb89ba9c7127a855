// The two parts of a decoder's layer against plain loops in double, with weights of each kind, in buffers of exactly their size.

#include "regard_decoder.h"
#include "testing.h"

#include <memory>

namespace {

// A weight and what it stands for.
struct Weight {
  Weight(int64_t bits, int64_t n, int64_t k, bool offsets)
      : n(n), k(k), values(n * k), bias(numbers(n)), floats(numbers(n * k, -.2f, .2f)), input_scale(numbers(k, .5f, 2)) {
    const int64_t group = bits == 4 ? 32 : k, columns = bits == 4 ? (k + 31) / 32 * 32 : k, groups = columns / group;
    codes.resize(bits == 4 ? n * columns / 2 : n * columns);
    for (uint8_t& v : codes) v = static_cast<uint8_t>(128 * (uniform() + 1));
    const float step = bits == 4 ? .03f : .002f;
    scale.reset(new Tensor(numbers(n * groups, step / 2, step), true));
    offset.reset(new Tensor(numbers(n * groups, -step, step), true));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const size_t at = i * groups + j / group;
        const uint8_t byte = codes[bits == 4 ? (i * columns + j) / 2 : i * columns + j];
        const int code = bits == 4 ? (j % 2 ? byte >> 4 : byte & 15) - 8 : static_cast<int8_t>(byte);
        values[i * k + j] = bits == 32 ? floats[i * k + j] : code * (*scale)[at] + (offsets && bits == 4 ? (*offset)[at] : 0);
        if (offsets) values[i * k + j] *= input_scale[j];
      }
    given.bits = bits;
    given.n = n;
    given.k = k;
    given.columns = columns;
    given.group = group;
    given.codes = bits == 32 ? static_cast<const void*>(floats.data()) : codes.data();
    given.scale = bits == 32 ? nullptr : static_cast<const uint16_t*>(scale->data());
    given.offset = offsets && bits == 4 ? static_cast<const uint16_t*>(offset->data()) : nullptr;
    given.bias = bias.data();
    given.input_scale = offsets ? input_scale.data() : nullptr;
    given.rounded = bits == 8 && !offsets;
  }
  Doubles operator()(Doubles x) const {
    const int64_t m = static_cast<int64_t>(x.size()) / k;
    for (int64_t t = 0; given.rounded && t < m; ++t) {
      double step = 0;
      for (int64_t j = 0; j < k; ++j) step = fmax(step, fabs(x[t * k + j]) / 127);
      for (int64_t j = 0; j < k; ++j) x[t * k + j] = rint(x[t * k + j] / step) * step;
    }
    Doubles y(m * n);
    for (int64_t t = 0; t < m; ++t)
      for (int64_t i = 0; i < n; ++i) {
        double found = bias[i];
        for (int64_t j = 0; j < k; ++j) found += values[i * k + j] * x[t * k + j];
        y[t * n + i] = found;
      }
    return y;
  }
  int64_t n, k;
  Doubles values;
  Floats bias, floats, input_scale;
  std::vector<uint8_t> codes;
  std::unique_ptr<Tensor> scale, offset;
  regard_weight given{};
};

Doubles normed(const Doubles& x, const Floats& weight, double eps) {
  const size_t width = weight.size();
  Doubles y(x.size());
  for (size_t t = 0; t * width < x.size(); ++t) {
    double squares = 0;
    for (size_t i = 0; i < width; ++i) squares += x[t * width + i] * x[t * width + i];
    const double factor = 1 / sqrt(squares / double(width) + eps);
    for (size_t i = 0; i < width; ++i) y[t * width + i] = x[t * width + i] * factor * weight[i];
  }
  return y;
}

void check(int64_t bits, int64_t m, int64_t threads) {
  const int64_t width = 70, head = 10, hidden = 90;
  const bool offsets = m % 2;
  now("%d bits, %d tokens", int(bits), int(m));
  const Floats x = numbers(m * width), norm = numbers(width), cosine = numbers(m * head), sine = numbers(m * head);
  const Weight q(bits, 40, width, offsets), k(bits, 20, width, offsets), v(bits, 20, width, offsets);
  Floats found[3] = {unwritten(m * 40), unwritten(m * 20), unwritten(m * 20)};
  regard_decoder_inputs_args a{};
  a.size = sizeof a;
  a.threads = threads;
  a.m = m;
  a.width = width;
  a.head_width = head;
  a.eps = 1e-5f;
  a.x = x.data();
  a.norm = norm.data();
  a.cosine = cosine.data();
  a.sine = sine.data();
  const Weight* const projections[3] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    a.projections[i] = projections[i]->given;
    a.outputs[i] = found[i].data();
  }
  must("inputs are taken", regard_decoder_inputs(&a));
  const Doubles u = normed(Doubles(x.begin(), x.end()), norm, a.eps);
  for (int i = 0; i < 3; ++i) {
    const Doubles y = (*projections[i])(u);
    Doubles expected = y;
    for (size_t j = 0; i < 2 && j < y.size(); ++j) {
      const size_t token = j / projections[i]->n, feature = j % head;
      const bool first = feature < head / 2;
      const double other = first ? -y[j + head / 2] : y[j - head / 2];
      expected[j] = y[j] * cosine[token * head + feature] + other * sine[token * head + feature];
    }
    compare("inputs", Doubles(found[i].begin(), found[i].end()), expected, 2e-6, 1);
  }

  const Weight output(bits, width, 40, offsets), gate(bits, hidden, width, offsets), up(bits, hidden, width, offsets);
  const Weight down(bits, width, hidden, offsets);
  const Floats attended = numbers(m * 40);
  Floats y = unwritten(m * width);
  regard_decoder_outputs_args b{};
  b.size = sizeof b;
  b.threads = threads;
  b.m = m;
  b.width = width;
  b.eps = 1e-5f;
  b.x = x.data();
  b.attended = attended.data();
  b.norm = norm.data();
  b.output = output.given;
  b.gate = gate.given;
  b.up = up.given;
  b.down = down.given;
  b.y = y.data();
  must("outputs are taken", regard_decoder_outputs(&b));
  Doubles sum = output(Doubles(attended.begin(), attended.end()));
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += x[i];
  const Doubles h = normed(sum, norm, b.eps), values = up(h);
  Doubles gates = gate(h);
  for (size_t i = 0; i < gates.size(); ++i) gates[i] *= values[i] / (1 + exp(-gates[i]));
  Doubles expected = down(gates);
  for (size_t i = 0; i < sum.size(); ++i) expected[i] += sum[i];
  compare("outputs", Doubles(y.begin(), y.end()), expected, 2e-6, 1);
  b.down.n = width - 1;
  must("a weight of another size", regard_decoder_outputs(&b), REGARD_BAD_ARGUMENT);
  a.projections[1].n = 21;
  must("keys that are no heads", regard_decoder_inputs(&a), REGARD_BAD_ARGUMENT);
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int64_t bits : {32, 8, 4})
      for (int64_t m : {1, 5}) check(bits, m, m == 1 ? 1 : 3);
  });
}
