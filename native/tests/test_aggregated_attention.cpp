// Aggregated attention against plain loops in double, and its gradients along a random direction against finite
// differences of the same loops.

#include "regard_aggregated_attention.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  size_t heads, width, rows, columns, factor, window;
  bool half;
  int64_t threads;
};

const size_t B = 2;

// In the order of `Inputs`.
enum { Q, K, V, FAR_K, FAR_V, MOVED, SLOPE, NEAR_BIAS, NEAR_TOKENS, NEAR_WEIGHTS, TABLE, INPUTS };
const char* const NAMES[] = {"gradient of q", "gradient of k", "gradient of v", "gradient of far k", "gradient of far v",
                             "gradient of moved", "gradient of slope", "gradient of near bias", "gradient of near tokens",
                             "gradient of near weights", "gradient of the table"};
using Inputs = std::vector<Doubles>;

Doubles direction(const double* x, size_t width) {
  double squares = 0;
  for (size_t d = 0; d < width; ++d) squares += x[d] * x[d];
  Doubles found(x, x + width);
  for (double& each : found) each /= fmax(sqrt(squares), 1e-12);
  return found;
}

Doubles attend(const Case& c, const Inputs& x) {
  const size_t H = c.heads, D = c.width, N = c.rows * c.columns, A = c.rows / c.factor, Z = c.columns / c.factor, M = A * Z;
  const size_t P = c.window * c.window, border = c.window / 2;
  Doubles out(B * H * N * D);
  for (size_t pair = 0; pair < B * H; ++pair)
    for (size_t i = 0; i < N; ++i) {
      const size_t h = pair % H, row = i / c.columns, column = i % c.columns;
      const Doubles query = direction(&x[Q][(pair * N + i) * D], D);
      Doubles scores, more;
      std::vector<const double*> values;
      const auto see = [&](const double* key, const double* value, double bias, double weight) {
        const Doubles there = direction(key, D);
        double score = 0;
        for (size_t d = 0; d < D; ++d) score += (query[d] + x[MOVED][h * D + d]) * there[d];
        scores.push_back(score * x[SLOPE][h]);
        scores.push_back(bias);
        more.push_back(weight);
        values.push_back(value);
      };
      for (size_t place = 0; place < P; ++place) {
        const size_t y = row + place / c.window - border, z = column + place % c.window - border;  // wraps below 0
        if (y >= c.rows || z >= c.columns) continue;
        const size_t j = (pair * N + y * c.columns + z) * D;
        double weight = x[NEAR_WEIGHTS][h * P + place];
        for (size_t d = 0; d < D; ++d) weight += query[d] * x[NEAR_TOKENS][(h * D + d) * P + place];
        see(&x[K][j], &x[V][j], x[NEAR_BIAS][h * P + place], weight);
      }
      for (size_t j = 0; j < M; ++j) {
        const size_t down = row + c.rows - c.factor - c.factor * (j / Z),
                     across = column + c.columns - c.factor - c.factor * (j % Z);
        const size_t at = (h * (2 * c.rows - c.factor) + down) * (2 * c.columns - c.factor) + across;
        see(&x[FAR_K][(pair * M + j) * D], &x[FAR_V][(pair * M + j) * D], x[TABLE][at], 0);
      }
      double total = 0;
      Doubles weights;
      for (size_t j = 0; j < values.size(); ++j) {
        weights.push_back(exp(scores[2 * j] * log(static_cast<double>(values.size())) + scores[2 * j + 1]));
        total += weights[j];
      }
      for (size_t j = 0; j < values.size(); ++j)
        for (size_t d = 0; d < D; ++d) out[(pair * N + i) * D + d] += (weights[j] / total + more[j]) * values[j][d];
    }
  return out;
}

