/* Layers of a Llama-like decoder, for few tokens: the parts of a layer before and after attention, between which the
 * caller writes keys and values to a cache and attends; and whole layers with their caches or states. */
#ifndef REGARD_DECODER_H
#define REGARD_DECODER_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A weight as regard_quantized_linear takes it. Column j of the input is first multiplied by input_scale_j, unless that
 * is NULL; then, if `rounded`, each row of the input is rounded to multiples of its largest magnitude / 127. */
typedef struct {
  int64_t bits, n, k, columns, group, rounded;
  const void *codes;
  const uint16_t *scale, *offset;
  const float *bias;
  const float *input_scale; /* (K,) */
} regard_weight;

/* outputs_i = projections_i(norm(x)), norm(x) = x / sqrt(mean(x^2) + eps) * norm, which is also written to `normed` if
 * not NULL. Heads of the first two outputs are rotated unless `cosine` is NULL: feature i < width / 2 to u_i cosine_i -
 * u_(i + width / 2) sine_i, the other half likewise with a plus. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t m, width;               /* tokens and features */
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

/* In place of softmax attention: the recurrence of regard_gated_recurrence_step. Values, gates and rates have G heads,
 * each shared by equally many query heads, and are computed from the layer's normed input u:
 *
 *     z = gates_1(gates_0(u)) + gate_bias,     g = max(least, -exp(log_rates) softplus(sign z)),
 *     beta = most_beta sigmoid(beta(u)).
 *
 * Keys are phi(k), queries phi(q) times `scale`. If `normalized`, a one is appended to values, so that a query also
 * reads the sum of its weights, and the output is divided by that sum plus `divisor` (0 where that is 0). With a window
 * the recurrence takes up the keys and values that leave the window, and the output and the sum of weights get the
 * unnormalised terms of a softmax over the window with the query's own token: weights exp(w + score - the largest
 * score), with w from `log_window_weights`. */
typedef struct {
  regard_weight gates[2];  /* n 0: none; without both, softplus is 1. z: 1 or head_width numbers for each of G heads */
  const float *gate_bias;  /* as many numbers as z has; NULL: none */
  const float *log_rates;  /* (G,); NULL: no decay */
  float sign, least;
  int64_t steps;           /* whether values are multiplied by softplus(sign z), one number per head */
  regard_weight beta;      /* gives one number for each of the G heads; n 0: none */
  float most_beta;
  float eps[2];            /* queries, keys: phi becomes y / sqrt(sum(y^2) + eps) in each head; negative: unchanged */
  int64_t feature_map;     /* phi: a regard_feature_map */
  const float *maps[2];    /* W of queries, keys: phi(x) = [softmax(x W), softmax(-x W)]; (query heads, head_width,
                              features) contiguous; excludes gates, rates and feature_map; NULL: none */
  int64_t features;
  float scale;
  int64_t normalized;
  float divisor;
  int64_t window;          /* tokens; 0: none. Only with maps and normalized */
  const float *log_window_weights; /* (query heads,); NULL: 0 */
} regard_decoder_recurrence;

/* A whole layer: weights of queries, keys, values, output, gate, up and down, and its part of the cache. Query i of a row sees
 * the row's keys up to its own, at most `left` before it (-1: all). Scores, also in a window, are multiplied by
 * `scale`. */
typedef struct {
  float eps[2];
  const float *norms[2];
  regard_weight weights[7];
  float scale;
  int64_t left;
  float *keys, *values;
  int64_t keys_strides[3], values_strides[3]; /* row or page, head, token or slot; features are contiguous */
  const regard_decoder_recurrence *recurrence; /* NULL: softmax; otherwise `left`, keys and values are unused */
} regard_decoder_layer;

/* (batch, query heads, head_width or 2 features, head_width or one more if normalized) contiguous; states do not
 * overlap. For a recurrence with a window, also the previous tokens in the window, right-aligned, followed by room for
 * the new ones. */
typedef struct {
  const float *before;
  float *after;
  float *keys, *values;  /* (batch, query heads, window + n, head_width), features contiguous */
  int64_t keys_strides[3], values_strides[3]; /* row, head, token */
  const int64_t *lengths; /* (batch,) previous tokens; slots of the window before a row's first token are not read */
} regard_decoder_state;

