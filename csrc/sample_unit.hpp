// A draw from one row of logits, behind top-k, top-p and min-p. Only for isa_*.cpp.
//
// The filters keep what is not below a threshold, and a threshold is an entry of the row. It is found digit by digit:
// entries are counted (top-k) or weighed (top-p) by the leading bits of an order-preserving integer, from the largest
// down, until the wanted amount is reached; then the next bits of those that fell into that place. Before that, top-p
// alone narrows the weights down between which its threshold lies: most entries then need no more than a comparison.
#pragma once

#include "draw.hpp"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

constexpr int kDigitBits = 11;  // 11 + 11 + 10
constexpr int kDigits = 1 << kDigitBits;

INLINE std::uint32_t ordered(float x) {                      // larger floats have larger integers
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

struct Memory {
  INLINE Memory(std::int64_t count, Pieces pieces)
      : z(pieces.take<float>(count)),
        weight(pieces.take<float>(count)),
        bits(pieces.take<std::uint32_t>(count)),
        bytes(pieces.bytes()) {}
  INLINE static Memory of(std::int64_t count) { return Memory(count, Pieces(scratch(Memory(count, Pieces()).bytes))); }
  float *z, *weight;
  std::uint32_t* bits;
  std::int64_t bytes;
};

// The largest entry but top_k - 1.
INLINE float kth(const float* z, std::int64_t n, std::int64_t top_k, Memory& memory) {
  for (std::int64_t i = 0; i < n; ++i) {
    memory.bits[i] = ordered(z[i]);
    memory.weight[i] = 1.0f;
  }
  return threshold({memory.bits, memory.weight, n}, static_cast<double>(top_k));
}

// The entry with `share` of the probability on it and above it, among the few that are not below the floor.
INLINE float nucleus_of_few(const float* z, std::int64_t n, float peak, float floor, float share, Memory& memory) {
  Candidates c{memory.bits, memory.weight, 0};
  double total = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (z[i] < floor) continue;
    c.bits[c.count] = ordered(z[i]);
    total += c.weight[c.count++] = exponential(z[i] - peak);
  }
  return threshold(c, static_cast<double>(share) * total);
}

// Narrows the weights low..high among which the entry lies that has `amount` on it and above it: twice to an eighth,
// by the logarithm. Sums are floats, so that a bound moves only where their roundings leave no doubt.
INLINE void narrow_down(const float* weight, std::int64_t n, double amount, float& low, float& high) {
  constexpr int kCuts = 7;
  const double doubt = 0x1p-22 * static_cast<double>(n / kLanes + 1);
  for (int round = 0; round < 2; ++round) {
    F cut[kCuts], mass[kCuts];
    float cuts[kCuts];
    const double step = __builtin_pow(static_cast<double>(high) / low, 1.0 / (kCuts + 1));
    for (int k = 0; k < kCuts; ++k) {
      cuts[k] = static_cast<float>(low * __builtin_pow(step, k + 1));
      cut[k] = fill(cuts[k]);
      mass[k] = zero();
    }
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const F w = load_at(weight, i, n);
      for (int k = 0; k < kCuts; ++k) mass[k] = add(mass[k], at_least(w, cut[k]));
    }
    for (int k = 0; k < kCuts; ++k) {  // cuts rise, masses fall
      const double found = sum(mass[k]);
      if (found >= amount * (1.0 + doubt)) low = cuts[k];
      if (found < amount * (1.0 - doubt)) {
        high = cuts[k];
        break;
      }
    }
  }
}

// The same among all.
INLINE float nucleus(const float* z, std::int64_t n, float peak, float share, Memory& memory) {
  double sums[kLanes] = {}, total = 0.0, above_all = 0.0;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    alignas(64) float e[kLanes];
    store(e, exponential(sub(load_at(z, i, n), fill(peak))));
    for (std::int64_t j = n - i; j < kLanes; ++j) e[j] = 0.0f;
    for (std::int64_t j = 0; j < kLanes; ++j) sums[j] += e[j];
    store_at(memory.weight, load(e), i, n);
  }
  for (const double sum : sums) total += sum;
  const double amount = static_cast<double>(share) * total;
  // all entries below this weight together could not make up the rest
  float low = static_cast<float>(0.999 * (total - amount) / static_cast<double>(n)), high = 2.0f;
  narrow_down(memory.weight, n, amount, low, high);
  Candidates c{memory.bits, memory.weight, 0};  // weights move up, never past what is yet to be read
  double larger_ones[kLanes] = {};
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const F w = load_at(memory.weight, i, n);
    alignas(64) float e[kLanes], weight[kLanes];
    store(weight, w);
    store(e, at_least(w, fill(high)));
    for (std::int64_t j = 0; j < kLanes; ++j) larger_ones[j] += e[j];
    for (unsigned held = above(fill(high), w) & ~above(fill(low), w); held; held &= held - 1) {
      const int j = __builtin_ctz(held);
      c.bits[c.count] = ordered(z[i + j]);
      c.weight[c.count++] = weight[j];
    }
  }
  for (const double sum : larger_ones) above_all += sum;
  return threshold(c, amount - above_all);
}

INLINE float filters(const Sample& t, const float* z, float peak, Memory& memory) {
  const std::int64_t n = t.vocabulary;
  float floor = -kInfinity;
  if (t.top_k > 0 && t.top_k < n) floor = kth(z, n, t.top_k, memory);
  if (t.top_p < 1.0f)
    floor =
        floor > -kInfinity ? nucleus_of_few(z, n, peak, floor, t.top_p, memory) : nucleus(z, n, peak, t.top_p, memory);
  if (t.log_min_p < 0.0f) {
    const float least_likely = peak + t.log_min_p;
    floor = least_likely > floor ? least_likely : floor;
  }
  return floor;
}

// The largest entry; NaN unless all are below infinity and none is NaN.
INLINE float sound_peak(const float* z, std::int64_t n) {
  F peaks = fill(-kInfinity);
  unsigned sound = ~0u;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    peaks = larger(peaks, load(z + i));
    sound &= above(fill(kInfinity), load(z + i));
  }
  float peak = largest(peaks);
  bool finite = sound == ~0u || sound == (1u << kLanes) - 1u;
  for (; i < n; ++i) {
    peak = z[i] > peak ? z[i] : peak;
    finite &= z[i] < kInfinity;
  }
  return finite ? peak : __builtin_nanf("");
}

void sample_row(const Sample& t, std::int64_t row) {
  const float* logits = t.logits + row * t.stride;
  const std::int64_t n = t.vocabulary;
  t.token[row] = -1;
  const float peak = sound_peak(logits, n);
  if (!(peak > -kInfinity)) return;
  float best = -kInfinity;
  std::int64_t token = -1;
  if (t.temperature == 0.0f) {
    best_of(logits, 0, n, best, token);
  } else if (t.top_k == 0 && t.top_p >= 1.0f && t.log_min_p == 0.0f) {
    draw_from(logits, t.key[row], 0, n, t.temperature, false, best, token);
  } else {
    Memory memory = Memory::of(n);
    for (std::int64_t i = 0; i < n; i += kLanes)
      store_at(memory.z, div(load_at(logits, i, n), fill(t.temperature)), i, n);
    const float floor = filters(t, memory.z, peak / t.temperature, memory);
    for (std::int64_t i = 0; i < n; ++i) memory.z[i] = memory.z[i] < floor ? -kInfinity : memory.z[i];
    draw_from(memory.z, t.key[row], 0, n, 1.0f, false, best, token);
  }
  t.token[row] = token;
}

}  // namespace
