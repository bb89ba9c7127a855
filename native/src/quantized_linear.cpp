// Few rows times a weight of 8 or 4 bits: codes are read once, so that the time is that of reading them. They are
// converted to floats in registers and multiplied there. With byte dot products (VNNI), inputs are represented by 8-bit
// digits instead: three, or one for inputs that are rounded to 8 bits. Weights in float32 are read as they are.

#include "regard_quantized_linear.h"

#include "digits.h"
#include "lanes.h"

#include "lane_sums.h"
#include "parallel.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;
using Args = regard_quantized_linear_args;

constexpr int64_t BLOCK = 32;           // rows of W whose codes stay in cache for all rows of x
constexpr int64_t TASKS = 4;            // tasks per thread, each at least a block and one stream from memory
constexpr int64_t LEAST_WORK = 1 << 17;  // fewest codes that are worth a thread
constexpr int64_t AHEAD = 1024;         // distance of prefetching, in bytes
constexpr int64_t FAR = 8192;           // the same for the second-level cache
constexpr int64_t NEAR = 512;           // the same for reads of parts of a cache line, where prefetching is limited

REGARD_INLINE UIntVec unsigned_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<UIntVec>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<UIntVec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
#if defined(__SSE2__)
  const __m128i none = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(static_cast<int>(word));
  return reinterpret_cast<UIntVec>(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, none), none));
#else
  return ((UIntVec{} + word) >> UIntVec{0, 8, 16, 24}) & 255u;
#endif
#endif
}

// Two 4-bit codes for each lane: of an even column and of an odd one.
REGARD_INLINE void half_codes(const uint8_t* p, Vec& even, Vec& odd) {
  const UIntVec both = unsigned_bytes(p);
#if defined(__AVX512F__)
  // the lookup only uses the four low bits
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  even = reinterpret_cast<Vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(both), table));
  odd = reinterpret_cast<Vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(both >> 4), table));
#else
  even = __builtin_convertvector(reinterpret_cast<IntVec>(both & 15) - 8, Vec);
  odd = __builtin_convertvector(reinterpret_cast<IntVec>(both >> 4) - 8, Vec);
#endif
}

// Prefetches after the bytes at `p`, but not beyond the task's own codes, which end at `end`.
REGARD_INLINE void fetch(const void* p, const void* end) {
  const char* const last = static_cast<const char*>(end) - 1;
  const char* const from = static_cast<const char*>(p);
  __builtin_prefetch(from + AHEAD < last ? from + AHEAD : last);
  __builtin_prefetch(from + FAR < last ? from + FAR : last, 0, 2);
}

// The rows of x in the form that the products read.
struct Inputs {
  const float* even;  // (M, stride): the rows, or with 4 bits their even columns
  const float* odd;   // (M, stride): their odd columns
  const float* sums;  // (M, groups): sums over each group, if there are offsets
  int64_t stride;
#if defined(__AVX512VNNI__)
  const Digits* digits;  // (M, steps), instead of floats
  const int8_t* bytes;   // (steps, M, count, STEP), instead of both: each digit of the inputs, padded with zeros
  const int32_t* start;  // (M, count, LANES): corrects for the offset of codes, which count from 0 in products of bytes
  int count;             // number of digits
  const float* step;     // (M,): the value of a digit's unit; nullptr without digits or bytes
  int64_t steps;
#endif
};

// The contribution of the offsets of a row of W.
REGARD_INLINE float of_offsets(const Args& a, const Inputs& x, int64_t row, int64_t token, int64_t groups) {
  if (a.offset == nullptr) return 0.f;
  const bfloat16* const offset = a.offset + row * groups;
  const float* const sums = x.sums + token * groups;
  Vec total = zero();
  for (int64_t g = 0; g < groups; g += LANES) {
    const int count = static_cast<int>(least<int64_t>(LANES, groups - g));
    total = count == LANES ? fma(load(offset + g), load(sums + g), total)
                           : fma(load(offset + g, count), load(sums + g, count), total);
  }
  return sum(total);
}

#if defined(__AVX512VNNI__)
// Writes results from sums ordered by row, then token: scaled(row, token, sum) plus the bias.
template <int TOKENS, class Scaled>
REGARD_INLINE void put_results(const Args& a, int64_t row, int rows, int64_t token, Vec sums, Scaled&& scaled) {
  float by[LANES];
  store(by, sums);
  for (int r = 0; r < rows; ++r) {
    const float bias = a.bias == nullptr ? 0.f : a.bias[row + r];
    for (int t = 0; t < TOKENS; ++t)
      a.y[(token + t) * a.n + row + r] = scaled(row + r, token + t, by[r * TOKENS + t]) + bias;
  }
}

