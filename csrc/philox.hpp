// Philox 4x32-10 (Salmon et al., SC'11), a counter-based random number generator. Only for isa.cpp.
#pragma once

#include "simd.hpp"

namespace {

constexpr int kCounters = 16;          // consecutive counters that are computed together
constexpr int kWords = 4 * kCounters;  // and the words that they give

#if defined(__AVX512F__)

// Writes the output words for the counters first..first + kCounters - 1: word w of counter first + i goes to
// out[w * kCounters + i]. Words are in the lower halves of 64-bit lanes, where the products take them from; the upper
// halves mean nothing.
INLINE void philox(std::uint64_t key, std::uint64_t first, std::uint32_t out[kWords]) {
  const __m512i multiplier_a = _mm512_set1_epi64(0xD2511F53), multiplier_b = _mm512_set1_epi64(0xCD9E8D57);
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  __m512i c0[2], c1[2], c2[2], c3[2];
  for (int g = 0; g < 2; ++g) {
    c0[g] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(first + 8 * g)), lanes);
    c1[g] = _mm512_srli_epi64(c0[g], 32);
    c2[g] = c3[g] = _mm512_setzero_si512();
  }
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
    for (int g = 0; g < 2; ++g) {
      const __m512i a = _mm512_mul_epu32(c0[g], multiplier_a), b = _mm512_mul_epu32(c2[g], multiplier_b);
      c0[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1[g], key0, 0x96);  // exclusive or of three
      c2[g] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3[g], key1, 0x96);
      c1[g] = b;
      c3[g] = a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const auto write = [&](int word, const __m512i c[2]) {
    for (int g = 0; g < 2; ++g)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + word * kCounters + 8 * g), _mm512_cvtepi64_epi32(c[g]));
  };
  write(0, c0);
  write(1, c1);
  write(2, c2);
  write(3, c3);
}

#else

// Writes the output words for the counters first..first + kCounters - 1, by loops simple enough to vectorise: word w
// of counter first + i goes to out[w * kCounters + i].
INLINE void philox(std::uint64_t key, std::uint64_t first, std::uint32_t out[kWords]) {
  constexpr std::uint32_t kMultiplierA = 0xD2511F53u, kMultiplierB = 0xCD9E8D57u;
  constexpr std::uint32_t kWeylA = 0x9E3779B9u, kWeylB = 0xBB67AE85u;
  std::uint32_t *c0 = out, *c1 = out + kCounters, *c2 = out + 2 * kCounters, *c3 = out + 3 * kCounters;
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<std::uint32_t>(first + i);
    c1[i] = static_cast<std::uint32_t>((first + i) >> 32);
    c2[i] = c3[i] = 0;
  }
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma omp simd
    for (int i = 0; i < kCounters; ++i) {
      const std::uint64_t a = static_cast<std::uint64_t>(kMultiplierA) * c0[i];
      const std::uint64_t b = static_cast<std::uint64_t>(kMultiplierB) * c2[i];
      c0[i] = static_cast<std::uint32_t>(b >> 32) ^ c1[i] ^ k0;
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
