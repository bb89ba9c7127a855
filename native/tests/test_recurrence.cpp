// The gated recurrence against a loop over tokens in double, forward and backward, and one step of it.

#include "regard_recurrence.h"
#include "testing.h"

namespace {

Floats gates(size_t count) {
  Floats g(count);
  for (float& y : g) {
    const float kind = uniform();
    y = kind > 0.9f ? -INFINITY : kind > 0.8f ? -50.f : kind > 0.5f ? 0.f : 2 * kind - 1;
  }
  return g;
}

struct Case {
  int64_t batch, heads, groups, tokens, keys, values, decay, inclusive, threads;
};

regard_sequence sequence(Floats& x, int64_t heads, int64_t tokens, int64_t width) {
  return {x.empty() ? nullptr : x.data(), REGARD_FLOAT32, heads, heads * tokens * width, tokens * width, width};
}

void run(const Case& c) {
  now("batch %d, heads %d, groups %d, tokens %d, keys %d, values %d, decay %d, inclusive %d", int(c.batch), int(c.heads),
      int(c.groups), int(c.tokens), int(c.keys), int(c.values), int(c.decay), int(c.inclusive));
  const int64_t every = 32, kept = c.tokens == 0 ? 0 : (c.tokens - 1) / every, matrix = c.keys * c.values;
  const int64_t gate = c.decay == REGARD_DECAY_VECTOR ? c.keys : 1, rows = c.batch * c.heads * c.tokens,
                shared = c.batch * c.groups * c.tokens, states = c.batch * c.heads * matrix;
  Floats q = numbers(shared * c.keys), k = numbers(shared * c.keys), v = numbers(rows * c.values),
         g = gates(c.decay ? rows * gate : 0), state = numbers(states), grad_o = numbers(rows * c.values),
         grad_final = numbers(states);
  Floats o(rows * c.values), final_state(states), checkpoints(c.batch * c.heads * kept * matrix);
  Floats grad_q(q.size()), grad_k(k.size()), grad_v(v.size()), grad_g(g.size()), grad_state(states);

  regard_gated_recurrence_args forward = {};
  forward.size = sizeof forward;
  forward.threads = c.threads;
  forward.batch = c.batch;
  forward.heads = c.heads;
  forward.tokens = c.tokens;
  forward.key_width = c.keys;
  forward.value_width = c.values;
  forward.decay = c.decay;
  forward.inclusive = c.inclusive;
  forward.checkpoint_every = every;
  forward.q = sequence(q, c.groups, c.tokens, c.keys);
  forward.k = sequence(k, c.groups, c.tokens, c.keys);
  forward.v = sequence(v, c.heads, c.tokens, c.values);
  forward.g = sequence(g, c.heads, c.tokens, gate);
  forward.state = state.data();
  forward.o = sequence(o, c.heads, c.tokens, c.values);
  forward.final_state = final_state.data();
  forward.checkpoints = checkpoints.data();
  regard_gated_recurrence_backward_args backward = {};
  backward.size = sizeof backward;
  backward.threads = c.threads;
  backward.batch = c.batch;
  backward.heads = c.heads;
  backward.tokens = c.tokens;
  backward.key_width = c.keys;
  backward.value_width = c.values;
  backward.decay = c.decay;
  backward.inclusive = c.inclusive;
  backward.checkpoint_every = every;
  backward.q = forward.q;
  backward.k = forward.k;
  backward.v = forward.v;
  backward.g = forward.g;
  backward.state = state.data();
  backward.checkpoints = checkpoints.data();
  backward.grad_o = sequence(grad_o, c.heads, c.tokens, c.values);
  backward.grad_final_state = grad_final.data();
  backward.grad_q = sequence(grad_q, c.groups, c.tokens, c.keys);
  backward.grad_k = sequence(grad_k, c.groups, c.tokens, c.keys);
  backward.grad_v = sequence(grad_v, c.heads, c.tokens, c.values);
  backward.grad_g = sequence(grad_g, c.heads, c.tokens, gate);
  backward.grad_state = grad_state.data();
  must("forward", regard_gated_recurrence(&forward));
  must("backward", regard_gated_recurrence_backward(&backward));

  Doubles o_(o.size()), final_(states), grad_q_(q.size()), grad_k_(k.size()), grad_v_(v.size()), grad_g_(g.size()),
      grad_state_(states);
  for (int64_t head = 0; head < c.batch * c.heads; ++head) {
    const int64_t own = head / c.heads * c.groups + head % c.heads / (c.heads / c.groups);
    const float *qh = q.data() + own * c.tokens * c.keys, *kh = k.data() + own * c.tokens * c.keys,
                *vh = v.data() + head * c.tokens * c.values, *doh = grad_o.data() + head * c.tokens * c.values;
    auto decay = [&](int64_t t, int64_t d) {
      return c.decay == 0 ? 1. : exp(double(g[(head * c.tokens + t) * gate + (gate == 1 ? 0 : d)]));
    };
    Doubles s(state.data() + head * matrix, state.data() + (head + 1) * matrix);
    std::vector<Doubles> before;  // decayed, not yet written
    for (int64_t t = 0; t < c.tokens; ++t) {
      for (int64_t d = 0; d < c.keys; ++d) {
        const double kept = decay(t, d);
        for (int64_t e = 0; e < c.values; ++e) s[d * c.values + e] *= kept;
      }
      before.push_back(s);
      for (int64_t d = 0; d < c.keys; ++d)
        for (int64_t e = 0; e < c.values; ++e) s[d * c.values + e] += double(kh[t * c.keys + d]) * vh[t * c.values + e];
      const Doubles& read = c.inclusive ? s : before.back();
      for (int64_t d = 0; d < c.keys; ++d)
        for (int64_t e = 0; e < c.values; ++e) {
          o_[(head * c.tokens + t) * c.values + e] += read[d * c.values + e] * qh[t * c.keys + d];
          grad_q_[(own * c.tokens + t) * c.keys + d] += read[d * c.values + e] * doh[t * c.values + e];
        }
    }
    for (int64_t i = 0; i < matrix; ++i) final_[head * matrix + i] = s[i];
    Doubles r(grad_final.data() + head * matrix, grad_final.data() + (head + 1) * matrix);  // of the written state
    for (int64_t t = c.tokens - 1; t >= 0; --t) {
      auto reads = [&] {
        for (int64_t d = 0; d < c.keys; ++d)
          for (int64_t e = 0; e < c.values; ++e) r[d * c.values + e] += double(qh[t * c.keys + d]) * doh[t * c.values + e];
      };
      if (c.inclusive) reads();
      for (int64_t d = 0; d < c.keys; ++d)
        for (int64_t e = 0; e < c.values; ++e) {
          grad_k_[(own * c.tokens + t) * c.keys + d] += r[d * c.values + e] * vh[t * c.values + e];
          grad_v_[(head * c.tokens + t) * c.values + e] += r[d * c.values + e] * kh[t * c.keys + d];
        }
      if (!c.inclusive) reads();
      for (int64_t d = 0; d < c.keys; ++d) {
        const double kept = decay(t, d);
        for (int64_t e = 0; e < c.values; ++e) {
          if (c.decay != 0)
            grad_g_[(head * c.tokens + t) * gate + (gate == 1 ? 0 : d)] +=
                before[t][d * c.values + e] * r[d * c.values + e];
          r[d * c.values + e] *= kept;
        }
      }
    }
    for (int64_t i = 0; i < matrix; ++i) grad_state_[head * matrix + i] = r[i];
  }
  compare("o", o, o_, 2e-6);
  compare("final state", final_state, final_, 2e-6);
  compare("grad q", grad_q, grad_q_, 2e-6);
  compare("grad k", grad_k, grad_k_, 2e-6);
  compare("grad v", grad_v, grad_v_, 2e-6);
  compare("grad g", grad_g, grad_g_, 2e-6);
  compare("grad state", grad_state, grad_state_, 2e-6);
}

void step(const Case& c, bool correcting) {
  now("batch %d, heads %d, groups %d, keys %d, values %d, decay %d", int(c.batch), int(c.heads), int(c.groups), int(c.keys),
      int(c.values), int(c.decay));
  const int64_t gate = c.decay == REGARD_DECAY_VECTOR ? c.keys : 1, matrix = c.keys * c.values, rows = c.batch * c.heads;
  Floats q = numbers(c.batch * c.groups * c.keys), k = numbers(c.batch * c.groups * c.keys), v = numbers(rows * c.values),
         g = gates(c.decay ? rows * gate : 0), beta = numbers(rows), state = numbers(rows * matrix);
  Floats o(v.size()), new_state(state.size());
  regard_gated_recurrence_step_args args = {};
  args.size = sizeof args;
  args.threads = c.threads;
  args.batch = c.batch;
  args.heads = c.heads;
  args.key_width = c.keys;
  args.value_width = c.values;
  args.decay = c.decay;
  args.q = sequence(q, c.groups, 1, c.keys);
  args.k = sequence(k, c.groups, 1, c.keys);
  args.v = sequence(v, c.heads, 1, c.values);
  args.g = sequence(g, c.heads, 1, gate);
  if (correcting) args.beta = sequence(beta, c.heads, 1, 1);
  args.state = state.data();
  args.o = sequence(o, c.heads, 1, c.values);
  args.new_state = new_state.data();
  must("step", regard_gated_recurrence_step(&args));
  Doubles o_(o.size()), new_(state.size());
  for (int64_t head = 0; head < rows; ++head) {
    const int64_t own = head / c.heads * c.groups + head % c.heads / (c.heads / c.groups);
    Doubles kept(c.keys, 1.);
    for (int64_t d = 0; c.decay != 0 && d < c.keys; ++d) kept[d] = exp(double(g[head * gate + (gate == 1 ? 0 : d)]));
    for (int64_t e = 0; e < c.values; ++e) {
      double u = v[head * c.values + e], found = 0;
      auto decayed = [&](int64_t d) { return state[head * matrix + d * c.values + e] * kept[d]; };
      for (int64_t d = 0; d < c.keys; ++d) found += decayed(d) * k[own * c.keys + d];
      if (correcting) u = beta[head] * (u - found);
      for (int64_t d = 0; d < c.keys; ++d) {
        const double s = decayed(d) + k[own * c.keys + d] * u;
        new_[head * matrix + d * c.values + e] = s;
        o_[head * c.values + e] += s * q[own * c.keys + d];
      }
    }
  }
  compare("step's o", o, o_, 2e-6);
  compare("step's state", new_state, new_, 2e-6);
}

}  // namespace

int main() {
  return on_every_instruction_set([] {
    for (int64_t decay = 0; decay < 3; ++decay)
      for (int64_t inclusive = 0; inclusive < 2; ++inclusive) {
        run({1, 2, 2, 0, 8, 8, decay, inclusive, 1});
        run({2, 2, 1, 1, 5, 3, decay, inclusive, 2});
        run({1, 1, 1, 33, 17, 70, decay, inclusive, 2});
        run({1, 4, 2, 75, 16, 24, decay, inclusive, 2});
        run({1, 2, 2, 64, 32, 33, decay, inclusive, 1});
        step({3, 4, 2, 1, 19, 37, decay, 1, 2}, inclusive);
        step({1, 2, 2, 1, 16, 64, decay, 1, 1}, inclusive);
      }
    if (strcmp(regard_instruction_set(), "baseline") == 0) return;
    step({550, 8, 8, 1, 16, 64, REGARD_DECAY_VECTOR, 1, 2}, false);  // larger than the caches
  });
}
