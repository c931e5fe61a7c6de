// The pass over a head, which never stores its logits. Only for isa.cpp.
#pragma once

#include "gumbel.hpp"
#include "kernels.hpp"
#include "linear_kernels.hpp"

namespace {

using namespace genssd;

// Adds the bias to the logits x at i..i + kLanes - 1 of n, and applies the softcap.
template <typename T>
INLINE Vec bias_and_softcap(const HeadParams& p, Vec x, const T* bias, std::int64_t i, std::int64_t n) {
  if (bias) x = add(x, load_bounded(bias, i, n));
  if (p.softcap > 0.0f) x = mul(broadcast(p.softcap), hyperbolic_tangent(div(x, broadcast(p.softcap))));
  return x;
}

// Computes z of a row's target, bit for bit as the pass over the head does.
template <typename T>
void target(const HeadParams& p, std::int64_t row) {
  const std::int64_t token = p.target[row];
  const T* hidden = static_cast<const T*>(p.hidden) + row * p.hidden_stride;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + token : nullptr;
  const Vec x = broadcast(dot_single(hidden, p.weight, token, p.inputs));
  alignas(64) float z[kLanes];
  store(z, div(bias_and_softcap(p, x, bias, 0, 1), broadcast(p.temperature)));
  p.target_z[row] = z[0];
}

void target_row(const HeadParams& p, std::int64_t row) {
  const TileScope scope;
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { target<T>(p, row); });
}

// The statistics of one row while a block is computed, with the sums kept per lane.
struct RunningStats {
  Vec sum_e, sum_ed, sum_ee;
  BlockStats stats;
  std::int64_t num_top;  // entries of the row's list of the largest z

  INLINE static RunningStats start() { return {zero(), zero(), zero(), {}, 0}; }
};

constexpr float kLowestFloat = -3.4028234663852886e38f;
constexpr float kLowestShift = -1e3f;  // exp of it is 0; a much lower one would make 0 times infinity of sum_ed

// Adds the z of one panel to the sums, after rescaling them where the peak rises.
INLINE void update_sums(RunningStats& running, const float* z, std::int64_t columns) {
  BlockStats& stats = running.stats;
  unsigned larger = 0;
  for (std::int64_t c = 0; c < columns; c += kLanes) larger |= greater_bits(load(z + c), broadcast(stats.peak));
  if (larger) {
    Vec peaks = load(z);
    for (std::int64_t c = kLanes; c < columns; c += kLanes) peaks = max(peaks, load(z + c));
    const float old_peak = stats.peak, new_peak = reduce_max(peaks);
    if (old_peak > -kInfinity) {
      const Vec shift = max(broadcast(kLowestShift), broadcast(old_peak - new_peak)), factor = exponential(shift);
      running.sum_ed = mul(factor, fma(running.sum_e, shift, running.sum_ed));
      running.sum_e = mul(factor, running.sum_e);
      running.sum_ee = mul(mul(factor, factor), running.sum_ee);
    }
    stats.peak = new_peak;
  }
  const Vec base = broadcast(stats.peak > -kInfinity ? stats.peak : 0.0f);
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    const Vec d =
        max(broadcast(kLowestFloat), sub(load(z + c), base));  // finite even for z = -inf: 0 times d is 0; NaN is kept
    const Vec e = exponential(d);
    running.sum_e = add(running.sum_e, e);
    running.sum_ed = fma(e, d, running.sum_ed);
    running.sum_ee = fma(e, e, running.sum_ee);
  }
}

// Inserts the z of the tokens first_token, first_token + 1, ... into a sorted list of `count` entries, at most top_k,
// and returns the new count. Of equal ones the first stays before the others. z must be readable, and -inf, beyond the
// last column up to a whole vector.
INLINE std::int64_t insert_top_k(const float* z, std::int64_t first_token, std::int64_t columns, std::int64_t top_k,
                                 float* values, std::int32_t* ids, std::int64_t count) {
  const auto insert = [&](std::int64_t i, std::int64_t c) {  // z[c] goes to place i or before it
    for (; i > 0 && z[c] > values[i - 1]; --i) values[i] = values[i - 1], ids[i] = ids[i - 1];
    values[i] = z[c];
    ids[i] = static_cast<std::int32_t>(first_token + c);
  };
  std::int64_t c = 0;
  for (; c < columns && count < top_k; ++c) insert(count++, c);
  while (c < columns) {
    if (c % kLanes == 0 && !greater_bits(load(z + c), broadcast(values[top_k - 1]))) {
      c += kLanes;  // none of this vector is large enough
      continue;
    }
    if (z[c] > values[top_k - 1]) insert(top_k - 1, c);
    ++c;
  }
  return count;
}

