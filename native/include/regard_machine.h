/* Measured speed of the machine: the roofline against which kernels are judged. */
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
  double *gflops;  /* out: 1e9 operations per second of fused multiply-adds in registers */
} regard_fma_peak_args;
REGARD_API int regard_fma_peak(const regard_fma_peak_args *args);

typedef struct {
  int64_t size;
  int64_t threads;
  const float *from; /* (count,) read once per pass */
  float *to;         /* (count,) written once per pass; NULL to only read */
  int64_t count;
  int64_t passes;
  float *sink; /* out: a value that depends on everything read, so that no read is optimised away */
} regard_bandwidth_args;
REGARD_API int regard_bandwidth(const regard_bandwidth_args *args);

#ifdef __cplusplus
}
#endif
#endif
