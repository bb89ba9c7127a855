// Softmax over a window around each position and the pooled map, forward and backward.
//
// Positions are in the lanes of vectors and features are separate lines, so that a window is read by shifted loads, the
// biases of a pooled key are contiguous in the table, and softmax needs no sums across lanes. A block has about 64
// positions: part of a row of the map, or some whole rows. Scores are kept for one block, keys and values of the map
// for a band of rows, or in backward for the whole map of one head.
//
// Backward uses the log-sum-exp. With dW = dO V^T over all keys and delta = sum_j P_j dW_j, the gradient of scores is
// P (dW - delta), that of the learned window weights dW.

#include "regard_aggregated_attention.h"

#include "vector.h"

#include "parallel.h"
#include "product.h"
#include "token_blocks.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;

constexpr int BLOCK = 64;     // lanes of a block
constexpr int BAND = 8;       // rows of a task
constexpr float SMALLEST = 1e-12f;  // least norm by which directions are divided

REGARD_INLINE float infinity() { return __builtin_inff(); }

REGARD_INLINE Vec reciprocal_root(Vec squares) {
  float lanes[LANES];
  store(lanes, squares);
  for (int i = 0; i < LANES; ++i) lanes[i] = 1.f / most(__builtin_sqrtf(lanes[i]), SMALLEST);
  return load(lanes);
}

struct Problem {
  const regard_aggregated_attention_args* args;
  int64_t rows, columns, width, line;  // line: features of a position, padded to full vectors
  int64_t m, far_columns;              // pooled positions in total, and in a row
  int places, border;                  // positions of a window, and how far it extends to each side
  int64_t padded, pitch;               // columns padded to full vectors, and with the border on both sides
  int64_t table_rows, table_columns;
  int wide, high;                      // of a block: lanes in a row, and rows

  explicit Problem(const regard_aggregated_attention_args& a)
      : args(&a),
        rows(a.rows),
        columns(a.columns),
        width(a.width),
        line(round_up(a.width, LANES)),
        m(a.rows / a.factor * (a.columns / a.factor)),
        far_columns(a.columns / a.factor),
        places(static_cast<int>(a.window * a.window)),
        border(static_cast<int>(a.window / 2)),
        padded(round_up(a.columns, LANES)),
        pitch(padded + 2 * border),
        table_rows(2 * a.rows - a.factor),
        table_columns(2 * a.columns - a.factor),
        wide(static_cast<int>(least<int64_t>(padded, BLOCK))),
        high(static_cast<int>(least<int64_t>(BLOCK / wide, BAND))) {}

  int64_t keys() const { return m + places; }
  int64_t row_floats() const { return line * pitch; }
  template <class T>
  const T* head(const void* data, const int64_t* strides, int64_t b, int64_t h) const {
    return static_cast<const T*>(data) + b * strides[0] + h * strides[1];
  }
  const float* table(int64_t h) const { return args->table + h * table_rows * table_columns; }
  const float* table_end() const { return args->table + args->heads * table_rows * table_columns; }
  // Index into the table for the bias of position y, x and pooled position j.
  int64_t place_in_table(int64_t y, int64_t x, int64_t j) const {
    const int64_t factor = args->factor, a = j / far_columns, b = j % far_columns;
    return (y - factor * a + rows - factor) * table_columns + x - factor * b + columns - factor;
  }
  int64_t blocks_of_row() const { return ceil_div(columns, BLOCK); }
};

// Transposed rows of the map, (row, line, pitch): a line for each feature, with zeros left and right of the map.
struct Turned {
  float* data;
  int64_t first;  // first row of the map in `data`

  float* row(const Problem& p, int64_t y) const { return data + (y - first) * p.row_floats(); }
};

void clear_borders(const Problem& p, const Turned& turned, int64_t rows) {
  const int64_t right = p.border + p.padded;
  for (int64_t i = 0; i < rows * p.line; ++i) {
    float* line = turned.data + i * p.pitch;
    for (int64_t x = 0; x < p.border; ++x) line[x] = line[right + x] = 0.f;
  }
}

// Loads `count` positions as lines of features, pads them with zeros to `padded` lines, and transposes them.
template <class T>
void load_turned(const Problem& p, const T* from, int64_t stride, int64_t count, int64_t padded, float* lines, float* to,
                 int64_t ldt) {
  load_rows(from, stride, static_cast<int>(count), static_cast<int>(p.width), lines, p.line);
  for (int64_t i = count * p.line; i < padded * p.line; i += LANES) store(lines + i, zero());
  transpose_padded(static_cast<int>(padded), static_cast<int>(p.line), lines, p.line, to, ldt);
}

template <class T>
void store_turned(const Problem& p, T* to, int64_t stride, int64_t count, int64_t padded, const float* from, int64_t ldf,
                  float* lines) {
  transpose_padded(static_cast<int>(p.line), static_cast<int>(padded), from, ldf, lines, p.line);
  store_rows(to, stride, static_cast<int>(count), static_cast<int>(p.width), lines, p.line);
}

