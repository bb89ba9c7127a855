// Conserved flows against plain loops in double, and their gradients against differences of those loops.

#include "regard_conserved_flows.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

int failures = 0;
unsigned seed = 1;

float uniform() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(seed >> 8) / (1 << 24);
}

std::vector<float> numbers(int64_t count, float low) {
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = low + uniform();
  return x;
}

constexpr double EPS = 1e-2, LOW = -0.6, HIGH = 1.4, TEMPERATURE = 0.7, MAXIMUM = 0.3;
constexpr int64_t LENGTH = 3;

// Competition, acceptance, sums and normaliser of one head. `in` holds sinks, sources, sums and normaliser.
// The normaliser is relative to the largest logit, or to `constant`.
std::vector<double> head(int64_t n, int64_t d, int64_t valid, const std::vector<double>& in, double constant = NAN) {
  const double *x = in.data(), *y = x + n * d;
  std::vector<double> totals(in.end() - 4 * d - 1, in.end() - 1), found(static_cast<size_t>(2 * n));
  double *Y = totals.data(), *X = Y + d, *kept_y = X + d, *kept_x = kept_y + d;
  double normalizer = in.back();  // of exp(l - MAXIMUM), whatever comes
  double largest = MAXIMUM;
  const auto flow = [&](const double* a, const double* b) {
    double total = 0;
    for (int64_t c = 0; c < d; ++c) total += (a[c] + EPS) * (b[c] + EPS);
    return total;
  };
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t c = 0; c < d; ++c) X[c] += x[t * d + c], Y[c] += y[t * d + c];
    const double incoming = flow(x + t * d, Y), outgoing = flow(y + t * d, X);
    const double count = static_cast<double>(LENGTH + t + 1);
    for (int64_t c = 0; c < d; ++c)
      kept_x[c] += x[t * d + c] * count / incoming, kept_y[c] += y[t * d + c] * count / outgoing;
    const double each = flow(y + t * d, kept_x) / count;
    const double logit = std::fmin(std::fmax(each, LOW), HIGH) / TEMPERATURE;
    const double weight = t < valid ? std::exp(logit - MAXIMUM) : 0;
    if (t < valid) largest = std::fmax(largest, logit);
    normalizer += weight;
    found[static_cast<size_t>(t)] = count * weight / normalizer;
    found[static_cast<size_t>(n + t)] = 1 / (1 + std::exp(-flow(x + t * d, kept_y) / count)) / incoming;
  }
  found.insert(found.end(), totals.begin(), totals.end());
  found.push_back(normalizer * std::exp(MAXIMUM - (constant == constant ? constant : largest)));
  return found;
}

void compare(const char* what, double found, double expected, double scale) {
  if (std::fabs(found - expected) <= 1e-4 * scale) return;
  std::printf("%s: %g, not %g (%s)\n", what, found, expected, regard_instruction_set());
  ++failures;
}

void append(std::vector<double>& to, const std::vector<float>& from, int64_t begin, int64_t count) {
  to.insert(to.end(), from.begin() + begin, from.begin() + begin + count);
}

