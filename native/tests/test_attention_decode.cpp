// Decoding attention against a loop in double, in one tensor and in pages. Buffers are as large as they must be and no
// larger, so that a sanitizer sees reads and writes beyond them.

#include "regard_attention.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

namespace {

int failures = 0;
unsigned seed = 1;

double uniform() {
  seed = seed * 1664525u + 1013904223u;
  return (seed >> 8) / 16777216.0 * 2 - 1;
}

struct Case {
  int64_t batch, kv_heads, groups, n, m, width, value_width;
  int bfloat16, threads;
  int64_t left, page;  // -1 for no limit; 0 for no pages
  bool ragged, extras;
};

// Numbers of either type, in exactly the memory that they need.
struct Numbers {
  Numbers(int64_t count, bool half) : half(half), memory(malloc(static_cast<size_t>(count) * (half ? 2 : 4) + !count)) {
    for (int64_t i = 0; i < count; ++i) set(i, static_cast<float>(uniform()));
  }
  ~Numbers() { free(memory); }
  Numbers(const Numbers&) = delete;
  void set(int64_t i, float x) {
    if (half) {
      uint32_t bits;
      memcpy(&bits, &x, 4);
      static_cast<uint16_t*>(memory)[i] = static_cast<uint16_t>(bits >> 16);
    } else {
      static_cast<float*>(memory)[i] = x;
    }
  }
  double get(int64_t i) const {
    if (!half) return static_cast<float*>(memory)[i];
    const uint32_t bits = static_cast<uint32_t>(static_cast<uint16_t*>(memory)[i]) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  bool half;
  void* memory;
};

void run(const Case& c) {
  const int64_t heads = c.kv_heads * c.groups, per_row = c.page ? (c.m + c.page - 1) / c.page : 0;
  const int64_t slots = c.page ? c.page : c.m, held = c.page ? c.batch * per_row : c.batch;
  const bool half = c.bfloat16 != 0;
  Numbers q(c.batch * heads * c.n * c.width, half), k(held * c.kv_heads * slots * c.width, half);
  Numbers v(held * c.kv_heads * slots * c.value_width, half), out(c.batch * heads * c.n * c.value_width, half);
  std::vector<float> lse(static_cast<size_t>(c.batch * heads * c.n));
  std::vector<int64_t> query_ranks(static_cast<size_t>(c.batch * c.n)), key_ranks(static_cast<size_t>(c.batch * c.m));
  std::vector<int64_t> lengths(static_cast<size_t>(c.batch)), pages(static_cast<size_t>(c.batch * per_row));
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t length = c.ragged ? static_cast<int64_t>((uniform() + 1) / 2 * static_cast<double>(c.m)) : c.m;
    lengths[static_cast<size_t>(b)] = length;
    for (int64_t i = 0; i < c.n; ++i) query_ranks[static_cast<size_t>(b * c.n + i)] = length - c.n + i;
    for (int64_t j = 0; j < c.m; ++j) key_ranks[static_cast<size_t>(b * c.m + j)] = j < length ? j : -1;
    for (int64_t p = 0; p < per_row; ++p)  // backwards, and nonsense where the row has no key
      pages[static_cast<size_t>(b * per_row + p)] = p * c.page < length ? (b + 1) * per_row - 1 - p : int64_t{1} << 40;
  }
  std::vector<float> sink(static_cast<size_t>(heads)), bias(static_cast<size_t>(heads * c.m));
  std::vector<float> distance(static_cast<size_t>(c.m + 1));
  for (auto& x : sink) x = static_cast<float>(uniform());
  for (auto& x : bias) x = uniform() > 0.8 ? -INFINITY : static_cast<float>(uniform());
  for (auto& x : distance) x = static_cast<float>(uniform());

  regard_attention_args args{};
  args.size = sizeof args;
  args.threads = c.threads;
  args.dtype = c.bfloat16;
  args.q = q.memory, args.k = k.memory, args.v = v.memory, args.out = out.memory;
  args.lse = lse.data();
  args.batch = c.batch, args.heads = heads, args.kv_heads = c.kv_heads;
  args.n = c.n, args.m = c.m, args.width = c.width, args.value_width = c.value_width;
  const int64_t strides[4][3] = {{heads * c.n * c.width, c.n * c.width, c.width},
                                 {c.kv_heads * slots * c.width, slots * c.width, c.width},
                                 {c.kv_heads * slots * c.value_width, slots * c.value_width, c.value_width},
                                 {heads * c.n * c.value_width, c.n * c.value_width, c.value_width}};
  memcpy(args.q_strides, strides[0], sizeof strides[0]);
  memcpy(args.k_strides, strides[1], sizeof strides[1]);
  memcpy(args.v_strides, strides[2], sizeof strides[2]);
  memcpy(args.out_strides, strides[3], sizeof strides[3]);
  args.scale = 0.5f;
  args.visibility.query_ranks = query_ranks.data();
  args.visibility.query_ranks_stride = c.n;
  args.visibility.causal = 1;
  args.visibility.left = c.left, args.visibility.right = -1;
  if (c.extras) {
    args.softcap = 2;
    args.sink = sink.data();
    args.biases.bias = bias.data();
    args.biases.bias_strides[1] = c.m, args.biases.bias_strides[3] = 1;
    args.biases.distance = distance.data();
    args.biases.distances = c.m + 1, args.biases.distance_zero = c.m;
  }
  regard_attention_decode_args decode{};
  decode.size = sizeof decode;
  decode.forward = &args;
  if (c.page) {
    decode.pages = pages.data();
    decode.pages_stride = per_row;
    decode.page_size = c.page;
    decode.lengths = lengths.data();
  } else {
    args.visibility.key_ranks = key_ranks.data();
    args.visibility.key_ranks_stride = c.m;
  }
  if (regard_attention_decode(&decode) != REGARD_OK) {
    printf("refused\n");
    ++failures;
    return;
  }

