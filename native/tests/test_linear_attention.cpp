// Linear attention against a loop over tokens in double, forward and backward, with every feature map.

#include "regard_recurrence.h"
#include "testing.h"

namespace {

struct Case {
  int64_t map, normalize, batch, heads, groups, tokens, keys, values, threads;
};

regard_sequence sequence(Floats& x, int64_t heads, int64_t tokens, int64_t width) {
  return {x.empty() ? nullptr : x.data(), REGARD_FLOAT32, heads, heads * tokens * width, tokens * width, width};
}

double phi(int64_t map, double x) {
  switch (map) {
    case REGARD_FEATURES_ELU: return x > 0 ? x + 1 : exp(x);
    case REGARD_FEATURES_RELU: return x > 0 ? x : 0;
    case REGARD_FEATURES_RELU_SQUARED: return x > 0 ? x * x : 0;
    case REGARD_FEATURES_SIGMOID: return 1 / (1 + exp(-x));
    case REGARD_FEATURES_EXP: return exp(x);
    case REGARD_FEATURES_SILU: return x / (1 + exp(-x));
    default: return x;
  }
}

double slope(int64_t map, double x) {
  const double s = 1 / (1 + exp(-x));
  switch (map) {
    case REGARD_FEATURES_ELU: return x > 0 ? 1 : exp(x);
    case REGARD_FEATURES_RELU: return x > 0;
    case REGARD_FEATURES_RELU_SQUARED: return x > 0 ? 2 * x : 0;
    case REGARD_FEATURES_SIGMOID: return s * (1 - s);
    case REGARD_FEATURES_EXP: return exp(x);
    case REGARD_FEATURES_SILU: return s * (1 + x * (1 - s));
    default: return 1;
  }
}

void run(const Case& c) {
  now("map %d, normalize %d, batch %d, heads %d, groups %d, tokens %d, keys %d, values %d", int(c.map), int(c.normalize),
      int(c.batch), int(c.heads), int(c.groups), int(c.tokens), int(c.keys), int(c.values));
  const int64_t every = 32, kept = c.tokens == 0 ? 0 : (c.tokens - 1) / every, columns = c.values + c.normalize,
                matrix = c.keys * columns, rows = c.batch * c.heads * c.tokens, shared = c.batch * c.groups * c.tokens,
                states = c.batch * c.heads * matrix;
  const float scale = 0.7f, eps = 1e-3f, shift = 0.05f;
  Floats q = numbers(shared * c.keys), k = numbers(shared * c.keys), v = numbers(rows * c.values), state = numbers(states),
         grad_o = numbers(rows * c.values), grad_final = numbers(states);
  for (float& x : state) x = fabsf(x);  // so that denominators do not vanish
  std::vector<int64_t> valid(c.batch);
  for (int64_t b = 0; b < c.batch; ++b) valid[b] = b % 2 == 0 ? c.tokens : c.tokens / 3;
  Floats o(rows * c.values), final_state(states), checkpoints(c.batch * c.heads * kept * matrix), inverse(rows);
  Floats grad_q(q.size()), grad_k(k.size()), grad_v(v.size()), grad_state(states);

  regard_linear_attention_args forward = {};
  forward.size = sizeof forward;
  regard_gated_recurrence_args& f = forward.recurrence;
  f.threads = c.threads;
  f.batch = c.batch;
  f.heads = c.heads;
  f.tokens = c.tokens;
  f.key_width = c.keys;
  f.value_width = c.values;
  f.inclusive = 1;
  f.checkpoint_every = every;
  f.q = sequence(q, c.groups, c.tokens, c.keys);
  f.k = sequence(k, c.groups, c.tokens, c.keys);
  f.v = sequence(v, c.heads, c.tokens, c.values);
  f.state = state.data();
  f.o = sequence(o, c.heads, c.tokens, c.values);
  f.final_state = final_state.data();
  f.checkpoints = checkpoints.data();
  forward.options = {c.map, c.normalize, scale, eps, shift, valid.data(), inverse.data()};
  regard_linear_attention_backward_args backward = {};
  backward.size = sizeof backward;
  backward.options = forward.options;
  regard_gated_recurrence_backward_args& g = backward.recurrence;
  g.threads = c.threads;
  g.batch = c.batch;
  g.heads = c.heads;
  g.tokens = c.tokens;
  g.key_width = c.keys;
  g.value_width = c.values;
  g.inclusive = 1;
  g.checkpoint_every = every;
  g.q = f.q;
  g.k = f.k;
  g.v = f.v;
  g.state = state.data();
  g.checkpoints = checkpoints.data();
  g.grad_o = sequence(grad_o, c.heads, c.tokens, c.values);
  g.grad_final_state = grad_final.data();
  g.grad_q = sequence(grad_q, c.groups, c.tokens, c.keys);
  g.grad_k = sequence(grad_k, c.groups, c.tokens, c.keys);
  g.grad_v = sequence(grad_v, c.heads, c.tokens, c.values);
  g.grad_state = grad_state.data();
  must("forward", regard_linear_attention(&forward));
  must("backward", regard_linear_attention_backward(&backward));

  Doubles o_(o.size()), final_(states), grad_q_(q.size()), grad_k_(k.size()), grad_v_(v.size()), grad_state_(states);
  for (int64_t head = 0; head < c.batch * c.heads; ++head) {
    const int64_t own = head / c.heads * c.groups + head % c.heads / (c.heads / c.groups), b = head / c.heads;
    const float *qh = q.data() + own * c.tokens * c.keys, *kh = k.data() + own * c.tokens * c.keys;
    auto query = [&](int64_t t, int64_t d) { return phi(c.map, double(scale) * qh[t * c.keys + d]) + double(shift); };
    auto key = [&](int64_t t, int64_t d) { return t < valid[b] ? phi(c.map, kh[t * c.keys + d]) + double(shift) : 0.; };
    // values with a column of ones
    auto value = [&](int64_t t, int64_t e) {
      return e < c.values ? double(v[(head * c.tokens + t) * c.values + e]) : 1.;
    };
    Doubles s(state.data() + head * matrix, state.data() + (head + 1) * matrix);
    Doubles grad_read(c.tokens * columns);
    std::vector<Doubles> states_after;
    for (int64_t t = 0; t < c.tokens; ++t) {
      Doubles read(columns);
      for (int64_t d = 0; d < c.keys; ++d) {
        const double kd = key(t, d), qd = query(t, d);
        for (int64_t e = 0; e < columns; ++e) {
          s[d * columns + e] += kd * value(t, e);
          read[e] += qd * s[d * columns + e];
        }
      }
      states_after.push_back(s);
      const double denominator = c.normalize ? read[c.values] + eps : 1;
      double* grad = grad_read.data() + t * columns;
      for (int64_t e = 0; e < c.values; ++e) {
        const int64_t at = (head * c.tokens + t) * c.values + e;
        o_[at] = read[e] / denominator;
        grad[e] = grad_o[at] / denominator;
        if (c.normalize) grad[c.values] -= grad[e] * o_[at];
      }
    }
    for (int64_t i = 0; i < matrix; ++i) final_[head * matrix + i] = s[i];
    Doubles r(grad_final.data() + head * matrix, grad_final.data() + (head + 1) * matrix);
    for (int64_t t = c.tokens - 1; t >= 0; --t)
      for (int64_t d = 0; d < c.keys; ++d) {
        const double kd = key(t, d), qd = query(t, d);
        double of_query = 0, of_key = 0;
        for (int64_t e = 0; e < columns; ++e) {
          of_query += states_after[t][d * columns + e] * grad_read[t * columns + e];
          r[d * columns + e] += qd * grad_read[t * columns + e];
          of_key += r[d * columns + e] * value(t, e);
          if (e < c.values) grad_v_[(head * c.tokens + t) * c.values + e] += kd * r[d * columns + e];
        }
        const int64_t at = (own * c.tokens + t) * c.keys + d;
        grad_q_[at] += of_query * scale * slope(c.map, double(scale) * qh[t * c.keys + d]);
        if (t < valid[b]) grad_k_[at] += of_key * slope(c.map, kh[t * c.keys + d]);
      }
    for (int64_t i = 0; i < matrix; ++i) grad_state_[head * matrix + i] = r[i];
  }
  compare("o", o, o_, 2e-6);
  compare("final state", final_state, final_, 2e-6);
  compare("grad q", grad_q, grad_q_, 2e-6);
  compare("grad k", grad_k, grad_k_, 2e-6);
  compare("grad v", grad_v, grad_v_, 2e-6);
  compare("grad state", grad_state, grad_state_, 2e-6);
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int64_t map = REGARD_FEATURES_IDENTITY; map <= REGARD_FEATURES_SILU; ++map) {
      const int64_t normalize = map != REGARD_FEATURES_IDENTITY && map != REGARD_FEATURES_SILU;
      run({map, normalize, 1, 2, 2, 0, 8, 8, 1});
      run({map, normalize, 2, 2, 1, 1, 5, 3, 2});
      run({map, normalize, 1, 1, 1, 33, 17, 70, 2});
      run({map, normalize, 2, 4, 2, 75, 16, 24, 2});
      run({map, 0, 2, 2, 2, 64, 32, 33, 1});
    }
  });
}
