/* Competition and acceptance of causal flow attention (regard/engines/conserved_flows.py) from non-negative sinks x and
 * sources y. With n_t tokens seen at t and X, Y the running sums of x and y:
 *   incoming_t = <x_t + eps, Y_t + eps>,           outgoing_t = <y_t + eps, X_t + eps>,
 *   conserved sinks_t = <x_t + eps, Y'_t + eps>,   conserved sources_t = <y_t + eps, X'_t + eps>,
 * where X', Y' are the running sums of x_t n_t / incoming_t and y_t n_t / outgoing_t. Then
 *   competition_t = n_t exp(l_t) / sum_{j<=t} exp(l_j),   l_t = clamp(conserved sources_t / n_t, low, high) / temperature,
 *   acceptance_t = sigmoid(conserved sinks_t / n_t) / incoming_t.
 */
#ifndef REGARD_CONSERVED_FLOWS_H
#define REGARD_CONSERVED_FLOWS_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t batch, heads, n, width;
  const float *sinks, *sources; /* (B, H, N, D) */
  int64_t sinks_strides[3], sources_strides[3];
  const int64_t *lengths; /* (B,) tokens seen before this call */
  const int64_t *valid;   /* (B,) valid tokens of each row; later ones do not compete. NULL: all are valid */
  int64_t compete;        /* 0: competition is 1 everywhere */
  int64_t allocate;       /* 0: acceptance is 1 / incoming */
  float eps, low, high, temperature;
  const float *totals;           /* (4, B, H, D) contiguous, the state to continue from: Y, X, Y', X' */
  const float *maximum, *normalizer; /* (B, H): largest l so far and sum of exp(l - maximum) */
  float *competition, *acceptance;   /* (B, H, N) */
  float *flows;                      /* (4, B, H, N) in the order above, for the backward pass */
  float *totals_out, *maximum_out, *normalizer_out;
} regard_conserved_flows_args;
REGARD_API int regard_conserved_flows(const regard_conserved_flows_args *args);

/* Gradients, contiguous; the maximum is held constant. `forward` is the forward call's struct with `flows` filled; its
 * other outputs are not read. */
typedef struct {
  int64_t size;
  const regard_conserved_flows_args *forward;
  const float *grad_competition, *grad_acceptance;
  const float *grad_totals_out, *grad_normalizer_out;
  float *grad_sinks, *grad_sources;
  float *grad_totals, *grad_maximum, *grad_normalizer;
} regard_conserved_flows_backward_args;
REGARD_API int regard_conserved_flows_backward(const regard_conserved_flows_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
