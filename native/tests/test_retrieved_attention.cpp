// Attention to retrieved blocks against plain loops in double: given blocks and the best ones, rotated or not, and the
// step.

#include "regard_retrieved_attention.h"
#include "testing.h"

namespace {

struct Case {
  const char* name;
  int64_t heads, kv_heads, n, m, width, value_width, block, top_k;
  bool turned, given, own, half;
  int64_t threads;
  bool tied = false;
};

constexpr int64_t B = 2;
constexpr double TOLERANCE = 1e-4;

void check(const Case& c) {
  now("%s", c.name);
  const int64_t H = c.heads, G = c.kv_heads, n = c.n, m = c.m, D = c.width, V = c.value_width, size = c.block + 1;
  const int64_t blocks = (m - c.own) / size, picks = std::min(c.top_k, blocks), positions = (c.top_k + 2) * size;
  const int64_t rotated = D / 2 * 2;
  Floats q = numbers(B * H * n * D, -3, 3), turns(positions * rotated);
  Tensor k(numbers(B * G * m * D), c.half), v(numbers(B * G * m * V), c.half), marks(B * G * blocks * D, c.half);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < rotated / 2; ++i) {
      const double angle = static_cast<double>(p) * pow(100., -2. * static_cast<double>(i) / static_cast<double>(rotated));
      turns[p * rotated + i] = static_cast<float>(cos(angle));
      turns[p * rotated + rotated / 2 + i] = static_cast<float>(sin(angle));
    }
  std::vector<int64_t> closed(B * blocks), length(B), chosen(B * H * n * picks), found_of(2 * B);
  std::vector<uint8_t> landmark(B * m);
  Floats out = unwritten(B * H * n * V), lse = unwritten(B * H * n);
  std::vector<int64_t> held(B);
  for (int64_t b = 0; b < B; ++b) {
    length[b] = b == 0 ? m : std::max<int64_t>(m - size - 2, c.own);
    const int64_t first = m - length[b];
    held[b] = (length[b] - c.own) / size;
    for (int64_t s = first; s < m; ++s) landmark[b * m + s] = (s - first) % size == c.block;
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t number = j - blocks + held[b];
      closed[b * blocks + j] = number < 0 ? -1 : number * size + c.block;
      if (number < 0) continue;
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t i = 0; c.tied && i < D; ++i) {  // but for rounding all landmarks are the first one
          const int64_t row = ((b * G + g) * m + first + c.block) * D + i;
          k.set(row + number * size * D, static_cast<float>(k[row]) * (1 + 1e-6f * uniform()));
        }
        for (int64_t i = 0; i < D; ++i)
          marks.set(((b * G + g) * blocks + j) * D + i,
                    static_cast<float>(k[((b * G + g) * m + first + number * size + c.block) * D + i]));
      }
    }
  }

  const auto row = [](const auto& x, int64_t at, int64_t width) {
    Doubles y;
    for (int64_t i = at * width; i < (at + 1) * width; ++i) y.push_back(x[i]);
    return y;
  };
  const auto turn = [&](const Doubles& x, int64_t position) {
    Doubles y = x;
    for (int64_t i = 0; c.turned && i < rotated / 2; ++i) {
      const double cosine = turns[position * rotated + i],
                   sine = turns[position * rotated + rotated / 2 + i];
      y[i] = x[i] * cosine - x[i + rotated / 2] * sine;
      y[i + rotated / 2] = x[i] * sine + x[i + rotated / 2] * cosine;
    }
    return y;
  };
  const auto dot = [&](const Doubles& x, const Doubles& y) {
    double total = 0;
    for (size_t i = 0; i < x.size(); ++i) total += x[i] * y[i];
    return 0.7 * total;
  };
  // the mean of values by the softmax of scores, and its log-sum-exp
  const auto mean = [](const Doubles& scores, const std::vector<Doubles>& values, size_t width, double* log_sum) {
    Doubles y(width);
    double top = -INFINITY, total = 0;
    for (const double s : scores) top = std::max(top, s);
    for (const double s : scores) total += exp(s - top);
    for (size_t j = 0; j < scores.size(); ++j)
      for (size_t i = 0; i < width; ++i) y[i] += exp(scores[j] - top) / total * values[j][i];
    *log_sum = scores.empty() ? -INFINITY : top + log(total);
    return y;
  };
  Doubles expected, expected_lse;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < n; ++i) {
        const int64_t g = h / (H / G), total = held[b], first = m - length[b];
        const int64_t open = c.own ? (length[b] - 1) - total * size : 0;
        const int64_t begin = std::min(total, c.top_k + 1) * size;
        const Doubles raw = row(q, (b * H + h) * n + i, D), query = c.own ? turn(raw, begin + open) : raw;
        const auto key = [&](int64_t slot, int64_t position) {
          return dot(query, turn(row(k, (b * G + g) * m + slot, D), position));
        };
        const auto value = [&](int64_t slot) { return row(v, (b * G + g) * m + slot, V); };
        std::vector<std::pair<double, int64_t>> order;
        for (int64_t j = 0; j < total; ++j) {
          const int64_t slot = total <= c.top_k ? j : std::max<int64_t>(0, j - (total - c.top_k) + 1);
          const double score = c.given ? uniform() : key(first + j * size + c.block, slot * size + c.block);
          order.push_back({-score, j});
        }
        const size_t count = static_cast<size_t>(std::min(total, c.top_k));
        std::sort(order.begin(), order.end());
        if (count > 0) {
          double longest = 0;
          for (int64_t j = 0; j < total; ++j) {
            const Doubles mark = row(k, (b * G + g) * m + first + j * size + c.block, D);
            longest = std::max(longest, dot(mark, mark) / 0.7);
          }
          const double margin = TOLERANCE * sqrt(0.7 * longest * dot(raw, raw)), least = order[count - 1].first;
          for (auto& pair : order)
            pair = {pair.first < least - margin ? 0 : pair.first <= least + margin ? 1 : 2, -pair.second};
          std::sort(order.begin(), order.end());
          for (auto& pair : order) pair.second = -pair.second;
        }
        order.resize(count);
        std::vector<int64_t> taken;
        for (const auto& pair : order) taken.push_back(pair.second);
        std::sort(taken.begin(), taken.end());
        int64_t* told = chosen.data() + ((b * H + h) * n + i) * picks;
        for (int64_t j = 0; j < picks; ++j) {
          const int64_t at = j - picks + static_cast<int64_t>(taken.size());
          told[j] = at < 0 ? -1 : taken[at] + blocks - total;
        }
        Doubles gates;
        std::vector<Doubles> parts;
        double log_sum;
        for (size_t order_of = 0; order_of < taken.size(); ++order_of) {
          const int64_t j = taken[order_of];
          const int64_t slot =
              total <= c.top_k ? j : static_cast<int64_t>(order_of) + (j >= total - c.top_k);
          Doubles scores;
          std::vector<Doubles> values;
          for (int64_t t = 0; t < c.block; ++t) {
            scores.push_back(key(first + j * size + t, slot * size + t));
            values.push_back(value(first + j * size + t));
          }
          parts.push_back(mean(scores, values, V, &log_sum));
          gates.push_back(key(first + j * size + c.block, slot * size + c.block));
        }
        for (int64_t t = 0; c.own && t <= open; ++t) {
          if (landmark[b * m + m - 1 - open + t]) continue;
          gates.push_back(key(m - 1 - open + t, begin + t));
          parts.push_back(value(m - 1 - open + t));
        }
        const Doubles all = mean(gates, parts, V, &log_sum);
        expected.insert(expected.end(), all.begin(), all.end());
        expected_lse.push_back(log_sum);
      }

  regard_retrieved_attention_args a{};
  a.size = sizeof a;
  a.threads = c.threads;
  a.dtype = c.half ? REGARD_BFLOAT16 : REGARD_FLOAT32;
  a.q = q.data(), a.k = k.data(), a.v = v.data(), a.marks = marks.data();
  a.out = out.data(), a.lse = lse.data();
  a.batch = B, a.heads = H, a.kv_heads = G, a.n = n, a.m = m, a.width = D, a.value_width = V;
  strides(a.q_strides, H, n, D), strides(a.k_strides, G, m, D), strides(a.v_strides, G, m, V);
  strides(a.out_strides, H, n, V), strides(a.marks_strides, G, blocks, D), strides(a.chosen_strides, H, n, picks);
  a.closed = closed.data(), a.cached = a.length = length.data(), a.landmark = landmark.data();
  a.chosen = c.given && picks > 0 ? chosen.data() : nullptr;
  a.closed_stride = blocks, a.landmark_stride = m;
  a.block = c.block, a.top_k = c.top_k, a.blocks = blocks, a.picks = picks;
  if (c.turned) a.turns = turns.data(), a.positions = positions, a.rotated = rotated;
  a.own = c.own, a.found = c.own ? found_of.data() : nullptr;
  a.scale = 0.7f;
  a.tolerance = TOLERANCE;
  must("taken", regard_retrieved_attention(&a));
  compare("output", out, expected, 2e-5, 1);
  compare("lse", lse, expected_lse, 1e-5, 1);
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
      {"ties", 4, 2, 37, 1200, 8, 6, 5, 4, false, false, false, false, 3, true},
      {"ties, turned", 2, 1, 70, 1200, 16, 16, 5, 3, true, false, false, false, 2, true},
      {"a step among ties", 6, 2, 1, 400, 16, 16, 3, 3, true, false, true, false, 1, true},
      {"no queries", 2, 1, 0, 40, 4, 4, 3, 2, false, false, false, false, 1},
  };
  return on_every_instruction_set([&] {
    for (const Case& c : cases) check(c);
  });
}