// Normalises lanes to unit length; `inverse` gets the factors.
void turn_to_directions(int64_t width, int64_t lanes, float* x, int64_t ld, float* inverse) {
  for (int64_t i = 0; i < lanes; i += LANES) {
    Vec squares = zero();
    for (int64_t d = 0; d < width; ++d) squares = fma(load(x + d * ld + i), load(x + d * ld + i), squares);
    const Vec factor = reciprocal_root(squares);
    for (int64_t d = 0; d < width; ++d) store(x + d * ld + i, load(x + d * ld + i) * factor);
    store(inverse + i, factor);
  }
}

// The part of the map that is being processed.
struct Block {
  int64_t y, x;
  int rows, wide, lanes;  // rows of the map, lanes in each, lanes in all
  int columns;            // columns of the map in a row

  Block(const Problem& p, int64_t first, int64_t end, int64_t column)
      : y(first),
        x(column),
        rows(static_cast<int>(least<int64_t>(p.high, end - first))),
        wide(static_cast<int>(round_up(least<int64_t>(BLOCK, p.columns - column), LANES))),
        lanes(rows * wide),
        columns(static_cast<int>(least<int64_t>(wide, p.columns - column))) {}
};

template <class F>
void each_block(const Problem& p, int64_t begin, int64_t end, F&& f) {
  for (int64_t y = begin; y < end; y += p.high)
    for (int64_t x = 0; x < p.columns; x += BLOCK) f(Block(p, y, end, x));
}

// One thread's memory; (features or keys, BLOCK) unless stated otherwise.
struct Worker {
  float *keys, *values;          // transposed rows of the map; keys are directions
  float* lines;                  // (padded or BLOCK, line)
  float *far_keys, *far_values;  // (m, line); keys are directions
  float *query, *moved, *inverse, *logs;  // directions, scaled queries for the scores; 1 / norm and log L by lane
  float* scores;                 // scores, later weights, of pooled keys, then of the window
  float* learned;                // learned weights of the window
  float* output;
  float* count_logs;             // (places + 1,) log L by the number of visible window keys
  // backward only
  float *key_inverse, *far_inverse;    // (rows, padded), (m,)
  float *grad_keys, *grad_values;      // transposed, like the map
  float *grad_far_keys, *grad_far_values;
  float *grad, *grad_lines, *query_lines, *moved_lines;  // grad: of the output; lines are (BLOCK, line)
  float *slopes, *grad_moved;
  float* sums;                         // (line + 1 + 2 places, LANES): gradients of moved, slope, biases, weights

  template <class Take>
  void lay_out(const Problem& p, bool backward, Take&& take) {
    const int64_t map = (backward ? p.rows : BAND + 2 * p.border) * p.row_floats();
    take(keys, map);
    take(values, map);
    take(lines, most<int64_t>(p.padded, BLOCK) * p.line);
    take(far_keys, p.m * p.line);
    take(far_values, p.m * p.line);
    take(query, p.line * BLOCK);
    take(moved, p.line * BLOCK);
    take(inverse, BLOCK);
    take(logs, BLOCK);
    take(scores, p.keys() * BLOCK);
    take(learned, p.places * BLOCK);
    take(output, p.line * BLOCK);
    take(count_logs, p.places + 1);
    take(far_inverse, p.m);
    take(key_inverse, (backward ? p.rows : 1) * p.padded);
    if (!backward) return;
    take(grad_keys, map);
    take(grad_values, map);
    take(grad_far_keys, p.m * p.line);
    take(grad_far_values, p.m * p.line);
    take(grad, p.line * BLOCK);
    take(grad_lines, p.line * BLOCK);
    take(query_lines, p.line * BLOCK);
    take(moved_lines, p.line * BLOCK);
    take(slopes, p.keys() * BLOCK);
    take(grad_moved, p.line * BLOCK);
    take(sums, (p.line + 1 + 2 * p.places) * LANES);
  }
  static size_t bytes(const Problem& p, bool backward) {
    size_t total = 0;
    Worker().lay_out(p, backward, [&](float*&, int64_t count) {
      total += Workspace::bytes_of<float>(static_cast<size_t>(count));
    });
    return total;
  }
  void take(Workspace& space, const Problem& p, bool backward) {
    lay_out(p, backward, [&](float*& to, int64_t count) { to = space.take<float>(static_cast<size_t>(count)); });
    for (int i = 0; i <= p.places; ++i) count_logs[i] = static_cast<float>(__builtin_log(static_cast<double>(p.m + i)));
  }
};

