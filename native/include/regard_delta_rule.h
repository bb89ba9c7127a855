/* The delta rule with optional decay:
 *
 *   S_t = exp(g_t) S_{t-1} + k_t u_t^T,  u_t = beta_t (v_t - (exp(g_t) S_{t-1})^T k_t),  o_t = S_t^T q_t
 */
#ifndef REGARD_DELTA_RULE_H
#define REGARD_DELTA_RULE_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Number of tokens between states that the forward call keeps for the backward call. */
#define REGARD_DELTA_RULE_SEGMENT 256

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of q, k, v and out; everything else is float32 */
  const void *q; /* NULL: only the final state is computed, and out is not touched */
  const void *k, *v;
  const float *log_decay; /* (B, H, n, decay_width), <= 0, -inf allowed; NULL when decay_width is 0 */
  const float *beta;      /* (B, H, n) */
  const float *state;     /* (B, H, width, value_width); NULL for zeros */
  void *out;
  float *final_state; /* (B, H, width, value_width) contiguous */
  float *kept;        /* (B, H, (n - 1) / REGARD_DELTA_RULE_SEGMENT, width, value_width) contiguous: the states before
                         tokens SEGMENT, 2 SEGMENT, ...; NULL when there will be no backward call */
  int64_t batch, heads, n, width, value_width;
  int64_t decay_width; /* 0: no decay, 1: one per head, width: one per key feature */
  int64_t inclusive;   /* whether o_t sees k_t; otherwise it reads exp(g_t) S_{t-1} */
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* batch, head, token; features are contiguous */
  int64_t log_decay_strides[3];
  int64_t beta_strides[3];
  int64_t state_strides[3]; /* batch, head, key feature */
} regard_delta_rule_args;
REGARD_API int regard_delta_rule(const regard_delta_rule_args *args);

/* Gradients. `forward` is the forward call's struct with `kept` filled; its out and final_state are not read. Gradients
 * are contiguous and overwritten, not accumulated; NULL if not wanted. A gate of -inf has gradient 0. */
typedef struct {
  int64_t size;
  const regard_delta_rule_args *forward;
  const void *grad_out; /* of the dtype; NULL for zeros */
  int64_t grad_out_strides[3];
  const float *grad_final_state; /* (B, H, width, value_width); NULL for zeros */
  int64_t grad_final_state_strides[3];
  void *grad_q, *grad_k, *grad_v; /* of the dtype */
  float *grad_log_decay, *grad_beta, *grad_state;
} regard_delta_rule_backward_args;
REGARD_API int regard_delta_rule_backward(const regard_delta_rule_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
