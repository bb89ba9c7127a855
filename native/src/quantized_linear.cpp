// Few rows times a weight of 8 or 4 bits: codes are read once, turned into floats in registers and multiplied there, so that
// the time is that of reading them. Sums are float32.

#include "regard_quantized_linear.h"

#include "vector.h"

#include "parallel.h"
#include "workspace.h"

namespace REGARD_ISA {
namespace {

using regard::Workspace;
using Args = regard_quantized_linear_args;

constexpr int64_t BLOCK = 32;           // rows of W of a task: its codes stay in the cache for all rows of x
constexpr int64_t LEAST_WORK = 1 << 17;  // codes that are worth a thread
constexpr int64_t AHEAD = 512;          // bytes that are fetched before they are read

// LANES bytes as integers. Compilers turn them one by one where they are not told how.
REGARD_INLINE IntVec signed_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<IntVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  uint32_t word;
  __builtin_memcpy(&word, p, sizeof word);
#if defined(__SSE2__)
  const __m128i none = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(static_cast<int>(word));
  return reinterpret_cast<IntVec>(_mm_unpacklo_epi16(none, _mm_unpacklo_epi8(none, bytes))) >> 24;
#else
  return reinterpret_cast<IntVec>((UIntVec{} + word) << UIntVec{24, 16, 8, 0}) >> 24;
#endif
#endif
}
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

REGARD_INLINE Vec signed_codes(const int8_t* p) { return __builtin_convertvector(signed_bytes(p), Vec); }

// Two codes for each lane: those of even columns and those of odd ones.
REGARD_INLINE void half_codes(const uint8_t* p, Vec& even, Vec& odd) {
  const UIntVec both = unsigned_bytes(p);
#if defined(__AVX512F__)
  // a lookup reads the four low bits alone
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  even = reinterpret_cast<Vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(both), table));
  odd = reinterpret_cast<Vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(both >> 4), table));
#else
  even = __builtin_convertvector(reinterpret_cast<IntVec>(both & 15) - 8, Vec);
  odd = __builtin_convertvector(reinterpret_cast<IntVec>(both >> 4) - 8, Vec);
#endif
}

// The rows of x, as the products read them.
struct Inputs {
  const float* even;  // (M, stride): the rows, or for 4 bits their even columns
  const float* odd;   // (M, stride): the odd ones
  const float* sums;  // (M, groups): of each group, where there are offsets
  int64_t stride;
};

// One row of W after the other, as it lies in memory: what fetches ahead follows one stream better than several.
template <int TOKENS>
void product_8bit(const Args& a, const Inputs& x, int64_t row, int64_t token) {
  constexpr int CHAINS = 4 / TOKENS;  // sums that do not wait for each other
  const int8_t* const codes = static_cast<const int8_t*>(a.codes) + row * a.columns;
  Vec total[CHAINS][TOKENS];
#pragma GCC unroll 4
  for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[c][t] = zero();
  int64_t j = 0;
  const auto add = [&](int c, int64_t at) __attribute__((always_inline)) {
    __builtin_prefetch(codes + at + AHEAD);
    const Vec w = signed_codes(codes + at);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) total[c][t] = fma(w, load(x.even + (token + t) * x.stride + at), total[c][t]);
  };
  for (; j + CHAINS * LANES <= a.k; j += CHAINS * LANES) {
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) add(c, j + c * LANES);
  }
  for (; j + LANES <= a.k; j += LANES) add(0, j);
  const float scale = to_float(a.scale[row]), bias = a.bias == nullptr ? 0.f : a.bias[row];
  for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
    for (int c = 1; c < CHAINS; ++c) total[0][t] += total[c][t];
    float found = sum(total[0][t]);
    for (int64_t rest = j; rest < a.k; ++rest)
      found += static_cast<float>(codes[rest]) * x.even[(token + t) * x.stride + rest];
    a.y[(token + t) * a.n + row] = found * scale + bias;
  }
}

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
      float found = sum(total[i][t]) + (a.bias == nullptr ? 0.f : a.bias[row + i]);
      if (a.offset != nullptr)
        for (int64_t g = 0; g < groups; ++g)
          found += to_float(a.offset[(row + i) * groups + g]) * x.sums[(token + t) * groups + g];
      a.y[(token + t) * a.n + row + i] = found;
    }
}

