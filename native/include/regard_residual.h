/* Residual branches of a pre-norm transformer block, in float32: a feed-forward network, and softmax self-attention. */
#ifndef REGARD_RESIDUAL_H
#define REGARD_RESIDUAL_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* y = x W^T + bias. */
typedef struct {
  int64_t n, k;         /* shape of W, (n, k) contiguous; n = 0: absent */
  const float *weight;
  const float *bias;    /* (n,); NULL for none */
} regard_dense;

/* The norm of x, (m, width), at the start of a branch: each row, minus its mean if `centred`, divided by the root of
 * its mean square + eps, times weight, plus bias. */
typedef struct {
  int64_t centred;
  float eps;
  const float *weight, *bias; /* (width,); NULL for ones and zeros */
} regard_row_norm;

/* y = x + scale * branch(norm(x)). */
typedef struct {
  int64_t width;
  const float *x;       /* rows `x_stride` apart */
  int64_t x_stride;
  float *y;             /* (m, width) contiguous, not overlapping x */
  regard_row_norm norm;
  const float *scale;   /* (width,); NULL for ones */
} regard_residual;

/* down(gelu(up z)) with the exact erf, or down(silu(gate z) * up z) if there is a gate. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t m;
  regard_residual around;
  regard_dense gate, up, down;
} regard_residual_feed_forward_args;
REGARD_API int regard_residual_feed_forward(const regard_residual_feed_forward_args *args);

/* output(heads of softmax(scale_of_scores q k^T + key_bias) v) for each of `batch` sequences of consecutive rows. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, n;       /* n: rows of a sequence, of the longest if there are borders */
  const int64_t *borders; /* (batch + 1,) first row of each sequence, from 0, and the number of rows; NULL if all have n */
  const float *key_bias;  /* (batch, n) contiguous, -inf hides; NULL for none, and with borders */
  int64_t heads, kv_heads;
  float scale_of_scores;
  regard_residual around;
  regard_dense query, key, value, output;
} regard_residual_attention_args;
REGARD_API int regard_residual_attention(const regard_residual_attention_args *args);

#ifdef __cplusplus
}
#endif
#endif
