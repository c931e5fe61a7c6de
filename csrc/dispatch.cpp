// Chooses the kernels for this processor. Compiled for the plainest one.
#include "kernels.hpp"

namespace genssd {

const Kernels* kernels() {
#if defined(GENSSD_X86)
  static const Kernels* const best = []() -> const Kernels* {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return nullptr;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
      return &kAvx2;
    return __builtin_cpu_supports("avx512bf16") ? &kAvx512Bf16 : &kAvx512;
  }();
  return best;
#else
  return nullptr;
#endif
}

}  // namespace genssd
