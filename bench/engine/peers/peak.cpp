// Measures the multiplications and additions per second of all cores together, by the best instruction for products of
// bfloat16 that the processor has: TDPBF16PS, else VDPBF16PS, else VFMADD231PS on float32, to which bfloat16 is
// widened.
//
// Usage: peak THREADS [registers | cache]. registers: all operands stay in registers. cache: the rows and the columns
// of every product are loaded from memory that stays in the first cache (two tiles by two, TDPBF16PS alone). Prints
// operations per second; exits with 2 where the processor has no such instruction.

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 1'000'000;

// Whether the processor has tiles for bfloat16 and the system grants them.
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

bool has_pairs() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

// Sixteen instructions a step, each with its own accumulator, so that none waits for another. Written in assembly,
// because compilers keep sixteen accumulators in memory. Returns the operations.
double run_pairs() {
  for (long step = 0; step < kSteps; ++step) {
    asm volatile(
        ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
        "vdpbf16ps %%zmm17, %%zmm16, %%zmm\\r\n\t"
        ".endr" ::
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
              "xmm12", "xmm13", "xmm14", "xmm15");
  }
  return 16.0 * 64 * kSteps;  // 16 lanes of two products and two sums
}

bool has_fma(bool wide) {
  return wide ? __builtin_cpu_supports("avx512f") : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Twelve instructions a step, as above; what they add up stays zero.
template <bool WIDE>
double run_fma() {
  if (WIDE) {
    asm volatile(".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13\n\tvpxorq %%zmm\\r, %%zmm\\r, %%zmm\\r\n\t.endr" ::
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                       "xmm11", "xmm12", "xmm13");
  } else {
    asm volatile(".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13\n\tvxorps %%ymm\\r, %%ymm\\r, %%ymm\\r\n\t.endr" ::
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                       "xmm11", "xmm12", "xmm13");
  }
  for (long step = 0; step < kSteps; ++step) {
    if (WIDE) {
      asm volatile(
          ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11\n\t"
          "vfmadd231ps %%zmm13, %%zmm12, %%zmm\\r\n\t"
          ".endr" ::
              : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    } else {
      asm volatile(
          ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11\n\t"
          "vfmadd231ps %%ymm13, %%ymm12, %%ymm\\r\n\t"
          ".endr" ::
              : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11");
    }
  }
  return 12.0 * (WIDE ? 16 : 8) * 2 * kSteps;
}

struct alignas(64) Shapes {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four products a step: two tiles of rows by two of columns.
template <bool LOADS>
double run_tiles() {
  alignas(64) static thread_local unsigned char memory[16][1024];  // 16 KiB
  const Shapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
  for (long step = 0; step < kSteps; ++step) {
    if (LOADS) {
      const unsigned char* from = memory[step % 4 * 4];
      asm volatile(
          "tileloadd (%0,%1,1), %%tmm4\n\t"
          "tileloadd 1024(%0,%1,1), %%tmm5\n\t"
          "tileloadd 2048(%0,%1,1), %%tmm6\n\t"
          "tileloadd 3072(%0,%1,1), %%tmm7" ::"r"(from),
          "r"(64L)
          : "memory");
    }
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\t"
        "tdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\t"
        "tdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
  return 4.0 * 16 * 16 * 32 * 2 * kSteps;
}

}  // namespace

int main(int, char** arguments) {
  const int count = std::atoi(arguments[1]);
  const bool from_cache = arguments[2] && std::string_view(arguments[2]) == "cache";
  double (*run)() = nullptr;
  if (has_tiles()) {
    run = from_cache ? run_tiles<true> : run_tiles<false>;
  } else if (!from_cache) {
    if (has_pairs())
      run = run_pairs;
    else if (has_fma(true))
      run = run_fma<true>;
    else if (has_fma(false))
      run = run_fma<false>;
  }
  if (!run) return 2;
  double best = 0;  // over many short rounds, because other programs may use the cores in some of them
  for (int round = 0; round < 40; ++round) {
    const auto started = std::chrono::steady_clock::now();
    std::vector<double> operations(count);
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back([&, i] { operations[i] = run(); });
    for (auto& thread : threads) thread.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
    double rate = 0;
    for (const double one : operations) rate += one / taken.count();
    best = rate > best ? rate : best;
  }
  std::printf("%.6e\n", best);
}
