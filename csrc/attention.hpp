// Attention of query rows over paged keys and values, one (row, kv head) at a time.
//
// Each row reads its own sequence's pages in the order of positions and nothing else, so its bits do not depend on the
// other rows, on the number of threads, or on which pages hold its tokens.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace genssd {

struct BFloat16 {
  std::uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, BFloat16* out) {  // round to nearest even; NaN stays NaN
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (x != x) {
    out->bits = static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return;
  }
  out->bits = static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// exp for x <= 0 (Cephes polynomial); below the smallest normal it is 0.
inline float exp_nonpositive(float x) {
  const float clamped = x > -87.0f ? x : -87.0f;
  const float n = std::floor(clamped * 1.44269504088896341f + 0.5f);
  float r = clamped - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float y = p * r * r + r + 1.0f;
  const float scale = std::bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23);
  return x > -87.0f ? y * scale : (x != x ? x : 0.0f);
}

template <typename T>
struct AttentionTask {
  const T* q;                       // [rows, heads, head_dim]
  const T* k_pages;                 // [pages, page_size, kv_heads, head_dim]
  const T* v_pages;                 // [pages, page_size, kv_heads, head_dim]
  const std::int32_t* page_table;   // [sequences, table_width]
  const std::int32_t* row_sequence; // [rows]
  const std::int32_t* row_position; // [rows]; a row sees positions first..position of its sequence
  T* out;                           // [rows, heads, head_dim]
  std::int64_t heads, kv_heads, head_dim, page_size, table_width;
  std::int64_t window;              // positions seen at most, itself included; 0: all
  float scale;
};

template <typename T>
inline float dot(const float* a, const T* b, std::int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < n; ++i) sum += a[i] * widen(b[i]);
  return sum;
}

template <typename T>
[[gnu::always_inline]] inline void attend_row(const AttentionTask<T>& t, std::int64_t row, std::vector<float>& scratch) {
  const std::int64_t group = t.heads / t.kv_heads, D = t.head_dim;
  const std::int64_t last = t.row_position[row];
  const std::int64_t first = t.window > 0 ? std::max<std::int64_t>(0, last - t.window + 1) : 0;
  const std::int64_t length = last - first + 1;
  const std::int32_t* table = t.page_table + t.row_sequence[row] * t.table_width;
  scratch.resize(static_cast<std::size_t>(length + 2 * D));
  float* weight = scratch.data();
  float* query = weight + length;
  float* sum = query + D;

  for (std::int64_t head = 0; head < t.heads; ++head) {
    const std::int64_t kv_head = head / group;
    const T* q = t.q + (row * t.heads + head) * D;
    for (std::int64_t d = 0; d < D; ++d) query[d] = widen(q[d]) * t.scale;

    float peak = -INFINITY;
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t position = first + i;
      const std::int64_t slot = table[position / t.page_size] * t.page_size + position % t.page_size;
      weight[i] = dot(query, t.k_pages + (slot * t.kv_heads + kv_head) * D, D);
      peak = std::max(peak, weight[i]);
    }
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (std::int64_t i = 0; i < length; ++i) {
      weight[i] = exp_nonpositive(weight[i] - peak);
      total += weight[i];
    }
    std::fill(sum, sum + D, 0.0f);
    for (std::int64_t i = 0; i < length; ++i) {
      const std::int64_t position = first + i;
      const std::int64_t slot = table[position / t.page_size] * t.page_size + position % t.page_size;
      const T* v = t.v_pages + (slot * t.kv_heads + kv_head) * D;
      const float w = weight[i];
#pragma omp simd
      for (std::int64_t d = 0; d < D; ++d) sum[d] += w * widen(v[d]);
    }
    T* out = t.out + (row * t.heads + head) * D;
    for (std::int64_t d = 0; d < D; ++d) narrow(sum[d] / total, out + d);
  }
}

}  // namespace genssd
