// Measures the bf16 multiplications and additions per second of all cores together, with all operands in registers.
// Usage: peak THREADS. Prints operations per second; exits with 2 where the processor has no such instruction.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifdef __AVX512BF16__

namespace {

constexpr int kInstructions = 16;  // instructions of a step, each with its own accumulator: none waits for another
constexpr int kOperations = 64;    // operations of one instruction: 16 lanes of two products and two sums
constexpr long kSteps = 5'000'000;

// Written in assembly, because compilers keep sixteen accumulators in memory.
void run() {
    for (long step = 0; step < kSteps; ++step) {
        asm volatile(
            ".irp r, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n\t"
            "vdpbf16ps %%zmm17, %%zmm16, %%zmm\\r\n\t"
            ".endr" ::
                : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                  "xmm12", "xmm13", "xmm14", "xmm15");
    }
}

}  // namespace

int main(int, char** arguments) {
    const int count = std::atoi(arguments[1]);
    double best = 0;  // over many short rounds, because other programs may use the cores in some of them
    for (int round = 0; round < 40; ++round) {
        const auto started = std::chrono::steady_clock::now();
        std::vector<std::thread> threads;
        for (int i = 0; i < count; ++i) {
            threads.emplace_back(run);
        }
        for (auto& thread : threads) {
            thread.join();
        }
        const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
        const double rate = double(kOperations) * kInstructions * kSteps * count / taken.count();
        best = rate > best ? rate : best;
    }
    std::printf("%.6e\n", best);
}
#else
int main() { return 2; }
#endif
