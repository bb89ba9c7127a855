// The machine's roofline: speed of fused multiply-adds in registers, and of reading or rewriting memory.

#include "regard_machine.h"

#include <time.h>

#include "vector.h"

#include "parallel.h"

namespace REGARD_ISA {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Enough independent sums to hide the latency of multiply-adds at two per cycle.
constexpr int SUMS = REGISTERS >= 32 ? 16 : 12;
constexpr int ROUNDS = 20000;

__attribute__((noinline)) float multiply_add(float seed) {
  Vec sums[SUMS];
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; ++i) sums[i] = broadcast(seed + static_cast<float>(i));
  Vec a = broadcast(seed), b = broadcast(0.5f);
  for (int round = 0; round < ROUNDS; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; ++i) sums[i] = fma(sums[i], a, b);
    __asm__ volatile("" : "+m"(seed));
  }
  Vec all = zero();
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; ++i) all += sums[i];
  return sum(all);
}

}  // namespace

int fma_peak(const regard_fma_peak_args* args) {
  if (args->threads < 1) return REGARD_BAD_ARGUMENT;
  const int threads = static_cast<int>(args->threads);
  float results[64] = {};
  double best = 0, start = now();
  do {
    const double before = now();
    parallel(threads, [&](int part) { results[part % 64] = multiply_add(0.25f); });
    const double seconds = now() - before;
    const double rate = 2.0 * LANES * SUMS * ROUNDS * threads / seconds * 1e-9;
    if (rate > best) best = rate;
  } while (now() - start < args->seconds);
  *args->gflops = results[0] == 0.f ? 0 : best;
  return REGARD_OK;
}

int bandwidth(const regard_bandwidth_args* args) {
  if (args->threads < 1 || args->count < 0) return REGARD_BAD_ARGUMENT;
  const int threads = static_cast<int>(args->threads);
  const int64_t each = round_up(ceil_div(args->count, threads), 8 * LANES);
  float found[64] = {};
  for (int64_t pass = 0; pass < args->passes; ++pass)
    parallel(threads, [&](int part) {
      const int64_t begin = least(each * part, args->count), end = least(begin + each, args->count);
      Vec sums[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sums[i] = zero();
      int64_t at = begin;
      for (; at + 8 * LANES <= end; at += 8 * LANES)
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const Vec x = load(args->from + at + i * LANES);
          if (args->to != nullptr)
            store(args->to + at + i * LANES, x + 1.f);
          else
            sums[i] += x;
        }
      Vec all = zero();
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) all += sums[i];
      found[part % 64] += sum(all);
    });
  *args->sink = found[0];
  return REGARD_OK;
}

}  // namespace REGARD_ISA