template <int TOKENS>
void rows_of(const Args& a, const Inputs& x, int64_t first, int64_t last, int64_t token) {
  int64_t row = first;
  if (a.bits == 8) {
    for (; row < last; ++row) product_8bit<TOKENS>(a, x, row, token);
    return;
  }
  constexpr int ROWS = 4 / TOKENS;  // so that sums stay in registers
  for (; row + ROWS <= last; row += ROWS) product_4bit<ROWS, TOKENS>(a, x, row, token);
  for (; row < last; ++row) product_4bit<1, TOKENS>(a, x, row, token);
}

void block(const Args& a, const Inputs& x, int64_t first, int64_t last) {
  int64_t token = 0;
  for (; token + 4 <= a.m; token += 4) rows_of<4>(a, x, first, last, token);
  if (token + 2 <= a.m) {
    rows_of<2>(a, x, first, last, token);
    token += 2;
  }
  if (token < a.m) rows_of<1>(a, x, first, last, token);
}

// Even and odd columns apart, zeros behind the last.
void take_apart(const Args& a, float* even, float* odd, float* sums) {
  const int64_t half = a.columns / 2, groups = a.columns / a.group;
  for (int64_t t = 0; t < a.m; ++t) {
    const float* const x = a.x + t * a.x_stride;
    for (int64_t i = 0; i < half; ++i) {
      even[t * half + i] = 2 * i < a.k ? x[2 * i] : 0.f;
      odd[t * half + i] = 2 * i + 1 < a.k ? x[2 * i + 1] : 0.f;
    }
    if (sums == nullptr) continue;
    for (int64_t g = 0; g < groups; ++g) {
      float found = 0;
      for (int64_t j = g * a.group; j < least((g + 1) * a.group, a.k); ++j) found += x[j];
      sums[t * groups + g] = found;
    }
  }
}

bool wrong(const Args& a) {
  if (a.threads < 1 || a.m < 0 || a.n < 0 || a.k < 0) return true;
  if (a.bits == 8) return a.columns != a.k || a.offset != nullptr;
  return a.bits != 4 || a.group < 32 || a.group % 32 != 0 || a.columns % a.group != 0 || a.columns < a.k;
}

}  // namespace

int quantized_linear(const regard_quantized_linear_args* args) {
  const Args& a = *args;
  if (wrong(a)) return REGARD_BAD_ARGUMENT;
  if (a.m * a.n == 0) return REGARD_OK;
  const bool apart = a.bits == 4;
  const size_t halves = apart ? static_cast<size_t>(a.m * a.columns / 2) : 0;
  const size_t sums = apart && a.offset != nullptr ? static_cast<size_t>(a.m * (a.columns / a.group)) : 0;
  Workspace workspace(2 * Workspace::bytes_of<float>(halves) + Workspace::bytes_of<float>(sums));
  Inputs x{a.x, nullptr, nullptr, a.x_stride};
  if (apart) {
    if (!workspace) return REGARD_OUT_OF_MEMORY;
    float *const even = workspace.take<float>(halves), *const odd = workspace.take<float>(halves);
    float* const total = sums == 0 ? nullptr : workspace.take<float>(sums);
    take_apart(a, even, odd, total);
    x = {even, odd, total, a.columns / 2};
  }
  const int64_t tasks = ceil_div(a.n, BLOCK);
  const int64_t threads = least(least<int64_t>(a.threads, 64), most<int64_t>(1, a.n * a.k / LEAST_WORK));
  parallel_tasks(static_cast<int>(threads), static_cast<long>(tasks), [&](long task) {
    block(a, x, task * BLOCK, least((task + 1) * BLOCK, a.n));
  });
  return REGARD_OK;
}

}  // namespace REGARD_ISA
