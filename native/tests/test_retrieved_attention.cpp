// Attention to retrieved blocks against plain loops in double: given blocks and the best ones, turned or not, and the step.

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "regard_retrieved_attention.h"

namespace {

// Exactly as many elements as given, so that a sanitizer sees what is touched beyond them.
template <class T>
struct Array {
  explicit Array(size_t count) : count(count), data(new T[count]()) {}
  T* get() const { return count == 0 ? nullptr : data.get(); }
  T& operator[](size_t i) const { return data[i]; }
  size_t count;
  std::unique_ptr<T[]> data;
};

unsigned state = 1;
float uniform() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.f;
}
Array<float> random_array(size_t count) {
  Array<float> x(count);
  for (size_t i = 0; i < count; ++i) x[i] = uniform();
  return x;
}

// Rounds to bfloat16 in place, and gives the bits.
Array<uint16_t> to_bits(const Array<float>& x) {
  Array<uint16_t> y(x.count);
  for (size_t i = 0; i < x.count; ++i) {
    uint32_t bits;
    memcpy(&bits, &x[i], 4);
    y[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
    bits = static_cast<uint32_t>(y[i]) << 16;
    memcpy(&x[i], &bits, 4);
  }
  return y;
}

struct Case {
  const char* name;
  int64_t heads, kv_heads, n, m, width, value_width, block, top_k;
  bool turned, given, own, half;
  int64_t threads;
};

constexpr int64_t B = 2;
int failures = 0;

using Numbers = std::vector<double>;

void check(const Case& c) {
  const int64_t H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width, size = c.block + 1;
  const int64_t blocks = (m - c.own) / size, picks = std::min(c.top_k, blocks), positions = (c.top_k + 2) * size;
  const int64_t rotated = D / 2 * 2;
  const auto count_of = [](int64_t x) { return static_cast<size_t>(x); };
  Array<float> q = random_array(count_of(B * H * n * D)), k = random_array(count_of(B * G * m * D)),
               v = random_array(count_of(B * G * m * V)), turns(count_of(positions * rotated));
  for (size_t i = 0; i < q.count; ++i) q[i] *= 3;
  Array<uint16_t> k_bits(0), v_bits(0), marks_bits(0);
  if (c.half) k_bits = to_bits(k), v_bits = to_bits(v);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < rotated / 2; ++i) {
      const double angle = static_cast<double>(p) * pow(100., -2. * static_cast<double>(i) / static_cast<double>(rotated));
      turns[count_of(p * rotated + i)] = static_cast<float>(cos(angle));
      turns[count_of(p * rotated + rotated / 2 + i)] = static_cast<float>(sin(angle));
    }
  Array<int64_t> closed(count_of(B * blocks)), length(B), chosen(count_of(B * H * n * picks)), found_of(2 * B);
  Array<uint8_t> landmark(count_of(B * m));
  Array<float> marks(count_of(B * G * blocks * D)), out(count_of(B * H * n * V)), lse(count_of(B * H * n));
  std::vector<int64_t> held(B);
  for (int64_t b = 0; b < B; ++b) {
    length[count_of(b)] = b == 0 ? m : std::max<int64_t>(m - size - 2, c.own);
    const int64_t first = m - length[count_of(b)];
    held[count_of(b)] = (length[count_of(b)] - c.own) / size;
    for (int64_t s = first; s < m; ++s) landmark[count_of(b * m + s)] = (s - first) % size == c.block;
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t number = j - blocks + held[count_of(b)];
      closed[count_of(b * blocks + j)] = number < 0 ? -1 : number * size + c.block;
      if (number < 0) continue;
      for (int64_t g = 0; g < G; ++g)
        for (int64_t i = 0; i < D; ++i)
          marks[count_of(((b * G + g) * blocks + j) * D + i)] =
              k[count_of(((b * G + g) * m + first + number * size + c.block) * D + i)];
    }
  }
  if (c.half) marks_bits = to_bits(marks);

  const auto turn = [&](const float* x, int64_t position) {
    Numbers y(x, x + D);
    for (int64_t i = 0; c.turned && i < rotated / 2; ++i) {
      const double cosine = turns[count_of(position * rotated + i)],
                   sine = turns[count_of(position * rotated + rotated / 2 + i)];
      y[count_of(i)] = x[i] * cosine - x[i + rotated / 2] * sine;
      y[count_of(i + rotated / 2)] = x[i] * sine + x[i + rotated / 2] * cosine;
    }
    return y;
  };
  const auto dot = [&](const Numbers& x, const Numbers& y) {
    double total = 0;
    for (size_t i = 0; i < x.size(); ++i) total += x[i] * y[i];
    return 0.7 * total;
  };
  // the mean of values by the softmax of scores, and its log-sum-exp
  const auto mean = [](const Numbers& scores, const std::vector<Numbers>& values, size_t width, double* log_sum) {
    Numbers y(width);
    double top = -INFINITY, total = 0;
    for (const double s : scores) top = std::max(top, s);
    for (const double s : scores) total += exp(s - top);
    for (size_t j = 0; j < scores.size(); ++j)
      for (size_t i = 0; i < width; ++i) y[i] += exp(scores[j] - top) / total * values[j][i];
    *log_sum = scores.empty() ? -INFINITY : top + log(total);
    return y;
  };
  std::vector<Numbers> expected;
  Numbers expected_lse;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t g = h / (H / G), total = held[count_of(b)], first = m - length[count_of(b)];
        const int64_t open = c.own ? (length[count_of(b)] - 1) - total * size : 0;
        const int64_t begin = std::min(total, c.top_k + 1) * size;
        const float* raw = &q[count_of(((b * H + h) * n + i) * D)];
        const Numbers query = c.own ? turn(raw, begin + open) : Numbers(raw, raw + D);
        const auto key = [&](int64_t slot, int64_t position) {
          return dot(query, turn(&k[count_of(((b * G + g) * m + slot) * D)], position));
        };
        const auto value = [&](int64_t slot) {
          const float* from = &v[count_of(((b * G + g) * m + slot) * V)];
          return Numbers(from, from + V);
        };
        std::vector<std::pair<double, int64_t>> order;
        for (int64_t j = 0; j < total; ++j) {
          const int64_t slot = total <= c.top_k ? j : std::max<int64_t>(0, j - (total - c.top_k) + 1);
          const double score = c.given ? uniform() : key(first + j * size + c.block, slot * size + c.block);
          order.push_back({-score, j});
        }
        std::sort(order.begin(), order.end());
        order.resize(count_of(std::min(total, c.top_k)));
        std::vector<int64_t> taken;
        for (const auto& pair : order) taken.push_back(pair.second);
        std::sort(taken.begin(), taken.end());
        int64_t* told = chosen.get() + ((b * H + h) * n + i) * picks;
        for (int64_t j = 0; j < picks; ++j) {
          const int64_t at = j - picks + static_cast<int64_t>(taken.size());
          told[j] = at < 0 ? -1 : taken[count_of(at)] + blocks - total;
        }
        Numbers gates;
        std::vector<Numbers> parts;
        double log_sum;
        for (size_t order_of = 0; order_of < taken.size(); ++order_of) {
          const int64_t j = taken[order_of];
          const int64_t slot =
              total <= c.top_k ? j : static_cast<int64_t>(order_of) + (j >= total - c.top_k);
          Numbers scores;
          std::vector<Numbers> values;
          for (int64_t t = 0; t < c.block; ++t) {
            scores.push_back(key(first + j * size + t, slot * size + t));
            values.push_back(value(first + j * size + t));
          }
          parts.push_back(mean(scores, values, count_of(V), &log_sum));
          gates.push_back(key(first + j * size + c.block, slot * size + c.block));
        }
        for (int64_t t = 0; c.own && t <= open; ++t) {
          if (landmark[count_of(b * m + m - 1 - open + t)]) continue;
          gates.push_back(key(m - 1 - open + t, begin + t));
          parts.push_back(value(m - 1 - open + t));
        }
        expected.push_back(mean(gates, parts, count_of(V), &log_sum));
        expected_lse.push_back(log_sum);
      }

  const auto strides = [](int64_t (&to)[3], int64_t heads, int64_t tokens, int64_t features) {
    to[0] = heads * tokens * features, to[1] = tokens * features, to[2] = features;
  };
  regard_retrieved_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  const auto pick = [&](const Array<float>& x, const Array<uint16_t>& bits) {
    return c.half ? static_cast<void*>(bits.get()) : x.get();
  };
  a.q = q.get(), a.k = pick(k, k_bits), a.v = pick(v, v_bits), a.marks = pick(marks, marks_bits);
  a.out = out.get(), a.lse = lse.get();
  a.batch = B, a.heads = H, a.kv_heads = G, a.n = n, a.m = m, a.width = D, a.value_width = V;
  strides(a.q_strides, H, n, D), strides(a.k_strides, G, m, D), strides(a.v_strides, G, m, V);
  strides(a.out_strides, H, n, V), strides(a.marks_strides, G, blocks, D), strides(a.chosen_strides, H, n, picks);
  a.closed = closed.get(), a.cached = a.length = length.get(), a.landmark = landmark.get();
  a.chosen = c.given && picks > 0 ? chosen.get() : nullptr;
  a.closed_stride = blocks, a.landmark_stride = m;
  a.block = c.block, a.top_k = c.top_k, a.blocks = blocks, a.picks = picks;
  if (c.turned) a.turns = turns.get(), a.positions = positions, a.rotated = rotated;
  a.own = c.own, a.found = c.own ? found_of.get() : nullptr;
  a.scale = 0.7f;
  if (regard_retrieved_attention(&a) != REGARD_OK) {
    printf("%s: refused\n", c.name);
    ++failures;
    return;
  }
  double error = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    for (size_t p = 0; p < expected[i].size(); ++p)
      error = fmax(error, fabs(out[i * count_of(V) + p] - expected[i][p]));
    if (isinf(expected_lse[i]) ? lse[i] != -INFINITY : !(fabs(lse[i] - expected_lse[i]) < 1e-5 * (1 + fabs(expected_lse[i]))))
      error = INFINITY;
    for (size_t p = 0; p < expected[i].size(); ++p)
      if (!isfinite(out[i * count_of(V) + p])) error = INFINITY;
  }
  if (!(error < 2e-5)) {
    printf("%s, %s: error %g\n", regard_instruction_set(), c.name, error);
    ++failures;
  }
}

}  // namespace

