// Philox 4x32-10 (Salmon et al., SC'11), a counter-based random number generator. Only for isa.cpp.
//
// The first of the four output words equals Triton's tl.randint(key, counter), so GPU kernels can draw the same bits.
#pragma once

#include "simd.hpp"

namespace {

constexpr int kCounters = 32;  // consecutive counters that are computed together

#if defined(__AVX512F__)

// Writes the first output words for the counters first..first + kCounters - 1. Words are in the lower halves of 64-bit
// lanes, where the products take them from; the upper halves mean nothing.
INLINE void philox(std::uint64_t key, std::uint64_t first, std::uint32_t out[kCounters]) {
  const __m512i multiplier_a = _mm512_set1_epi64(0xD2511F53), multiplier_b = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i c0[4], c1[4], c2[4], c3[4];
  for (int g = 0; g < 4; ++g) {
    c0[g] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first + 8 * g)), lanes);
    c1[g] = _mm512_srli_epi64(c0[g], 32);
    c2[g] = c3[g] = _mm512_setzero_si512();
  }
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int g = 0; g < 4; ++g) {
      const __m512i a = _mm512_mul_epu32(c0[g], multiplier_a), b = _mm512_mul_epu32(c2[g], multiplier_b);
      c0[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1[g], key0, 0x96);  // exclusive or of three
      c2[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3[g], key1, 0x96);
      c1[g] = b;
      c3[g] = a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int g = 0; g < 4; ++g)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8 * g), _mm512_cvtepi64_epi32(c0[g]));
}

#else

// Writes the first output words for the counters first..first + kCounters - 1, by loops simple enough to vectorise.
INLINE void philox(std::uint64_t key, std::uint64_t first, std::uint32_t out[kCounters]) {
  constexpr std::uint32_t kMultiplierA = 0xD2511F53u, kMultiplierB = 0xCD9E8D57u;
  constexpr std::uint32_t kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;
  std::uint32_t c1[kCounters], c2[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    out[i] = static_cast<std::uint32_t>(first + i);
    c1[i] = static_cast<std::uint32_t>((first + i) >> 32);
    c2[i] = c3[i] = 0;
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
      const std::uint64_t a = static_cast<std::uint64_t>(kMultiplierA) * out[i];
      const std::uint64_t b = static_cast<std::uint64_t>(kMultiplierB) * c2[i];
      out[i] = static_cast<std::uint32_t>(b >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<std::uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<std::uint32_t>(b);
      c3[i] = static_cast<std::uint32_t>(a);
    }
    k0 += kWeylA;
    k1 += kWeylB;
  }
}

#endif

}  // namespace
