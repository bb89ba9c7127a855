// Residual branches of a pre-norm block in one call. As separate operations, a branch has passes over memory, copies
// and parallel regions between its products, which take as long as the products if rows are few and narrow.
//
// Weights are packed first, in panels of two vectors of outputs, which takes a fiftieth of the time of a product with a
// hundred rows. Then every thread takes blocks of rows from the norm to the sum, so that intermediate values stay in
// its cache.

#include "regard_attention.h"
#include "regard_residual.h"

#include "elementwise.h"
#include "token_blocks.h"

#include "parallel.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int PANEL = 2 * LANES;                     // outputs in a panel
constexpr int TILE = REGISTERS >= 32 ? 12 : 6;       // most rows whose sums for a panel fit in registers
constexpr int64_t BLOCK = 96;                        // most rows in a block
constexpr int64_t PIECE = 192;                       // inputs of a panel packed at once
constexpr int64_t FEW = 2 * BLOCK;                   // rows per thread up to which they count as few
constexpr int64_t SPACE = 16;                        // numbers between rows, so that they are in different cache sets

int64_t row_of(int64_t width) { return round_up(width, PANEL) + SPACE; }
size_t numbers(int64_t rows, int64_t width) { return static_cast<size_t>(rows * width); }

// A weight in panels, [outputs / PANEL][inputs][PANEL], and its bias, both padded with zeros.
struct Packed {
  int64_t n = 0, k = 0;
  float *panels = nullptr, *bias = nullptr;

  static size_t bytes(const regard_dense& w) {
    return Workspace::bytes_of<float>(numbers(round_up(w.n, PANEL), w.k + 1));
  }
  Packed(const regard_dense& w, Workspace& workspace) : n(w.n), k(w.k) {
    panels = workspace.take<float>(numbers(round_up(n, PANEL), k + 1));
    bias = panels + round_up(n, PANEL) * k;
    for (int64_t i = 0; i < round_up(n, PANEL); ++i) bias[i] = i < n && w.bias != nullptr ? w.bias[i] : 0.f;
  }
  int64_t count() const { return ceil_div(n, PANEL); }
  float* panel(int64_t number) const { return panels + number * PANEL * k; }
};

// Packs inputs from `begin` to `end` of the panel of outputs from `first` on.
void pack_panel(const regard_dense& w, int64_t first, int64_t begin, int64_t end, float* to) {
  for (int half = 0; half < 2; ++half, first += LANES, to += LANES) {
    const int outputs = static_cast<int>(most<int64_t>(0, least<int64_t>(LANES, w.n - first)));
    int64_t j = begin;
    for (; outputs == LANES && j + LANES <= end; j += LANES)
      transpose_square(w.weight + first * w.k + j, w.k, to + (j - begin) * PANEL, PANEL);
    for (; j < end; ++j)
      for (int i = 0; i < LANES; ++i) to[(j - begin) * PANEL + i] = i < outputs ? w.weight[(first + i) * w.k + j] : 0.f;
  }
}

// Products of ROWS rows with a panel, added to its bias.
template <int ROWS>
void tile(int64_t k, const float* x, int64_t ldx, const float* panel, const float* bias, float* y, int64_t ldy) {
  Vec sums[ROWS][2];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) sums[i][0] = load(bias), sums[i][1] = load(bias + LANES);
  // one pointer for three rows, as many as addressing modes reach with one more register
  constexpr int POINTERS = (ROWS + 2) / 3;
  const float* at[POINTERS];
