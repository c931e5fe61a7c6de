// Drawing tokens with counter-based noise: Philox 4x32-10 (Salmon et al., SC'11), keyed by 64 bits per row, counted by
// token id. Only for isa_*.cpp.
//
// A token's noise is a function of (row key, token id) alone: not of the batch, the order or the thread.
// The first of the four output words equals Triton's tl.randint(key, token_id), so GPU kernels can draw the same bits.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

constexpr int kCounters = 32;  // consecutive counters computed together: simple loops, so that they vectorise

#if defined(__AVX512F__)

// First output words for the counters first..first + kCounters - 1. Words sit in the lower halves of 64-bit lanes,
// where the products take them from; the upper halves mean nothing.
INLINE void philox(std::uint64_t key, std::uint64_t first, std::uint32_t out[kCounters]) {
  const __m512i by_a = _mm512_set1_epi64(0xD2511F53), by_b = _mm512_set1_epi64(0xCD9E8D57);
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
      const __m512i a = _mm512_mul_epu32(c0[g], by_a), b = _mm512_mul_epu32(c2[g], by_b);
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

// First output words for the counters first..first + kCounters - 1.
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

// Natural logarithm for positive normal floats (Cephes polynomial), branch-free so that loops over it vectorise.
INLINE float log_positive(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  float exponent = static_cast<float>(static_cast<std::int32_t>(bits >> 23) - 126);
  float m = std::bit_cast<float>((bits & 0x007FFFFFu) | 0x3F000000u);  // in [0.5, 1)
  const bool low = m < 0.707106781186547524f;
  exponent -= low ? 1.0f : 0.0f;
  m = (low ? m + m : m) - 1.0f;
  const float m2 = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float y = p * m * m2;
  y += exponent * -2.12194440e-4f;
  y -= 0.5f * m2;
  return m + y + exponent * 0.693359375f;
}

// Gumbel(0, 1) noise. u is uniform on (0, 1) with its fine resolution near 0, where -log(-log(1 - u)) is largest:
// the tail reaches 22.9 instead of the 16.6 of a float32 uniform near 1.
INLINE float gumbel(std::uint32_t bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  const float keep = u < 0x1p-11f ? 0.5f : 1.0f - u;
  const float by_series = u + 0.5f * u * u;
  const float by_log = -log_positive(keep > 0x1p-25f ? keep : 0x1p-25f);
  return -log_positive(u < 0x1p-11f ? by_series : by_log);
}

INLINE void noise_of(const std::uint32_t* bits, float* noise) {
#pragma omp simd
  for (int i = 0; i < kCounters; ++i) noise[i] = gumbel(bits[i]);
}

constexpr float kLargestNoise = 23.0f;  // of gumbel: 22.88, and room for rounding

// Bits above this give noise below t: the smaller the bits, the larger the noise. With room for rounding.
INLINE std::uint32_t bits_for(float t) {
  const float u = 1.0f - exponential(-exponential(-t));
  const float limit = (t > 8.0f ? exponential(-t) : u) * 4294967296.0f * 1.001f + 1024.0f;
  return limit < 4294967040.0f ? static_cast<std::uint32_t>(limit) : 0xFFFFFFFFu;
}

void gumbel_row(std::int64_t key, float* out, std::int64_t count) {
  for (std::int64_t first = 0; first < count; first += kCounters) {
    std::uint32_t bits[kCounters];
    float noise[kCounters];
    philox(static_cast<std::uint64_t>(key), static_cast<std::uint64_t>(first), bits);
    noise_of(bits, noise);
    for (std::int64_t i = 0; i < least(kCounters, count - first); ++i) out[first + i] = noise[i];
  }
}

// The first of the largest among z and what was best so far; z belongs to the ids first..first + n - 1.
INLINE void best_of(const float* z, std::int64_t first, std::int64_t n, float& best, std::int64_t& token) {
  for (std::int64_t i = 0; i < n; ++i)
    if (z[i] > best) best = z[i], token = first + i;
}

// The same among z / temperature + noise, or among z itself. Noise that could not win is not made.
INLINE void draw_from(const float* z, std::int64_t key, std::int64_t first, std::int64_t n, float temperature,
                      bool greedy, float& best, std::int64_t& token) {
  if (greedy) return best_of(z, first, n, best, token);
  for (std::int64_t start = 0; start < n; start += kCounters) {
    const std::int64_t some = least(kCounters, n - start);
    std::uint32_t bits[kCounters], least_bits = 0xFFFFFFFFu;
    alignas(64) float y[kCounters], noise[kCounters];
    F peaks = fill(-kInfinity);
    for (std::int64_t i = 0; i < some; i += kLanes) {
      store(y + i, div(load_at(z + start, i, some), fill(temperature)));
      for (std::int64_t j = some; j < i + kLanes; ++j) y[j] = -kInfinity;
      peaks = larger(peaks, load(y + i));
    }
    const float peak = largest(peaks);
    if (peak + kLargestNoise <= best || peak == -kInfinity) continue;
    philox(static_cast<std::uint64_t>(key), static_cast<std::uint64_t>(first + start), bits);
    for (std::int64_t i = 0; i < kCounters; ++i) least_bits = bits[i] < least_bits ? bits[i] : least_bits;
    if (least_bits > bits_for(best - peak)) continue;
    noise_of(bits, noise);
    for (std::int64_t i = 0; i < some; ++i) y[i] += noise[i];
    best_of(y, first + start, some, best, token);
  }
}

}  // namespace
