// Attention of a token to part of its cache: the pages that may hold its largest scores (Quest, arXiv 2406.10774).
//
// The elementwise minimum and maximum of a page's keys bound its scores,
//
//     q . k <= sum_d max(q_d low_d, q_d high_d) = max(q, 0) . high + min(q, 0) . low
//
// so that a page costs two products: with the positive and the negative part of a head's query or, if heads read the
// same pages, with the sums of these parts. The chosen pages form a table, with which the decoding kernel reads keys
// and values in place.

#include "regard_attention.h"
#include "regard_quest_attention.h"

#include "vector.h"

#include "lane_sums.h"
#include "parallel.h"
#include "workspace.h"

namespace REGARD_ISA {

int attention_decode(const regard_attention_decode_args* decode);

namespace {

using regard::Workspace;
using Args = regard_quest_attention_args;

constexpr int64_t SCORED = 64;             // pages in a task
constexpr int64_t LEAST_SCORED = 1 << 17;  // fewest numbers in bounds that are worth several threads

// A line is one or all query heads of a (row, kv head): those that read the same pages. Lines are numbered by (row, kv
// head).
struct Problem {
  const Args* args;
  int64_t units, lines_each, heads_each;  // number of (row, kv head)s, of lines in each, of heads in a line
  int64_t held, columns;                  // pages of a (row, kv head), and in a line's table
  int64_t query_line, score_line;
  float* positive;  // (lines, query_line), zeros beyond the width
  float* negative;
  float* scores;   // (lines, score_line)
  uint32_t* order;  // (lines, score_line)
  int64_t* table;   // (lines, columns)
  int64_t* lengths;  // (lines,)

