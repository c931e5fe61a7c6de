// The kernels for processors with what CMakeLists.txt compiles this file for.
#include "attention_unit.hpp"
#include "linear_unit.hpp"
#include "row_unit.hpp"
#include "sample_unit.hpp"

const genssd::Kernels genssd::kAvx512Bf16{
    "avx512_bf16",      linear_unit,  target_row, head_unit,    attention_unit, partial_attention_unit,
    fold_attention_row, rms_norm_row, gated_row,  write_kv_row, sample_row,     gumbel_row,
};
