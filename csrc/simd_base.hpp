// What every instruction set shares before its primitives: scalar helpers and conversions. Only for isa.cpp.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <bit>
#include <cstdint>

#include "dtypes.hpp"

namespace {

using genssd::BFloat16;
using genssd::Float16;

#define INLINE [[gnu::always_inline]] inline

INLINE std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
INLINE std::int64_t max(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

constexpr float kInfinity = __builtin_inff();

INLINE float widen(float x) { return x; }
INLINE float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
#if defined(__aarch64__)
INLINE float widen(Float16 x) { return std::bit_cast<__fp16>(x.bits); }
#else
INLINE float widen(Float16 x) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }
#endif

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, BFloat16* out) {  // round to nearest even; NaN stays NaN
  const auto bits = std::bit_cast<std::uint32_t>(x);
  out->bits = static_cast<std::uint16_t>(x != x ? (bits >> 16) | 0x40u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
#if defined(__aarch64__)
INLINE void narrow(float x, Float16* out) { out->bits = std::bit_cast<std::uint16_t>(static_cast<__fp16>(x)); }
#else
INLINE void narrow(float x, Float16* out) {
  out->bits = static_cast<std::uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT)));
}
#endif

// Brings a cache line, from which is soon read, into the L2 cache.
INLINE void prefetch_line(const char* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