// As many rows as fill a vector with their results, of which `rows` exist.
template <int TOKENS>
void product_of_digits(const Args& a, const Inputs& x, int64_t row, int rows, int64_t token) {
  constexpr int ROWS = LANES / TOKENS;
  const int64_t width = a.columns / 2, groups = a.columns / a.group;
  const int64_t of_step = 2 * STEP / a.group;  // groups in a step: 4, 2 or 1; fewer in the last step
  const int64_t full = width / STEP, left = width - full * STEP;
  const __m512i low_half = _mm512_set1_epi8(15);
  // A scale is placed in the upper half of each lane of its group, which makes it a float32.
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i place = _mm512_slli_epi32(_mm512_srli_epi32(lane, of_step == 4 ? 2 : of_step == 2 ? 3 : 4), 16);
  Vec found[LANES];
  // not unrolled: the hardware prefetcher tracks a single load instruction
#pragma GCC unroll 1
  for (int r = 0; r < ROWS; ++r) {
    const int64_t at = row + least(r, rows - 1);
    const uint8_t* const codes = static_cast<const uint8_t*>(a.codes) + at * width;
    __m512 total[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[t] = _mm512_setzero_ps();
    const auto add = [&](int64_t s, __mmask64 which, __mmask8 scales) __attribute__((always_inline)) {
      const __m512i both = _mm512_maskz_loadu_epi8(which, codes + s * STEP);
      const __m512i low = _mm512_and_si512(both, low_half);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
      const __m128i own = _mm_maskz_loadu_epi16(scales, a.scale + at * groups + s * of_step);
      const __m512i placed = _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, _mm512_castsi128_si512(own));
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const Digits& digits = x.digits[(token + t) * x.steps + s];
        const __m512 sums = _mm512_cvtepi32_ps(product(digits.start, low, high, digits));
        total[t] = _mm512_fmadd_ps(sums, _mm512_castsi512_ps(placed), total[t]);
      }
    };
    for (int64_t s = 0; s < full; ++s) add(s, ~__mmask64{0}, static_cast<__mmask8>((1 << of_step) - 1));
    if (left) add(full, (__mmask64{1} << left) - 1, static_cast<__mmask8>((1 << (groups - full * of_step)) - 1));
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) found[r * TOKENS + t] = reinterpret_cast<Vec>(total[t]);
  }
  put_results<TOKENS>(a, row, rows, token, sums_of(found), [&](int64_t at, int64_t t, float sum) {
    return sum * x.step[t] + of_offsets(a, x, at, t, groups);
  });
}
#endif

REGARD_INLINE Vec numbers(const int8_t* p) { return __builtin_convertvector(signed_bytes(p), Vec); }
REGARD_INLINE Vec numbers(const float* p) { return load(p); }

// Rows with one scale or none: one after the other, in memory order, since the hardware prefetcher follows one stream
// better than several.
template <int TOKENS, class T>
void product_of_rows(const Args& a, const Inputs& x, int64_t row, int64_t token, int64_t end) {
  constexpr int CHAINS = 4 / TOKENS;  // independent sums
  const T* const codes = static_cast<const T*>(a.codes) + row * a.columns;
  Vec total[CHAINS][TOKENS];
#pragma GCC unroll 4
  for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[c][t] = zero();
  const T* const last = static_cast<const T*>(a.codes) + end * a.columns;
  int64_t j = 0;
  const auto add = [&](int c, int64_t at) __attribute__((always_inline)) {
    if (sizeof(T) == 1)
      __builtin_prefetch(codes + at + NEAR);
    else
      fetch(codes + at, last);
    const Vec w = numbers(codes + at);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[c][t] = fma(w, load(x.even + (token + t) * x.stride + at), total[c][t]);
  };
  for (; j + CHAINS * LANES <= a.k; j += CHAINS * LANES) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) add(c, j + c * LANES);
  }
  for (; j + LANES <= a.k; j += LANES) add(0, j);
  const float scale = a.scale == nullptr ? 1.f : to_float(a.scale[row]), bias = a.bias == nullptr ? 0.f : a.bias[row];
  for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) total[0][t] += total[c][t];
    float found = sum(total[0][t]);
    for (int64_t rest = j; rest < a.k; ++rest)
      found += static_cast<float>(codes[rest]) * x.even[(token + t) * x.stride + rest];
    a.y[(token + t) * a.n + row] = found * scale + bias;
  }
}

