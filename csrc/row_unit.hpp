// Operations on one row at a time: norm, rotary and cache writes, gated activations. Only for isa_*.cpp.
#pragma once

#include <cstring>

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

// x rounded to T, as a vector again: intermediate results are those of torch's own operators.
template <typename T>
INLINE F rounded(F x) {
  alignas(64) T values[kLanes];
  store(values, x);
  return load(values);
}
template <>
INLINE F rounded<float>(F x) {
  return x;
}
#if defined(__AVX512BF16__)
template <>
INLINE F rounded<BFloat16>(F x) {
  const __m512i bits = _mm512_cvtepu16_epi32(std::bit_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
#endif

template <typename T>
INLINE void normalize(const T* x, const T* weight, std::int64_t n, float eps, T* out) {
  F squares = zero();
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const F value = load_at(x, i, n);
    squares = fma(value, value, squares);
  }
  const F scale = fill(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps));
  for (std::int64_t i = 0; i < n; i += kLanes)
    store_at(out, mul(load_at(weight, i, n), rounded<T>(mul(load_at(x, i, n), scale))), i, n);
}

template <typename T>
void rms_norm_of(const RmsNorm& t, std::int64_t row) {
  const T* x = static_cast<const T*>(t.x) + row * t.stride_x;
  if (t.residual) {
    const T* residual = static_cast<const T*>(t.residual) + row * t.width;
    T* sum = static_cast<T*>(t.sum) + row * t.width;
    for (std::int64_t i = 0; i < t.width; i += kLanes)
      store_at(sum, add(load_at(residual, i, t.width), load_at(x, i, t.width)), i, t.width);
    x = sum;
  }
  normalize(x, static_cast<const T*>(t.weight), t.width, t.eps, static_cast<T*>(t.out) + row * t.width);
}

template <typename T>
void gated_of(const Gated& t, std::int64_t row) {
  const T *gate = static_cast<const T*>(t.gate_up) + row * 2 * t.width, *up = gate + t.width;
  T* out = static_cast<T*>(t.out) + row * t.width;
  for (std::int64_t i = 0; i < t.width; i += kLanes) {
    const F x = load_at(gate, i, t.width);
    // gelu by tanh, as Gemma's: 0.5 (1 + tanh u) is 1 / (1 + e^-2u), which keeps its digits where tanh is near -1
    const F slope = t.gelu ? mul(fill(2.0f * 0.7978845608028654f), fma(mul(mul(x, x), x), fill(0.044715f), x)) : x;
    // e^-slope as a square, which becomes infinite; exponential itself is bounded, and x over that need not be small
    const F half = exponential(mul(fill(-0.5f), slope));
    const F y = div(x, fma(half, half, fill(1.0f)));
    store_at(out, mul(y, load_at(up, i, t.width)), i, t.width);
  }
}

template <typename T>
INLINE void rotate(const T* x, const float* cos, const float* sin, std::int64_t half, T* out) {
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const F first = load_at(x, i, half), second = load_at(x + half, i, half);
    const F c = load_at(cos, i, half), s = load_at(sin, i, half);
    store_at(out, sub(mul(first, c), mul(second, s)), i, half);
    store_at(out + half, add(mul(second, c), mul(first, s)), i, half);
  }
}

constexpr std::int64_t kLargestHead = 1024;

template <typename T>
void write_kv_of(const WriteKv& t, std::int64_t row) {
  const std::int64_t half = t.width / 2, slot = t.slot[row];
  const float *cos = t.cos + row * half, *sin = t.sin + row * half;
  const T* x = static_cast<const T*>(t.qkv) + row * (t.heads + 2 * t.kv_heads) * t.width;
  const auto place = [&](const T* head, const void* norm, T* out) {
    T normed[kLargestHead];
    if (norm) {
      normalize(head, static_cast<const T*>(norm), t.width, t.eps, normed);
      head = normed;
    }
    rotate(head, cos, sin, half, out);
  };
  T* q = static_cast<T*>(t.q) + row * t.heads * t.width;
  for (std::int64_t h = 0; h < t.heads; ++h) place(x + h * t.width, t.q_norm, q + h * t.width);
  if (slot < 0) return;
  T* k = static_cast<T*>(t.k_pages) + slot * t.kv_heads * t.width;
  T* v = static_cast<T*>(t.v_pages) + slot * t.kv_heads * t.width;
  for (std::int64_t h = 0; h < t.kv_heads; ++h) place(x + (t.heads + h) * t.width, t.k_norm, k + h * t.width);
  const T* values = x + (t.heads + t.kv_heads) * t.width;
  std::memcpy(v, values, t.kv_heads * t.width * sizeof(T));
}

void rms_norm_row(const RmsNorm& t, std::int64_t row) {
  switch (t.type) {
    case Type::kFloat: return rms_norm_of<float>(t, row);
    case Type::kBFloat16: return rms_norm_of<BFloat16>(t, row);
    case Type::kFloat16: return rms_norm_of<Float16>(t, row);
  }
}

void gated_row(const Gated& t, std::int64_t row) {
  switch (t.type) {
    case Type::kFloat: return gated_of<float>(t, row);
    case Type::kBFloat16: return gated_of<BFloat16>(t, row);
    case Type::kFloat16: return gated_of<Float16>(t, row);
  }
}

void write_kv_row(const WriteKv& t, std::int64_t row) {
  switch (t.type) {
    case Type::kFloat: return write_kv_of<float>(t, row);
    case Type::kBFloat16: return write_kv_of<BFloat16>(t, row);
    case Type::kFloat16: return write_kv_of<Float16>(t, row);
  }
}

}  // namespace