  // Number of complete pages before that of the newest key.
  int64_t past(int64_t unit) const { return most(args->counts[unit] - 1, int64_t{0}) / args->page_size; }
};

template <class T>
void take_parts(const Problem& problem, int64_t line) {
  const Args& a = *problem.args;
  float* positive = problem.positive + line * problem.query_line;
  float* negative = problem.negative + line * problem.query_line;
  for (int64_t p = 0; p < problem.query_line; ++p) positive[p] = negative[p] = 0.f;
  for (int64_t h = line * problem.heads_each; h < (line + 1) * problem.heads_each; ++h) {
    const T* q = static_cast<const T*>(a.q) + h * a.q_strides[1];
    for (int64_t p = 0; p < a.width; ++p) {
      const float x = to_float(q[p]);
      // a NaN goes into both, so that every page's score is NaN
      positive[p] += x < 0.f ? 0.f : x;
      negative[p] += x > 0.f ? 0.f : x;
    }
  }
}

// Score bounds of pages [from, to) of a (row, kv head), for each of its lines.
template <class T>
void score(const Problem& problem, int64_t unit, int64_t from, int64_t to) {
  const int64_t width = problem.args->width;
  const T* low = static_cast<const T*>(problem.args->low) + unit * problem.held * width;
  const T* high = static_cast<const T*>(problem.args->high) + unit * problem.held * width;
  for (int64_t page = from; page < to; page += LANES) {
    const int count = static_cast<int>(least(static_cast<int64_t>(LANES), to - page));
    for (int64_t line = unit * problem.lines_each; line < (unit + 1) * problem.lines_each; ++line) {
      const float* positive = problem.positive + line * problem.query_line;
      const float* negative = problem.negative + line * problem.query_line;
      const T *above = high + page * width, *below = low + page * width;
      const Vec found = count == LANES ? dots<false>(above, width, LANES, positive, width) +
                                             dots<false>(below, width, LANES, negative, width)
                                       : dots<true>(above, width, count, positive, width) +
                                             dots<true>(below, width, count, negative, width);
      store(problem.scores + line * problem.score_line + page, found, count);
    }
  }
}

// Maps floats to integers in the same order, with NaN as the largest.
REGARD_INLINE uint32_t ordered(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t found = bits >> 31 ? ~bits : bits | 0x80000000u;
  return x != x ? UINT32_MAX : found;
}

// Lists the pages of the `chosen` largest scores in ascending order; ties go to the first.
void choose(const float* scores, uint32_t* order, int64_t count, int64_t chosen, int64_t first, int64_t* pages) {
  for (int64_t i = 0; i < count; ++i) order[i] = ordered(scores[i]);
  uint32_t limit = 0;  // the largest number that `chosen` scores reach, found bit by bit
  int64_t above = 0;   // how many exceed it
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t higher = limit | uint32_t{1} << bit;
    int32_t reached = 0;
    for (int64_t i = 0; i < count; ++i) reached += order[i] >= higher;
    if (reached >= chosen)
      limit = higher;
    else
      above = reached;
  }
  int64_t equal = chosen - above;
  for (int64_t i = 0; i < count; ++i)
    if (order[i] > limit || (order[i] == limit && equal-- > 0)) *pages++ = first + i;
}

// Writes the table of a line: pages numbered over all (row, kv head)s.
void list_pages(const Problem& problem, int64_t line) {
  const Args& a = *problem.args;
  const int64_t unit = line / problem.lines_each, past = problem.past(unit), chosen = least(a.chosen, past);
  const int64_t first = unit * problem.held;
  int64_t* pages = problem.table + line * problem.columns;
  if (chosen == past)
    for (int64_t i = 0; i < past; ++i) pages[i] = first + i;
  else
    choose(problem.scores + line * problem.score_line, problem.order + line * problem.score_line, past, chosen, first,
           pages);
  pages[chosen] = first + past;
  problem.lengths[line] = a.counts[unit] - (past - chosen) * a.page_size;
}

template <class T>
int run(const Args& a) {
  Problem problem{};
  problem.args = &a;
  problem.units = a.batch * a.kv_heads;
  problem.heads_each = a.shared ? a.heads / a.kv_heads : 1;
  problem.lines_each = a.heads / a.kv_heads / problem.heads_each;
  problem.held = a.m / a.page_size;
  problem.columns = least(a.chosen, problem.held - 1) + 1;
  problem.query_line = round_up(a.width, static_cast<int64_t>(LANES));
  problem.score_line = round_up(problem.held, static_cast<int64_t>(LANES));
  const int64_t lines = problem.units * problem.lines_each;

  const size_t floats = static_cast<size_t>(lines * problem.query_line);
  const size_t scores = static_cast<size_t>(lines * problem.score_line);
  const size_t places = static_cast<size_t>(lines * problem.columns);
  Workspace space(2 * Workspace::bytes_of<float>(floats) + 2 * Workspace::bytes_of<float>(scores) +
                  Workspace::bytes_of<int64_t>(places) + Workspace::bytes_of<int64_t>(static_cast<size_t>(lines)));
  if (!space) return REGARD_OUT_OF_MEMORY;
  problem.positive = space.take<float>(floats);
  problem.negative = space.take<float>(floats);
  problem.scores = space.take<float>(scores);
  problem.order = space.take<uint32_t>(scores);
  problem.table = space.take<int64_t>(places);
  problem.lengths = space.take<int64_t>(static_cast<size_t>(lines));

  int64_t scored = 0;  // most pages that any unit scores
  for (int64_t unit = 0; unit < problem.units; ++unit)
    if (problem.past(unit) > a.chosen) scored = most(scored, problem.past(unit));
  const bool many = 2 * problem.units * scored * a.width >= LEAST_SCORED;
  const int threads = static_cast<int>(many ? most(a.threads, int64_t{1}) : 1);
  if (scored > 0) {
    for (int64_t line = 0; line < lines; ++line) take_parts<T>(problem, line);
    const int64_t each = ceil_div(scored, SCORED);
    parallel_tasks(threads, static_cast<long>(problem.units * each), [&](long task) {
      const int64_t unit = task / each, from = task % each * SCORED, past = problem.past(unit);
      if (past > a.chosen) score<T>(problem, unit, from, least(from + SCORED, past));
    });
  }
  parallel_tasks(threads, static_cast<long>(lines), [&](long line) { list_pages(problem, line); });

  const int64_t rank = 0;  // rank of every query: each sees all keys of its pages
  regard_attention_args read{};
  read.size = sizeof read;
  read.threads = a.threads;
  read.dtype = a.dtype;
  read.q = a.q, read.k = a.k, read.v = a.v, read.out = a.out;
  read.batch = lines, read.heads = problem.heads_each, read.kv_heads = 1;
  read.n = 1, read.m = problem.columns * a.page_size;
  read.width = a.width, read.value_width = a.value_width;
  read.q_strides[0] = problem.heads_each * a.q_strides[1], read.q_strides[1] = a.q_strides[1];
  read.k_strides[0] = a.page_size * a.width, read.k_strides[2] = a.width;
  read.v_strides[0] = a.page_size * a.value_width, read.v_strides[2] = a.value_width;
  read.out_strides[0] = problem.heads_each * a.out_strides[1], read.out_strides[1] = a.out_strides[1];
  read.scale = a.scale;
  read.visibility.query_ranks = &rank;
  read.visibility.left = read.visibility.right = -1;
  regard_attention_decode_args decode{};
  decode.size = sizeof decode;
  decode.forward = &read;
  decode.pages = problem.table;
  decode.pages_stride = problem.columns;
  decode.page_size = a.page_size;
  decode.lengths = problem.lengths;
  return attention_decode(&decode);
}

bool wrong(const Args& a) {
  if (a.kv_heads < 1 || a.heads % a.kv_heads != 0 || a.width < 1 || a.n != 1) return true;
  if (a.page_size < 1 || a.chosen < 0 || a.m < a.page_size || a.m % a.page_size != 0) return true;
  for (int64_t unit = 0; unit < a.batch * a.kv_heads; ++unit)
    if (a.counts[unit] < 0 || a.counts[unit] > a.m) return true;
  return false;
}

}  // namespace

int quest_attention(const regard_quest_attention_args* args) {
  if (wrong(*args)) return REGARD_BAD_ARGUMENT;
  if (args->batch * args->heads == 0) return REGARD_OK;
  return args->dtype == REGARD_BFLOAT16 ? run<bfloat16>(*args) : run<float>(*args);
}

}  // namespace REGARD_ISA
