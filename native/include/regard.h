/* The C ABI of regard's CPU kernels. Plain C types only: no PyTorch, no C++ in the interface.
 *
 * Conventions. Every kernel takes one struct whose first member is its size in bytes, so that a version mismatch
 * between library and caller is detected. Strides count elements. A tensor's last axis is contiguous unless a stride is
 * given for it. `threads` is the maximum number of threads. Results do not depend on the order of threads. Kernels
 * return REGARD_OK or an error; after an error the outputs are undefined.
 */
#ifndef REGARD_H
#define REGARD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define REGARD_API __declspec(dllexport)
#else
#define REGARD_API __attribute__((visibility("default")))
#endif

#define REGARD_ABI_VERSION 1

enum regard_status {
  REGARD_OK = 0,
  REGARD_WRONG_SIZE = 1,    /* the struct's size: library and caller have different versions */
  REGARD_BAD_ARGUMENT = 2,  /* a shape or option that the kernel does not support */
  REGARD_OUT_OF_MEMORY = 3
};

enum regard_dtype { REGARD_FLOAT32 = 0, REGARD_BFLOAT16 = 1 };

REGARD_API int regard_abi_version(void);

/* Instruction sets: "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16". The best one that the processor supports
 * is chosen at load time, when Linux is also asked to permit AMX. `regard_set_instruction_set` forces another; it
 * returns REGARD_BAD_ARGUMENT if the library, the processor or the system does not support it.
 * `regard_instruction_sets` lists all that work on this machine, separated by commas, the best last. */
REGARD_API const char *regard_instruction_set(void);
REGARD_API const char *regard_instruction_sets(void);
REGARD_API int regard_set_instruction_set(const char *name);

/* Threads. `fork` has the signature of GOMP_parallel and `thread` that of omp_get_thread_num. Given those of PyTorch's
 * OpenMP runtime, the kernels use its threads instead of competing with them. NULL: the library's own threads. */
typedef void (*regard_fork)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*regard_thread)(void);
REGARD_API void regard_set_thread_pool(regard_fork fork, regard_thread thread);

/* Fill workspaces with NaN before use, to reveal reads of uninitialised memory. */
REGARD_API void regard_set_poison(int poison);

/* Peak bytes held by workspaces since the last call with reset = 1. */
REGARD_API int64_t regard_workspace_peak(int reset);

#ifdef __cplusplus
}
#endif
#endif
