// Residual branches of a block against plain loops in double, in buffers of exactly their size.

#include "regard_residual.h"

#include <array>

#include "testing.h"

namespace {

// A linear layer and its numbers.
struct Layer {
  Layer(int64_t n, int64_t k, bool biased) : n(n), k(k), weight(normal(n * k, 1.f / sqrtf(k))), bias(normal(biased ? n : 0)) {}
  regard_dense dense() const { return {n, k, weight.data(), bias.empty() ? nullptr : bias.data()}; }
  Doubles of(const Doubles& x) const {
    Doubles y;
    for (size_t t = 0; t < x.size(); t += k)
      for (int64_t i = 0; i < n; ++i) {
        double sum = bias.empty() ? 0 : bias[i];
        for (int64_t j = 0; j < k; ++j) sum += static_cast<double>(weight[i * k + j]) * x[t + j];
        y.push_back(sum);
      }
    return y;
  }
  int64_t n, k;
  Floats weight, bias;
};

// The norm, scale and residual addition of both branches.
struct Around {
  Around(int64_t m, int64_t width, bool centred, bool learned)
      : m(m), width(width), stride(width + 3), centred(centred), x(normal(m > 0 ? (m - 1) * stride + width : 0)),
        y(unwritten(m * width)), weight(normal(learned ? width : 0)), bias(normal(learned && centred ? width : 0)),
        scale(normal(learned ? width : 0)) {}
  static const float* where(const Floats& x) { return x.empty() ? nullptr : x.data(); }
  regard_residual struct_of() {
    return {width, x.data(), stride, y.data(), {centred, 1e-3f, where(weight), where(bias)}, where(scale)};
  }
  Doubles normed() const {
    Doubles found;
    for (int64_t t = 0; t < m; ++t) {
      double mean = 0, square = 0;
      for (int64_t i = 0; centred && i < width; ++i) mean += x[t * stride + i] / static_cast<double>(width);
      for (int64_t i = 0; i < width; ++i) square += pow(x[t * stride + i] - mean, 2) / static_cast<double>(width);
      for (int64_t i = 0; i < width; ++i)
        found.push_back((x[t * stride + i] - mean) / sqrt(square + 1e-3f) * (weight.empty() ? 1 : weight[i]) +
                        (bias.empty() ? 0 : bias[i]));
    }
    return found;
  }
  void compare_with(const Doubles& branch) const {
    Doubles expected;
    for (int64_t t = 0; t < m * width; ++t)
      expected.push_back(x[t / width * stride + t % width] + (scale.empty() ? 1 : scale[t % width]) * branch[t]);
    compare("y", y, expected, 2e-6);
  }
  int64_t m, width, stride;
  bool centred;
  Floats x, y, weight, bias, scale;
};

void feed_forward(int64_t m, int64_t width, int64_t hidden, int64_t threads, bool gated, bool learned) {
  now("feed-forward of %d x %d x %d, %d threads%s", int(m), int(width), int(hidden), int(threads), gated ? ", gated" : "");
  Around around(m, width, !gated, learned);
  const Layer gate(hidden, width, learned), up(hidden, width, learned), down(width, hidden, learned);
  regard_residual_feed_forward_args a{sizeof a, threads, m, around.struct_of(), {}, up.dense(), down.dense()};
  if (gated) a.gate = gate.dense();
  must("taken", regard_residual_feed_forward(&a));
  const Doubles normed = around.normed(), gates = gate.of(normed);
  Doubles inner = up.of(normed);
  for (size_t i = 0; i < inner.size(); ++i)
    inner[i] *= gated ? gates[i] / (1 + exp(-gates[i])) : 0.5 * (1 + erf(inner[i] / sqrt(2.)));
  around.compare_with(down.of(inner));
}

// `lengths` of the sequences, all of which have n if it is empty; or a bias for each key, -inf for every seventh.
void attention(int64_t batch, int64_t n, int64_t width, int64_t heads, int64_t kv_heads, int64_t threads, bool learned,
               const std::vector<int64_t>& lengths = {}, bool biased = false) {
  now("attention of %d x %d x %d, %d heads, %d threads%s%s", int(batch), int(n), int(width), int(heads), int(threads),
      lengths.empty() ? "" : ", unequal lengths", biased ? ", biased keys" : "");
  const int64_t d = 5, e = 3;
  std::vector<int64_t> borders{0};
  for (int64_t b = 0; b < batch; ++b) borders.push_back(borders.back() + (lengths.empty() ? n : lengths[b]));
  Around around(borders.back(), width, true, learned);
  const Layer query(heads * d, width, learned), key(kv_heads * d, width, learned), value(kv_heads * e, width, learned);
  const Layer output(width, heads * e, learned);
  Floats bias = normal(batch * n);
  for (size_t i = 6; i < bias.size(); i += 7) bias[i] = -INFINITY;
  regard_residual_attention_args a{sizeof a, threads, batch, n, lengths.empty() ? nullptr : borders.data(),
                                   biased ? bias.data() : nullptr, heads, kv_heads, 0.7f, around.struct_of(),
                                   query.dense(), key.dense(), value.dense(), output.dense()};
  must("taken", regard_residual_attention(&a));
  const Doubles normed = around.normed(), q = query.of(normed), k = key.of(normed), v = value.of(normed);
  Doubles read(borders.back() * heads * e);
  for (int64_t t = 0, b = 0; t < borders.back(); ++t) {
    while (t >= borders[b + 1]) ++b;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t own = h / (heads / kv_heads);
      double total = 0;
      Doubles sums(e);
      for (int64_t j = borders[b]; j < borders[b + 1]; ++j) {
        double score = 0;
        for (int64_t i = 0; i < d; ++i) score += q[(t * heads + h) * d + i] * k[(j * kv_heads + own) * d + i];
        const double weight = exp(0.7f * score + (biased ? bias[j] : 0.));
        total += weight;
        for (int64_t i = 0; i < e; ++i) sums[i] += weight * v[(j * kv_heads + own) * e + i];
      }
      for (int64_t i = 0; i < e; ++i) read[(t * heads + h) * e + i] = sums[i] / total;
    }
  }
  around.compare_with(output.of(read));
}

