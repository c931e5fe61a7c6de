// AVX-512 (F, BW, DQ, VL): all but how bfloat16 is rounded and multiplied. Only for the headers of such sets.
#pragma once

#include "simd_base.hpp"

namespace {

constexpr std::int64_t kLanes = 16;
// Rows of a register tile, which is four vectors wide: 24 sums, 4 columns and a factor fit in 32 registers.
constexpr int kTileRows = 6;

using Vec = __m512;
INLINE Vec zero() { return _mm512_setzero_ps(); }
INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Vec load(const BFloat16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
INLINE Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// Rounds to nearest even, with plain instructions; NaN stays NaN.
INLINE void store_nearest(BFloat16* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
INLINE void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where a or b is NaN
INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE Vec round_to_integer(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vec scale_by_power_of_two(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
INLINE float reduce_sum(Vec x) { return _mm512_reduce_add_ps(x); }
INLINE float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }

using Mask = __mmask16;
INLINE Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE Vec select(Mask mask, Vec yes, Vec no) { return _mm512_mask_mov_ps(no, mask, yes); }
INLINE Vec zero_where(Mask mask, Vec x) { return _mm512_mask_mov_ps(x, mask, zero()); }
INLINE Vec negate_where(Mask mask, Vec x) { return _mm512_mask_sub_ps(x, mask, zero(), x); }
INLINE unsigned greater_bits(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // one bit per lane
// x where it is at least the bound, 0 elsewhere.
INLINE Vec zero_below(Vec x, Vec bound) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), x); }

// bfloat16 pairs, one in the 32 bits of each lane: the first values as floats, the second values, and two into pairs.
INLINE Vec unpack_first(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16)); }
INLINE Vec unpack_second(Vec x) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(~0xFFFF)));
}
INLINE Vec pack_pairs(Vec first, Vec second) {
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(first), 16), _mm512_castps_si512(second)));
}

// Turns rows into columns.
INLINE void transpose(Vec rows[kLanes]) {
  Vec pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // quads[i + c]: column c of each 128-bit lane, of rows i..i + 3
    quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
    quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    const Vec low_even = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0x88);
    const Vec low_odd = _mm512_shuffle_f32x4(quads[c], quads[4 + c], 0xDD);
    const Vec high_even = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0x88);
    const Vec high_odd = _mm512_shuffle_f32x4(quads[8 + c], quads[12 + c], 0xDD);
    rows[c] = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(low_even, high_even, 0xDD);
    rows[4 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    rows[12 + c] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xDD);
  }
}

}  // namespace
