// Chooses the kernels for this processor. Compiled for the plainest one.
#if defined(GENSSD_X86)
#include <cpuid.h>
#endif

#include <atomic>
#include <cstring>

#include "kernels.hpp"

namespace genssd {

namespace {

std::atomic<const Kernels*> active{nullptr};

#if defined(GENSSD_X86)
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

}  // namespace

const Kernels* const* supported() {
  static const Kernels* found[4] = {};  // the best first, then null
  static const bool once = [] {
    int count = 0;
#if defined(GENSSD_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        if (__builtin_cpu_supports("avx512bf16")) found[count++] = &kAvx512Bf16;
        found[count++] = &kAvx512;
      }
      found[count++] = &kAvx2;
    }
#endif
    active = found[0];
    return count > 0;
  }();
  (void)once;
  return found;
}

const Kernels* kernels() {
  supported();
  return active;
}

bool use(const char* name) {
  for (const Kernels* const* set = supported(); *set; ++set)
    if (!std::strcmp((*set)->name, name)) {
      active = *set;
      return true;
    }
  return false;
}

}  // namespace genssd
