// Conserved flows against plain loops in double, and their gradients against finite differences of those loops.

#include "regard_conserved_flows.h"
#include "testing.h"

namespace {

constexpr double EPS = 1e-2, LOW = -0.6, HIGH = 1.4, TEMPERATURE = 0.7, MAXIMUM = 0.3;
constexpr int64_t LENGTH = 3;

// Competition, acceptance, sums and normaliser of one head. `in` holds sinks, sources, sums and normaliser.
// The normaliser is relative to the largest logit, or to `constant`.
Doubles head(int64_t n, int64_t d, int64_t valid, const Doubles& in, double constant = NAN) {
  const double *x = in.data(), *y = x + n * d;
  Doubles totals(in.end() - 4 * d - 1, in.end() - 1), found(2 * n);
  double *Y = totals.data(), *X = Y + d, *kept_y = X + d, *kept_x = kept_y + d;
  double normalizer = in.back();  // sum of exp(l - MAXIMUM)
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
    const double logit = fmin(fmax(each, LOW), HIGH) / TEMPERATURE;
    const double weight = t < valid ? exp(logit - MAXIMUM) : 0;
    if (t < valid) largest = fmax(largest, logit);
    normalizer += weight;
    found[t] = count * weight / normalizer;
    found[n + t] = 1 / (1 + exp(-flow(x + t * d, kept_y) / count)) / incoming;
  }
  found.insert(found.end(), totals.begin(), totals.end());
  found.push_back(normalizer * exp(MAXIMUM - (constant == constant ? constant : largest)));
  return found;
}

void append(Doubles& to, const Floats& from, int64_t begin, int64_t count) {
  to.insert(to.end(), from.begin() + begin, from.begin() + begin + count);
}

void check(int64_t heads, int64_t n, int64_t d, int64_t valid, int threads) {
  now("heads %d, n %d, width %d, threads %d", int(heads), int(n), int(d), threads);
  Floats x = numbers(heads * n * d, 0.1f, 1.1f), y = numbers(heads * n * d, 0.1f, 1.1f), totals = numbers(4 * heads * d, 0);
  Floats grad_competition = numbers(heads * n, -0.5f, 0.5f), grad_acceptance = numbers(heads * n, -0.5f, 0.5f);
  Floats grad_totals = numbers(4 * heads * d, -0.5f, 0.5f), grad_normalizer = numbers(heads, -0.5f, 0.5f);
  Floats maximum(heads, static_cast<float>(MAXIMUM)), normalizer = numbers(heads, 0.5f, 1.5f);
  Floats competition = unwritten(heads * n), acceptance = unwritten(heads * n), flows = unwritten(4 * heads * n);
  Floats totals_out = unwritten(totals.size()), maximum_out = unwritten(heads), normalizer_out = unwritten(heads);
  Floats grad_x = unwritten(x.size()), grad_y = unwritten(y.size()), before = unwritten(totals.size());
  Floats before_maximum = unwritten(heads), before_normalizer = unwritten(heads);
  const int64_t length = LENGTH;
  regard_conserved_flows_args args = {};
  args.size = sizeof args;
  args.threads = threads;
  args.batch = 1, args.heads = heads, args.n = n, args.width = d;
  args.sinks = x.data(), args.sources = y.data();
  strides(args.sinks_strides, heads, n, d), strides(args.sources_strides, heads, n, d);
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
  must("forward", regard_conserved_flows(&args));
  must("backward", regard_conserved_flows_backward(&back));
  for (int64_t h = 0; h < heads; ++h) {
    Doubles in, cotangent, found, gradients;
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
    compare("output", found, head(n, d, valid, in), 3e-6, 1);
    const auto loss = [&](const Doubles& at) {
      const Doubles all = head(n, d, valid, at, maximum_out[h]);
      double total = 0;
      for (size_t i = 0; i < all.size(); ++i) total += all[i] * cotangent[i];
      return total;
    };
    compare("gradient", gradients, slope(loss, in, 1e-6), 1e-4, 1);
  }
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int threads : {1, 3}) {
      check(1, 1, 1, 1, threads);
      check(2, 35, 5, 33, threads);
      check(1, 7, 69, 7, threads);
      check(1, 0, 3, 0, threads);
    }
  });
}