template <class T>
void load_far(const Problem& p, const Worker& worker, int64_t b, int64_t h) {
  const regard_aggregated_attention_args& a = *p.args;
  const int m = static_cast<int>(p.m), width = static_cast<int>(p.width);
  load_rows(p.head<T>(a.far_k, a.far_k_strides, b, h), a.far_k_strides[2], m, width, worker.far_keys, p.line);
  load_rows(p.head<T>(a.far_v, a.far_v_strides, b, h), a.far_v_strides[2], m, width, worker.far_values, p.line);
  for (int64_t j = 0; j < p.m; ++j) {
    float* key = worker.far_keys + j * p.line;
    Vec squares = zero();
    for (int64_t d = 0; d < p.line; d += LANES) squares = fma(load(key + d), load(key + d), squares);
    worker.far_inverse[j] = 1.f / most(__builtin_sqrtf(sum(squares)), SMALLEST);
    for (int64_t d = 0; d < p.line; d += LANES) store(key + d, load(key + d) * worker.far_inverse[j]);
  }
}

// Loads keys and values of rows [begin, end) of the map; `inverse` (rows, padded) begins with row `begin` if kept for
// all.
template <class T>
void load_map(const Problem& p, const Worker& worker, int64_t b, int64_t h, int64_t begin, int64_t end, bool keep) {
  const regard_aggregated_attention_args& a = *p.args;
  const Turned keys{worker.keys, begin}, values{worker.values, begin};
  const T *k = p.head<T>(a.k, a.k_strides, b, h), *v = p.head<T>(a.v, a.v_strides, b, h);
  for (int64_t y = begin; y < end; ++y) {
    float* key = keys.row(p, y) + p.border;
    load_turned(p, k + y * p.columns * a.k_strides[2], a.k_strides[2], p.columns, p.padded, worker.lines, key, p.pitch);
    turn_to_directions(p.width, p.padded, key, p.pitch, worker.key_inverse + (keep ? (y - begin) * p.padded : 0));
    load_turned(p, v + y * p.columns * a.v_strides[2], a.v_strides[2], p.columns, p.padded, worker.lines,
                values.row(p, y) + p.border, p.pitch);
  }
}

template <class T>
void load_queries(const Problem& p, const Worker& worker, int64_t b, int64_t h, const Block& block) {
  const regard_aggregated_attention_args& a = *p.args;
  const T* q = p.head<T>(a.q, a.q_strides, b, h);
  for (int r = 0; r < block.rows; ++r)
    load_turned(p, q + ((block.y + r) * p.columns + block.x) * a.q_strides[2], a.q_strides[2], block.columns, block.wide,
                worker.lines, worker.query + r * block.wide, BLOCK);
  turn_to_directions(p.width, block.lanes, worker.query, BLOCK, worker.inverse);
  for (int r = 0; r < block.rows; ++r) {
    const int64_t y = block.y + r;
    const int64_t down = least(y + p.border, p.rows - 1) - most<int64_t>(y - p.border, 0) + 1;
    for (int i = 0; i < block.wide; ++i) {
      const int64_t x = least(block.x + i, p.columns - 1);
      const int64_t across = least(x + p.border, p.columns - 1) - most<int64_t>(x - p.border, 0) + 1;
      worker.logs[r * block.wide + i] = worker.count_logs[down * across];
    }
  }
  const float *moved = a.moved + h * p.width, slope = a.slope[h];
  for (int i = 0; i < block.lanes; i += LANES) {
    const Vec scale = load(worker.logs + i) * slope;
    for (int64_t d = 0; d < p.width; ++d)
      store(worker.moved + d * BLOCK + i, (load(worker.query + d * BLOCK + i) + moved[d]) * scale);
    for (int64_t d = p.width; d < p.line; ++d) store(worker.moved + d * BLOCK + i, zero());
  }
}

// Calls f(place, row of the block, row of the map, columns to the right) for each position of the window and row of the
// block.
template <class F>
REGARD_INLINE void each_place(const Problem& p, const Block& block, F&& f) {
  for (int place = 0; place < p.places; ++place) {
    const int64_t side = p.args->window;
    for (int r = 0; r < block.rows; ++r) f(place, r, block.y + r + place / side - p.border, place % side - p.border);
  }
}

