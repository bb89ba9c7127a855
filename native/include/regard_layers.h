/* The operations around a layer's matrix products, each in one pass over memory: a short depthwise convolution with
 * SiLU, RMSNorm with its gate, rotary positions, and the product with a gate. Gradients that are NULL are not computed.
 * */
#ifndef REGARD_LAYERS_H
#define REGARD_LAYERS_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

#define REGARD_SHORT_CONVOLUTION_WIDEST 16

/* y_t = act(bias + sum_j weight_j x_{t - (width - 1 - after) + j}) for each channel, over the valid tokens of a row.
 * The tokens before the first are those of the cache; all other tokens outside the row are zeros. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype;              /* of x, cache, y, last and their gradients */
  int64_t batch, n, channels;
  int64_t width, after;       /* number of taps, and of taps after the token: 0 in causal form */
  int64_t silu;               /* whether act is SiLU; otherwise the identity */
  const void *x;              /* (B, N, C) */
  int64_t x_strides[2];       /* batch, token */
  const float *weight;        /* (C, width) contiguous */
  const float *bias;          /* (C,); NULL for none */
  const void *cache;          /* (B, width - 1, C) contiguous, causal form only; NULL for zeros */
  const int64_t *lengths;     /* (B,), in [0, N]; NULL: all N */
  void *y;                    /* (B, N, C) contiguous, 0 past a row's length */
  void *last;                 /* (B, width - 1, C): the last inputs; NULL: not wanted */
} regard_short_convolution_args;
REGARD_API int regard_short_convolution(const regard_short_convolution_args *args);

typedef struct {
  int64_t size;
  const regard_short_convolution_args *forward; /* y and last are not read */
  const void *grad_y;         /* (B, N, C) */
  int64_t grad_y_strides[2];
  const void *grad_last;      /* (B, width - 1, C) contiguous; NULL for zeros */
  void *grad_x;               /* (B, N, C) contiguous */
  float *grad_weight, *grad_bias;
  void *grad_cache;           /* (B, width - 1, C) */
} regard_short_convolution_backward_args;
REGARD_API int regard_short_convolution_backward(const regard_short_convolution_backward_args *args);

enum regard_gate_place { REGARD_NO_GATE = 0, REGARD_GATE_BEFORE = 1, REGARD_GATE_AFTER = 2 };

/* Each group of a row by itself: norm(u) = u / sqrt(mean(u^2) + eps) * weight; y = norm(x), norm(x silu(z)) or
 * norm(x) silu(z). Rows are indexed by three axes. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype;              /* of x, z, y and their gradients */
  int64_t rows[3];
  int64_t groups, width;      /* a row has groups * width features */
  int64_t gate;               /* of enum regard_gate_place */
  float eps;
  const void *x;
  int64_t x_strides[3];
  const void *z;              /* NULL without a gate */
  int64_t z_strides[3];
  const float *weight;        /* (groups * width,); NULL for ones */
  void *y;                    /* contiguous */
} regard_rms_norm_args;
REGARD_API int regard_rms_norm(const regard_rms_norm_args *args);

typedef struct {
  int64_t size;
  const regard_rms_norm_args *forward; /* y is not read */
  const void *grad_y;
  int64_t grad_y_strides[3];
  void *grad_x, *grad_z;      /* contiguous */
  float *grad_weight;
} regard_rms_norm_backward_args;
REGARD_API int regard_rms_norm_backward(const regard_rms_norm_backward_args *args);

/* Features i and i + rotated / 2 of a head are rotated by position * frequency_i turns, backwards with `reverse`;
 * features from `rotated` on are copied. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype;              /* of x, y */
  int64_t batch, heads, n, width, rotated;
  int64_t reverse;
  const void *x;              /* (B, H, N, width) */
  int64_t x_strides[3];       /* batch, head, token */
  const int64_t *positions;   /* (B, N) */
  int64_t positions_strides[2]; /* batch (0 when shared), token */
  const double *frequencies;  /* (rotated / 2,) in turns per position */
  void *y;
  int64_t y_strides[3];
} regard_rotary_args;
REGARD_API int regard_rotary(const regard_rotary_args *args);

enum regard_gate_function { REGARD_GATE_BY_SILU = 0, REGARD_GATE_BY_SIGMOID = 1 };

/* y = x f(gate). With grad_y, grad_x and grad_gate are written instead of y. All outputs are contiguous. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype;
  int64_t rows, width;
  int64_t function;           /* of enum regard_gate_function */
  const void *x, *gate;       /* (rows, width) */
  int64_t x_stride, gate_stride;
  void *y;
  const void *grad_y;         /* NULL: forward */
  int64_t grad_y_stride;
  void *grad_x, *grad_gate;
} regard_gated_product_args;
REGARD_API int regard_gated_product(const regard_gated_product_args *args);

#ifdef __cplusplus
}
#endif
#endif
