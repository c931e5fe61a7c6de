// Draws a token from one row of logits, after top-k, top-p and min-p. Only for isa.cpp.
//
// The filters keep what is not below a threshold, and a threshold is an entry of the row. It is found by radix
// selection: the entries are counted (top-k) or their weights added (top-p) by the leading bits of an order-preserving
// integer, from the largest down, until the required amount is reached; then by the next bits of the entries that have
// those leading bits. Before that, top-p alone narrows down the weights between which its threshold lies, so that most
// entries need no more than a comparison.
#pragma once

#include "gumbel.hpp"
#include "kernels.hpp"
#include "simd.hpp"
#include "workspace.hpp"

namespace {

using namespace genssd;

constexpr int kDigitBits = 11;  // 11 + 11 + 10
constexpr int kDigits = 1 << kDigitBits;

// Maps floats to integers in the same order.
INLINE std::uint32_t to_ordered(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);  // -0 becomes 0
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

INLINE float from_ordered(std::uint32_t bits) {
  return std::bit_cast<float>(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

struct SampleWorkspace {
  float *z, *weight;
  std::uint32_t* bits;
  std::int64_t bytes;  // of all of these

  INLINE SampleWorkspace(std::int64_t vocabulary, Arena arena)
      : z(arena.allocate<float>(vocabulary)),
        weight(arena.allocate<float>(vocabulary)),
        bits(arena.allocate<std::uint32_t>(vocabulary)),
        bytes(arena.bytes()) {}

  INLINE static SampleWorkspace of_thread(std::int64_t vocabulary) {
    const std::int64_t bytes = SampleWorkspace(vocabulary, Arena()).bytes;
    return SampleWorkspace(vocabulary, Arena(thread_workspace(bytes)));
  }
};

// Entries of a row among which a threshold may lie.
struct Candidates {
  std::uint32_t* bits;  // to_ordered
  float* weight;
  std::int64_t count;

  INLINE void add(float z, float w) {
    bits[count] = to_ordered(z);
    weight[count++] = w;
  }
};

// Returns the largest entry such that it and the entries above it have at least `amount` of weight; the smallest entry
// if there is none.
float find_threshold(Candidates c, double amount) {
  double weight_above = 0.0;
  for (int shift = 32 - kDigitBits;; shift = shift > kDigitBits ? shift - kDigitBits : 0) {
    double weight[kDigits] = {};
    bool occurs[kDigits] = {};
    for (std::int64_t i = 0; i < c.count; ++i) {
      const std::uint32_t digit = (c.bits[i] >> shift) & (kDigits - 1);
      weight[digit] += c.weight[i];
      occurs[digit] = true;
    }
    int digit = kDigits - 1, last = -1;
    for (; digit >= 0; --digit) {
      if (!occurs[digit]) continue;
      last = digit;
      if (weight_above + weight[digit] >= amount) break;
      weight_above += weight[digit];
    }
    if (digit < 0) weight_above -= weight[last];  // by rounding, all of the weight is less than the amount
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < c.count; ++i)
      if (static_cast<int>((c.bits[i] >> shift) & (kDigits - 1)) == last) {
        c.bits[kept] = c.bits[i];
        c.weight[kept++] = c.weight[i];
      }
    c.count = kept;
    if (shift == 0) return from_ordered(c.bits[0]);
  }
}

// Returns the top_k-th largest entry.
INLINE float top_k_threshold(const float* z, std::int64_t n, std::int64_t top_k, SampleWorkspace& workspace) {
  for (std::int64_t i = 0; i < n; ++i) {
    workspace.bits[i] = to_ordered(z[i]);
    workspace.weight[i] = 1.0f;
  }
  return find_threshold({workspace.bits, workspace.weight, n}, static_cast<double>(top_k));
}

// Returns the threshold of top-p among the few entries that are not below another filter's threshold.
INLINE float top_p_threshold_above(float floor, const float* z, std::int64_t n, float peak, float top_p,
                                   SampleWorkspace& workspace) {
  Candidates c{workspace.bits, workspace.weight, 0};
  double total = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (z[i] < floor) continue;
    const float weight = exponential(z[i] - peak);
    c.add(z[i], weight);
    total += weight;
  }
  return find_threshold(c, static_cast<double>(top_p) * total);
}

// Narrows the range low..high of weights in which the entry lies that, with those above it, has `amount`: twice to an
// eighth of its logarithm. Sums are floats, so a bound moves only where their rounding leaves no doubt.
INLINE void narrow_range(const float* weight, std::int64_t n, double amount, float& low, float& high) {
  constexpr int kCuts = 7;
  const double margin = 0x1p-22 * static_cast<double>(n / kLanes + 1);
  for (int round = 0; round < 2; ++round) {
    Vec cut_vec[kCuts], mass[kCuts];
    float cut[kCuts];
    const double ratio = __builtin_pow(static_cast<double>(high) / low, 1.0 / (kCuts + 1));
    for (int k = 0; k < kCuts; ++k) {
      cut[k] = static_cast<float>(low * __builtin_pow(ratio, k + 1));
      cut_vec[k] = broadcast(cut[k]);
      mass[k] = zero();
    }
    for (std::int64_t i = 0; i < n; i += kLanes) {
      const Vec w = load_bounded(weight, i, n);
      for (int k = 0; k < kCuts; ++k) mass[k] = add(mass[k], zero_below(w, cut_vec[k]));
    }
    for (int k = 0; k < kCuts; ++k) {  // cuts rise, masses fall
      const double mass_above = reduce_sum(mass[k]);
      if (mass_above >= amount * (1.0 + margin)) low = cut[k];
      if (mass_above < amount * (1.0 - margin)) {
        high = cut[k];
        break;
      }
    }
  }
}

// Writes exp(z - peak) to the weights, and returns their sum.
INLINE double compute_entry_weights(const float* z, std::int64_t n, float peak, float* weight) {
  double lane_totals[kLanes] = {}, total = 0.0;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    alignas(64) float e[kLanes];
    store(e, exponential(sub(load_bounded(z, i, n), broadcast(peak))));
    for (std::int64_t j = n - i; j < kLanes; ++j) e[j] = 0.0f;
    for (std::int64_t j = 0; j < kLanes; ++j) lane_totals[j] += e[j];
    store_bounded(weight, load(e), i, n);
  }
  for (const double lane_total : lane_totals) total += lane_total;
  return total;
}