int main() {
  const Case cases[] = {
      {"given blocks", 2, 1, 70, 83, 16, 16, 9, 3, false, true, false, false, 1},
      {"given blocks, turned", 2, 1, 70, 83, 16, 16, 9, 3, true, true, false, false, 2},
      {"the best blocks", 4, 2, 37, 120, 8, 6, 5, 4, false, false, false, false, 3},
      {"the best blocks, turned, odd widths", 3, 1, 21, 120, 7, 19, 5, 2, true, false, false, false, 2},
      {"more than there are", 2, 2, 9, 40, 6, 8, 7, 20, true, false, false, false, 1},
      {"blocks of a token", 2, 1, 33, 90, 4, 8, 1, 5, true, false, false, false, 2},
      {"bfloat16", 2, 1, 70, 83, 16, 24, 9, 3, true, true, false, true, 2},
      {"a step", 6, 2, 1, 104, 16, 16, 9, 3, true, false, true, false, 2},
      {"a step on a landmark", 2, 1, 1, 100, 16, 16, 9, 3, true, false, true, false, 1},
      {"a step that is not turned", 2, 1, 1, 57, 5, 3, 9, 3, false, false, true, false, 1},
      {"a step in bfloat16", 2, 1, 1, 104, 16, 16, 9, 3, true, true, true, true, 1},
      {"a step without blocks", 2, 1, 1, 4, 16, 16, 9, 3, true, false, true, false, 1},
      {"no queries", 2, 1, 0, 40, 4, 4, 3, 2, false, false, false, false, 1},
  };
  regard_set_poison(1);
  std::string sets = std::string(regard_instruction_sets()) + ",";
  for (size_t comma; (comma = sets.find(',')) != std::string::npos; sets.erase(0, comma + 1)) {
    regard_set_instruction_set(sets.substr(0, comma).c_str());
    for (const Case& c : cases) check(c);
  }
  return failures != 0;
}
