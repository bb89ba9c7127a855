/* Products of few rows with the transpose of a weight stored in 8 or 4 bits, or in float32. */
#ifndef REGARD_QUANTIZED_LINEAR_H
#define REGARD_QUANTIZED_LINEAR_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x W^T + bias, W = code * scale + offset with a scale and an offset for each group in a row. 8-bit codes are
 * signed; 4-bit codes 0 to 15 stand for -8 to 7, with column 2 i in the low half of byte i and column 2 i + 1 in the
 * high half. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t bits;            /* 8 or 4; 32 for a weight in float32 */
  int64_t m, n, k;         /* rows of x, rows of W, columns of x */
  int64_t columns;         /* of W, >= k, a multiple of the group; those beyond k meet zeros. 8 and 32 bits: k */
  int64_t group;           /* columns that share a scale. 8 bits: all; 4 bits: a multiple of 32; 32 bits: not read */
  const float *x;          /* (M, K) */
  int64_t x_stride;
  const void *codes;       /* (N, columns) int8 or float32, or (N, columns / 2) uint8, contiguous */
  const uint16_t *scale;   /* (N, columns / group) bfloat16, contiguous; NULL for 32 bits */
  const uint16_t *offset;  /* the same; NULL for zeros; 4 bits only */
  const float *bias;       /* (N,); NULL for zeros */
  float *y;                /* (M, N) contiguous */
  int64_t rounded;         /* whether rows of x are first rounded to multiples of max |x| / 127; 8 bits only */
} regard_quantized_linear_args;
REGARD_API int regard_quantized_linear(const regard_quantized_linear_args *args);

#ifdef __cplusplus
}
#endif
#endif
