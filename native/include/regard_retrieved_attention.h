/* Attention to cache blocks that queries retrieve by landmarks (regard/engines/retrieved_attention). A row's slots hold
 * tokens in the order of their ranks, the last one in the last slot; a block is closed by a landmark and has the
 * tokens, at most `block`, since the previous landmark. For a query i and its chosen blocks c, with s_ij = scale q_i .
 * k_j:
 *   u_i^c = softmax of s_i over the tokens of c,   out_i = sum over c of softmax_c(s_i,landmark(c)) sum_j u_ij^c v_j.
 * The `top_k` blocks whose landmarks score highest are chosen, unless `chosen` is given; among ties the newest. Scores
 * are ties if they differ from the lowest one that is high enough by at most `tolerance` times the scale and the lengths
 * of the query and of the longest landmark key. The output of a query without blocks is 0.
 *
 * With `turns` keys are rotated by the position of their block. A block in slot p has its landmark at position
 * p (block + 1) + block and its tokens right before. For scoring, the newest top_k blocks have the slots 1 to top_k and
 * older ones slot 0; the m-th chosen block (from 0, oldest first) gets slot m, or m + 1 if it is among the newest. With
 * at most top_k blocks each block's slot is its number. */
#ifndef REGARD_RETRIEVED_ATTENTION_H
#define REGARD_RETRIEVED_ATTENTION_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of k, v and marks; q and out are float32 */
  const void *q, *k, *v;
  void *out;
  float *lse; /* (B, H, n) contiguous: log-sum-exp of the landmarks' scores; -inf without blocks */
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* batch, head, token; features are contiguous */
  const void *marks; /* (B, G, blocks, width): a copy of the landmarks' keys, the newest last */
  int64_t marks_strides[3];
  const int64_t *closed; /* (B, blocks): the landmarks' ranks, ascending; unused ones are below the first cached rank */
  const int64_t *cached; /* (B,): cached tokens, which are in the last slots */
  const int64_t *length; /* (B,): tokens so far; the token in the last slot has the rank length - 1 */
  const uint8_t *landmark; /* (B, m) */
  const int64_t *chosen;   /* (B, H, n, picks): numbers of blocks, ascending, -1 for none; NULL: choose the best */
  int64_t closed_stride, landmark_stride, chosen_strides[3]; /* 0 if rows, heads or queries share them */
  int64_t block, top_k, blocks, picks; /* picks is at most top_k; without `chosen` it is min(top_k, blocks) */
  const float *turns; /* (positions, rotated) contiguous: cosines, then sines, of planes of features i and i + rotated / 2 */
  int64_t positions, rotated;
  int64_t own; /* n is 1, and the last slot is the query's own token: q is not rotated yet; the query also attends to
                  itself and the tokens after the last landmark before it, each next to the chosen landmarks */
  int64_t *found; /* (B, 2) with `own`: the tokens after the last landmark before it, and whether it is a landmark itself */
  float scale;
  float tolerance;
} regard_retrieved_attention_args;
REGARD_API int regard_retrieved_attention(const regard_retrieved_attention_args *args);

#ifdef __cplusplus
}
#endif
#endif
