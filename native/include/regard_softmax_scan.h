/* The running softmax of fixed queries: for scores s_t and values v_t of each query, m_t the running maximum,
 * u_t = sum_{j<=t} exp(s_j - m_t), w_t = sum_{j<=t} exp(s_j - m_t) v_j, and the output w_t / u_t (0 where u_t = 0). */
#ifndef REGARD_SOFTMAX_SCAN_H
#define REGARD_SOFTMAX_SCAN_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Carries are contiguous: m and u (B, H, Q), w (B, H, Q, V). An empty carry is -inf, 0, 0. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of v and out */
  int64_t batch, heads, n, queries, width;
  const float *s;          /* (B, H, N, Q); -inf skips a token */
  int64_t s_strides[4];    /* batch, head, token, query */
  const void *v;           /* (B, H, N, V) */
  int64_t v_strides[3];    /* batch, head, token */
  const float *log_decay;  /* (B|1, H|1, N) <= 0: log of a token's factor on all earlier weights; NULL for none */
  int64_t log_decay_strides[3]; /* 0 on shared axes */
  const float *mix;        /* (B, H, N, Q): weights of a sum over queries; NULL: an output for each query */
  int64_t mix_strides[4];
  const float *m, *u, *w;  /* carry to continue from */
  void *out;               /* (B, H, Q, N, V), with mix (B, H, N, V); contiguous */
  float *m_out, *u_out, *w_out;
} regard_softmax_scan_args;
REGARD_API int regard_softmax_scan(const regard_softmax_scan_args *args);

/* Gradients. `forward` is the forward call's struct with `out` filled, which is only read without mix; its outgoing
 * carry is not read. Maxima are held constant. Gradients that are NULL are not computed. The gradient of log_decay at
 * token t is grad_carry_m + the sum of grad_s over tokens before t. */
typedef struct {
  int64_t size;
  const regard_softmax_scan_args *forward;
  const void *grad_out;         /* of the dtype */
  int64_t grad_out_strides[4];  /* batch, head, query (unused with mix), token */
  const float *grad_u, *grad_w; /* of the outgoing carry */
  float *grad_s;                /* (B, H, N, Q) */
  int64_t grad_s_strides[4];
  void *grad_v;                 /* (B, H, N, V) contiguous, of the dtype */
  float *grad_mix;              /* (B, H, N, Q) contiguous */
  float *grad_carry_m, *grad_carry_u, *grad_carry_w; /* never NULL */
} regard_softmax_scan_backward_args;
REGARD_API int regard_softmax_scan_backward(const regard_softmax_scan_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
