/* Blocked attention: out_i = sum over visible j of weight(s_ij) v_j with s_ij = scale q_i . k_j + biases. */
#ifndef REGARD_ATTENTION_H
#define REGARD_ATTENTION_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

enum regard_attention_rule {
  REGARD_SOFTMAX = 0,
  REGARD_SIGMOID = 1,      /* sigmoid(s + shift) */
  REGARD_RELU = 2,         /* max(0, s + shift) */
  REGARD_RELU_SQUARED = 3, /* max(0, s + shift)^2 */
  REGARD_CLIPPED = 4       /* min(1, max(0, (high - low) softmax(s) + low)), no sink */
};

/* Which keys a query may see is a rule on ranks (regard/core/visibility.py); a key of negative rank does not exist. All
 * limits apply together. */
typedef struct {
  const int64_t *query_ranks; /* (rows, n) */
  const int64_t *key_ranks;   /* (rows, m) */
  int64_t query_ranks_stride, key_ranks_stride; /* between rows of the batch; 0 if all rows share them */
  int64_t causal;                               /* keys at or before the query */
  int64_t left, right;                          /* maximum distance before and after the query; -1 for no limit */
  int64_t block, lookback, lookahead;           /* limits in blocks of `block` ranks; block 0 for no limit */
  const uint8_t *blocks;                        /* block mask (B|1, H|1, query blocks, key blocks); NULL for none */
  int64_t blocks_strides[3];                    /* batch, head, query block; key blocks are contiguous */
  int64_t blocks_rows, blocks_columns, block_size;
} regard_visibility;

/* Biases added to the scores. */
typedef struct {
  const float *bias;       /* (B|1, H|1, n|1, m|1) by slot, -inf hides; NULL for none */
  int64_t bias_strides[4]; /* 0 on axes of size 1 */
  const float *distance;   /* (H|1, distances) added by key rank - query rank + distance_zero; NULL for none */
  int64_t distance_stride; /* between heads; 0 if heads share it */
  int64_t distance_zero;   /* index of distance 0; every visible pair's index is in the table */
  int64_t distances;
} regard_score_biases;

/* Softmax, clipped or not, has a log-sum-exp: of s (natural logarithm) over visible keys, without the sink; -inf where
   no key is visible. */
typedef struct {
  int64_t size;
  int64_t threads;
  int64_t dtype; /* of q, k, v and out */
  const void *q, *k, *v;
  void *out;
  float *lse; /* (B, H, n) contiguous; NULL when not wanted */
  int64_t batch, heads, kv_heads, n, m, width, value_width;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* batch, head, token; features are contiguous */
  float scale;
  float shift;
  float softcap; /* c > 0: s becomes c tanh(s / c) before biases; 0 for none */
  int32_t rule;
  float low, high; /* of REGARD_CLIPPED: low <= 0, high >= 1 */
  const float *sink; /* (H,) one more logit per head in the softmax's denominator; NULL for none */
  regard_visibility visibility;
  regard_score_biases biases;
} regard_attention_args;
REGARD_API int regard_attention(const regard_attention_args *args);

/* Gradients. `forward` is the forward call's struct with `out` and `lse` filled (lse is needed for softmax only). Every
 * gradient has the strides given here and is overwritten, not accumulated. */
typedef struct {
  int64_t size;
  const regard_attention_args *forward;
  const void *grad_out; /* (B, H, n, value_width) of the dtype */
  int64_t grad_out_strides[3];
  const float *grad_lse; /* (B, H, n) contiguous; NULL for none */
  void *grad_q, *grad_k, *grad_v; /* of the dtype */
  int64_t grad_q_strides[3], grad_k_strides[3], grad_v_strides[3];
  float *grad_sink;     /* (H,); NULL when not wanted */
  float *grad_bias;     /* (B, H, n|1, m|1) contiguous, summed over axes of 1; NULL when not wanted */
  float *grad_distance; /* (H, distances) contiguous; NULL when not wanted */
  int64_t grad_bias_queries, grad_bias_keys; /* n or 1, m or 1 */
} regard_attention_backward_args;
REGARD_API int regard_attention_backward(const regard_attention_backward_args *args);

/* Few queries against a long cache: the keys of all (row, kv head) pairs are divided into equal spans over the threads,
 * and the partial results are merged by their log-sum-exps (LeanAttention, arXiv 2405.10480). Softmax only. With
 * `pages` NULL k and v are as in attention. Otherwise token t of row b is in page pages[b * pages_stride + t /
 * page_size], slot t % page_size, k_strides and v_strides are (page, head, slot), and entries of `pages` before a row's
 * first visible key and after its last key are not read. No block mask. */
typedef struct {
  int64_t size;
  const regard_attention_args *forward;
  const int64_t *pages;
  int64_t pages_stride, page_size;
  const int64_t *lengths; /* (batch,) keys of each row, with ranks 0, 1, ...; NULL: key_ranks are used */
  float *scores;          /* (B, H, n, m) contiguous: scores of visible keys, others may be left; NULL when not wanted */
} regard_attention_decode_args;
REGARD_API int regard_attention_decode(const regard_attention_decode_args *args);

#ifdef __cplusplus
}
#endif
#endif
