/* The gated recurrence without delta correction:
 *
 *     S_t = exp(g_t) S_{t-1} + k_t v_t^T,     o_t = S_t^T q_t   or, exclusive,   o_t = (exp(g_t) S_{t-1})^T q_t
 *
 * with states of K x V float32 numbers for each of B x H heads. Several heads may share queries or keys: with G of them
 * for H heads, head h uses number h / (H / G).
 */
#ifndef REGARD_RECURRENCE_H
#define REGARD_RECURRENCE_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* (B, heads, N, width), the last axis contiguous; the other strides are arbitrary and may be 0. data NULL: absent. */
typedef struct {
  void *data;
  int64_t dtype;
  int64_t heads;
  int64_t batch_stride, head_stride, token_stride;
} regard_sequence;

enum regard_decay {
  REGARD_DECAY_NONE = 0,
  REGARD_DECAY_SCALAR = 1, /* g (B, H, N, 1) */
  REGARD_DECAY_VECTOR = 2  /* g (B, H, N, K) */
};

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, heads, tokens, key_width, value_width;
  int64_t decay;
  int64_t inclusive;
  int64_t checkpoint_every; /* tokens between checkpoints, a multiple of 16 */
  regard_sequence q;        /* absent: the final state only */
  regard_sequence k, v, g;
  const float *state;   /* S_0 (B, H, K, V) contiguous; NULL for zero */
  regard_sequence o;    /* out; absent when q is */
  float *final_state;   /* out, (B, H, K, V) contiguous */
  float *checkpoints;   /* out, (B, H, C, K, V) contiguous: S after every checkpoint_every tokens, without the
                           last one; NULL for none */
} regard_gated_recurrence_args;
REGARD_API int regard_gated_recurrence(const regard_gated_recurrence_args *args);

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, heads, tokens, key_width, value_width;
  int64_t decay;
  int64_t inclusive;
  int64_t checkpoint_every;
  regard_sequence q, k, v, g;
  const float *state;
  const float *checkpoints;       /* from the forward pass */
  regard_sequence grad_o;         /* absent: zero */
  const float *grad_final_state;  /* NULL: zero */
  regard_sequence grad_q, grad_k; /* out, with the heads of q and k; absent: not wanted, also below. */
  regard_sequence grad_v, grad_g;
  float *grad_state;
} regard_gated_recurrence_backward_args;
REGARD_API int regard_gated_recurrence_backward(const regard_gated_recurrence_backward_args *args);

/* One token, inclusive: S' = exp(g) S + k u^T, o = S'^T q, u = v or beta (v - (exp(g) S)^T k). Token strides unused. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, heads, key_width, value_width;
  int64_t decay;
  regard_sequence q, k, v, g;
  regard_sequence beta; /* (B, H) */
  const float *state;   /* (B, H, K, V) contiguous */
  regard_sequence o;    /* out */
  float *new_state;     /* out, (B, H, K, V) contiguous */
} regard_gated_recurrence_step_args;
REGARD_API int regard_gated_recurrence_step(const regard_gated_recurrence_step_args *args);

/* Linear attention: an inclusive gated recurrence without decay, of phi(scale q_t) and phi(k_t), optionally normalised:
 *
 *     z_t = z_{t-1} + phi(k_t),     o_t = S_t^T phi(scale q_t) / (z_t . phi(scale q_t) + eps).
 *
 * If normalised, states, checkpoints and gradients of states are K x (V + 1), with z in the last column. */
enum regard_feature_map {
  REGARD_FEATURES_AS_THEY_ARE = 0, /* scale and shift are not used */
  REGARD_FEATURES_IDENTITY = 1,
  REGARD_FEATURES_ELU = 2, /* elu + 1 */
  REGARD_FEATURES_RELU = 3,
  REGARD_FEATURES_RELU_SQUARED = 4,
  REGARD_FEATURES_SIGMOID = 5,
  REGARD_FEATURES_EXP = 6,
  REGARD_FEATURES_SILU = 7
};

typedef struct {
  int64_t feature_map;
  int64_t normalize;
  float scale, eps, shift; /* the shift is added to phi */
  const int64_t *valid; /* (B) number of valid keys, the first ones; NULL: all */
  float *inverse;       /* (B, H, N) 1 / (z . phi(scale q) + eps), written by forward for backward; NULL: not wanted */
} regard_linear_attention_options;

typedef struct {
  int64_t size;
  regard_gated_recurrence_args recurrence;
  regard_linear_attention_options options;
} regard_linear_attention_args;
REGARD_API int regard_linear_attention(const regard_linear_attention_args *args);

typedef struct {
  int64_t size;
  regard_gated_recurrence_backward_args recurrence;
  regard_linear_attention_options options;
} regard_linear_attention_backward_args;
REGARD_API int regard_linear_attention_backward(const regard_linear_attention_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