void every_size() {
  for (const bool gated : {false, true})
    for (const int64_t threads : {1, 2, 3}) {
      feed_forward(0, 4, 4, threads, gated, true);
      feed_forward(1, 1, 1, threads, gated, false);
      feed_forward(29, 37, 70, threads, gated, true);
      feed_forward(130, 16, 100, threads, gated, false);
      feed_forward(600, 7, 5, threads, gated, true);  // enough rows for threads to divide them
    }
  feed_forward(14, 210, 33, 2, false, true);
  for (const int64_t threads : {1, 2, 3}) {
    attention(0, 5, 4, 1, 1, threads, true);
    attention(1, 0, 4, 1, 1, threads, true);
    attention(1, 1, 1, 1, 1, threads, false);
    attention(2, 33, 37, 2, 2, threads, true);
    attention(1, 600, 4, 2, 1, threads, true);
    attention(200, 4, 6, 4, 2, threads, false);  // several sequences at once, different ones in each thread
    attention(7, 101, 3, 1, 1, threads, true);
    attention(2, 33, 37, 2, 2, threads, true, {}, true);
    attention(1, 600, 4, 2, 1, threads, true, {}, true);
    attention(200, 4, 6, 4, 2, threads, false, {}, true);
    attention(3, 40, 8, 2, 1, threads, true, {5, 0, 40});
    attention(8, 150, 6, 2, 2, threads, true, {150, 0, 1, 97, 150, 3, 96, 140});
    attention(300, 5, 4, 1, 1, threads, false, std::vector<int64_t>(300, 3));
  }
}

// Non-finite numbers, and numbers whose erf is 1 or close to it.
void far_numbers() {
  now("far numbers");
  const float x[] = {-1e30f, -9, -5.54f, -5.55f, -0.f, 1e-20f, 5.54f, 5.55f, 30, 1e30f};
  const float one = 1;
  for (const float each : x) {
    float y = NAN;
    const float unit[] = {each};
    // the norm of a single number is the bias
    regard_residual around{1, &one, 1, &y, {1, 1e-3f, nullptr, unit}, nullptr};
    regard_residual_feed_forward_args a{sizeof a, 1, 1, around, {}, {1, 1, &one, nullptr}, {1, 1, &one, nullptr}};
    must("taken", regard_residual_feed_forward(&a));
    compare("gelu", Floats{y}, Doubles{1 + each * 0.5 * (1 + erf(each / sqrt(2.)))}, 1e-6);
  }
}

void refusals() {
  now("refusals");
  const float one = 1;
  float y;
  const regard_dense dense{1, 1, &one, nullptr}, wide{2, 1, &one, nullptr};
  const regard_residual around{1, &one, 1, &y, {1, 1e-3f, nullptr, nullptr}, nullptr};
  const regard_residual_feed_forward_args right{sizeof right, 1, 1, around, {}, dense, dense};
  auto a = right;
  a.threads = 0;
  must("no threads", regard_residual_feed_forward(&a), REGARD_BAD_ARGUMENT);
  a = right;
  a.down = wide;
  must("wide output", regard_residual_feed_forward(&a), REGARD_BAD_ARGUMENT);
  a = right;
  a.gate = wide;
  must("wide gate", regard_residual_feed_forward(&a), REGARD_BAD_ARGUMENT);
  a = right;
  a.size = 8;
  must("another version", regard_residual_feed_forward(&a), REGARD_WRONG_SIZE);
  regard_residual_attention_args b{sizeof b, 1, 1, 1, nullptr, nullptr, 1, 1, 1.f, around, dense, dense, dense, dense};
  b.heads = 2;
  must("heads that do not divide", regard_residual_attention(&b), REGARD_BAD_ARGUMENT);
  b.heads = 1;
  b.key = wide;
  must("keys wider than queries", regard_residual_attention(&b), REGARD_BAD_ARGUMENT);
  b.key = dense;
  b.batch = 2;
  for (const auto& borders : {std::array<int64_t, 3>{1, 1, 1}, {0, 1, 0}, {0, 0, 2}}) {
    b.borders = borders.data();
    must("borders out of order", regard_residual_attention(&b), REGARD_BAD_ARGUMENT);
  }
  const std::array<int64_t, 3> borders{0, 0, 1};
  b.borders = borders.data();
  b.key_bias = &one;
  must("biased keys in sequences of unequal lengths", regard_residual_attention(&b), REGARD_BAD_ARGUMENT);
}

}  // namespace

int main() {
  refusals();
  return on_every_instruction_set([] {
    every_size();
    far_numbers();
  });
}