#if defined(__AVX512VNNI__)
// As many rows as fill a vector with their results, of which `rows` exist.
template <int COUNT, int TOKENS>
void product_of_bytes(const Args& a, const Inputs& x, int64_t row, int rows, int64_t token, int64_t end) {
  constexpr int SUMS = COUNT * TOKENS, ROWS = LANES / TOKENS;
  const int64_t line = a.m * COUNT * STEP, full = a.k / STEP, left = a.k - full * STEP;
  const __m512i middle = _mm512_set1_epi8(-128);
  Vec found[LANES];
  // not unrolled: the hardware prefetcher tracks a single load instruction
#pragma GCC unroll 1
  for (int r = 0; r < ROWS; ++r) {
    const int8_t* const codes = static_cast<const int8_t*>(a.codes) + (row + least(r, rows - 1)) * a.k;
    const int8_t* inputs = x.bytes + token * COUNT * STEP;
    __m512i total[SUMS];
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; ++i) total[i] = _mm512_loadu_si512(x.start + (token * COUNT + i) * LANES);
    const auto add = [&](int64_t s, __mmask64 which) __attribute__((always_inline)) {
      fetch(codes + s * STEP, static_cast<const int8_t*>(a.codes) + end * a.k);
      const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(which, codes + s * STEP), middle);
#pragma GCC unroll 32
      for (int i = 0; i < SUMS; ++i)
        total[i] = _mm512_dpbusd_epi32(total[i], w, _mm512_loadu_si512(inputs + i * STEP));
      inputs += line;
    };
    for (int64_t s = 0; s < full; ++s) add(s, ~__mmask64{0});
    if (left) add(full, (__mmask64{1} << left) - 1);
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; ++t) {
      __m512 sum = _mm512_cvtepi32_ps(total[t * COUNT + COUNT - 1]);
#pragma GCC unroll 2
      for (int d = COUNT - 2; d >= 0; --d)
        sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256), _mm512_cvtepi32_ps(total[t * COUNT + d]));
      found[r * TOKENS + t] = reinterpret_cast<Vec>(sum);
    }
  }
  put_results<TOKENS>(a, row, rows, token, sums_of(found), [&](int64_t at, int64_t t, float sum) {
    return sum * (x.step[t] * to_float(a.scale[at]));
  });
}
#endif