// to (ROWS, vector) = dot products of x (width, BLOCK) with the map at ROWS adjacent offsets.
template <int ROWS>
REGARD_INLINE void products_of_places(int64_t width, const float* x, const float* map, int64_t pitch, float* to) {
  Vec sums[ROWS];
#pragma GCC unroll 3
  for (int i = 0; i < ROWS; ++i) sums[i] = zero();
  for (int64_t d = 0; d < width; ++d) {
    const Vec here = load(x + d * BLOCK);
#pragma GCC unroll 3
    for (int i = 0; i < ROWS; ++i) sums[i] = fma(here, load(map + d * pitch + i), sums[i]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < ROWS; ++i) store(to + i * BLOCK, sums[i]);
}

// to (places, BLOCK) = x (width, BLOCK) times the window around each lane; 0 in rows beyond the map.
void multiply_window(const Problem& p, const Block& block, const float* x, const Turned& map, float* to) {
  const int side = static_cast<int>(p.args->window);
  for (int down = 0; down < side; ++down)
    for (int r = 0; r < block.rows; ++r) {
      const int64_t y = block.y + r + down - p.border;
      const bool there = y >= 0 && y < p.rows;
      for (int i = 0; i < block.wide; i += LANES) {
        const int lane = r * block.wide + i;
        float* found = to + down * side * BLOCK + lane;
        const float* row = there ? map.row(p, y) + block.x + i : nullptr;  // left edge of the window
        int across = 0;
        for (; there && across + 3 <= side; across += 3)
          products_of_places<3>(p.width, x + lane, row + across, p.pitch, found + across * BLOCK);
        for (; there && across < side; ++across)
          products_of_places<1>(p.width, x + lane, row + across, p.pitch, found + across * BLOCK);
        for (; across < side; ++across) store(found + across * BLOCK, zero());
      }
    }
}

// to (width, BLOCK) += sums over the window of weights (places, BLOCK) times the map.
void gather_window(const Problem& p, const Block& block, const float* weights, const Turned& map, float* to) {
  constexpr int FEATURES = 4;
  const int side = static_cast<int>(p.args->window);
  for (int r = 0; r < block.rows; ++r)
    for (int i = 0; i < block.wide; i += LANES) {
      const int lane = r * block.wide + i;
      for (int64_t d = 0; d < p.width; d += FEATURES) {
        Vec sums[FEATURES];
#pragma GCC unroll 4
        for (int f = 0; f < FEATURES; ++f) sums[f] = load(to + (d + f) * BLOCK + lane);
        for (int down = 0; down < side; ++down) {
          const int64_t y = block.y + r + down - p.border;
          if (y < 0 || y >= p.rows) continue;
          const float* row = map.row(p, y) + d * p.pitch + block.x + i;
          for (int across = 0; across < side; ++across) {
            const Vec weight = load(weights + (down * side + across) * BLOCK + lane);
#pragma GCC unroll 4
            for (int f = 0; f < FEATURES; ++f) sums[f] = fma(weight, load(row + f * p.pitch + across), sums[f]);
          }
        }
#pragma GCC unroll 4
        for (int f = 0; f < FEATURES; ++f) store(to + (d + f) * BLOCK + lane, sums[f]);
      }
    }
}

// map += weights (places, BLOCK) times x (width, BLOCK), one position at a time, so that no load waits for a recent
// store.
void scatter_window(const Problem& p, const Block& block, const float* weights, const float* x, const Turned& map) {
  each_place(p, block, [&](int place, int r, int64_t y, int64_t right) {
    if (y < 0 || y >= p.rows) return;
    for (int i = 0; i < block.wide; i += LANES) {
      const int lane = r * block.wide + i;
      const Vec weight = load(weights + place * BLOCK + lane);
      float* to = map.row(p, y) + p.border + block.x + i + right;
      for (int64_t d = 0; d < p.width; ++d)
        store(to + d * p.pitch, fma(weight, load(x + d * BLOCK + lane), load(to + d * p.pitch)));
    }
  });
}

// Scores of a block with their biases, -inf for places beyond the map, and the learned weights of the window.
void compute_scores(const Problem& p, const Worker& worker, int64_t h, const Block& block, const Turned& keys) {
  const regard_aggregated_attention_args& a = *p.args;
  const int m = static_cast<int>(p.m), width = static_cast<int>(p.width);
  product<Into::ZERO>(m, block.lanes, width, worker.far_keys, p.line, 1, worker.moved, BLOCK, worker.scores, BLOCK);
  const float *table = p.table(h), *end = p.table_end();
  for (int64_t j = 0; j < p.m; ++j)
    for (int r = 0; r < block.rows; ++r) {
      const float* bias = table + p.place_in_table(block.y + r, block.x, j);
      float* to = worker.scores + j * BLOCK + r * block.wide;
      for (int i = 0; i < block.wide; i += LANES) {
        const Vec here = bias + i + LANES <= end ? load(bias + i) : load(bias + i, most(0, least(LANES, block.columns - i)));
        store(to + i, load(to + i) + here);
      }
    }
  float* near = worker.scores + p.m * BLOCK;
  multiply_window(p, block, worker.moved, keys, near);
  IntVec lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  each_place(p, block, [&](int place, int r, int64_t y, int64_t right) {
    const Vec bias = broadcast(a.near_bias[h * p.places + place]), nothing = broadcast(-infinity());
    const bool there = y >= 0 && y < p.rows;
    for (int i = 0; i < block.wide; i += LANES) {
      float* to = near + place * BLOCK + r * block.wide + i;
      const int32_t first = static_cast<int32_t>(block.x + i + right), after = static_cast<int32_t>(p.columns);
      const IntVec x = lanes + (first - IntVec{});
      store(to, there ? select((x >= 0) & (x < after), load(to) + bias, nothing) : nothing);
    }
  });
  product<Into::ZERO>(p.places, block.lanes, width, a.near_tokens + h * p.width * p.places, 1, p.places, worker.query, BLOCK,
                      worker.learned, BLOCK);
  for (int place = 0; place < p.places; ++place)
    for (int i = 0; i < block.lanes; i += LANES) {
      float* to = worker.learned + place * BLOCK + i;
      store(to, load(to) + a.near_weights[h * p.places + place]);
    }
}

// Calls f(lane, index in (B, H, N), whether it is on the map) for the lanes of a block, row by row.
template <class F>
REGARD_INLINE void each_lane(const Problem& p, int64_t b, int64_t h, const Block& block, F&& f) {
  for (int r = 0; r < block.rows; ++r) {
    const int64_t at = ((b * p.args->heads + h) * p.rows + block.y + r) * p.columns + block.x;
    for (int i = 0; i < block.wide; ++i) f(r * block.wide + i, at + i, i < block.columns);
  }
}

template <class T>
void attend(const Problem& p, const Worker& worker, int64_t b, int64_t h, const Block& block, const Turned& keys,
            const Turned& values) {
  const regard_aggregated_attention_args& a = *p.args;
  load_queries<T>(p, worker, b, h, block);
  compute_scores(p, worker, h, block, keys);
  alignas(64) float tops[BLOCK], totals[BLOCK];
  for (int i = 0; i < block.lanes; i += LANES) {
    Vec top = broadcast(-infinity()), total = zero();
    for (int64_t j = 0; j < p.keys(); ++j) top = maximum(load(worker.scores + j * BLOCK + i), top);
    for (int64_t j = 0; j < p.keys(); ++j) {
      const Vec weight = exp(load(worker.scores + j * BLOCK + i) - top);
      store(worker.scores + j * BLOCK + i, weight);
      total += weight;
    }
    store(tops + i, top);
    store(totals + i, total);
  }
  if (a.lse != nullptr)
    each_lane(p, b, h, block, [&](int lane, int64_t at, bool there) {
      if (there) a.lse[at] = tops[lane] + static_cast<float>(__builtin_log(static_cast<double>(totals[lane])));
    });
  product<Into::ZERO>(static_cast<int>(p.width), block.lanes, static_cast<int>(p.m), worker.far_values, 1, p.line, worker.scores,
                      BLOCK, worker.output, BLOCK);
  float* near = worker.scores + p.m * BLOCK;
  for (int i = 0; i < block.lanes; i += LANES) {
    const Vec inverse = 1.f / load(totals + i);
    for (int64_t d = 0; d < p.width; ++d) store(worker.output + d * BLOCK + i, load(worker.output + d * BLOCK + i) * inverse);
    for (int place = 0; place < p.places; ++place) {
      const int64_t at = place * BLOCK + i;
      store(near + at, fma(load(near + at), inverse, load(worker.learned + at)));
    }
  }
  gather_window(p, block, near, values, worker.output);
  T* out = static_cast<T*>(a.out) + b * a.out_strides[0] + h * a.out_strides[1];
  for (int r = 0; r < block.rows; ++r)
    store_turned(p, out + ((block.y + r) * p.columns + block.x) * a.out_strides[2], a.out_strides[2], block.columns, block.wide,
                 worker.output + r * block.wide, BLOCK, worker.lines);
}

template <class T>
int run(const regard_aggregated_attention_args& a) {
  const Problem p(a);
  const int64_t bands = ceil_div(p.rows, BAND), tasks = a.batch * a.heads * bands;
  const int64_t parts = least(most<int64_t>(1, a.threads), tasks);
  Workspace space(static_cast<size_t>(parts) * (Worker::bytes(p, false) + Workspace::bytes_of<Worker>(1)));
  if (!space) return REGARD_OUT_OF_MEMORY;
  long next = 0;
  Worker* workers = space.take<Worker>(static_cast<size_t>(parts));
  for (int64_t part = 0; part < parts; ++part) {
    workers[part].take(space, p, false);
    clear_borders(p, {workers[part].keys, 0}, BAND + 2 * p.border);
    clear_borders(p, {workers[part].values, 0}, BAND + 2 * p.border);
  }
  parallel(static_cast<int>(parts), [&](int part) {
    const Worker& worker = workers[part];
    int64_t loaded = -1;  // the head whose pooled keys and values are loaded
    for (;;) {
      const int64_t task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      const int64_t pair = task / bands, b = pair / a.heads, h = pair % a.heads;
      const int64_t begin = task % bands * BAND, end = least(begin + BAND, p.rows);
      if (loaded != pair) load_far<T>(p, worker, b, h);
      loaded = pair;
      const int64_t first = most<int64_t>(begin - p.border, 0);
      load_map<T>(p, worker, b, h, first, least(end + p.border, p.rows), false);
      const Turned keys{worker.keys, first}, values{worker.values, first};
      each_block(p, begin, end, [&](const Block& block) { attend<T>(p, worker, b, h, block, keys, values); });
    }
  });
  return REGARD_OK;
}

// --- backward

// Gradients of the learned parameters, for one (row, head).
struct Learned {
  float *moved, *slope, *near_bias, *near_tokens, *near_weights, *table;  // tokens: (places, line)

  static int64_t floats(const Problem& p) {
    return round_up(p.line + 1 + (2 + p.line) * p.places + p.table_rows * p.table_columns + LANES, LANES);
  }
  Learned(const Problem& p, float* data) : moved(data) {
    slope = moved + p.line;
    near_bias = slope + 1;
    near_weights = near_bias + p.places;
    near_tokens = near_weights + p.places;
    table = near_tokens + p.places * p.line;  // with room for one more vector at the end
  }
};

// The gradient of u from that of x = u / |u|, for all lanes. `inverse` is 1 / |u|, limited for short u.
void turn_back(int64_t width, int64_t lanes, const float* x, int64_t ldx, const float* inverse, float* grad, int64_t ldg) {
  for (int64_t i = 0; i < lanes; i += LANES) {
    Vec along = zero();
    for (int64_t d = 0; d < width; ++d) along = fma(load(x + d * ldx + i), load(grad + d * ldg + i), along);
    const Vec factor = load(inverse + i);
    along = select(reinterpret_cast<IntVec>(factor < 1.f / SMALLEST), along, zero());
    for (int64_t d = 0; d < width; ++d)
      store(grad + d * ldg + i, (load(grad + d * ldg + i) - load(x + d * ldx + i) * along) * factor);
  }
}

template <class T>
void attend_backward(const Problem& p, const Worker& worker, const regard_aggregated_attention_backward_args& args, int64_t b,
                     int64_t h, const Block& block, const Turned& keys, const Turned& values, const Turned& grad_keys,
                     const Turned& grad_values, const Learned& learned) {
  const regard_aggregated_attention_args& a = *p.args;
  const int m = static_cast<int>(p.m), width = static_cast<int>(p.width), line = static_cast<int>(p.line), lanes = block.lanes;
  load_queries<T>(p, worker, b, h, block);
  compute_scores(p, worker, h, block, keys);
  const T* grad_out = p.head<T>(args.grad_out, args.grad_out_strides, b, h);
  for (int r = 0; r < block.rows; ++r)
    load_turned(p, grad_out + ((block.y + r) * p.columns + block.x) * args.grad_out_strides[2], args.grad_out_strides[2],
                block.columns, block.wide, worker.grad_lines + r * block.wide * p.line, worker.grad + r * block.wide, BLOCK);

  float *near = worker.scores + p.m * BLOCK, *near_slopes = worker.slopes + p.m * BLOCK;
  product<Into::ZERO>(m, lanes, width, worker.far_values, p.line, 1, worker.grad, BLOCK, worker.slopes, BLOCK);
  multiply_window(p, block, worker.grad, values, near_slopes);
  transpose_padded(line, lanes, worker.query, BLOCK, worker.query_lines, p.line);
  transpose_padded(line, lanes, worker.moved, BLOCK, worker.moved_lines, p.line);

  // gradients of the learned window weights are the products of output gradients and values
  product<Into::SUM>(p.places, line, lanes, near_slopes, BLOCK, 1, worker.query_lines, p.line, learned.near_tokens, p.line);
  product<Into::ZERO>(width, lanes, p.places, a.near_tokens + h * p.width * p.places, p.places, 1, near_slopes, BLOCK,
                      worker.output, BLOCK);
  float *slope_sum = worker.sums + p.line * LANES, *bias_sums = slope_sum + LANES,
        *weight_sums = bias_sums + p.places * LANES;
  for (int place = 0; place < p.places; ++place) {
    Vec total = load(weight_sums + place * LANES);
    for (int i = 0; i < lanes; i += LANES) total += load(near_slopes + place * BLOCK + i);
    store(weight_sums + place * LANES, total);
  }

  // weights, and the gradients of scores
  alignas(64) float lse[BLOCK];
  each_lane(p, b, h, block, [&](int lane, int64_t at, bool there) { lse[lane] = there ? a.lse[at] : infinity(); });
  for (int i = 0; i < lanes; i += LANES) {
    const Vec base = load(lse + i);
    Vec delta = zero(), total = zero();
    for (int64_t j = 0; j < p.keys(); ++j) {
      const Vec weight = exp(load(worker.scores + j * BLOCK + i) - base);
      store(worker.scores + j * BLOCK + i, weight);
      delta = fma(weight, load(worker.slopes + j * BLOCK + i), delta);
      total += weight;
    }
    // although the log-sum-exp is rounded, gradients of scores must sum to 0
    const Vec inverse = select(reinterpret_cast<IntVec>(base < infinity()), 1.f / total, zero());
    delta *= inverse;
    for (int64_t j = 0; j < p.keys(); ++j) {
      float *weight = worker.scores + j * BLOCK + i, *slope = worker.slopes + j * BLOCK + i;
      const Vec here = load(weight) * inverse;
      store(weight, here);
      store(slope, here * (load(slope) - delta));
    }
    for (int place = 0; place < p.places; ++place) {
      float* weight = near + place * BLOCK + i;
      store(weight, load(weight) + load(worker.learned + place * BLOCK + i));
    }
  }

  // values and keys
  product<Into::SUM>(m, line, lanes, worker.scores, BLOCK, 1, worker.grad_lines, p.line, worker.grad_far_values, p.line);
  product<Into::SUM>(m, line, lanes, worker.slopes, BLOCK, 1, worker.moved_lines, p.line, worker.grad_far_keys, p.line);
  scatter_window(p, block, near, worker.grad, grad_values);
  scatter_window(p, block, near_slopes, worker.moved, grad_keys);

  // biases: pooled positions of a column are far apart in the table, so that no load waits for a recent store
  for (int64_t column = 0; column < p.far_columns; ++column)
    for (int64_t j = column; j < p.m; j += p.far_columns)
      for (int r = 0; r < block.rows; ++r) {
        float* to = learned.table + p.place_in_table(block.y + r, block.x, j);
        const float* from = worker.slopes + j * BLOCK + r * block.wide;
        for (int i = 0; i < block.columns; i += LANES) store(to + i, load(to + i) + load(from + i));
      }
  for (int place = 0; place < p.places; ++place) {
    Vec total = load(bias_sums + place * LANES);
    for (int i = 0; i < lanes; i += LANES) total += load(near_slopes + place * BLOCK + i);
    store(bias_sums + place * LANES, total);
  }

  // queries: moved = (d(q) + moved) slope log L
  product<Into::ZERO>(width, lanes, m, worker.far_keys, 1, p.line, worker.slopes, BLOCK, worker.grad_moved, BLOCK);
  gather_window(p, block, near_slopes, keys, worker.grad_moved);
  const float *moved = a.moved + h * p.width, slope = a.slope[h];
  Vec slopes = zero();
  for (int i = 0; i < lanes; i += LANES) {
    const Vec log = load(worker.logs + i);
    for (int64_t d = 0; d < p.width; ++d) {
      const int64_t at = d * BLOCK + i;
      const Vec here = load(worker.grad_moved + at) * log;
      slopes = fma(here, load(worker.query + at) + moved[d], slopes);
      store(worker.sums + d * LANES, fma(here, broadcast(slope), load(worker.sums + d * LANES)));
      store(worker.output + at, fma(here, broadcast(slope), load(worker.output + at)));
    }
  }
  store(slope_sum, load(slope_sum) + slopes);
  if (args.grad_q == nullptr) return;
  turn_back(p.width, lanes, worker.query, BLOCK, worker.inverse, worker.output, BLOCK);
  T* grad_q = static_cast<T*>(args.grad_q) + b * args.grad_q_strides[0] + h * args.grad_q_strides[1];
  for (int r = 0; r < block.rows; ++r)
    store_turned(p, grad_q + ((block.y + r) * p.columns + block.x) * args.grad_q_strides[2], args.grad_q_strides[2],
                 block.columns, block.wide, worker.output + r * block.wide, BLOCK, worker.lines);
}

template <class T>
void store_map(const Problem& p, const Worker& worker, void* data, const int64_t* strides, int64_t b, int64_t h,
               const Turned& from) {
  if (data == nullptr) return;
  T* to = static_cast<T*>(data) + b * strides[0] + h * strides[1];
  for (int64_t y = 0; y < p.rows; ++y)
    store_turned(p, to + y * p.columns * strides[2], strides[2], p.columns, p.padded, from.row(p, y) + p.border, p.pitch,
                 worker.lines);
}

template <class T>
void store_far(const Problem& p, void* data, const int64_t* strides, int64_t b, int64_t h, const float* from) {
  if (data == nullptr) return;
  store_rows(static_cast<T*>(data) + b * strides[0] + h * strides[1], strides[2], static_cast<int>(p.m),
             static_cast<int>(p.width), from, p.line);
}

void clear(float* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) data[i] = 0.f;
}

