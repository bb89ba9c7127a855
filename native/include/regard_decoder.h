/* Layers of a Llama-like decoder, for few tokens: the two parts of one, what comes before attention and what comes after it,
 * between which the caller puts keys and values into a cache and attends; and whole layers with their caches or states. */
#ifndef REGARD_DECODER_H
#define REGARD_DECODER_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A weight as regard_quantized_linear takes it. Column j of its input is multiplied with input_scale_j first, unless that is
 * NULL; then, if asked for, each row of it is rounded to multiples of its largest number / 127. */
typedef struct {
  int64_t bits, n, k, columns, group, rounded;
  const void *codes;
  const uint16_t *scale, *offset;
  const float *bias;
  const float *input_scale; /* (K,) */
} regard_weight;

/* outputs_i = projections_i(norm(x)), norm(x) = x / sqrt(mean(x^2) + eps) * norm, which is written too if asked for; heads of the
 * first two are turned: feature i < width / 2 to u_i cosine_i - u_(i + width / 2) sine_i, the other half likewise with a plus. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t m, width;               /* tokens, and features of each */
  int64_t head_width;             /* even; divides n of the first two projections */
  float eps;
  const float *x;                 /* (M, width) contiguous */
  const float *norm;              /* (width,) */
  const float *cosine, *sine;     /* (M, head_width) contiguous */
  regard_weight projections[3];   /* of queries, keys, values */
  float *outputs[3];              /* (M, n) contiguous */
  float *normed;                  /* (M, width) contiguous; NULL for none */
} regard_decoder_inputs_args;
REGARD_API int regard_decoder_inputs(const regard_decoder_inputs_args *args);

/* h = x + output(attended); y = h + down(silu(gate(norm(h))) up(norm(h))). */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t m, width;
  float eps;
  const float *x;                 /* (M, width) contiguous */
  const float *attended;          /* (M, k of output) contiguous */
  const float *norm;              /* (width,) */
  regard_weight output, gate, up, down;
  float *y;                       /* (M, width) contiguous */
} regard_decoder_outputs_args;
REGARD_API int regard_decoder_outputs(const regard_decoder_outputs_args *args);

/* In the place of softmax attention: the recurrence of regard_gated_recurrence_step, of values, gates and rates of G heads that
 * each serve as many query heads, from the layer's normed input u:
 *
 *     z = gates_1(gates_0(u)) + gate_bias,     g = max(least, -exp(log_rates) softplus(sign z)),
 *     beta = most_beta sigmoid(beta(u)).
 *
 * It is of phi(k) and of phi(q) times `scale`. Normalized, values have a one behind them, so that a query reads the sum of its
 * weights too, and what it reads of values is divided by that sum plus `divisor` (0 where that is 0). With a window the key and
 * the value that are written are those that leave it, and to what is read and to its sum comes what a softmax over the window,
 * the query's own token included, has before it is divided: exp(w + score - the largest score), w of `log_window_weights`. */
typedef struct {
  regard_weight gates[2];  /* n 0: none; without both, softplus is 1. z: one number or head_width of them for each of the G */
  const float *gate_bias;  /* as many numbers as the gates make; NULL: none */
  const float *log_rates;  /* (G,); NULL: no decay */
  float sign, least;
  int64_t steps;           /* whether values are multiplied with softplus(sign z), one number a head */
  regard_weight beta;      /* to one number for each of the G; n 0: none */
  float most_beta;
  float eps[2];            /* phi of queries, and of keys, becomes y / sqrt(sum(y^2) + eps) for each head; negative: it stays */
  int64_t feature_map;     /* phi: a regard_feature_map */
  const float *maps[2];    /* phi(x) = [softmax(x W), softmax(-x W)] with W of queries, and of keys, of each query head: (query
                              heads, head_width, features) contiguous, without gates, rates and another phi; NULL: none */
  int64_t features;
  float scale;
  int64_t normalized;
  float divisor;
  int64_t window;          /* tokens; 0: none. With maps and normalized only */
  const float *log_window_weights; /* (query heads,); NULL: 0 */
} regard_decoder_recurrence;

/* A whole layer: weights of queries, keys, values, output, gate, up and down, and its part of the cache. Query i of a row sees
 * the row's keys up to its own, at most `left` before it (-1: all). Scores, a window's too, are multiplied with `scale`. */
typedef struct {
  float eps[2];
  const float *norms[2];
  regard_weight weights[7];
  float scale;
  int64_t left;
  float *keys, *values;
  int64_t keys_strides[3], values_strides[3]; /* row or page, head, token or slot; features are contiguous */
  const regard_decoder_recurrence *recurrence; /* NULL: softmax; otherwise `left`, keys and values are not used */
} regard_decoder_layer;

/* (batch, query heads, head_width or 2 features, head_width or one more where normalized) contiguous, each in memory of its
 * own. Of a recurrence with a window, also the window's tokens before these, right-aligned, and room for these behind them. */
typedef struct {
  const float *before;
  float *after;
  float *keys, *values;  /* (batch, query heads, window + n, head_width), features contiguous */
  int64_t keys_strides[3], values_strides[3]; /* row, head, token */
  const int64_t *lengths; /* (batch,) tokens before of each row; slots of the window before its first are not read */
} regard_decoder_state;

/* Layers one after the other, and a norm of the last one's answer if asked for; token i of row b is number lengths_b + i of its
 * row. Without pages all rows have room for as many tokens as the longest, and the first `padding_b` of a row may be none, which
 * nobody sees; with pages, token t of row b has its place as in regard_attention_decode. Nothing is written when an argument is
 * bad. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, n, width, head_width;
  int64_t count;
  const regard_decoder_layer *layers;
  const regard_decoder_state *states; /* one for each layer with a recurrence, in their order */
  const int64_t *lengths;         /* (batch,) tokens before, padding among them */
  const int64_t *padding;         /* (batch,); NULL for none. Not with pages */
  const int64_t *pages;           /* (batch, pages_stride); NULL for none */
  int64_t pages_stride, page_size;
  const float *cosine, *sine;     /* (batch, n, head_width) contiguous */
  float eps;
  const float *norm;              /* (width,); NULL for none */
  float *x;                       /* (batch, n, width) contiguous; in its place comes the answer */
} regard_decoder_layers_args;
REGARD_API int regard_decoder_layers(const regard_decoder_layers_args *args);

#ifdef __cplusplus
}
#endif
#endif
