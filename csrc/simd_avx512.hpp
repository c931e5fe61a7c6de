// AVX-512 without instructions for bfloat16.
#pragma once

#include "simd_avx512_base.hpp"

namespace {

INLINE void store(BFloat16* p, Vec x) { store_nearest(p, x); }

}  // namespace

#include "bfloat16_fma.hpp"
