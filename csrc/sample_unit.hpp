// A draw from one row of logits, behind top-k, top-p and min-p. Only for isa_*.cpp.
//
// The filters keep what is not below a threshold, and a threshold is an entry of the row. It is found digit by digit:
// entries are counted (top-k) or weighed (top-p) by the leading bits of an order-preserving integer, from the largest
// down, until the wanted amount is reached; then the next bits of those that fell into that place.
#pragma once

#include "draw.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

constexpr int kDigitBits = 11;  // 11 + 11 + 10
constexpr int kDigits = 1 << kDigitBits;

INLINE std::uint32_t ordered(float x) {  // larger floats have larger integers
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);  // one zero
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

INLINE float from_ordered(std::uint32_t bits) {
  return std::bit_cast<float>(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

struct Candidates {  // entries of a row that a threshold may still lie among
  std::uint32_t* bits;
  float* weight;
  std::int64_t count;
};

// The largest entry with at least `amount` of weight on it and above it; the smallest entry if there is none.
float threshold(Candidates c, double amount) {
  double above = 0.0;
  for (int low = 32 - kDigitBits;; low = low > kDigitBits ? low - kDigitBits : 0) {
    double weight[kDigits] = {};
    bool held[kDigits] = {};
    for (std::int64_t i = 0; i < c.count; ++i) {
      const std::uint32_t digit = (c.bits[i] >> low) & (kDigits - 1);
      weight[digit] += c.weight[i];
      held[digit] = true;
    }
    int digit = kDigits - 1, last = -1;
    for (; digit >= 0; --digit) {
      if (!held[digit]) continue;
      last = digit;
      if (above + weight[digit] >= amount) break;
      above += weight[digit];
    }
    if (digit < 0) above -= weight[last];  // rounding: all of it is not enough
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < c.count; ++i)
      if (static_cast<int>((c.bits[i] >> low) & (kDigits - 1)) == last) {
        c.bits[kept] = c.bits[i];
        c.weight[kept++] = c.weight[i];
      }
    c.count = kept;
    if (low == 0) return from_ordered(c.bits[0]);
  }
}

struct Gathered {
  Candidates candidates;
  double weight;
};

struct Memory {
  explicit Memory(std::int64_t count)
      : z(new float[static_cast<std::size_t>(count)]),
        weight(new float[static_cast<std::size_t>(count)]),
        bits(new std::uint32_t[static_cast<std::size_t>(count)]) {}
  ~Memory() {
    delete[] z;
    delete[] weight;
    delete[] bits;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  float *z, *weight;
  std::uint32_t* bits;
};

INLINE float filters(const Sample& t, const float* z, float peak, Memory& memory) {
  const std::int64_t n = t.vocabulary;
  const auto gather = [&](float floor, bool counting) {
    Candidates c{memory.bits, memory.weight, 0};
    double all = 0.0;
    for (std::int64_t i = 0; i < n; i += kLanes) {
      float e[kLanes];
      if (!counting) store(e, exponential(sub(load_at(z, i, n), fill(peak))));
      for (std::int64_t j = 0; j < least(kLanes, n - i); ++j) {
        if (z[i + j] < floor) continue;
        c.bits[c.count] = ordered(z[i + j]);
        all += c.weight[c.count++] = counting ? 1.0f : e[j];
      }
    }
    return Gathered{c, all};
  };
  float floor = -kInfinity;
  if (t.top_k > 0 && t.top_k < n) floor = threshold(gather(floor, true).candidates, static_cast<double>(t.top_k));
  if (t.top_p < 1.0f) {
    const Gathered kept = gather(floor, false);
    floor = threshold(kept.candidates, static_cast<double>(t.top_p) * kept.weight);
  }
  if (t.log_min_p < 0.0f) {
    const float least_likely = peak + t.log_min_p;
    floor = least_likely > floor ? least_likely : floor;
  }
  return floor;
}

void sample_row(const Sample& t, std::int64_t row) {
  const float* logits = t.logits + row * t.stride;
  const std::int64_t n = t.vocabulary;
  t.token[row] = -1;
  float peak = -kInfinity;
  bool sound = true;
  for (std::int64_t i = 0; i < n; ++i) {
    peak = logits[i] > peak ? logits[i] : peak;
    sound &= logits[i] < kInfinity;  // neither NaN nor infinite
  }
  if (!sound || peak == -kInfinity) return;
  float best = -kInfinity;
  std::int64_t token = -1;
  if (t.temperature == 0.0f) {
    best_of(logits, 0, n, best, token);
  } else if (t.top_k == 0 && t.top_p >= 1.0f && t.log_min_p == 0.0f) {
    draw_from(logits, t.key[row], 0, n, t.temperature, false, best, token);
  } else {
    Memory memory(n);
    for (std::int64_t i = 0; i < n; i += kLanes)
      store_at(memory.z, div(load_at(logits, i, n), fill(t.temperature)), i, n);
    const float floor = filters(t, memory.z, peak / t.temperature, memory);
    for (std::int64_t i = 0; i < n; ++i)
      if (memory.z[i] < floor) memory.z[i] = -kInfinity;
    draw_from(memory.z, t.key[row], 0, n, 1.0f, false, best, token);
  }
  t.token[row] = token;
}

}  // namespace