  double worst = 0;
  std::vector<double> weights(static_cast<size_t>(c.m)), wanted(static_cast<size_t>(c.value_width));
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < c.n; ++i) {
        const int64_t g = h / c.groups, rank = query_ranks[static_cast<size_t>(b * c.n + i)];
        const auto place = [&](int64_t j) {
          if (!c.page) return (b * c.kv_heads + g) * slots + j;
          const int64_t page = pages[static_cast<size_t>(b * per_row + j / c.page)];
          return (page * c.kv_heads + g) * slots + j % c.page;
        };
        const int64_t query = (b * heads + h) * c.n + i;
        double top = -INFINITY, total = 0;
        for (int64_t j = 0; j < c.m; ++j) {
          double& s = weights[static_cast<size_t>(j)];
          s = -INFINITY;
          if (j >= lengths[static_cast<size_t>(b)] || j > rank || (c.left >= 0 && rank - j > c.left)) continue;
          s = 0;
          for (int64_t p = 0; p < c.width; ++p) s += q.get(query * c.width + p) * k.get(place(j) * c.width + p);
          s *= 0.5;
          if (c.extras)
            s = 2 * tanh(s / 2) + bias[static_cast<size_t>(h * c.m + j)] + distance[static_cast<size_t>(j - rank + c.m)];
          if (s > top) top = s;
        }
        for (double& x : wanted) x = 0;
        for (int64_t j = 0; j < c.m; ++j) {
          const double s = weights[static_cast<size_t>(j)];
          if (s == -INFINITY) continue;
          const double w = exp(s - top);
          total += w;
          for (int64_t p = 0; p < c.value_width; ++p)
            wanted[static_cast<size_t>(p)] += w * v.get(place(j) * c.value_width + p);
        }
        const double found_lse = lse[static_cast<size_t>(query)];
        if (total == 0 ? found_lse != -INFINITY : !(fabs(found_lse - top - log(total)) < 1e-4)) ++failures;
        const double all = total + (c.extras && total > 0 ? exp(sink[static_cast<size_t>(h)] - top) : 0);
        for (int64_t p = 0; p < c.value_width; ++p) {
          const double x = total == 0 ? 0 : wanted[static_cast<size_t>(p)] / all;
          const double error = fabs(out.get(query * c.value_width + p) - x);
          if (!(error <= worst)) worst = error;
        }
      }
  if (!(worst < (half ? 6e-3 : 5e-6))) {
    printf("b%ld g%ld x%ld n%ld m%ld d%ld v%ld: error %g\n", (long)c.batch, (long)c.kv_heads, (long)c.groups, (long)c.n,
           (long)c.m, (long)c.width, (long)c.value_width, worst);
    ++failures;
  }
}

}  // namespace

int main() {
  const char* sets[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  const Case cases[] = {
      {1, 1, 1, 1, 1, 8, 8, 0, 1, -1, 0, false, false},     {1, 2, 1, 1, 513, 64, 64, 0, 2, -1, 0, false, false},
      {3, 2, 3, 1, 300, 7, 33, 0, 3, -1, 0, true, true},    {2, 1, 4, 2, 700, 16, 40, 0, 5, 90, 0, true, false},
      {2, 2, 2, 5, 260, 24, 17, 1, 2, -1, 0, true, true},   {1, 1, 8, 3, 650, 33, 64, 1, 4, -1, 0, false, false},
      {3, 2, 1, 1, 256, 64, 64, 0, 3, -1, 16, true, false}, {2, 1, 2, 2, 200, 20, 9, 1, 2, 50, 24, true, true},
      {2, 1, 20, 1, 333, 16, 16, 0, 2, -1, 5, true, false}, {2, 3, 1, 2, 0, 8, 8, 0, 2, -1, 0, false, false},
  };
  regard_set_poison(1);
  for (const char* set : sets) {
    if (regard_set_instruction_set(set) != REGARD_OK) continue;
    for (const Case& c : cases) run(c);
  }
  if (failures) printf("%d failures\n", failures);
  return failures != 0;
}
