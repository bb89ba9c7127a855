/* Softmax over a window around each position of a map and over the pooled map (TransNeXt,
 * regard/engines/aggregated_attention). The queries are the positions of a map, row by row. A query's keys are those of
 * the window x window positions around it, as far as they are on the map, and those of all positions of the map pooled
 * by factor x factor. With d(x) = x / |x| and L the number of a query's keys,
 *   s_ij = slope log(L_i) (d(q_i) + moved) . d(k_j) + (near_bias by position in the window, or table by offset),
 *   out_i = sum_j (softmax(s_i)_j + [in the window] (d(q_i) . tokens_p + near_weights_p)) v_j. */
#ifndef REGARD_AGGREGATED_ATTENTION_H
#define REGARD_AGGREGATED_ATTENTION_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of q, k, v, far_k, far_v and out */
  const void *q, *k, *v, *far_k, *far_v;
  void *out;
  float *lse; /* (B, H, N) contiguous, or NULL: log-sum-exp of the scores */
  int64_t batch, heads, width;
  int64_t rows, columns; /* size of the map; N = rows columns */
  int64_t factor;        /* divides both; M = N / factor^2 */
  int64_t window;        /* odd; P = window^2 */
  int64_t q_strides[3], k_strides[3], v_strides[3], far_k_strides[3], far_v_strides[3], out_strides[3];
  const float *moved;        /* (H, width), this and the following contiguous */
  const float *slope;        /* (H,) */
  const float *near_bias;    /* (H, P) */
  const float *near_tokens;  /* (H, width, P) */
  const float *near_weights; /* (H, P) */
  /* (H, 2 rows - factor, 2 columns - factor): the bias of position y, x and pooled position a, b is at index
   * y - factor a + rows - factor, x - factor b + columns - factor */
  const float *table;
} regard_aggregated_attention_args;
REGARD_API int regard_aggregated_attention(const regard_aggregated_attention_args *args);

/* Gradients. `forward` is the forward call's struct with `lse` filled. Every gradient has the strides given here, or is
 * contiguous like its input, and is overwritten, not accumulated; NULL if not wanted. */
typedef struct {
  int64_t size;
  const regard_aggregated_attention_args *forward;
  const void *grad_out; /* (B, H, N, width) of the dtype */
  int64_t grad_out_strides[3];
  void *grad_q, *grad_k, *grad_v, *grad_far_k, *grad_far_v; /* of the dtype */
  int64_t grad_q_strides[3], grad_k_strides[3], grad_v_strides[3], grad_far_k_strides[3], grad_far_v_strides[3];
  float *grad_moved, *grad_slope, *grad_near_bias, *grad_near_tokens, *grad_near_weights, *grad_table;
} regard_aggregated_attention_backward_args;
REGARD_API int regard_aggregated_attention_backward(const regard_aggregated_attention_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