/* A layer's query reads only some pages of its cache, as in regard_quest_attention; the cache, in contiguous memory, has
 * `slots` slots per head. low NULL: it reads all keys, and the rest is unused. */
typedef struct {
  const float *low, *high;
  int64_t slots, page_size, chosen, shared;
} regard_decoder_reading;

/* A layer that drops tokens by the weights of its queries. After a token (n = 1) has attended, each kv head adds the
 * weights of its query heads to `weights`, beginning with 0 in the new token's slot. A row that then holds more than
 * `capacity` tokens drops the one with the least sum, the first among equals, of those whose rank is below `kept_from`;
 * the token in its last slot takes that slot. With weights NULL the newest queries' weights decide alone, summed over
 * all heads, which drop the same slot. capacity 0: drops nothing, and the rest is unused. */
typedef struct {
  float *weights;  /* (batch, kv heads, slots) contiguous; NULL: none are kept */
  int64_t *ranks;  /* (batch, kv heads, slots) contiguous: the tokens' places in their row */
  int64_t slots, capacity, kept_from;
} regard_decoder_eviction;

/* Tokens in 8 bits, which come before those of a layer's cache: a key is k times k_step, a value v times v_step. */
typedef struct {
  const int8_t *k, *v;          /* (batch, kv heads, tokens, head_width) and (batch, kv heads, head_width, tokens), contiguous */
  const float *k_step, *v_step; /* (batch, kv heads, head_width) and (batch, kv heads, tokens), contiguous */
  int64_t tokens;
} regard_decoder_block;
typedef struct {
  const regard_decoder_block *blocks;
  int64_t count; /* 0: none */
} regard_decoder_rounded;

/* The rotation of a cache whose keys are stored as they are: the token in slot s is rotated by row s, its key whenever it
 * is read, its query once. cosine NULL: tokens are rotated once, by their own angles, and the rest is unused. */
typedef struct {
  const float *cosine, *sine; /* (slots, head_width) contiguous */
  int64_t slots;              /* at least as many as any row holds with its new tokens */
} regard_decoder_rotation;

/* Layers in sequence, and optionally a norm of the last one's output; token i of row b has the number lengths_b + i in
 * its row. Without pages all rows have room for as many tokens as the longest, and the first `padding_b` tokens of a
 * row may be padding, which is never visible; with pages, token t of row b is stored as in regard_attention_decode.
 * Caches of layers that have dropped tokens hold fewer: in layer i, token t of a row is stored as token t - fewer_i. Where
 * slots_i is not negative, a single new token (n = 1) of each row goes there instead, in place of a token that the layer
 * drops, and sees all of its lengths_b - fewer_i + 1 slots. Nothing is written if an argument is bad. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, n, width, head_width;
  int64_t count;
  const regard_decoder_layer *layers;
  const regard_decoder_state *states; /* one for each layer with a recurrence, in order */
  const int64_t *lengths;         /* (batch,) previous tokens, including padding */
  const int64_t *padding;         /* (batch,); NULL for none. Not with pages */
  const int64_t *pages;           /* (batch, pages_stride); NULL for none */
  int64_t pages_stride, page_size;
  const int64_t *fewer, *slots;   /* (count,), the former at most any length; NULL: 0 and -1. Not with pages or padding */
  const regard_decoder_reading *reading; /* (count,); NULL: all keys. Only for n = 1, not with pages or padding */
  const regard_decoder_eviction *evictions; /* (count,); NULL: none. As `reading`, and not together with it or slots in a layer */
  const regard_decoder_rounded *rounded; /* (count,); NULL: none. As `evictions`, and not together with them */
  const regard_decoder_rotation *rotations; /* (count,); NULL: none. Not with pages or padding, nor together with
                                               `reading`, `evictions`, `rounded` or a recurrence in a layer */
  const float *cosine, *sine;     /* (batch, n, head_width) contiguous */
  float eps;
  const float *norm;              /* (width,); NULL for none */
  float *x;                       /* (batch, n, width) contiguous; overwritten by the output */
} regard_decoder_layers_args;
REGARD_API int regard_decoder_layers(const regard_decoder_layers_args *args);

#ifdef __cplusplus
}
#endif
#endif
