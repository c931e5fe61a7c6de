// The operators as Python calls them: they check their arguments and divide the work among threads. Their contracts
// are in genssd.kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "segments.hpp"
#include "tensors.hpp"

namespace genssd {

// Fewer operations than this take less time than to wake a thread.
inline constexpr std::int64_t kOperationsPerThread = 1 << 16;

// Returns how many of the threads share work of so many operations.
inline int threads_for(std::int64_t operations, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(operations / kOperationsPerThread, 1, std::max(threads, 1)));
}

// head_operators.cpp
void gumbel_noise(Array keys, Array out, int threads);
void linear_logprob(Array hidden, Array weight, std::int64_t vocabulary, Array target, MaybeArray bias,
                    float temperature, float softcap, Array stats, Array rank, Array top_ids, Array top_logprob,
                    int threads);
void linear_sample(Array hidden, Array weight, std::int64_t vocabulary, Array key, MaybeArray bias, float temperature,
                   float softcap, std::int64_t drawable, Array tokens, Array logprob, int threads);
void sample(Array logits, Array key, float temperature, std::int64_t top_k, float top_p, float log_min_p, Array tokens,
            int threads);

// layer_operators.cpp
void packed_rows(Array weight, std::int64_t rows, Array index, Array out);
void linear(Array x, Array weight, MaybeArray bias, Array out, int threads);
void rms_norm(Array x, MaybeArray residual, Array weight, float eps, std::optional<float> offset, Array out,
              MaybeArray sum, int threads);
void gated(Array gate_up, const char* gate, float alpha, float limit, Array out, int threads);
void weighted_sum(Array values, Array index, Array weight, Array out, int threads);
void rotary_angles(Array position, Array frequency, float factor, Array cos, Array sin, int threads);
void write_kv(Array qkv, Array cos, Array sin, Array k_pages, Array v_pages, Array slot, MaybeArray q_norm,
              MaybeArray k_norm, float eps, std::optional<float> norm_offset, Array q, int threads);
void copy_pages(Array kv, Array source, Array destination, int threads);

// attention_operators.cpp
SegmentTable* segment_table(Array tables, Array table, Array first, Array rows, std::int64_t page_size,
                            std::int64_t segment, std::int64_t window, std::int64_t unit_rows,
                            std::int64_t chain_programs, std::int64_t resume_tokens);
void paged_attention(Array q, Array k_pages, Array v_pages, const SegmentTable& table, Array out, float scale,
                     float softcap, MaybeArray sinks, int threads);

}  // namespace genssd
