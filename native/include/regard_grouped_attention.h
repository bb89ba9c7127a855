/* Softmax on two levels (landmark attention, regard/engines/grouped_attention.py). The keys of a row form groups,
 * runs of slots that each end with a landmark, except perhaps the last. With s_ij = scale q_i . k_j over visible keys,
 *   u_ij = softmax of s_i over the tokens of one group,                 for each group c except the query's own,
 *   t_i  = softmax of s_i over the tokens of its own group and the landmarks of the other groups that have a token,
 *   out_i = sum over own tokens of t_ij v_j + sum over other groups c of t_ic sum over j in c of u_ij v_j.
 * Landmarks have no value. The output of a query that sees no key is 0. */
#ifndef REGARD_GROUPED_ATTENTION_H
#define REGARD_GROUPED_ATTENTION_H

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
  float *lse; /* (B, H, n) contiguous: log-sum-exp of the upper level; -inf where no key is visible */
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* batch, head, token; features are contiguous */
  const int64_t *query_ranks; /* (rows, n) */
  const int64_t *key_ranks;   /* (rows, m); a key of negative rank does not exist */
  const int64_t *own;         /* (rows, n): the query's own group, from 0; NULL: no query has one */
  const uint8_t *landmark;    /* (rows, m) */
  int64_t query_ranks_stride, key_ranks_stride, own_stride, landmark_stride; /* between rows; 0: rows share them */
  float scale;
  int32_t causal; /* only keys at or before the query are visible */
} regard_grouped_attention_args;
REGARD_API int regard_grouped_attention(const regard_grouped_attention_args *args);

/* Gradients. `forward` is the forward call's struct with `out` and `lse` filled. Every gradient has the strides given
 * here and is overwritten, not accumulated. */
typedef struct {
  int64_t size;
  const regard_grouped_attention_args *forward;
  const void *grad_out; /* (B, H, n, value_width) of the dtype */
  int64_t grad_out_strides[3];
  void *grad_q, *grad_k, *grad_v; /* of the dtype; NULL if not wanted */
  int64_t grad_q_strides[3], grad_k_strides[3], grad_v_strides[3];
} regard_grouped_attention_backward_args;
REGARD_API int regard_grouped_attention_backward(const regard_grouped_attention_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