#pragma GCC unroll 16
  for (int i = 0; i < POINTERS; ++i) at[i] = x + 3 * i * ldx;
  for (int64_t p = 0; p < k; ++p, panel += PANEL) {
    __builtin_prefetch(panel + 16 * PANEL);
    __builtin_prefetch(panel + 16 * PANEL + LANES);
    const Vec first = load(panel), second = load(panel + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec number = broadcast(at[i / 3][i % 3 * ldx]);
      sums[i][0] = fma(number, first, sums[i][0]);
      sums[i][1] = fma(number, second, sums[i][1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < POINTERS; ++i) ++at[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    store(y + i * ldy, sums[i][0]);
    store(y + i * ldy + LANES, sums[i][1]);
  }
}

template <int ROWS>
REGARD_INLINE void tile_of(int rows, int64_t k, const float* x, int64_t ldx, const float* panel, const float* bias, float* y,
                           int64_t ldy) {
  if (rows == ROWS) return tile<ROWS>(k, x, ldx, panel, bias, y, ldy);
  if constexpr (ROWS > 1) tile_of<ROWS - 1>(rows, k, x, ldx, panel, bias, y, ldy);
}

// Some panels of a weight, with their biases.
struct Panels {
  int64_t k, count;
  const float *numbers, *bias;
};

Panels all(const Packed& w) { return {w.k, w.count(), w.panels, w.bias}; }
Panels some(const Packed& w, int64_t begin, int64_t end) { return {w.k, end - begin, w.panel(begin), w.bias + begin * PANEL}; }

// y = x W^T + bias for some rows, in tiles of about equal size; calls after(first row, rows, first output) for each
// tile.
template <class F>
void product(int64_t rows, const float* x, int64_t ldx, const Panels& w, float* y, int64_t ldy, F&& after) {
  const int64_t tiles = ceil_div(rows, TILE);
  for (int64_t panel = 0; panel < w.count; ++panel)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = rows * t / tiles, output = panel * PANEL;
      const int count = static_cast<int>(rows * (t + 1) / tiles - row);
      tile_of<TILE>(count, w.k, x + row * ldx, ldx, w.numbers + output * w.k, w.bias + output, y + row * ldy + output, ldy);
      after(row, count, output);
    }
}
void product(int64_t rows, const float* x, int64_t ldx, const Panels& w, float* y, int64_t ldy) {
  product(rows, x, ldx, w, y, ldy, [](int64_t, int, int64_t) {});
}

// x Phi(x), with erf(z) = z P(z^2) / Q(z^2) to a relative error of 2e-8 before rounding, up to where it is 1 in
// float32.
REGARD_INLINE Vec gelu(Vec x) {
  constexpr float END = 3.92f;
  const Vec given = x * 0.70710678118654752f;
  const Vec z = minimum(broadcast(END), maximum(broadcast(-END), given)), s = z * z;  // NaN stays
  Vec p = broadcast(2.025896492341417e-06f), q = broadcast(3.783189822570421e-05f);
  p = fma(p, s, broadcast(0.00028469174867495894f));
  q = fma(q, s, broadcast(0.0011707603698596358f));
  p = fma(p, s, broadcast(0.003808295587077737f));
  q = fma(q, s, broadcast(0.015055352821946144f));
  p = fma(p, s, broadcast(0.05287585034966469f));
  q = fma(q, s, broadcast(0.11456087231636047f));
  p = fma(p, s, broadcast(0.1915532946586609f));
  q = fma(q, s, broadcast(0.503092348575592f));
  p = fma(p, s, broadcast(1.1283791065216064f));
  q = fma(q, s, broadcast(1.f));
  const Vec inside = z * p * reciprocal(q), sign = select(reinterpret_cast<IntVec>(z < 0.f), broadcast(-1.f), broadcast(1.f));
  const Vec erf = select(reinterpret_cast<IntVec>(magnitude(given) >= END), sign, inside);
  return 0.5f * x * (1.f + erf);
}

// The norm of rows from `row` on.
void normalise(const regard_residual& a, int64_t row, int64_t rows, float* y, int64_t ldy) {
  const regard_row_norm& norm = a.norm;
  const int64_t width = a.width;
  const float share = 1.f / static_cast<float>(width);
  const float* x = a.x + row * a.x_stride;
  for (int64_t t = 0; t < rows; ++t, x += a.x_stride, y += ldy) {
    Vec total = zero(), squares = zero();
    if (norm.centred)
      over_vectors(width, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
        total += take<decltype(full)::value>(x + i, count);
      });
    const Vec mean = broadcast(sum(total) * share);
    over_vectors(width, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      Vec v = take<FULL>(x + i, count) - mean;
      if (!FULL) v = select(lane_numbers() < count, v, zero());
      squares = fma(v, v, squares);
    });
    const Vec factor = broadcast(1.f / __builtin_sqrtf(sum(squares) * share + norm.eps));
    over_vectors(width, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      Vec v = (take<FULL>(x + i, count) - mean) * factor;
      if (norm.weight != nullptr) v *= take<FULL>(norm.weight + i, count);
      if (norm.bias != nullptr) v += take<FULL>(norm.bias + i, count);
      put<FULL>(y + i, v, count);
    });
  }
}