// Adds the z of one row and one panel, whose tokens are first_token, first_token + 1, ..., to the statistics of the
// row. slot: index of (row, vocabulary block).
INLINE void update_stats(const HeadParams& p, std::int64_t row, std::int64_t slot, const float* z,
                         std::int64_t first_token, std::int64_t columns, RunningStats& running) {
  update_sums(running, z, columns);
  if (p.target) {
    const Vec target_z = broadcast(p.target_z[row]);
    for (std::int64_t c = 0; c < columns; c += kLanes)
      running.stats.num_above += __builtin_popcount(greater_bits(load(z + c), target_z));
    if (p.top_k)
      running.num_top = insert_top_k(z, first_token, columns, p.top_k, p.top_values + slot * p.top_k,
                                     p.top_ids + slot * p.top_k, running.num_top);
  }
  if (p.key && first_token < p.num_drawable)
    draw(z, p.key[row], first_token, min(columns, p.num_drawable - first_token), p.temperature, p.greedy,
         running.stats.best);
}

// Reduces the lanes of the sums and stores the statistics of a row.
INLINE void finish_stats(const HeadParams& p, std::int64_t slot, const RunningStats& running) {
  BlockStats& out = p.stats[slot];
  out = running.stats;
  out.sum_e = reduce_sum(running.sum_e);
  out.sum_ed = reduce_sum(running.sum_ed);
  out.sum_ee = reduce_sum(running.sum_ee);
  for (std::int64_t k = running.num_top; k < p.top_k; ++k) p.top_ids[slot * p.top_k + k] = -1;
}

// Computes the task (block of the vocabulary, block of rows).
template <typename T>
void head(const HeadParams& p, std::int64_t task) {
  const std::int64_t blocks = (p.vocabulary + kVocabularyBlock - 1) / kVocabularyBlock;
  const std::int64_t row_blocks = (p.rows + kRowBlock - 1) / kRowBlock;
  const std::int64_t block = task / row_blocks, first_row = task % row_blocks * kRowBlock;
  const std::int64_t rows = min(kRowBlock, p.rows - first_row);
  const std::int64_t end = min(p.vocabulary, (block + 1) * kVocabularyBlock);
  const Rows<T> hidden{static_cast<const T*>(p.hidden) + first_row * p.hidden_stride, p.hidden_stride, rows};
  const T* bias = static_cast<const T*>(p.bias);
  RunningStats running[kRowBlock];
  for (std::int64_t i = 0; i < rows; ++i) running[i] = RunningStats::start();
  LinearWorkspace<T>& workspace = LinearWorkspace<T>::of_thread();
  const bool raw = !bias && p.softcap == 0.0f;
  for (std::int64_t token = block * kVocabularyBlock; token < end; token += kPanelWidth) {
    const std::int64_t columns = min(kPanelWidth, end - token);
    dot_weight(hidden, p.weight, token, columns, p.inputs, workspace);
    for (std::int64_t i = 0; i < rows; ++i) {
      float* z = workspace.out + i * kPanelWidth;
      for (std::int64_t c = 0; c < columns; c += kLanes) {
        Vec x = load(z + c);
        if (!raw) x = bias_and_softcap(p, x, bias ? bias + token : nullptr, c, columns);
        if (p.target && p.temperature != 1.0f) x = div(x, broadcast(p.temperature));
        store(z + c, x);
      }
      for (std::int64_t c = columns; c < kPanelWidth; ++c) z[c] = -kInfinity;
      update_stats(p, first_row + i, (first_row + i) * blocks + block, z, token, columns, running[i]);
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) finish_stats(p, (first_row + i) * blocks + block, running[i]);
}

void head_task(const HeadParams& p, std::int64_t task) {
  const TileScope scope;
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { head<T>(p, task); });
}

}  // namespace