void check(const Case& c) {
  now("%s", c.name);
  const size_t H = c.heads, D = c.width, N = c.rows * c.columns, M = N / c.factor / c.factor, P = c.window * c.window;
  const size_t table = N == 0 ? 0 : H * (2 * c.rows - c.factor) * (2 * c.columns - c.factor);
  const size_t near = B * H * N * D, far = B * H * M * D;
  const size_t sizes[INPUTS] = {near, near, near, far, far, H * D, H, H * P, H * D * P, H * P, table};
  std::vector<Tensor> given, grads;
  Inputs x;
  for (int i = 0; i < INPUTS; ++i) {
    const bool half = c.half && i < MOVED;
    given.emplace_back(numbers(sizes[i], -1.5f, 1.5f), half);
    grads.emplace_back(sizes[i], half);
    Doubles exact;
    for (size_t j = 0; j < sizes[i]; ++j) exact.push_back(given[i][j]);
    x.push_back(exact);
  }
  Tensor out(sizes[Q], c.half), grad_out(numbers(sizes[Q]), c.half);
  Floats lse = unwritten(B * H * N);
  regard_aggregated_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = given[Q].data(), a.k = given[K].data(), a.v = given[V].data();
  a.far_k = given[FAR_K].data(), a.far_v = given[FAR_V].data(), a.out = out.data(), a.lse = lse.data();
  a.batch = B, a.heads = H, a.width = D, a.rows = c.rows, a.columns = c.columns, a.factor = c.factor, a.window = c.window;
  for (int64_t* each : {a.q_strides, a.k_strides, a.v_strides, a.out_strides}) strides(each, H, N, D);
  for (int64_t* each : {a.far_k_strides, a.far_v_strides}) strides(each, H, M, D);
  const auto floats = [](Tensor& from) { return static_cast<float*>(from.data()); };
  a.moved = floats(given[MOVED]), a.slope = floats(given[SLOPE]), a.near_bias = floats(given[NEAR_BIAS]);
  a.near_tokens = floats(given[NEAR_TOKENS]), a.near_weights = floats(given[NEAR_WEIGHTS]), a.table = floats(given[TABLE]);
  must("forward", regard_aggregated_attention(&a));
  const double tolerance = c.half ? 8e-3 : 2e-5;
  compare("output", out, attend(c, x), tolerance, 1);

  regard_aggregated_attention_backward_args back{};
  back.size = sizeof back;
  back.forward = &a;
  back.grad_out = grad_out.data();
  strides(back.grad_out_strides, H, N, D);
  back.grad_q = grads[Q].data(), back.grad_k = grads[K].data(), back.grad_v = grads[V].data();
  back.grad_far_k = grads[FAR_K].data(), back.grad_far_v = grads[FAR_V].data();
  for (int64_t* each : {back.grad_q_strides, back.grad_k_strides, back.grad_v_strides}) strides(each, H, N, D);
  for (int64_t* each : {back.grad_far_k_strides, back.grad_far_v_strides}) strides(each, H, M, D);
  back.grad_moved = floats(grads[MOVED]), back.grad_slope = floats(grads[SLOPE]);
  back.grad_near_bias = floats(grads[NEAR_BIAS]), back.grad_near_tokens = floats(grads[NEAR_TOKENS]);
  back.grad_near_weights = floats(grads[NEAR_WEIGHTS]), back.grad_table = floats(grads[TABLE]);
  if (N == 0) return must("backward of nothing", regard_aggregated_attention_backward(&back), REGARD_BAD_ARGUMENT);
  must("backward", regard_aggregated_attention_backward(&back));
  for (int i = 0; i < INPUTS; ++i) {
    const Floats along = normal(sizes[i]);
    const auto loss = [&](const Doubles& step) {
      Inputs changed = x;
      for (size_t j = 0; j < sizes[i]; ++j) changed[i][j] += step[0] * along[j];
      const Doubles found = attend(c, changed);
      double total = 0;
      for (size_t j = 0; j < found.size(); ++j) total += grad_out[j] * found[j];
      return total;
    };
    double found = 0, squares = 0;
    for (size_t j = 0; j < sizes[i]; ++j) {
      found += grads[i][j] * along[j];
      squares += grads[i][j] * grads[i][j];
    }
    compare(NAMES[i], Doubles{found}, slope(loss, Doubles{0}), tolerance, fmax(1, sqrt(squares)));
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {"one place", 1, 1, 1, 1, 1, 1, false, 1},
      {"window beyond the map", 1, 3, 2, 4, 2, 5, false, 2},
      {"some rows a block", 2, 5, 10, 4, 2, 3, false, 3},
      {"more than a block to a row", 1, 1, 1, 66, 1, 3, false, 2},
      {"bfloat16", 2, 5, 3, 6, 3, 3, true, 2},
      {"nothing", 2, 5, 0, 6, 3, 3, false, 2},
  };
  regard_aggregated_attention_args uneven{};
  uneven.size = sizeof uneven;
  uneven.width = 1, uneven.rows = 3, uneven.columns = 4, uneven.factor = 2, uneven.window = 3;
  return on_every_instruction_set([&] {
    for (const Case& c : cases) check(c);
    must("uneven squares", regard_aggregated_attention(&uneven), REGARD_BAD_ARGUMENT);
  });
}
