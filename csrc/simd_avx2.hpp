// AVX2 with FMA and F16C.
#pragma once

#include "simd_base.hpp"

namespace {

constexpr std::int64_t kLanes = 8;
// Rows of a register tile, which is four vectors wide: 8 sums and the operands fit in 16 registers.
constexpr int kTileRows = 2;

using Vec = __m256;
INLINE Vec zero() { return _mm256_setzero_ps(); }
INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Vec load(const BFloat16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
INLINE Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
INLINE void store(BFloat16* p, Vec x) {
  float values[kLanes];
  store(values, x);
  for (int i = 0; i < kLanes; ++i) narrow(values[i], p + i);
}
INLINE void store(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where a or b is NaN
INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
INLINE Vec round_to_integer(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vec scale_by_power_of_two(Vec x, Vec n) {  // n in -126..127
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(x, _mm256_castsi256_ps(exponent));
}
INLINE float reduce_sum(Vec x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float reduce_max(Vec x) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

using Mask = Vec;  // all bits of a lane are set, or none
INLINE Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
INLINE Vec select(Mask mask, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, mask); }
INLINE Vec zero_where(Mask mask, Vec x) { return _mm256_andnot_ps(mask, x); }
INLINE Vec negate_where(Mask mask, Vec x) { return _mm256_blendv_ps(x, sub(zero(), x), mask); }
INLINE unsigned greater_bits(Vec a, Vec b) {  // one bit per lane
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
// x where it is at least the bound, 0 elsewhere.
INLINE Vec zero_below(Vec x, Vec bound) { return _mm256_and_ps(x, _mm256_cmp_ps(x, bound, _CMP_GE_OQ)); }

// bfloat16 pairs, one in the 32 bits of each lane: the first values as floats, the second values, and two into pairs.
INLINE Vec unpack_first(Vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16)); }
INLINE Vec unpack_second(Vec x) {
  return _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(~0xFFFF)));
}
INLINE Vec pack_pairs(Vec first, Vec second) {
  return _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_srli_epi32(_mm256_castps_si256(first), 16), _mm256_castps_si256(second)));
}

// Turns rows into columns.
INLINE void transpose(Vec rows[kLanes]) {
  Vec pairs[8], quads[8];
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

}  // namespace

#include "bfloat16_fma.hpp"
