// Vectors of floats on one instruction set, chosen by the flags this is compiled with. Only for isa_*.cpp.
//
// Everything is in an unnamed namespace: the same names are compiled once per instruction set, and the linker must
// never take one set's copy for another's.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>

#include "types.hpp"

namespace {

using genssd::BFloat16;
using genssd::Float16;

#define INLINE [[gnu::always_inline]] inline

INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
INLINE std::int64_t most(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

constexpr float kInfinity = __builtin_inff();

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
INLINE float widen(Float16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, BFloat16* out) {  // round to nearest even; NaN stays NaN
  const auto bits = std::bit_cast<std::uint32_t>(x);
  out->bits = static_cast<std::uint16_t>(x != x ? (bits >> 16) | 0x40u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
INLINE void narrow(float x, Float16* out) {
  out->bits = static_cast<std::uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}

#if defined(__AVX512F__)

constexpr std::int64_t kLanes = 16;
constexpr int kTileRows = 6;  // of a register tile of products, which is four vectors wide

using F = __m512;
INLINE F zero() { return _mm512_setzero_ps(); }
INLINE F fill(float x) { return _mm512_set1_ps(x); }
INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
INLINE F load(const BFloat16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
INLINE F load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
#if defined(__AVX512BF16__)
INLINE void store(BFloat16* p, F x) {  // what is below 2^-126 becomes 0, as it is in products, too
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), std::bit_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}
#else
INLINE void store(BFloat16* p, F x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
#endif
INLINE void store(Float16* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE F larger(F a, F b) { return _mm512_max_ps(a, b); }  // b where one of them is NaN
INLINE F smaller(F a, F b) { return _mm512_min_ps(a, b); }
INLINE F round_to_integer(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F times_power_of_two(F x, F n) { return _mm512_scalef_ps(x, n); }
INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }
INLINE unsigned above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // one bit a lane
INLINE F at_least(F x, F bound) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), x); }  // or 0

// Of pairs of bfloat16 the first, or the second, as floats; and of such floats the pairs.
INLINE F first_of_pairs(F x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
INLINE F second_of_pairs(F x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(~0xFFFF)));
}
INLINE F pairs_of(F first, F second) {
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second)));
}

// Rows become columns.
INLINE void transpose(F rows[kLanes]) {
  F pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // quads[i + c]: column c of each 128-bit part, of rows i..i + 3
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    const F low_even = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    const F low_odd = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xDD);
    const F high_even = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    const F high_odd = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xDD);
    rows[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(low_even, high_even, 0xDD);
    rows[4 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[12 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD);
  }
}

#else  // AVX2 with FMA and F16C

constexpr std::int64_t kLanes = 8;
constexpr int kTileRows = 2;  // 16 registers hold 2 x 4 sums and the operands

using F = __m256;
INLINE F zero() { return _mm256_setzero_ps(); }
INLINE F fill(float x) { return _mm256_set1_ps(x); }
INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
INLINE F load(const BFloat16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
INLINE F load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
INLINE void store(BFloat16* p, F x) {
  float values[kLanes];
  store(values, x);
  for (int i = 0; i < kLanes; ++i) narrow(values[i], p + i);
}
INLINE void store(Float16* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE F larger(F a, F b) { return _mm256_max_ps(a, b); }
INLINE F smaller(F a, F b) { return _mm256_min_ps(a, b); }
INLINE F round_to_integer(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE F times_power_of_two(F x, F n) {  // n in -126..127
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(x, _mm256_castsi256_ps(exponent));
}
INLINE float sum(F x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float largest(F x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
INLINE F at_least(F x, F bound) { return _mm256_and_ps(x, _mm256_cmp_ps(x, bound, _CMP_GE_OQ)); }
INLINE unsigned above(F a, F b) { return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
INLINE F first_of_pairs(F x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
INLINE F second_of_pairs(F x) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(~0xFFFF)));
}
INLINE F pairs_of(F first, F second) {
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(first), 16), _mm256_castps_si256(second)));
}

INLINE void transpose(F rows[kLanes]) {
  F pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(quads[c], quads[4 + c], 0x31);
  }
}

#endif

// The first n < kLanes values, and zeros.
template <typename T>
INLINE F load_some(const T* p, std::int64_t n) {
  alignas(64) T values[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}

template <typename T>
INLINE void store_some(T* p, F x, std::int64_t n) {
  alignas(64) T values[kLanes];
  store(values, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = values[i];
}

// Values i..i + kLanes - 1 of n, zeros beyond the end.
template <typename T>
INLINE F load_at(const T* p, std::int64_t i, std::int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_some(p + i, n - i);
}

template <typename T>
INLINE void store_at(T* p, F x, std::int64_t i, std::int64_t n) {
  if (i + kLanes <= n)
    store(p + i, x);
  else
    store_some(p + i, x, n - i);
}

// e^x (Cephes polynomial); 0 below the smallest normal, e^88.376 above that; NaN stays NaN.
INLINE F exponential(F x) {
  const F clamped = smaller(fill(88.3762626f), larger(fill(-87.3365447f), x));  // NaN is handed through
  const F n = round_to_integer(mul(clamped, fill(1.44269504088896341f)));
  F r = fma(n, fill(-0.693359375f), clamped);
  r = fma(n, fill(2.12194440e-4f), r);
  F p = fill(1.9875691500e-4f);
  p = fma(p, r, fill(1.3981999507e-3f));
  p = fma(p, r, fill(8.3334519073e-3f));
  p = fma(p, r, fill(4.1665795894e-2f));
  p = fma(p, r, fill(1.6666665459e-1f));
  p = fma(p, r, fill(5.0000001201e-1f));
  const F y = times_power_of_two(add(fma(mul(p, r), r, r), fill(1.0f)), n);
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, fill(-87.3365447f), _CMP_LT_OQ), zero());
#else
  return _mm256_andnot_ps(_mm256_cmp_ps(x, fill(-87.3365447f), _CMP_LT_OQ), y);
#endif
}

INLINE float exponential(float x) {
  float out[kLanes];
  store(out, exponential(fill(x)));
  return out[0];
}

// tanh x = (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x; near 0, where that loses digits, its series.
INLINE F hyperbolic_tangent(F x) {
  const F size = larger(x, sub(zero(), x));
  const F e = exponential(mul(fill(-2.0f), size));
  const F far = div(sub(fill(1.0f), e), add(fill(1.0f), e));
  const F x2 = mul(x, x);
  F near = fma(x2, fill(-17.0f / 315.0f), fill(2.0f / 15.0f));
  near = fma(near, x2, fill(-1.0f / 3.0f));
  near = mul(size, fma(near, x2, fill(1.0f)));
#if defined(__AVX512F__)
  const F y = _mm512_mask_mov_ps(far, _mm512_cmp_ps_mask(size, fill(0.25f), _CMP_LT_OQ), near);
  return _mm512_mask_sub_ps(y, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), zero(), y);
#else
  const F y = _mm256_blendv_ps(far, near, _mm256_cmp_ps(size, fill(0.25f), _CMP_LT_OQ));
  return _mm256_blendv_ps(y, sub(zero(), y), _mm256_cmp_ps(x, zero(), _CMP_LT_OQ));
#endif
}

}  // namespace
