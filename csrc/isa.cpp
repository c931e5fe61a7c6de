// The kernels of one instruction set. CMakeLists.txt compiles this file once per set, with the set's flags and with
// the macros GENSSD_ISA, its name, and GENSSD_SIMD, its header.
#include "attention_kernels.hpp"
#include "head_kernels.hpp"
#include "kernels.hpp"
#include "linear_kernels.hpp"
#include "row_kernels.hpp"
#include "sample_kernels.hpp"

#define STRING(text) #text
#define NAME(text) STRING(text)
#define CONCATENATE(a, b) a##b
#define KERNELS(name) CONCATENATE(kernels_, name)

namespace genssd {

extern const Kernels KERNELS(GENSSD_ISA);
const Kernels KERNELS(GENSSD_ISA){
    .name = NAME(GENSSD_ISA),
    .linear = linear_task,
    .target = target_row,
    .head = head_task,
    .attention = attention_task,
    .partial_attention = partial_attention_task,
    .merge_attention = merge_attention_row,
    .rms_norm = rms_norm_row,
    .gated = gated_row,
    .weighted_sum = weighted_sum_row,
    .write_kv = write_kv_task,
    .sample = sample_row,
    .gumbel = gumbel_row,
};

}  // namespace genssd