// y = x + scale * the sum of the branch's `count` parts, for columns from `begin` to `end` of rows from `row` on.
struct Sum {
  const float* parts;
  int64_t ld, count, between;
};
void add(const regard_residual& a, int64_t row, int64_t rows, int64_t begin, int64_t end, const Sum& branch) {
  for (int64_t t = 0; t < rows; ++t) {
    const float *const part = branch.parts + t * branch.ld, *const x = a.x + (row + t) * a.x_stride + begin;
    float* const y = a.y + (row + t) * a.width + begin;
    over_vectors(end - begin, [&](int64_t i, int count, auto full) __attribute__((always_inline)) {
      constexpr bool FULL = decltype(full)::value;
      Vec v = take<FULL>(part + i, count);
      for (int64_t p = 1; p < branch.count; ++p) v += take<FULL>(part + p * branch.between + i, count);
      if (a.scale != nullptr) v *= take<FULL>(a.scale + begin + i, count);
      put<FULL>(y + i, take<FULL>(x + i, count) + v, count);
    });
  }
}

// Calls f(first row, rows, part) for blocks that cover all rows: smaller ones towards the end, so that threads finish
// together even on cores of different speed.
template <class F>
void over_blocks(int threads, int64_t m, F&& f) {
  int64_t next = 0;
  parallel(threads, [&](int part) {
    int64_t row = __atomic_load_n(&next, __ATOMIC_RELAXED);
    while (row < m) {
      const int64_t share = ceil_div(m - row, 2 * threads);
      const int64_t rows = least(least(round_up(share, TILE), BLOCK), m - row);
      if (!__atomic_compare_exchange_n(&next, &row, row + rows, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
      f(row, rows, part);
      row = __atomic_load_n(&next, __ATOMIC_RELAXED);
    }
  });
}

// Calls f(first row, rows) for blocks of rows, one after the other.
template <class F>
REGARD_INLINE void in_blocks(int64_t m, F&& f) {
  for (int64_t row = 0; row < m; row += BLOCK) f(row, least(BLOCK, m - row));
}

template <int COUNT>
void pack(int threads, const regard_dense* const (&weights)[COUNT], const Packed (&packed)[COUNT]) {
  long ends[COUNT], end = 0;
  for (int i = 0; i < COUNT; ++i) ends[i] = end += static_cast<long>(packed[i].count() * ceil_div(packed[i].k, PIECE));
  parallel_tasks(threads, end, [&](long task) {
    int i = 0;
    while (task >= ends[i]) ++i;
    const Packed& to = packed[i];
    const int64_t pieces = ceil_div(to.k, PIECE), number = task - (i == 0 ? 0 : ends[i - 1]);
    const int64_t panel = number / pieces, begin = number % pieces * PIECE;
    pack_panel(*weights[i], panel * PANEL, begin, least(begin + PIECE, to.k), to.panel(panel) + begin * PANEL);
  });
}

// Whether rows are so few that threads divide the outputs instead of the rows: then each packs the panels that only it
// reads, and no weight moves between the caches of cores, which takes as long as packing it.
bool are_few(int64_t m, int64_t threads) { return threads > 1 && m <= FEW * threads; }

// Applies the activation to hidden numbers in place.
void activate(int64_t row, int rows, int64_t column, float* hidden, const float* gates, int64_t ld) {
  for (int t = 0; t < rows; ++t)
    for (int i = 0; i < PANEL; i += LANES) {
      const int64_t at = (row + t) * ld + column + i;
      const Vec v = load(hidden + at);
      if (gates != nullptr) {
        const Vec g = load(gates + at);
        store(hidden + at, g * sigmoid(g) * v);
      } else {
        store(hidden + at, gelu(v));
      }
    }
}

bool wrong(const regard_dense& w, int64_t n, int64_t k) { return w.n != n || w.k != k || n < 1 || k < 1 || w.weight == nullptr; }

}  // namespace

int residual_feed_forward(const regard_residual_feed_forward_args* args) {
  const auto& a = *args;
  const int64_t width = a.around.width, hidden = a.up.n;
  const bool gated = a.gate.n != 0;
  if (a.threads < 1 || a.m < 0 || wrong(a.up, hidden, width) || wrong(a.down, width, hidden)) return REGARD_BAD_ARGUMENT;
  if (gated && wrong(a.gate, hidden, width)) return REGARD_BAD_ARGUMENT;
  if (a.m == 0) return REGARD_OK;
  const bool few = are_few(a.m, a.threads);
  const int64_t slices = ceil_div(hidden, PANEL);  // of the hidden numbers, divided among threads if rows are few
  const int threads = static_cast<int>(least(a.threads, few ? slices : ceil_div(a.m, TILE)));
  const int64_t narrow = row_of(width), wide = row_of(hidden), outputs = round_up(width, PANEL);
  const size_t parts = static_cast<size_t>(threads), layers = gated ? 2 : 1;
  const size_t normed_size = numbers(least(a.m, BLOCK), narrow), hidden_size = numbers(least(a.m, BLOCK), wide);
  const size_t partial = few ? numbers(a.m, narrow) : 0, sizes[] = {normed_size, layers * hidden_size, partial};
  size_t bytes = Packed::bytes(a.gate) + Packed::bytes(a.up) + Packed::bytes(a.down) +
                 Workspace::bytes_of<float>(static_cast<size_t>(outputs));
  for (const size_t size : sizes) bytes += Workspace::bytes_of<float>(parts * size);
  Workspace workspace(bytes);
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  const Packed packed[] = {{a.gate, workspace}, {a.up, workspace}, {a.down, workspace}};
  float* const normed_rooms = workspace.take<float>(parts * sizes[0]);
  float* const hidden_rooms = workspace.take<float>(parts * sizes[1]);
  float* const sums = workspace.take<float>(parts * sizes[2]);
  float* const zeros = workspace.take<float>(static_cast<size_t>(outputs));
  for (int64_t i = 0; i < outputs; ++i) zeros[i] = 0.f;

  // the branch for some rows, with the given panels of `gate`, `up` and `down`
  const auto branch = [&](int64_t row, int64_t rows, int part, const Panels& gate, const Panels& up, const Panels& down,
                          float* to) {
    float* const normed = normed_rooms + static_cast<size_t>(part) * sizes[0];
    float* const between = hidden_rooms + static_cast<size_t>(part) * sizes[1];
    float* const gates = gated ? between + hidden_size : nullptr;
    normalise(a.around, row, rows, normed, narrow);
    if (gated) product(rows, normed, narrow, gate, gates, wide);
    product(rows, normed, narrow, up, between, wide, [&](int64_t first, int count, int64_t column) {
      activate(first, count, column, between, gates, wide);
    });
    product(rows, between, wide, down, to == nullptr ? normed : to, narrow);
    return normed;
  };

  if (!few) {
    pack(static_cast<int>(a.threads), {&a.gate, &a.up, &a.down}, packed);
    over_blocks(threads, a.m, [&](int64_t row, int64_t rows, int part) {
      const float* const sum = branch(row, rows, part, all(packed[0]), all(packed[1]), all(packed[2]), nullptr);
      add(a.around, row, rows, 0, width, {sum, narrow, 1, 0});
    });
    return REGARD_OK;
  }
  parallel(threads, [&](int part) {
    const int64_t first = slices * part / threads, last = slices * (part + 1) / threads;
    const int64_t begin = first * PANEL, end = least(last * PANEL, hidden);
    for (int64_t panel = first; panel < last; ++panel) {
      if (gated) pack_panel(a.gate, panel * PANEL, 0, width, packed[0].panel(panel));
      pack_panel(a.up, panel * PANEL, 0, width, packed[1].panel(panel));
    }
    float* const own = packed[2].panels + outputs * begin;
    for (int64_t output = 0; output < outputs; output += PANEL)
      pack_panel(a.down, output, begin, end, own + output * (end - begin));
    const Panels down{end - begin, outputs / PANEL, own, part == 0 ? packed[2].bias : zeros};
    float* const to = sums + static_cast<size_t>(part) * sizes[2];
    in_blocks(a.m, [&](int64_t row, int64_t rows) {
      branch(row, rows, part, some(packed[0], gated ? first : 0, gated ? last : 0), some(packed[1], first, last), down,
             to + row * narrow);
    });
  });
  parallel(threads, [&](int part) {
    const int64_t row = a.m * part / threads, rows = a.m * (part + 1) / threads - row;
    add(a.around, row, rows, 0, width, {sums + row * narrow, narrow, threads, static_cast<int64_t>(sizes[2])});
  });
  return REGARD_OK;
}

// Whether sequences follow one another from row 0 on, none longer than `n`.
bool in_order(const int64_t* borders, int64_t batch, int64_t n) {
  bool right = borders[0] == 0;
  for (int64_t i = 0; i < batch; ++i) right = right && borders[i] <= borders[i + 1] && borders[i + 1] - borders[i] <= n;
  return right;
}

int residual_attention(const regard_residual_attention_args* args) {
  const auto& a = *args;
  const auto first_of = [&](int64_t sequence) { return a.borders ? a.borders[sequence] : sequence * a.n; };
  if (a.batch < 0 || (a.borders && (a.key_bias || !in_order(a.borders, a.batch, a.n)))) return REGARD_BAD_ARGUMENT;
  const int64_t width = a.around.width, m = first_of(a.batch);
  if (a.threads < 1 || a.n < 0 || a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads != 0)
    return REGARD_BAD_ARGUMENT;
  if (wrong(a.query, a.query.n, width) || wrong(a.key, a.key.n, width) || wrong(a.value, a.value.n, width) ||
      wrong(a.output, width, a.output.k))
    return REGARD_BAD_ARGUMENT;
  const int64_t key_width = a.query.n / a.heads, value_width = a.value.n / a.kv_heads;
  if (key_width * a.heads != a.query.n || key_width * a.kv_heads != a.key.n || value_width * a.kv_heads != a.value.n ||
      value_width * a.heads != a.output.k)
    return REGARD_BAD_ARGUMENT;
  if (m == 0) return REGARD_OK;
  const regard_dense* const weights[] = {&a.query, &a.key, &a.value, &a.output};
  const bool few = are_few(m, a.threads), alone = !few && a.batch >= 2 * a.threads;
  // sequences processed together: all, or few enough for the cache of the one thread that processes them
  const int64_t together = alone ? most<int64_t>(1, BLOCK / a.n) : a.batch, most_rows = least(together * a.n, m);
  const int threads = static_cast<int>(a.threads), teams = alone ? threads : 1, members = alone ? 1 : threads;
  const int64_t lds[] = {row_of(a.query.n), row_of(a.key.n), row_of(a.value.n), row_of(a.output.k)}, narrow = row_of(width);
  const size_t room = numbers(least(m, BLOCK), narrow);
  size_t each = 0, bytes = Workspace::bytes_of<int64_t>(static_cast<size_t>(a.n)) +
                           Workspace::bytes_of<float>(static_cast<size_t>(threads) * room);
  for (const int64_t ld : lds) each += Workspace::bytes_of<float>(numbers(most_rows, ld)) / sizeof(float);
  bytes += Workspace::bytes_of<float>(static_cast<size_t>(teams) * each);
  for (const auto* w : weights) bytes += Packed::bytes(*w);
  Workspace workspace(bytes);
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  const Packed packed[] = {{a.query, workspace}, {a.key, workspace}, {a.value, workspace}, {a.output, workspace}};
  float* const heads = workspace.take<float>(static_cast<size_t>(teams) * each);
  float* const rooms = workspace.take<float>(static_cast<size_t>(threads) * room);
  int64_t* const ranks = workspace.take<int64_t>(static_cast<size_t>(a.n));
  for (int64_t i = 0; i < a.n; ++i) ranks[i] = i;
  if (!few) pack(threads, weights, packed);

  int failed = REGARD_OK;
  const auto run = [&](int team, int64_t sequence, int64_t sequences) {
    float* tensors[4] = {heads + static_cast<size_t>(team) * each};
    for (int i = 1; i < 4; ++i)
      tensors[i] = tensors[i - 1] + Workspace::bytes_of<float>(numbers(most_rows, lds[i - 1])) / sizeof(float);
    const int64_t start = first_of(sequence), rows_here = first_of(sequence + sequences) - start;
    const auto room_of = [&](int part) { return rooms + static_cast<size_t>(team + part) * room; };
    // a thread's own panels of queries, keys, values and outputs, if rows are few
    const auto share = [&](int part, int i) {
      const int64_t before = i == 1 ? packed[0].count() : i == 2 ? packed[0].count() + packed[1].count() : 0;
      const int64_t total = i == 3 ? packed[3].count() : packed[0].count() + packed[1].count() + packed[2].count();
      const auto limit = [&](int64_t at) { return most<int64_t>(0, least(at - before, packed[i].count())); };
      return some(packed[i], limit(total * part / threads), limit(total * (part + 1) / threads));
    };
    const auto project = [&](int64_t row, int64_t rows, int part) {
      normalise(a.around, start + row, rows, room_of(part), narrow);
      for (int i = 0; i < 3; ++i) {
        const Panels own = few ? share(part, i) : all(packed[i]);
        product(rows, room_of(part), narrow, own, tensors[i] + row * lds[i] + (own.bias - packed[i].bias), lds[i]);
      }
    };
    const auto finish = [&](int64_t row, int64_t rows, int part) {
      const Panels own = few ? share(part, 3) : all(packed[3]);
      const int64_t begin = own.bias - packed[3].bias, end = least(begin + own.count * PANEL, width);
      product(rows, tensors[3] + row * lds[3], lds[3], own, room_of(part), narrow);
      add(a.around, start + row, rows, begin, end, {room_of(part), narrow, 1, 0});
    };
    if (few)
      parallel(threads, [&](int part) {
        for (int i = 0; i < 4; ++i) {
          const Panels own = share(part, i);
          const int64_t first = (own.bias - packed[i].bias) / PANEL;
          for (int64_t p = first; p < first + own.count; ++p) pack_panel(*weights[i], p * PANEL, 0, own.k, packed[i].panel(p));
        }
        in_blocks(rows_here, [&](int64_t row, int64_t rows) { project(row, rows, part); });
      });
    else
      over_blocks(members, rows_here, project);

    regard_attention_args attention{};
    attention.size = sizeof attention;
    attention.threads = members;
    attention.dtype = REGARD_FLOAT32;
    attention.heads = a.heads;
    attention.kv_heads = a.kv_heads;
    attention.width = key_width;
    attention.value_width = value_width;
    const auto strides = [&](int64_t (&to)[3], int64_t head, int64_t token) {
      to[0] = a.n * token;
      to[1] = head;
      to[2] = token;
    };
    strides(attention.q_strides, key_width, lds[0]);
    strides(attention.k_strides, key_width, lds[1]);
    strides(attention.v_strides, value_width, lds[2]);
    strides(attention.out_strides, value_width, lds[3]);
    attention.scale = a.scale_of_scores;
    attention.rule = REGARD_SOFTMAX;
    attention.visibility.query_ranks = attention.visibility.key_ranks = ranks;
    attention.visibility.left = attention.visibility.right = -1;
    attention.biases.bias_strides[0] = a.n;
    attention.biases.bias_strides[3] = 1;
    // sequences of one length all at once, others one by one
    for (int64_t at = sequence, step = a.borders ? 1 : sequences; at < sequence + sequences; at += step) {
      const int64_t row = first_of(at) - start;
      attention.batch = step;
      attention.n = attention.m = a.borders ? first_of(at + 1) - first_of(at) : a.n;
      attention.q = tensors[0] + row * lds[0];
      attention.k = tensors[1] + row * lds[1];
      attention.v = tensors[2] + row * lds[2];
      attention.out = tensors[3] + row * lds[3];
      if (a.key_bias) attention.biases.bias = a.key_bias + at * a.n;
      const int status = regard_attention(&attention);
      if (status != REGARD_OK) __atomic_store_n(&failed, status, __ATOMIC_RELAXED);
    }

    if (few)
      parallel(threads, [&](int part) {
        in_blocks(rows_here, [&](int64_t row, int64_t rows) { finish(row, rows, part); });
      });
    else
      over_blocks(members, rows_here, finish);
  };
  const int64_t tasks = ceil_div(a.batch, together);
  int64_t next = 0;
  parallel(teams, [&](int team) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      run(team, task * together, least(together, a.batch - task * together));
    }
  });
  return failed;
}

}  // namespace REGARD_ISA
