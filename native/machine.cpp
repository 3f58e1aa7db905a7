#include "machine.hpp"

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace evenkeel {

namespace baseline {
extern const Kernels kernels;
}
#if defined(EVENKEEL_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Caches {
  Index second = 1 << 20, third = 16 << 20;
  Caches() {
#if defined(__linux__) && defined(_SC_LEVEL2_CACHE_SIZE)
    if (const long size = sysconf(_SC_LEVEL2_CACHE_SIZE); size > 0) second = size;
    if (const long size = sysconf(_SC_LEVEL3_CACHE_SIZE); size > 0) third = size;
#endif
  }
};

const Caches& caches() {
  static const Caches found;
  return found;
}

Index cache_wish = 0;
Index stream_wish = -1;

}  // namespace

Index cache_for(Index threads) {
  if (cache_wish) return cache_wish;
  // Others use the last cache too, and what is written passes through it.
  return std::max(caches().second, caches().third / (2 * std::max<Index>(1, threads)));
}

Index stream_from() { return stream_wish >= 0 ? stream_wish : caches().third; }
void set_stream_from(Index bytes) { stream_wish = bytes; }
void set_cache(Index bytes) { cache_wish = bytes; }

const Kernels* kernels_named(const char* name) {
#if defined(EVENKEEL_X86)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !std::strcmp(name, "avx512")) return &avx512::kernels;
  if (has_avx2 && !std::strcmp(name, "avx2")) return &avx2::kernels;
#endif
  return std::strcmp(name, "baseline") ? nullptr : &baseline::kernels;
}

const Kernels& best_kernels() {
  for (const char* name : {"avx512", "avx2"})
    if (const Kernels* found = kernels_named(name)) return *found;
  return baseline::kernels;
}

}  // namespace evenkeel
