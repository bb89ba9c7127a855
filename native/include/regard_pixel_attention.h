/* Softmax over the keys of chosen pixels (SEA, regard/engines/pixel_attention). A query that sees the keys of ranks below
 * n has a map of K scores e over them; the key of rank j belongs to pixel floor((j + 1/2) K / n - 1e-4), at least 0. The
 * most probable pixels by softmax of e are kept, max(1, round(top_k oversample K / n)) per head on average; ties go to
 * the first. With P the softmax of scale q . k over the keys of kept pixels (0 without any) and sigma the logistic
 * function,
 *   out = sigma(mix_logit) sigma(row_logit) P V + (1 - sigma(mix_logit)) mean.
 * A logit that is NULL omits its factor. The output of a query that sees no key is 0. */
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
  float *lse; /* (B, H, n) contiguous, or NULL: log-sum-exp of the scores; -inf where there are none */
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* batch, head, token; features are contiguous */
  const float *estimate; /* (B, H, n, pixels) */
  int64_t estimate_strides[3], pixels;
  uint32_t *kept; /* out, (B, H, n, ceil(pixels / 32)) contiguous: one bit per pixel; may be NULL in forward */
  const uint32_t *chosen; /* in the same layout, or NULL: pixels to keep, regardless of estimate, top_k and together */
  const int64_t *totals; /* (rows, n): number of keys that a query sees; negative means none */
  const int64_t *slots;  /* (rows, m): slot of the key of each rank; NULL: the rank itself */
  const double *jitter;  /* (rows, m), or NULL: by slot, less than 1, added to the rank of the key before its pixel is
                          * found */
  int64_t totals_stride, slots_stride, jitter_stride; /* between rows; 0: rows share them */
  double top_k, oversample; /* with oversample > 1 only a regular subset of the keys of kept pixels is read */
  float scale;
  int32_t together; /* whether a query's heads share one budget of pixels; otherwise each keeps its own number */
  const float *row_logit, *mix_logit; /* (B, H, n) contiguous, or NULL */
  const float *first; /* (B, first_heads, value_width) contiguous: with `before` a sum of values, otherwise the mean */
  const int64_t *before; /* (B,): number of values in that sum. A query that sees n_t keys has the mean of these values
                          * and of the n_t - before values that begin at slot m - count */
  int64_t first_heads, count; /* first_heads is heads or kv_heads, with `before` the latter */
} regard_pixel_attention_args;
REGARD_API int regard_pixel_attention(const regard_pixel_attention_args *args);

/* Gradients. `forward` is the forward call's struct with `lse` and `kept` filled. Every gradient has the strides given here,
 * or is contiguous like its input, and is overwritten, not accumulated; NULL if not wanted. */
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
