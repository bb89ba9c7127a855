// Visibility of query-key pairs in one row of the batch, decided for whole tiles where possible.
#pragma once

#include "regard_attention.h"
#include "vector.h"

namespace REGARD_ISA {
namespace {

enum class Tile { EMPTY, FULL, PARTIAL };

// Ranks of a row as 32-bit integers, and their extremes in each block of STEP keys.
struct Pairs {
  static constexpr int STEP = 64;
  static constexpr int32_t ABSENT = -1;

  const regard_visibility* rule;
  const int32_t* queries;  // (n,)
  const int32_t* keys;     // (m,)
  const int32_t* lowest;   // (blocks of STEP keys,) lowest rank of the keys that exist
  const int32_t* highest;  // highest rank; -1 where no key exists
  const uint8_t* gaps;     // whether a key of the block is missing or ranks are not consecutive
  const uint8_t* blocks;   // block mask of this row and head, or nullptr

  // Bytes of memory for one row.
  static size_t bytes(int64_t n, int64_t m) {
    const size_t steps = static_cast<size_t>(ceil_div(m, STEP));
    return round_up(static_cast<int64_t>((static_cast<size_t>(n + m) + 2 * steps) * 4 + steps), 64);
  }

  // Prepares a row in `space`, which has bytes(n, m) bytes.
  static Pairs of_row(const regard_visibility* rule, int64_t row, int64_t n, int64_t m, void* space) {
    const int64_t steps = ceil_div(m, STEP);
    int32_t* queries = static_cast<int32_t*>(space);
    int32_t* keys = queries + n;
    int32_t* lowest = keys + m;
    int32_t* highest = lowest + steps;
    uint8_t* gaps = reinterpret_cast<uint8_t*>(highest + steps);
    const int64_t* from = rule->query_ranks + row * rule->query_ranks_stride;
    for (int64_t i = 0; i < n; ++i) queries[i] = static_cast<int32_t>(from[i]);
    from = rule->key_ranks + row * rule->key_ranks_stride;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t begin = step * STEP, end = least(begin + STEP, m);
      int32_t low = INT32_MAX, high = ABSENT;
      bool gap = false;
      for (int64_t j = begin; j < end; ++j) {
        const int32_t rank = from[j] < 0 ? ABSENT : static_cast<int32_t>(from[j]);
        keys[j] = rank;
        gap = gap || rank == ABSENT || (j > begin && rank != keys[j - 1] + 1);
        if (rank != ABSENT) {
          low = least(low, rank);
          high = most(high, rank);
        }
      }
      lowest[step] = low;
      highest[step] = high;
      gaps[step] = gap;
    }
    return Pairs{rule, queries, keys, lowest, highest, gaps, nullptr};
  }

  // This row for one head, with the head's block mask.
  Pairs of_head(int64_t row, int64_t head) const {
    Pairs mine = *this;
    if (rule->blocks != nullptr)
      mine.blocks = rule->blocks + row * rule->blocks_strides[0] + head * rule->blocks_strides[1];
    return mine;
  }

  static int32_t floor_div(int32_t a, int32_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

  // Visibility of queries [i, i_end) and the keys [step * STEP, ...) of one step.
  Tile classify(int64_t i, int64_t i_end, int64_t step) const {
    if (highest[step] == ABSENT) return Tile::EMPTY;
    int32_t first = queries[i], last = first;
    for (int64_t at = i + 1; at < i_end; ++at) {
      first = least(first, queries[at]);
      last = most(last, queries[at]);
    }
    const int32_t low = lowest[step], high = highest[step];
    bool full = !gaps[step];
    if (rule->causal) {
      if (low > last) return Tile::EMPTY;
      full = full && high <= first;
    }
    if (rule->left >= 0) {
      if (static_cast<int64_t>(first) - high > rule->left) return Tile::EMPTY;
      full = full && static_cast<int64_t>(last) - low <= rule->left;
    }
    if (rule->right >= 0) {
      if (static_cast<int64_t>(low) - last > rule->right) return Tile::EMPTY;
      full = full && static_cast<int64_t>(high) - first <= rule->right;
    }
    if (rule->block > 0) {
      const int32_t size = static_cast<int32_t>(rule->block);
      const int32_t a = floor_div(first, size), b = floor_div(last, size);
      const int32_t c = floor_div(low, size), d = floor_div(high, size);
      if (a - d > rule->lookback || c - b > rule->lookahead) return Tile::EMPTY;
      full = full && b - c <= rule->lookback && d - a <= rule->lookahead;
    }
    if (blocks != nullptr) {
      const int32_t size = static_cast<int32_t>(rule->block_size);
      const int32_t a = floor_div(first, size), b = floor_div(last, size);
      const int32_t c = floor_div(low, size), d = floor_div(high, size);
      bool any = false, all = true;
      for (int32_t row = a; row <= b; ++row)
        for (int32_t column = c; column <= d; ++column) {
          const bool visible = block(row, column);
          any = any || visible;
          all = all && visible;
        }
      if (!any) return Tile::EMPTY;
      full = full && all;
    }
    return full ? Tile::FULL : Tile::PARTIAL;
  }

  bool block(int32_t row, int32_t column) const {
    return row >= 0 && column >= 0 && row < rule->blocks_rows && column < rule->blocks_columns &&
           blocks[row * rule->blocks_strides[2] + column] != 0;
  }

  // Whether the query in one slot sees the key in another.
  bool visible(int64_t i, int64_t j) const {
    const int32_t a = queries[i], b = keys[j];
    if (b < 0) return false;
    if (rule->causal && b > a) return false;
    if (rule->left >= 0 && static_cast<int64_t>(a) - b > rule->left) return false;
    if (rule->right >= 0 && static_cast<int64_t>(b) - a > rule->right) return false;
    if (rule->block > 0) {
      const int32_t size = static_cast<int32_t>(rule->block);
      const int32_t distance = floor_div(a, size) - floor_div(b, size);
      if (distance > rule->lookback || -distance > rule->lookahead) return false;
    }
    if (blocks != nullptr) {
      const int32_t size = static_cast<int32_t>(rule->block_size);
      return block(floor_div(a, size), floor_div(b, size));
    }
    return true;
  }
};

}  // namespace
}  // namespace REGARD_ISA
