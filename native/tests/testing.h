// Shared by the kernels' tests: random numbers of either type in buffers of exactly their size, so that a sanitizer
// detects accesses beyond them; comparison with plain loops in double; a loop over instruction sets.
#ifndef REGARD_TESTING_H
#define REGARD_TESTING_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "regard.h"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline int failures = 0;
inline char subject[256] = "";  // what is being tested

__attribute__((format(printf, 1, 2))) inline void now(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(subject, sizeof subject, format, values);
  va_end(values);
}

inline void fail(const char* what, double error = NAN, double of = NAN) {
  printf("%s (%s), %s", subject, regard_instruction_set(), what);
  printf(error == error ? ": error %g of %g\n" : "\n", error, of);
  ++failures;
}

inline void must(const char* what, int status, int expected = REGARD_OK) {
  if (status != expected) fail(what);
}

// In [-1, 1).
inline float uniform() {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / (1 << 23) - 1.f;
}

inline Floats numbers(size_t count, float low = -1, float high = 1) {
  Floats x(count);
  for (float& each : x) each = low + (high - low) * (uniform() + 1) / 2;
  return x;
}

inline Floats normal(size_t count, float scale = 1) {
  Floats x = numbers(count, 1e-7f);
  for (float& each : x) each = scale * sqrtf(-2 * logf(fabsf(each))) * sinf(3.14159265f * uniform());
  return x;
}

inline Floats unwritten(size_t count) { return Floats(count, NAN); }

// Numbers in float32 or bfloat16; NaN until they are written.
struct Tensor {
  Tensor(size_t count, bool half) : half(half), bytes(count * (half ? 2 : 4), '\xff') {}
  Tensor(const Floats& x, bool half) : Tensor(x.size(), half) {
    for (size_t i = 0; i < x.size(); ++i) set(i, x[i]);
  }
  size_t size() const { return bytes.size() / (half ? 2 : 4); }
  void* data() { return bytes.data(); }
  void set(size_t i, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t high = static_cast<uint16_t>((bits + 0x8000) >> 16);
    half ? memcpy(&bytes[2 * i], &high, 2) : memcpy(&bytes[4 * i], &x, 4);
  }
  double operator[](size_t i) const {
    uint32_t bits = 0;
    memcpy(reinterpret_cast<char*>(&bits) + (half ? 2 : 0), &bytes[(half ? 2 : 4) * i], half ? 2 : 4);
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  bool half;
  std::vector<char> bytes;
};

// The strides of (batch, heads, tokens, features) in memory.
inline void strides(int64_t* to, int64_t heads, int64_t tokens, int64_t features) {
  to[0] = heads * tokens * features, to[1] = tokens * features, to[2] = features;
}

// Errors are relative to the largest expected number, or to `least` if all are smaller. NaN equals nothing.
template <class Found>
void compare(const char* what, const Found& found, const Doubles& expected, double tolerance, double least = 1e-30) {
  double largest = least, error = found.size() == expected.size() ? 0 : INFINITY;
  for (size_t i = 0; i < std::min(found.size(), expected.size()); ++i) {
    if (isfinite(expected[i])) largest = fmax(largest, fabs(expected[i]));
    const double each = found[i] == expected[i] ? 0 : fabs(found[i] - expected[i]);
    error = isnan(each) ? INFINITY : fmax(error, each);
  }
  if (error > tolerance * largest) fail(what, error, largest);
}

// The gradient of `loss` by central differences.
template <class Loss>
Doubles slope(const Loss& loss, Doubles x, double step = 1e-5) {
  Doubles found;
  for (double& moved : x) {
    const double here = moved;
    moved = here + step;
    const double above = loss(x);
    moved = here - step;
    found.push_back((above - loss(x)) / (2 * step));
    moved = here;
  }
  return found;
}

// Runs on each instruction set that works on this machine, with uninitialised workspaces full of NaN.
template <class Run>
void each_instruction_set(const Run& run) {
  regard_set_poison(1);
  std::string names = std::string(regard_instruction_sets()) + ",";
  for (size_t comma; (comma = names.find(',')) != std::string::npos; names.erase(0, comma + 1)) {
    must("instruction set", regard_set_instruction_set(names.substr(0, comma).c_str()));
    run();
  }
}

// The exit status of main.
inline int told() {
  printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}

template <class Run>
int on_every_instruction_set(const Run& run) {
  each_instruction_set(run);
  return told();
}

#endif