// All blocks of one (row, head), whose gradients no other task writes.
template <class T>
void run_pair(const Problem& p, const Worker& worker, const regard_aggregated_attention_backward_args& args, int64_t b, int64_t h,
              float* of_learned) {
  const Learned learned(p, of_learned);
  const Turned keys{worker.keys, 0}, values{worker.values, 0}, grad_keys{worker.grad_keys, 0},
      grad_values{worker.grad_values, 0};
  load_far<T>(p, worker, b, h);
  load_map<T>(p, worker, b, h, 0, p.rows, true);
  clear(grad_keys.data, p.rows * p.row_floats());
  clear(grad_values.data, p.rows * p.row_floats());
  clear(worker.grad_far_keys, p.m * p.line);
  clear(worker.grad_far_values, p.m * p.line);
  clear(worker.sums, (p.line + 1 + 2 * p.places) * LANES);
  clear(of_learned, Learned::floats(p));
  each_block(p, 0, p.rows, [&](const Block& block) {
    attend_backward<T>(p, worker, args, b, h, block, keys, values, grad_keys, grad_values, learned);
  });
  for (int64_t i = 0; i < p.line + 1 + 2 * p.places; ++i) of_learned[i] = sum(load(worker.sums + i * LANES));
  for (int64_t y = 0; y < p.rows; ++y)
    turn_back(p.width, p.padded, keys.row(p, y) + p.border, p.pitch, worker.key_inverse + y * p.padded,
              grad_keys.row(p, y) + p.border, p.pitch);
  for (int64_t j = 0; j < p.m; ++j) {
    const float* key = worker.far_keys + j * p.line;
    float* grad = worker.grad_far_keys + j * p.line;
    Vec products = zero();
    for (int64_t d = 0; d < p.line; d += LANES) products = fma(load(key + d), load(grad + d), products);
    const float along = worker.far_inverse[j] < 1.f / SMALLEST ? sum(products) : 0.f;
    for (int64_t d = 0; d < p.line; d += LANES)
      store(grad + d, (load(grad + d) - load(key + d) * along) * worker.far_inverse[j]);
  }
  store_map<T>(p, worker, args.grad_k, args.grad_k_strides, b, h, grad_keys);
  store_map<T>(p, worker, args.grad_v, args.grad_v_strides, b, h, grad_values);
  store_far<T>(p, args.grad_far_k, args.grad_far_k_strides, b, h, worker.grad_far_keys);
  store_far<T>(p, args.grad_far_v, args.grad_far_v_strides, b, h, worker.grad_far_values);
}

