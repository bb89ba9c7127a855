/* What the machine can do, measured now: the roofline that kernels are judged against. */
#ifndef REGARD_MACHINE_H
#define REGARD_MACHINE_H

#include "regard.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t size;
  int64_t threads;
  double seconds;  /* how long to measure */
  double *gflops;  /* out: 1e9 operations per second of fused multiply-adds that stay in registers */
} regard_fma_peak_args;
REGARD_API int regard_fma_peak(const regard_fma_peak_args *args);

typedef struct {
  int64_t size;
  int64_t threads;
  const float *from; /* (count,) read once a pass */
  float *to;         /* (count,) written once a pass; NULL to read only */
  int64_t count;
  int64_t passes;
  float *sink; /* out: something that depends on all that was read */
} regard_bandwidth_args;
REGARD_API int regard_bandwidth(const regard_bandwidth_args *args);

#ifdef __cplusplus
}
#endif
#endif