void check(int64_t heads, int64_t n, int64_t d, int64_t valid, int threads) {
  auto x = numbers(heads * n * d, 0.1f), y = numbers(heads * n * d, 0.1f), totals = numbers(4 * heads * d, 0);
  auto grad_competition = numbers(heads * n, -0.5f), grad_acceptance = numbers(heads * n, -0.5f);
  auto grad_totals = numbers(4 * heads * d, -0.5f), grad_normalizer = numbers(heads, -0.5f), normalizer = numbers(heads, 0.5f);
  const std::vector<float> maximum(static_cast<size_t>(heads), static_cast<float>(MAXIMUM));
  std::vector<float> competition(grad_competition.size(), NAN), acceptance(competition), flows(4 * competition.size(), NAN),
      totals_out(totals.size(), NAN), maximum_out(normalizer.size(), NAN), normalizer_out(maximum_out), grad_x(x.size(), NAN),
      grad_y(grad_x), before(totals_out), before_maximum(maximum_out), before_normalizer(maximum_out);
  const int64_t length = LENGTH;
  regard_conserved_flows_args args = {};
  args.size = sizeof args;
  args.threads = threads;
  args.batch = 1, args.heads = heads, args.n = n, args.width = d;
  args.sinks = x.data(), args.sources = y.data();
  const int64_t strides[3] = {heads * n * d, n * d, d};
  for (int i = 0; i < 3; ++i) args.sinks_strides[i] = args.sources_strides[i] = strides[i];
  args.lengths = &length;
  args.valid = &valid;
  args.compete = args.allocate = 1;
  args.eps = static_cast<float>(EPS), args.low = static_cast<float>(LOW), args.high = static_cast<float>(HIGH);
  args.temperature = static_cast<float>(TEMPERATURE);
  args.totals = totals.data(), args.maximum = maximum.data(), args.normalizer = normalizer.data();
  args.competition = competition.data(), args.acceptance = acceptance.data(), args.flows = flows.data();
  args.totals_out = totals_out.data(), args.maximum_out = maximum_out.data(), args.normalizer_out = normalizer_out.data();
  regard_conserved_flows_backward_args back = {};
  back.size = sizeof back;
  back.forward = &args;
  back.grad_competition = grad_competition.data(), back.grad_acceptance = grad_acceptance.data();
  back.grad_totals_out = grad_totals.data(), back.grad_normalizer_out = grad_normalizer.data();
  back.grad_sinks = grad_x.data(), back.grad_sources = grad_y.data(), back.grad_totals = before.data();
  back.grad_maximum = before_maximum.data(), back.grad_normalizer = before_normalizer.data();
  if (regard_conserved_flows(&args) != REGARD_OK || regard_conserved_flows_backward(&back) != REGARD_OK)
    std::printf("refused\n"), ++failures;
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> in, cotangent, found, gradients;
    append(in, x, h * n * d, n * d);
    append(in, y, h * n * d, n * d);
    append(gradients, grad_x, h * n * d, n * d);
    append(gradients, grad_y, h * n * d, n * d);
    append(cotangent, grad_competition, h * n, n);
    append(cotangent, grad_acceptance, h * n, n);
    append(found, competition, h * n, n);
    append(found, acceptance, h * n, n);
    for (int64_t i = 0; i < 4; ++i) {
      append(in, totals, (i * heads + h) * d, d);
      append(gradients, before, (i * heads + h) * d, d);
      append(cotangent, grad_totals, (i * heads + h) * d, d);
      append(found, totals_out, (i * heads + h) * d, d);
    }
    append(in, normalizer, h, 1);
    append(gradients, before_normalizer, h, 1);
    append(found, normalizer_out, h, 1);
    append(cotangent, grad_normalizer, h, 1);
    const auto expected = head(n, d, valid, in);
    for (size_t i = 0; i < expected.size(); ++i) compare("output", found[i], expected[i], std::fmax(1, std::fabs(expected[i])));
    const auto loss = [&] {
      const auto all = head(n, d, valid, in, maximum_out[static_cast<size_t>(h)]);
      double total = 0;
      for (size_t i = 0; i < all.size(); ++i) total += all[i] * cotangent[i];
      return total;
    };
    std::vector<double> differences(in.size());
    double largest = 1;
    for (size_t i = 0; i < in.size(); ++i) {
      const double kept = in[i], step = 1e-6;
      in[i] = kept + step;
      const double above = loss();
      in[i] = kept - step;
      differences[i] = (above - loss()) / (2 * step);
      in[i] = kept;
      largest = std::fmax(largest, std::fabs(differences[i]));
    }
    for (size_t i = 0; i < in.size(); ++i) compare("gradient", gradients[i], differences[i], largest);
  }
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
      check(1, 1, 1, 1, threads);
      check(2, 35, 5, 33, threads);
      check(1, 7, 69, 7, threads);
      check(1, 0, 3, 0, threads);
    }
  }
  if (failures == 0) std::printf("conserved flows: all equal\n");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
