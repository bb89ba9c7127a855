/* The selective scan of Mamba: for each channel e and state k, with steps s_t = softplus(dt_t + dt_bias) (s_t = dt_t
 * without dt_bias),
 *     h_t[e,k] = exp(s_t[e] a[e,k]) h_{t-1}[e,k] + s_t[e] x_t[e] b_t[k],
 *     y_t[e] = (sum_k h_t[e,k] c_t[k] + skip[e] x_t[e]) silu(z_t[e]).
 * Group g of b and c serves channels [g C / G, (g + 1) C / G). Tokens past a row's length neither decay nor write. With
 * `order`, tokens are visited in that order; inputs and outputs keep their positions. */
#ifndef REGARD_SELECTIVE_SCAN_H
#define REGARD_SELECTIVE_SCAN_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

#define REGARD_SELECTIVE_SCAN_EVERY 64

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of x, dt, b, c, z, y */
  int64_t batch, n, channels, groups, states;
  int64_t inclusive;        /* whether y_t reads h_t, or exp(s_t a) h_{t-1} */
  const void *x;            /* (B, N, C) */
  int64_t x_strides[2];     /* batch, token */
  const void *dt;           /* (B, N, C) */
  int64_t dt_strides[2];
  const float *a;           /* (C, K) contiguous */
  const void *b;            /* (B, N, G, K) */
  int64_t b_strides[3];     /* batch, token, group */
  const void *c;            /* (B, N, G, K); NULL: the state only */
  int64_t c_strides[3];
  const float *skip;        /* (C,); NULL for none */
  const float *dt_bias;     /* (C,); NULL: dt holds the steps themselves */
  const void *z;            /* (B, N, C); NULL for no gate */
  int64_t z_strides[2];
  const float *state;       /* (B, C, K) contiguous, to continue from; NULL for zeros */
  const int64_t *lengths;   /* (B,), in [0, N]; NULL: all N */
  const int64_t *order;     /* (N,): the tokens in visiting order, each once, for all rows; NULL: first to last. Not
                               with lengths */
  void *y;                  /* (B, N, C) contiguous, 0 past a row's length; NULL without c */
  float *last;              /* (B, C, K): the state after the last token */
  float *kept;              /* (B, ceil(N / EVERY), C, K): the states before every EVERY tokens of a row, where it has
                               them, for backward; NULL: not kept */
} regard_selective_scan_args;
REGARD_API int regard_selective_scan(const regard_selective_scan_args *args);

/* Gradients, all contiguous, 0 past a row's length. `forward` is the forward call's struct with `kept` filled; y and last
 * are not read. Gradients that are NULL are not computed. */
typedef struct {
  int64_t size;
  const regard_selective_scan_args *forward;
  const void *grad_y;       /* (B, N, C) of the dtype; NULL without c */
  int64_t grad_y_strides[2];
  const float *grad_last;   /* (B, C, K) contiguous */
  void *grad_x, *grad_dt;   /* of the dtype */
  float *grad_a;
  void *grad_b, *grad_c;    /* (B, N, G, K) of the dtype */
  float *grad_skip, *grad_dt_bias;
  void *grad_z;
  float *grad_state;
} regard_selective_scan_backward_args;
REGARD_API int regard_selective_scan_backward(const regard_selective_scan_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