template <int ROWS, int TOKENS>
void product_4bit(const Args& a, const Inputs& x, int64_t row, int64_t token) {
  const int64_t bytes = a.columns / 2, part = a.group / 2, groups = a.columns / a.group;
  const uint8_t* const codes = static_cast<const uint8_t*>(a.codes) + row * bytes;
  const float *const even = x.even + token * x.stride, *const odd = x.odd + token * x.stride;
  Vec total[ROWS][TOKENS];
#pragma GCC unroll 4
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[i][t] = zero();
  for (int64_t g = 0; g < groups; ++g) {
    Vec own[ROWS][TOKENS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) own[i][t] = zero();
    for (int64_t j = g * part; j < (g + 1) * part; j += LANES) {
#pragma GCC unroll 4
      for (int i = 0; i < ROWS; ++i) {
        Vec low, high;
        half_codes(codes + i * bytes + j, low, high);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t)
          own[i][t] = fma(low, load(even + t * x.stride + j), fma(high, load(odd + t * x.stride + j), own[i][t]));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      const Vec scale = broadcast(to_float(a.scale[(row + i) * groups + g]));
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) total[i][t] = fma(scale, own[i][t], total[i][t]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int t = 0; t < TOKENS; ++t) {
      const float bias = a.bias == nullptr ? 0.f : a.bias[row + i];
      a.y[(token + t) * a.n + row + i] = sum(total[i][t]) + of_offsets(a, x, row + i, token + t, groups) + bias;
    }
}

template <int TOKENS>
void rows_of(const Args& a, const Inputs& x, int64_t first, int64_t last, int64_t token, [[maybe_unused]] int64_t end) {
  int64_t row = first;
  if (a.bits == 32) {
    for (; row < last; ++row) product_of_rows<TOKENS, float>(a, x, row, token, end);
    return;
  }
  if (a.bits == 8) {
    for (; row < last; ++row) product_of_rows<TOKENS, int8_t>(a, x, row, token, end);
    return;
  }
#if defined(__AVX512VNNI__)
  if (x.step != nullptr) {
    for (; row < last; row += LANES / TOKENS)
      product_of_digits<TOKENS>(a, x, row, static_cast<int>(least<int64_t>(LANES / TOKENS, last - row)), token);
    return;
  }
#endif
  constexpr int ROWS = 4 / TOKENS;  // few enough for sums to stay in registers
  for (; row + ROWS <= last; row += ROWS) product_4bit<ROWS, TOKENS>(a, x, row, token);
  for (; row < last; ++row) product_4bit<1, TOKENS>(a, x, row, token);
}

#if defined(__AVX512VNNI__)
// Processes TOKENS tokens at a time, as many as have sums in registers; returns the first token that is left.
template <int COUNT, int TOKENS>
int64_t rows_of_bytes(const Args& a, const Inputs& x, int64_t first, int64_t last, int64_t token, int64_t end) {
  constexpr int ROWS = LANES / TOKENS;
  for (; token + TOKENS <= a.m; token += TOKENS)
    for (int64_t row = first; row < last; row += ROWS)
      product_of_bytes<COUNT, TOKENS>(a, x, row, static_cast<int>(least<int64_t>(ROWS, last - row)), token, end);
  return token;
}
#endif

// Rows [first, last) of W for all rows of x; `end` is the end of the task's rows.
void block(const Args& a, const Inputs& x, int64_t first, int64_t last, int64_t end) {
  int64_t token = 0;
#if defined(__AVX512VNNI__)
  if (x.bytes != nullptr) {
    if (x.count == 1) {
      token = rows_of_bytes<1, 16>(a, x, first, last, token, end);
      token = rows_of_bytes<1, 4>(a, x, first, last, token, end);
      rows_of_bytes<1, 1>(a, x, first, last, token, end);
    } else {
      token = rows_of_bytes<DIGITS, 4>(a, x, first, last, token, end);
      token = rows_of_bytes<DIGITS, 2>(a, x, first, last, token, end);
      rows_of_bytes<DIGITS, 1>(a, x, first, last, token, end);
    }
    return;
  }
#endif
  for (; token + 4 <= a.m; token += 4) rows_of<4>(a, x, first, last, token, end);
  if (token + 2 <= a.m) {
    rows_of<2>(a, x, first, last, token, end);
    token += 2;
  }
  if (token < a.m) rows_of<1>(a, x, first, last, token, end);
}

// Splits x into even and odd columns, padded with zeros.
void take_apart(const Args& a, float* even, float* odd) {
  const int64_t half = a.columns / 2;
  for (int64_t t = 0; t < a.m; ++t) {
    const float* const x = a.x + t * a.x_stride;
    for (int64_t i = 0; i < half; ++i) {
      even[t * half + i] = 2 * i < a.k ? x[2 * i] : 0.f;
      odd[t * half + i] = 2 * i + 1 < a.k ? x[2 * i + 1] : 0.f;
    }
  }
}

void sum_groups(const Args& a, float* sums) {
  const int64_t groups = a.columns / a.group;
  for (int64_t t = 0; t < a.m; ++t)
    for (int64_t g = 0; g < groups; ++g) {
      float found = 0;
      for (int64_t j = g * a.group; j < least((g + 1) * a.group, a.k); ++j) found += a.x[t * a.x_stride + j];
      sums[t * groups + g] = found;
    }
}

// Weights with the same input; their common options are those of the first.
struct Weights {
  const Args* first;
  int count;

  const Args& operator*() const { return *first; }
  bool have_offsets() const {
    bool found = false;
    for (int i = 0; i < count; ++i) found |= first[i].offset != nullptr;
    return found;
  }
};

void multiply(const Weights& all, const Inputs& x) {
  int64_t work = 0;
  for (int i = 0; i < all.count; ++i) work += all.first[i].n * all.first[i].k;
  const int64_t threads = least(least<int64_t>((*all).threads, 64), most<int64_t>(1, work / LEAST_WORK));
  const auto rows_of_task = [&](const Args& a) { return round_up(ceil_div(a.n, threads * TASKS), BLOCK); };
  int64_t tasks = 0;
  for (int i = 0; i < all.count; ++i) tasks += ceil_div(all.first[i].n, rows_of_task(all.first[i]));
  parallel_tasks(static_cast<int>(threads), static_cast<long>(tasks), [&](int64_t task) {
    const Args* a = all.first;
    for (int64_t own; task >= (own = ceil_div(a->n, rows_of_task(*a))); ++a) task -= own;
    const int64_t first = task * rows_of_task(*a), end = least(first + rows_of_task(*a), a->n);
    for (int64_t row = first; row < end; row += BLOCK) block(*a, x, row, least(row + BLOCK, end), end);
  });
}

// The rounding step of a row with this largest magnitude when rounded to 8 bits.
float step_of(float largest) { return (largest > 1e-30f ? largest : 1e-30f) / 127.f; }

void round_rows(const Args& a, float* rounded) {
  for (int64_t t = 0; t < a.m; ++t) {
    const float* const x = a.x + t * a.x_stride;
    float largest = 0;
    for (int64_t i = 0; i < a.k; ++i) {
      const float size = __builtin_fabsf(x[i]);
      largest = size > largest || size != size ? size : largest;  // NaN stays
    }
    const float step = largest != largest ? largest : step_of(largest);
    for (int64_t i = 0; i < a.k; ++i) rounded[t * a.k + i] = __builtin_rintf(x[i] / step) * step;
  }
}

#if defined(__AVX512VNNI__)
// Whether digits can represent the rows: no infinities, NaN or extreme magnitudes. Sets `step`.
bool has_steps(const Args& a, float* step) {
  for (int64_t t = 0; t < a.m; ++t) {
    const float found = largest(a.x + t * a.x_stride, a.k);
    if (!(found == 0.f || (found > 1e-25f && found < 1e35f))) return false;
    step[t] = found == 0.f ? 1.f : found / LARGEST;
  }
  return true;
}

// Multiplies 4-bit codes by digits; returns false if that is not possible.
bool multiplied_by_digits(const Weights& all) {
  const Args& a = *all;
  const int64_t steps = ceil_div(a.columns / 2, STEP);
  const size_t rows = static_cast<size_t>(a.m), count = rows * static_cast<size_t>(steps);
  const size_t sums = all.have_offsets() ? rows * static_cast<size_t>(a.columns / a.group) : 0;
  Workspace workspace(Workspace::bytes_of<float>(rows) + Workspace::bytes_of<float>(sums) +
                      Workspace::bytes_of<Digits>(count));
  if (!workspace) return false;
  float *const step = workspace.take<float>(rows), *const of_groups = sums == 0 ? nullptr : workspace.take<float>(sums);
  if (2 * STEP % a.group != 0 || !has_steps(a, step)) return false;
  if (of_groups != nullptr) sum_groups(a, of_groups);
  Digits* const digits = workspace.take<Digits>(count);
  for (int64_t t = 0; t < a.m; ++t)
    digits_of_row(a.x + t * a.x_stride, a.k, 1.f / step[t], steps, digits + t * steps);
  Inputs given{};
  given.sums = of_groups;
  given.digits = digits;
  given.step = step;
  given.steps = steps;
  multiply(all, given);
  return true;
}

// Multiplies 8-bit codes by digits, or by the single digit of rounded inputs; returns false if that is not possible.
bool multiplied_by_bytes(const Weights& all) {
  const Args& a = *all;
  if (a.k > MOST_COLUMNS) return false;
  const int count = a.rounded ? 1 : DIGITS;
  const int64_t steps = ceil_div(a.k, STEP);
  const size_t rows = static_cast<size_t>(a.m), digits = rows * static_cast<size_t>(count);
  Workspace workspace(Workspace::bytes_of<float>(rows) + Workspace::bytes_of<int32_t>(digits * LANES) +
                      Workspace::bytes_of<int8_t>(digits * static_cast<size_t>(steps * STEP)));
  if (!workspace) return false;
  float* const step = workspace.take<float>(rows);
  int32_t* const start = workspace.take<int32_t>(digits * LANES);
  int8_t* const bytes = workspace.take<int8_t>(digits * static_cast<size_t>(steps * STEP));
  if (!a.rounded && !has_steps(a, step)) return false;
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t t = 0; t < a.m; ++t) {
    const float* const x = a.x + t * a.x_stride;
    if (a.rounded) {
      const float found = largest(x, a.k);
      if (!(found < 1e38f)) return false;
      step[t] = step_of(found);
    }
    const Vec per_step = broadcast(step[t]);
    __m512i sums[DIGITS] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t s = 0; s < steps; ++s) {
      __m512i q[4], made[DIGITS];
      for (int i = 0; i < 4; ++i) {
        const int64_t at = s * STEP + i * LANES;
        const int lanes = static_cast<int>(most<int64_t>(0, least<int64_t>(LANES, a.k - at)));
        q[i] = _mm512_cvtps_epi32(reinterpret_cast<__m512>(load(x + least(at, a.k), lanes) / per_step));
      }
      take_digits(q, made);
      for (int d = 0; d < count; ++d) {
        _mm512_storeu_si512(bytes + ((s * a.m + t) * count + d) * STEP, made[d]);
        sums[d] = _mm512_dpbusd_epi32(sums[d], ones, made[d]);
      }
    }
    for (int d = 0; d < count; ++d)
      _mm512_storeu_si512(start + (t * count + d) * LANES, _mm512_mullo_epi32(sums[d], _mm512_set1_epi32(-128)));
  }
  Inputs given{};
  given.bytes = bytes;
  given.start = start;
  given.count = count;
  given.step = step;
  given.steps = steps;
  multiply(all, given);
  return true;
}
#endif

