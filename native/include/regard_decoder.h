/* Two parts of a layer of a Llama-like decoder, for few tokens: what comes before attention, and what comes after it. Between
 * them the caller puts keys and values into a cache and attends. */
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

/* outputs_i = projections_i(norm(x)), norm(x) = x / sqrt(mean(x^2) + eps) * norm; heads of the first two are turned:
 * feature i < width / 2 to u_i cosine_i - u_(i + width / 2) sine_i, the other half likewise with a plus. */
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

#ifdef __cplusplus
}
#endif
#endif
