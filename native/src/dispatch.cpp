// Chooses the instruction set, and exports the kernels, each forwarding to its version for that set.

#include "regard.h"

#include <atomic>
#include <string>

#include <string.h>

#if defined(REGARD_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace regard {
namespace {

#if defined(REGARD_X86)
constexpr const char* NAMES[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};
#if defined(REGARD_AMX)
constexpr int SETS = 5;

// Whether the processor has bfloat16 tiles (AMX) and the system permits this process to use them.
bool grant_tiles() {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // whether the system saves the tiles' state
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
constexpr int SETS = 4;
#endif

bool has(int set) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(REGARD_AVX512_ONLY)
  if (set < 2) return false;
#endif
  switch (set) {
    case 0:
      return true;
    case 1:
      return avx2;
    case 2:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case 3:
      return has(2) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    default: {
#if defined(REGARD_AMX)
      static const bool granted = has(3) && grant_tiles();
      return granted;
#else
      return false;
#endif
    }
  }
}
#else
constexpr const char* NAMES[] = {"baseline"};
constexpr int SETS = 1;

bool has(int) { return true; }
#endif

int best() {
  int found = 0;
  for (int set = 0; set < SETS; ++set)
    if (has(set)) found = set;
  return found;
}

std::atomic<int> chosen{best()};

}  // namespace
}  // namespace regard

extern "C" int regard_abi_version(void) { return REGARD_ABI_VERSION; }

extern "C" const char* regard_instruction_set(void) { return regard::NAMES[regard::chosen.load()]; }

extern "C" const char* regard_instruction_sets(void) {
  static const std::string* all = [] {
    auto* names = new std::string();
    for (int set = 0; set < regard::SETS; ++set)
      if (regard::has(set)) *names += (names->empty() ? "" : ",") + std::string(regard::NAMES[set]);
    return names;
  }();
  return all->c_str();
}

extern "C" int regard_set_instruction_set(const char* name) {
  for (int set = 0; set < regard::SETS; ++set)
    if (strcmp(name, regard::NAMES[set]) == 0 && regard::has(set)) {
      regard::chosen.store(set);
      return REGARD_OK;
    }
  return REGARD_BAD_ARGUMENT;
}

// REGARD_KERNEL(name, Args): regard_name(const Args*) runs `name` of the chosen set. Sources that gain nothing from
// bfloat16 instructions or byte dot products are not compiled for them; their AVX-512 version runs instead.
#if defined(REGARD_X86)
#if defined(REGARD_AVX512_ONLY)
#define isa_baseline isa_avx512  // never chosen
#define isa_avx2 isa_avx512      // never chosen
#endif
#define REGARD_DECLARE(isa, name, Args) \
  namespace isa {                       \
  int name(const Args*);                \
  }
#define REGARD_FORWARD(name, Args, pairs, tiles)                           \
  REGARD_DECLARE(isa_baseline, name, Args)                                 \
  REGARD_DECLARE(isa_avx2, name, Args)                                     \
  REGARD_DECLARE(isa_avx512, name, Args)                                   \
  REGARD_DECLARE(pairs, name, Args)                                        \
  REGARD_DECLARE(tiles, name, Args)                                        \
  extern "C" REGARD_API int regard_##name(const Args* args) {              \
    if (args->size != static_cast<int64_t>(sizeof(Args))) return REGARD_WRONG_SIZE; \
    switch (regard::chosen.load(std::memory_order_relaxed)) {              \
      case 0:                                                              \
        return isa_baseline::name(args);                                   \
      case 1:                                                              \
        return isa_avx2::name(args);                                       \
      case 2:                                                              \
        return isa_avx512::name(args);                                     \
      case 3:                                                              \
        return pairs::name(args);                                          \
      default:                                                             \
        return tiles::name(args);                                          \
    }                                                                      \
  }
#define REGARD_KERNEL(name, Args) REGARD_FORWARD(name, Args, isa_avx512, isa_avx512)
#define REGARD_KERNEL_VNNI(name, Args) REGARD_FORWARD(name, Args, isa_avx512_bf16, isa_avx512_bf16)
#if defined(REGARD_AMX)
#define REGARD_KERNEL_BF16(name, Args) REGARD_FORWARD(name, Args, isa_avx512_bf16, isa_amx_bf16)
#else
#define REGARD_KERNEL_BF16(name, Args) REGARD_FORWARD(name, Args, isa_avx512_bf16, isa_avx512_bf16)
#endif
#else
#define REGARD_KERNEL(name, Args)                                          \
  namespace isa_baseline {                                                 \
  int name(const Args*);                                                   \
  }                                                                        \
  extern "C" REGARD_API int regard_##name(const Args* args) {              \
    if (args->size != static_cast<int64_t>(sizeof(Args))) return REGARD_WRONG_SIZE; \
    return isa_baseline::name(args);                                       \
  }
#define REGARD_KERNEL_BF16(name, Args) REGARD_KERNEL(name, Args)
#define REGARD_KERNEL_VNNI(name, Args) REGARD_KERNEL(name, Args)
#endif

#include "kernels.inc"
