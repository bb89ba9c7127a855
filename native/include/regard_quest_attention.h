/* Attention of one token to the pages of a cache that may hold its largest scores. */
#ifndef REGARD_QUEST_ATTENTION_H
#define REGARD_QUEST_ATTENTION_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A page has `page_size` slots; `low` and `high` hold the elementwise minimum and maximum of its keys. If a (row, kv
 * head) has c keys, the pages before that of key c - 1 are complete. A query head attends, by softmax of scale q . k,
 * to the page of key c - 1 and to the `chosen` complete pages with the largest
 *     sum_d max(q_d low_d, q_d high_d),
 * or, with `shared`, with the largest sum of this over the query heads of the kv head. All tensors but queries and
 * outputs are contiguous; the heads of queries and of outputs are equally far apart, also across rows. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of all but counts */
  const void *q, *k, *v;
  void *out;
  float *lse; /* unused */
  int64_t batch, heads, kv_heads, n, m, width, value_width; /* n is 1; m slots, a multiple of page_size */
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  const void *low, *high; /* (B, G, m / page_size, width); only those of whole pages are read */
  const int64_t *counts;  /* (B, G) keys, 0 to m */
  int64_t page_size, chosen, shared;
  float scale;
} regard_quest_attention_args;
REGARD_API int regard_quest_attention(const regard_quest_attention_args *args);

#ifdef __cplusplus
}
#endif
#endif