bool wrong(const Args& a) {
  if (a.threads < 1 || a.m < 0 || a.n < 0 || a.k < 0) return true;
  if (a.rounded && a.bits != 8) return true;
  if (a.bits == 32) return a.columns != a.k || a.scale != nullptr || a.offset != nullptr;
  if (a.bits == 8) return a.columns != a.k || a.offset != nullptr;
  return a.bits != 4 || a.group < 32 || a.group % 32 != 0 || a.columns % a.group != 0 || a.columns < a.k;
}

int run(const Weights& all) {
  const Args& a = *all;
  if (a.m * a.n == 0) return REGARD_OK;
#if defined(__AVX512VNNI__)
  if (a.bits == 4 && multiplied_by_digits(all)) return REGARD_OK;
  if (a.bits == 8 && multiplied_by_bytes(all)) return REGARD_OK;
#endif
  Inputs x{};
  x.even = a.x;
  x.stride = a.x_stride;
  const bool apart = a.bits == 4;
  const size_t halves = apart ? static_cast<size_t>(a.m * a.columns / 2) : 0;
  const size_t sums = apart && all.have_offsets() ? static_cast<size_t>(a.m * (a.columns / a.group)) : 0;
  const size_t count = a.rounded ? static_cast<size_t>(a.m * a.k) : 0;
  Workspace workspace(2 * Workspace::bytes_of<float>(halves) + Workspace::bytes_of<float>(sums) +
                      Workspace::bytes_of<float>(count));
  if (!workspace) return REGARD_OUT_OF_MEMORY;
  if (a.rounded) {
    float* const rounded = workspace.take<float>(count);
    round_rows(a, rounded);
    x.even = rounded;
    x.stride = a.k;
  }
  if (apart) {
    float *const even = workspace.take<float>(halves), *const odd = workspace.take<float>(halves);
    float* const of_groups = sums == 0 ? nullptr : workspace.take<float>(sums);
    take_apart(a, even, odd);
    if (of_groups != nullptr) sum_groups(a, of_groups);
    x.even = even;
    x.odd = odd;
    x.sums = of_groups;
    x.stride = a.columns / 2;
  }
  multiply(all, x);
  return REGARD_OK;
}

bool share_inputs(const Args& a, const Args& b) {
  return a.x == b.x && a.x_stride == b.x_stride && a.m == b.m && a.k == b.k && a.bits == b.bits && a.columns == b.columns &&
         a.group == b.group && a.rounded == b.rounded && a.threads == b.threads && a.n > 0 && b.n > 0;
}

}  // namespace

// Several products; consecutive ones with the same input and format are computed together.
int quantized_linears(const regard_quantized_linear_args* args, int count) {
  for (int i = 0; i < count; ++i)
    if (wrong(args[i])) return REGARD_BAD_ARGUMENT;
  for (int i = 0, end = 0; i < count; i = end) {
    for (end = i + 1; end < count && share_inputs(args[i], args[end]);) ++end;
    const int status = run(Weights{args + i, end - i});
    if (status != REGARD_OK) return status;
  }
  return REGARD_OK;
}

int quantized_linear(const regard_quantized_linear_args* args) { return quantized_linears(args, 1); }

}  // namespace REGARD_ISA