// Returns the threshold of top-p among all entries.
INLINE float top_p_threshold(const float* z, std::int64_t n, float peak, float top_p, SampleWorkspace& workspace) {
  const double total = compute_entry_weights(z, n, peak, workspace.weight);
  const double amount = static_cast<double>(top_p) * total;
  // all entries with less weight than this could not together make up the rest
  float low = static_cast<float>(0.999 * (total - amount) / static_cast<double>(n)), high = 2.0f;
  narrow_range(workspace.weight, n, amount, low, high);
  Candidates c{workspace.bits, workspace.weight, 0};  // overwrites weights, but none that is yet to be read
  double lane_totals[kLanes] = {}, weight_above = 0.0;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec w = load_bounded(workspace.weight, i, n);
    alignas(64) float above[kLanes], weight[kLanes];
    store(weight, w);
    store(above, zero_below(w, broadcast(high)));
    for (std::int64_t j = 0; j < kLanes; ++j) lane_totals[j] += above[j];
    unsigned in_range = greater_bits(broadcast(high), w) & ~greater_bits(broadcast(low), w);
    for (; in_range; in_range &= in_range - 1) {
      const int j = __builtin_ctz(in_range);
      c.add(z[i + j], weight[j]);
    }
  }
  for (const double lane_total : lane_totals) weight_above += lane_total;
  return find_threshold(c, amount - weight_above);
}

// Returns the threshold of all filters together.
INLINE float filter_threshold(const SampleParams& p, const float* z, float peak, SampleWorkspace& workspace) {
  const std::int64_t n = p.vocabulary;
  float threshold = -kInfinity;
  if (p.top_k > 0 && p.top_k < n) threshold = top_k_threshold(z, n, p.top_k, workspace);
  if (p.top_p < 1.0f)
    threshold = threshold > -kInfinity ? top_p_threshold_above(threshold, z, n, peak, p.top_p, workspace)
                                       : top_p_threshold(z, n, peak, p.top_p, workspace);
  if (p.log_min_p < 0.0f) {
    const float min_p_threshold = peak + p.log_min_p;
    threshold = min_p_threshold > threshold ? min_p_threshold : threshold;
  }
  return threshold;
}

// Returns the largest entry; NaN where an entry is NaN or +inf.
INLINE float checked_peak(const float* z, std::int64_t n) {
  Vec peaks = broadcast(-kInfinity);
  unsigned below_infinity = ~0u;
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    peaks = max(peaks, load(z + i));
    below_infinity &= greater_bits(broadcast(kInfinity), load(z + i));
  }
  float peak = reduce_max(peaks);
  bool valid = below_infinity == ~0u || below_infinity == (1u << kLanes) - 1u;
  for (; i < n; ++i) {
    peak = z[i] > peak ? z[i] : peak;
    valid &= z[i] < kInfinity;
  }
  return valid ? peak : __builtin_nanf("");
}

void sample_row(const SampleParams& p, std::int64_t row) {
  const float* logits = p.logits + row * p.stride;
  const std::int64_t n = p.vocabulary;
  p.token[row] = -1;
  const float peak = checked_peak(logits, n);
  if (!(peak > -kInfinity)) return;
  BestToken best;
  if (p.temperature == 0.0f) {
    update_best(logits, 0, n, best);
  } else if (p.top_k == 0 && p.top_p >= 1.0f && p.log_min_p == 0.0f) {
    draw(logits, p.key[row], 0, n, p.temperature, false, best);
  } else {
    SampleWorkspace workspace = SampleWorkspace::of_thread(n);
    float* z = workspace.z;
    for (std::int64_t i = 0; i < n; i += kLanes)
      store_bounded(z, div(load_bounded(logits, i, n), broadcast(p.temperature)), i, n);
    const float threshold = filter_threshold(p, z, peak / p.temperature, workspace);
    for (std::int64_t i = 0; i < n; ++i) z[i] = z[i] < threshold ? -kInfinity : z[i];
    draw(z, p.key[row], 0, n, 1.0f, false, best);
  }
  p.token[row] = best.token;
}

}  // namespace
