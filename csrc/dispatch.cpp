// Compiled for the plainest processor: it must run on every one.
#include "dispatch.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace genssd {

// Written by CMake from the rows of CMakeLists.txt: INSTRUCTION_SET(name, condition) for each set, the best first. The
// condition holds where the processor has every feature of the set.
#define INSTRUCTION_SET(name, condition) extern const Kernels kernels_##name;
#include "instruction_sets.inc"
#undef INSTRUCTION_SET

namespace {

#if defined(__x86_64__)
// Float16 conversions, which every set uses. Not every compiler's __builtin_cpu_supports knows this feature.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(__x86_64__)
// Whether the processor has the tile instructions for bfloat16, and the system lets this process use their registers,
// for which it asks here: the system gives the memory to save them in only on request (Linux 5.16).
bool has_tiles() {
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;   // of leaf 7, in EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTile) == 0) return false;
#if defined(__linux__)
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!has_f16c()) return sets;
#define HAS(feature) __builtin_cpu_supports(#feature)
#define INSTRUCTION_SET(name, condition) \
  if (condition) sets.push_back(&kernels_##name);
#include "instruction_sets.inc"
#undef INSTRUCTION_SET
#undef HAS
#endif
  return sets;
}

std::vector<const Kernels*> compiled_kernels() {
  return {
#define INSTRUCTION_SET(name, condition) &kernels_##name,
#include "instruction_sets.inc"
#undef INSTRUCTION_SET
  };
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{supported_kernels().empty() ? nullptr : supported_kernels().front()};
  return kernels;
}

}  // namespace

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> sets = detect();
  return sets;
}

const Kernels* active_kernels() { return active(); }

bool use_kernels(std::string_view name, bool emulated) {
  for (const Kernels* kernels : emulated ? compiled_kernels() : supported_kernels())
    if (kernels->name == name) {
      active() = kernels;
      return true;
    }
  return false;
}

}  // namespace genssd