// Sums the gradients of one head's learned parameters over the rows of the batch.
void put_learned(const Problem& p, const regard_aggregated_attention_backward_args& args, int64_t h, float* all) {
  const regard_aggregated_attention_args& a = *p.args;
  const int64_t floats = Learned::floats(p), places = p.places;
  float* total = all + h * floats;
  for (int64_t b = 1; b < a.batch; ++b)
    for (int64_t i = 0; i < floats; i += LANES)
      store(total + i, load(total + i) + load(all + (b * a.heads + h) * floats + i));
  const Learned found(p, total);
  const auto put = [h](float* to, const float* from, int64_t count) {
    if (to != nullptr) memcpy(to + h * count, from, static_cast<size_t>(count) * sizeof(float));
  };
  put(args.grad_moved, found.moved, p.width);
  put(args.grad_slope, found.slope, 1);
  put(args.grad_near_bias, found.near_bias, places);
  put(args.grad_near_weights, found.near_weights, places);
  put(args.grad_table, found.table, p.table_rows * p.table_columns);
  if (args.grad_near_tokens == nullptr) return;
  for (int64_t place = 0; place < places; ++place)
    for (int64_t d = 0; d < p.width; ++d)
      args.grad_near_tokens[(h * p.width + d) * places + place] = found.near_tokens[place * p.line + d];
}

