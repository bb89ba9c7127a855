/* Softmax over the keys of chosen pixels (SEA, regard/engines/pixel_attention). A query that sees the keys of ranks below
 * n has a map of K scores e over them; the key of rank j belongs to pixel floor((j + 1/2) K / n - 1e-4), at least 0. The
 * most probable pixels by softmax of e are kept, max(1, round(top_k oversample K / n)) a head on average; of equal ones
 * the first. With P the softmax of scale q . k over the keys of kept pixels, 0 without any, and sigma the logistic function,
 *   out = sigma(mix_logit) sigma(row_logit) P V + (1 - sigma(mix_logit)) mean.
 * Logits that are NULL leave their factor out. A query that sees no key gives 0. */
#ifndef REGARD_PIXEL_ATTENTION_H
#define REGARD_PIXEL_ATTENTION_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of q, k, v and out */
  const void *q, *k, *v;
  void *out;
  float *lse; /* (B, H, n) contiguous, or NULL: the log-sum-exp of the scores; -inf where there are none */
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* batch, head, token; features are contiguous */
  const float *estimate; /* (B, H, n, pixels) */
  int64_t estimate_strides[3], pixels;
  uint32_t *kept; /* (B, H, n, ceil(pixels / 32)) contiguous, written: a bit a pixel; may be NULL forward */
  const uint32_t *chosen; /* the same, or NULL: pixels that are kept whatever the estimate says, top_k and together */
  const int64_t *totals; /* (rows, n): keys that a query sees; negative means none */
  const int64_t *slots;  /* (rows, m): the slot of the key of each rank; NULL: the rank */
  const double *jitter;  /* (rows, m), or NULL: what is added to the rank of the key in each slot before its pixel is found,
                          * less than 1 */
  int64_t totals_stride, slots_stride, jitter_stride; /* from row to row; 0: rows share them */
  double top_k, oversample; /* with oversample > 1 of the keys of kept pixels a regular part is read */
  float scale;
  int32_t together; /* the heads of a query share its pixels; otherwise each keeps its own number */
  const float *row_logit, *mix_logit; /* (B, H, n) contiguous, or NULL */
  const float *first; /* (B, first_heads, value_width) contiguous: with `before` a sum of values, otherwise the mean */
  const int64_t *before; /* (B,): values in that sum. The mean of n_t keys is that of `first` and the n_t - before values
                          * that begin at slot m - count */
  int64_t first_heads, count; /* first_heads is heads or kv_heads, with `before` the latter */
} regard_pixel_attention_args;
REGARD_API int regard_pixel_attention(const regard_pixel_attention_args *args);

/* Gradients. `forward` is the forward call's struct with `lse` and `kept` filled. Every gradient has the strides given here,
 * or is contiguous as its input, and is written, not added to; NULL where not wanted. */
typedef struct {
  int64_t size;
  const regard_pixel_attention_args *forward;
  const void *grad_out; /* (B, H, n, value_width) of the dtype */
  int64_t grad_out_strides[3];
  void *grad_q, *grad_k, *grad_v; /* of the dtype */
  int64_t grad_q_strides[3], grad_k_strides[3], grad_v_strides[3];
  float *grad_row_logit, *grad_mix_logit, *grad_first;
} regard_pixel_attention_backward_args;
REGARD_API int regard_pixel_attention_backward(const regard_pixel_attention_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
