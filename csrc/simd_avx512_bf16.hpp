// AVX-512 with instructions for bfloat16 (AVX512_BF16).
#pragma once

#include <cstring>

#include "simd_avx512_base.hpp"

namespace {

INLINE void store(BFloat16* p, Vec x) {  // values below 2^-126 become 0, as they are in products, too
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), std::bit_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// x rounded to bfloat16.
INLINE Vec rounded(Vec x, BFloat16) {
  const __m512i bits = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Products of bfloat16 pairs, two consecutive values of one vector in the 32 bits of one lane.
struct PairProduct {
  static constexpr int kSteps = 1;  // one instruction adds both products of a pair
  INLINE static Vec load_column(const float* pairs, int) { return load(pairs); }
  INLINE static Vec broadcast_factor(const BFloat16* x, int) {
    std::uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return broadcast(std::bit_cast<float>(pair));
  }
  INLINE static Vec multiply_add(Vec a, Vec b, Vec total) {
    return _mm512_dpbf16_ps(total, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
};

}  // namespace
