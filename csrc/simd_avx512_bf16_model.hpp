// AVX-512 with the roundings of AVX512_BF16, by plain instructions: for the model of the tile instructions, whose
// products are not those of AVX512_BF16 either.
#pragma once

#include "simd_avx512_base.hpp"

namespace {

INLINE void store(BFloat16* p, Vec x) {  // values below 2^-126 become 0 with their sign, as by vcvtneps2bf16
  const Vec size = _mm512_andnot_ps(broadcast(-0.0f), x);
  const Mask tiny = _mm512_cmp_ps_mask(size, broadcast(0x1p-126f), _CMP_LT_OQ);
  store_nearest(p, _mm512_mask_and_ps(x, tiny, x, broadcast(-0.0f)));
}

}  // namespace

#include "bfloat16_fma.hpp"
