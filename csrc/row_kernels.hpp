// Kernels that compute one row at a time: norms, cache writes with rotary embeddings, gated activations, sums of
// weighted rows. Only for isa.cpp.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

// out = RMS norm of x, times the weight. Intermediate results are rounded where torch's own operators round them.
template <typename T>
INLINE void normalize(const T* x, const NormWeight& norm, std::int64_t n, float eps, T* out) {
  const T* weight = static_cast<const T*>(norm.data);
  Vec squares = zero();
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec value = load_bounded(x, i, n);
    squares = fma(value, value, squares);
  }
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(reduce_sum(squares) / static_cast<float>(n) + eps));
  const Vec offset = broadcast(norm.offset);
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const Vec unit = mul(load_bounded(x, i, n), scale), w = load_bounded(weight, i, n);
    store_bounded(out, norm.has_offset ? mul(add(offset, w), unit) : mul(w, rounded(unit, T{})), i, n);
  }
}

// Computes one row of RmsNormParams.
template <typename T>
void rms_norm(const RmsNormParams& p, std::int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  if (p.residual) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.width;
    T* sum = static_cast<T*>(p.sum) + row * p.width;
    for (std::int64_t i = 0; i < p.width; i += kLanes)
      store_bounded(sum, add(load_bounded(residual, i, p.width), load_bounded(x, i, p.width)), i, p.width);
    x = sum;
  }
  normalize(x, p.weight, p.width, p.eps, static_cast<T*>(p.out) + row * p.width);
}

// Computes one row of GatedParams.
template <typename T>
void gated(const GatedParams& p, std::int64_t row) {
  const T *gate = static_cast<const T*>(p.gate_up) + row * 2 * p.width, *up = gate + p.width;
  T* out = static_cast<T*>(p.out) + row * p.width;
  const Vec limit = broadcast(p.limit);
  for (std::int64_t i = 0; i < p.width; i += kLanes) {
    Vec x = load_bounded(gate, i, p.width), factor = load_bounded(up, i, p.width);
    if (p.gate == Gate::kClamped) {  // min and max keep a NaN
      x = min(limit, x);
      factor = add(min(limit, max(sub(zero(), limit), factor)), broadcast(1.0f));
    }
    Vec slope = x;
    // gelu by tanh, as Gemma's: 0.5 (1 + tanh u) is 1 / (1 + e^-2u), which keeps its digits where tanh is near -1
    if (p.gate == Gate::kGelu)
      slope = mul(broadcast(2.0f * 0.7978845608028654f), fma(mul(mul(x, x), x), broadcast(0.044715f), x));
    else if (p.gate == Gate::kClamped)
      slope = mul(broadcast(p.alpha), x);
    // e^-slope as a square, which becomes infinite; exponential itself is bounded, and x over that need not be small
    const Vec root = exponential(mul(broadcast(-0.5f), slope));
    const Vec y = div(x, fma(root, root, broadcast(1.0f)));
    store_bounded(out, mul(y, factor), i, p.width);
  }
}

// Computes one row of WeightedSumParams.
template <typename T>
void weighted_sum(const WeightedSumParams& p, std::int64_t row) {
  const T* values = static_cast<const T*>(p.values);
  const T* weight = static_cast<const T*>(p.weight) + row * p.terms;
  const std::int64_t* index = p.index + row * p.terms;
  T* out = static_cast<T*>(p.out) + row * p.width;
  for (std::int64_t i = 0; i < p.width; i += kLanes) {
    Vec total = zero();
    for (std::int64_t k = 0; k < p.terms; ++k)
      total = add(total, mul(broadcast(widen(weight[k])), load_bounded(values + index[k] * p.width, i, p.width)));
    store_bounded(out, total, i, p.width);
  }
}

