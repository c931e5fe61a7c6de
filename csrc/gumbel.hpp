// Draws of tokens by the Gumbel-max trick, with noise from Philox. Only for isa.cpp.
//
// A token's noise is a function of (row key, token id) alone: not of the batch, the order or the thread. The kWords
// tokens from a multiple of kWords on take the words of kCounters counters: token v takes word v / kCounters % 4 of
// the counter v / kWords * kCounters + v % kCounters. The kernels on GPUs draw the same bits.
#pragma once

#include "kernels.hpp"
#include "philox.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

// Returns the natural logarithm of a positive normal float (Cephes polynomial). Branch-free, so that loops over it
// vectorise.
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

// Returns Gumbel(0, 1) noise. u is uniform on (0, 1) with its fine resolution near 0, where -log(-log(1 - u)) is
// largest: the tail reaches 22.9 instead of the 16.6 of a float32 uniform near 1.
INLINE float gumbel(std::uint32_t bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 0x1p-32f;
  const float complement = u < 0x1p-11f ? 0.5f : 1.0f - u;
  const float by_series = u + 0.5f * u * u;
  const float by_log = -log_positive(complement > 0x1p-25f ? complement : 0x1p-25f);
  return -log_positive(u < 0x1p-11f ? by_series : by_log);
}

// Writes the noise of kCounters tokens.
INLINE void gumbel_block(const std::uint32_t* bits, float* noise) {
#pragma omp simd
  for (int i = 0; i < kCounters; ++i) noise[i] = gumbel(bits[i]);
}

// Writes the random bits of the tokens first..first + kWords - 1; first is a multiple of kWords.
INLINE void random_bits(std::int64_t key, std::int64_t first, std::uint32_t out[kWords]) {
  philox(static_cast<std::uint64_t>(key), static_cast<std::uint64_t>(first / kWords * kCounters), out);
}

constexpr float kMaxGumbel = 23.0f;  // upper bound of the noise: 22.88, and room for rounding

// Returns an upper bound, with room for rounding, of the bits that give noise of at least t: larger bits give smaller
// noise.
INLINE std::uint32_t max_bits_for(float t) {
  const float u = 1.0f - exponential(-exponential(-t));
  const float limit = (t > 8.0f ? exponential(-t) : u) * 4294967296.0f * 1.001f + 1024.0f;
  return limit < 4294967040.0f ? static_cast<std::uint32_t>(limit) : 0xFFFFFFFFu;
}

// Writes the noise of the tokens 0..count - 1 of a row.
void gumbel_row(std::int64_t key, float* out, std::int64_t count) {
  for (std::int64_t first = 0; first < count; first += kWords) {
    std::uint32_t bits[kWords];
    float noise[kWords];
    random_bits(key, first, bits);
    for (int i = 0; i < kWords; i += kCounters) gumbel_block(bits + i, noise + i);
    for (std::int64_t i = 0; i < min(kWords, count - first); ++i) out[first + i] = noise[i];
  }
}

// Updates the best token with the scores of the tokens first_token, first_token + 1, ... Of equal ones the first wins.
INLINE void update_best(const float* scores, std::int64_t first_token, std::int64_t n, BestToken& best) {
  for (std::int64_t i = 0; i < n; ++i)
    if (scores[i] > best.score) best.score = scores[i], best.token = first_token + i;
}

// Updates the best token with the scores z / temperature + noise, or z itself where greedy, of the tokens first_token,
// first_token + 1, ...; first_token is a multiple of kWords. Noise that cannot make a token the best is not computed.
INLINE void draw(const float* z, std::int64_t key, std::int64_t first_token, std::int64_t n, float temperature,
                 bool greedy, BestToken& best) {
  if (greedy) return update_best(z, first_token, n, best);
  for (std::int64_t start = 0; start < n; start += kWords) {
    const std::int64_t count = min(kWords, n - start);
    alignas(64) float scores[kWords], noise[kCounters];
    Vec peaks = broadcast(-kInfinity);
    for (std::int64_t i = 0; i < count; i += kLanes) {
      store(scores + i, div(load_bounded(z + start, i, count), broadcast(temperature)));
      for (std::int64_t j = count; j < i + kLanes; ++j) scores[j] = -kInfinity;
      peaks = max(peaks, load(scores + i));
    }
    const float peak = reduce_max(peaks);
    if (peak + kMaxGumbel <= best.score || peak == -kInfinity) continue;
    std::uint32_t bits[kWords];
    random_bits(key, first_token + start, bits);
    const std::uint32_t max_bits = max_bits_for(best.score - peak);
    for (std::int64_t first = 0; first < count; first += kCounters) {
      bool can_win = false;
      for (int i = 0; i < kCounters; ++i) can_win |= bits[first + i] <= max_bits;
      if (!can_win) continue;
      gumbel_block(bits + first, noise);
      const std::int64_t end = min(kCounters, count - first);
      for (std::int64_t i = 0; i < end; ++i) scores[first + i] += noise[i];
      update_best(scores + first, first_token + start + first, end, best);
    }
  }
}

}  // namespace
