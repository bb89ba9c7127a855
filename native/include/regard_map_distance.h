/* Distance of an estimated map from exact attention (SEA, regard/engines/map_distance). With p_j the weights of a
 * query's visible keys, which are softmax of scale q . k or the target if there is one, and pixels as in
 * regard_pixel_attention.h,
 *   r_j     = e^{e_pixel(j)} / sum over visible i of e^{e_pixel(i)}
 *   kl      = sum of p_j log(p_j / r_j),   squares = sum of (p_j - r_j)^2,
 * and with a target, and w the softmax of scale q . k, also sum of p_j log(p_j / w_j) and sum of (p_j - w_j)^2. A query
 * that sees no key has 0. All keys of a pixel have the same r: sums over keys become sums over pixels. */
#ifndef REGARD_MAP_DISTANCE_H
#define REGARD_MAP_DISTANCE_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of q and k */
  const void *q, *k;
  int64_t batch, heads, kv_heads, n, m, width;
  int64_t q_strides[3], k_strides[3]; /* batch, head, token; features are contiguous */
  const float *estimate; /* (B, H, n, pixels) */
  int64_t estimate_strides[3], pixels;
  const float *target; /* (B, H, n, m) by slot, or NULL */
  int64_t target_strides[3];
  const int64_t *totals; /* (rows, n): number of keys that a query sees; negative means none */
  const int64_t *slots;  /* (rows, m): slot of the key of each rank; NULL: the rank itself */
  const double *jitter;  /* (rows, m), or NULL: by slot, added to the rank of the key before its pixel is found */
  int64_t totals_stride, slots_stride, jitter_stride; /* between rows; 0: rows share them */
  float scale;
  float *kl, *squares; /* (B, H, n) contiguous */
  float *mass;         /* (B, H, n, pixels) contiguous, or NULL: sum of p over the keys of each pixel */
  float *rows;         /* (B, H, n, 3) contiguous, or NULL; with a target, for each query log-sum-exp of its scores,
                        * sum of p, sum of w (w - p) */
} regard_map_distance_args;
REGARD_API int regard_map_distance(const regard_map_distance_args *args);

/* Gradients. `forward` is the forward call's struct with `mass`, and with a target `rows`, filled. Without a target q and k
 * have no gradient. Every gradient is overwritten, not accumulated; NULL if not wanted. */
typedef struct {
  int64_t size;
  const regard_map_distance_args *forward;
  const float *grad_kl, *grad_squares; /* (B, H, n) contiguous, or NULL: 0 */
  float *grad_estimate;                /* (B, H, n, pixels) contiguous */
  void *grad_q, *grad_k;               /* of the dtype; only with a target */
  int64_t grad_q_strides[3], grad_k_strides[3];
} regard_map_distance_backward_args;
REGARD_API int regard_map_distance_backward(const regard_map_distance_backward_args *args);

#ifdef __cplusplus
}
#endif
#endif
