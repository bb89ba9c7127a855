/* One token's attention to the pages of a cache that may hold its largest scores. */
#ifndef REGARD_QUEST_ATTENTION_H
#define REGARD_QUEST_ATTENTION_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A page is `page_size` slots. `low` and `high` have the smallest and the largest entries of its keys. With c keys of a
 * (row, kv head), the pages before that of key c - 1 are whole; of these its query heads read `chosen`, those of the largest
 *     sum_d max(q_d low_d, q_d high_d),
 * each its own or, with `shared`, those of the largest sum over the heads, and the page of key c - 1, as softmax of scale
 * q . k. All that is not a query or an output is contiguous; heads of a query and of an output are equally far apart, also
 * from row to row. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of all but counts */
  const void *q, *k, *v;
  void *out;
  float *lse; /* not written */
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
