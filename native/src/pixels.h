// The keys that belong to each pixel of a map (see regard_pixel_attention.h).
#pragma once

#include "vector.h"

namespace REGARD_ISA {
namespace {

// The first key of a pixel among `total` keys; `total` for the pixel after the last.
inline int64_t first_of_pixel(int64_t pixel, int64_t total, int64_t pixels) {
  if (pixel == 0) return 0;
  if (pixel == pixels) return total;
  const int64_t above = total * (10000 * pixel + 1) - 5000 * pixels, below = 10000 * pixels;
  return above <= 0 ? 0 : least(ceil_div(above, below), total);
}

// The pixel of a key, with `shift` added to its rank.
inline int64_t pixel_of_moved(int64_t key, double shift, int64_t total, int64_t pixels) {
  const double all = static_cast<double>(total), count = static_cast<double>(pixels);
  const double place = (static_cast<double>(key) + shift + 0.5) / all * count - 1e-4;
  if (!(place > 0)) return 0;
  return place >= count ? pixels - 1 : static_cast<int64_t>(place);
}

}  // namespace
}  // namespace REGARD_ISA
