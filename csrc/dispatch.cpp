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
#include <cstdint>

namespace genssd {

// Written by CMake from the rows of CMakeLists.txt: INSTRUCTION_SET(name, condition) for each set, the best first. The
// condition holds where the processor has every feature of the set.
#define INSTRUCTION_SET(name, condition) extern const Kernels kernels_##name;
#include "instruction_sets.inc"
#undef INSTRUCTION_SET

namespace {

#if defined(__x86_64__)
// What this processor has, and the system saves the registers of, by the names of the compiler's flags. It is read
// here because not every compiler's __builtin_cpu_supports knows all of it, and that of zig answers no to everything.
struct Features {
  bool fma = false, f16c = false, avx2 = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512bf16 = false;
};

Features read_features() {
  constexpr unsigned kSystemSaves = 1u << 27;                   // OSXSAVE, of leaf 1 in ECX
  constexpr std::uint64_t kVectors = 0x6, kLongVectors = 0xE6;  // of XCR0: registers of AVX, and of AVX-512
  Features features;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kSystemSaves) == 0) return features;
  const auto has = [](unsigned word, int bit) { return (word >> bit & 1u) != 0; };
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const std::uint64_t saved = std::uint64_t{high} << 32 | low;
  const bool has_vectors = (saved & kVectors) == kVectors, has_long = (saved & kLongVectors) == kLongVectors;
  features.fma = has_vectors && has(c, 12);
  features.f16c = has_vectors && has(c, 29);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = has_vectors && has(b, 5);
  features.avx512f = has_long && has(b, 16);
  features.avx512dq = has_long && has(b, 17);
  features.avx512bw = has_long && has(b, 30);
  features.avx512vl = has_long && has(b, 31);
  const unsigned last_subleaf = a;
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) features.avx512bf16 = has_long && has(a, 5);
  return features;
}

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
  const Features features = read_features();
  if (!features.f16c) return sets;  // float16 conversions, which every set uses
#define HAS(feature) features.feature
#endif
#define INSTRUCTION_SET(name, condition) \
  if (condition) sets.push_back(&kernels_##name);
#include "instruction_sets.inc"
#undef INSTRUCTION_SET
#undef HAS
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