template <class T>
int run_backward(const regard_aggregated_attention_backward_args& args) {
  const regard_aggregated_attention_args& a = *args.forward;
  const Problem p(a);
  const int64_t pairs = a.batch * a.heads, parts = least(most<int64_t>(1, a.threads), pairs), floats = Learned::floats(p);
  Workspace space(static_cast<size_t>(parts) * (Worker::bytes(p, true) + Workspace::bytes_of<Worker>(1)) +
                  Workspace::bytes_of<float>(static_cast<size_t>(pairs * floats)));
  if (!space) return REGARD_OUT_OF_MEMORY;
  float* learned = space.take<float>(static_cast<size_t>(pairs * floats));
  Worker* workers = space.take<Worker>(static_cast<size_t>(parts));
  for (int64_t part = 0; part < parts; ++part) {
    workers[part].take(space, p, true);
    clear_borders(p, {workers[part].keys, 0}, p.rows);
    clear_borders(p, {workers[part].values, 0}, p.rows);
  }
  long next = 0;
  parallel(static_cast<int>(parts), [&](int part) {
    for (;;) {
      const int64_t pair = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (pair >= pairs) return;
      run_pair<T>(p, workers[part], args, pair / a.heads, pair % a.heads, learned + pair * floats);
    }
  });
  parallel_tasks(static_cast<int>(parts), a.heads, [&](long h) { put_learned(p, args, h, learned); });
  return REGARD_OK;
}

bool valid(const regard_aggregated_attention_args& a) {
  return a.width >= 1 && a.factor >= 1 && a.window >= 1 && a.window % 2 == 1 && a.rows % a.factor == 0 &&
         a.columns % a.factor == 0;
}

bool empty(const regard_aggregated_attention_args& a) { return a.batch * a.heads * a.rows * a.columns == 0; }

}  // namespace

int aggregated_attention(const regard_aggregated_attention_args* args) {
  if (!valid(*args)) return REGARD_BAD_ARGUMENT;
  if (empty(*args)) return REGARD_OK;
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : run<float>(*args);
}

int aggregated_attention_backward(const regard_aggregated_attention_backward_args* args) {
  const regard_aggregated_attention_args& a = *args->forward;
  if (!valid(a) || empty(a)) return REGARD_BAD_ARGUMENT;
  return a.dtype == REGARD_BFLOAT16 ? run_backward<bfloat16>(*args) : run_backward<float>(*args);
}

}  // namespace REGARD_ISA