// Applies the rotary embedding to one head, of which x[i] and x[half + i] turn by the same angle.
template <typename T>
INLINE void rotate(const T* x, const float* cos, const float* sin, std::int64_t half, T* out) {
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const Vec first = load_bounded(x, i, half), second = load_bounded(x + half, i, half);
    const Vec c = load_bounded(cos, i, half), s = load_bounded(sin, i, half);
    store_bounded(out, sub(mul(first, c), mul(second, s)), i, half);
    store_bounded(out + half, add(mul(second, c), mul(first, s)), i, half);
  }
}

// Writes a key to a slot of a page, cell by cell. cells: the page's first cell of the head.
template <typename T>
INLINE void store_key(const T* key, std::int64_t head_dim, std::int64_t page_size, std::int64_t offset, T* cells) {
  constexpr std::int64_t kValues = std::is_same_v<T, BFloat16> ? 2 : 1;  // of a cell, see dot.hpp; head_dim is even
  for (std::int64_t i = 0; i < head_dim; i += kValues)
    std::memcpy(cells + i * page_size + offset * kValues, key + i, kValues * sizeof(T));
}

// Applies the norm, where there is one, and the rotary embedding of a row to one of its heads.
template <typename T>
INLINE void norm_and_rotate(const WriteKvParams& p, std::int64_t row, const T* head, const NormWeight& norm, T* out) {
  T normed[kMaxHeadDim];
  if (norm.data) {
    normalize(head, norm, p.head_dim, p.eps, normed);
    head = normed;
  }
  const std::int64_t rotated = 2 * p.half;
  rotate(head, p.cos + row * p.half, p.sin + row * p.half, p.half, out);
  std::memcpy(out + rotated, head + rotated, (p.head_dim - rotated) * sizeof(T));
}

// Rotates the queries of a few rows, and writes their rotated keys and their values to their slots of the cache. The
// keys of one head are written for all rows before those of the next: they lie in the same cache lines.
template <typename T>
void write_kv(const WriteKvParams& p, std::int64_t task) {
  const std::int64_t first = task * p.rows_of_task, end = min(p.rows, first + p.rows_of_task);
  const std::int64_t size = p.kv_heads * p.head_dim;
  const auto row_of = [&](std::int64_t row) {
    return static_cast<const T*>(p.qkv) + row * (p.heads + 2 * p.kv_heads) * p.head_dim;
  };
  for (std::int64_t row = first; row < end; ++row) {
    const T* x = row_of(row);
    T* q = static_cast<T*>(p.q) + row * p.heads * p.head_dim;
    for (std::int64_t h = 0; h < p.heads; ++h)
      norm_and_rotate(p, row, x + h * p.head_dim, p.q_norm, q + h * p.head_dim);
    if (p.slot[row] >= 0)
      std::memcpy(static_cast<T*>(p.v_pages) + p.slot[row] * size, x + (p.heads + p.kv_heads) * p.head_dim,
                  size * sizeof(T));
  }
  for (std::int64_t h = 0; h < p.kv_heads; ++h)
    for (std::int64_t row = first; row < end; ++row) {
      if (p.slot[row] < 0) continue;
      const std::int64_t page = p.slot[row] / p.page_size, offset = p.slot[row] % p.page_size;
      T key[kMaxHeadDim];
      norm_and_rotate(p, row, row_of(row) + (p.heads + h) * p.head_dim, p.k_norm, key);
      store_key(key, p.head_dim, p.page_size, offset,
                static_cast<T*>(p.k_pages) + (page * p.kv_heads + h) * p.page_size * p.head_dim);
    }
}

void rms_norm_row(const RmsNormParams& p, std::int64_t row) {
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { rms_norm<T>(p, row); });
}

void gated_row(const GatedParams& p, std::int64_t row) {
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { gated<T>(p, row); });
}

void weighted_sum_row(const WeightedSumParams& p, std::int64_t row) {
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { weighted_sum<T>(p, row); });
}

void write_kv_task(const WriteKvParams& p, std::int64_t task) {
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { write_kv<T>(p, task); });
}

}  // namespace
