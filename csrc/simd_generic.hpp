// Vectors of four floats in plain C++, by the vector extensions of gcc and clang, for a little-endian processor. A
// 64-bit ARM compiler makes NEON of them; on x86-64 they serve tests, which so reach this file without an ARM
// processor.
#pragma once

#include <cstring>

#include "simd_base.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

constexpr std::int64_t kLanes = 4;
// Rows of a register tile, which is four vectors wide: 24 sums, 4 columns and a factor fit in the 32 registers of ARM.
constexpr int kTileRows = 6;

using Vec = float __attribute__((vector_size(16)));
using Mask = std::int32_t __attribute__((vector_size(16)));  // all bits of a lane are set, or none
using Bits = std::uint32_t __attribute__((vector_size(16)));
using Halves = std::uint16_t __attribute__((vector_size(8)));  // the bits of four values of 16 bits

INLINE Bits bits_of(Vec x) { return std::bit_cast<Bits>(x); }
INLINE Vec from_bits(Bits bits) { return std::bit_cast<Vec>(bits); }

INLINE Vec zero() { return Vec{}; }
INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
INLINE Vec add(Vec a, Vec b) { return a + b; }
INLINE Vec sub(Vec a, Vec b) { return a - b; }
INLINE Vec mul(Vec a, Vec b) { return a * b; }
INLINE Vec div(Vec a, Vec b) { return a / b; }
INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#endif
}

INLINE Mask less(Vec a, Vec b) { return a < b; }
INLINE Vec select(Mask mask, Vec yes, Vec no) {
  const Bits chosen = std::bit_cast<Bits>(mask);
  return from_bits((chosen & bits_of(yes)) | (~chosen & bits_of(no)));
}
INLINE Vec zero_where(Mask mask, Vec x) { return from_bits(~std::bit_cast<Bits>(mask) & bits_of(x)); }
INLINE Vec negate_where(Mask mask, Vec x) { return select(mask, sub(zero(), x), x); }
INLINE unsigned greater_bits(Vec a, Vec b) {  // one bit per lane
  const Bits set = std::bit_cast<Bits>(a > b) & Bits{1, 2, 4, 8};
  return (set[0] | set[1]) | (set[2] | set[3]);
}
// x where it is at least the bound, 0 elsewhere.
INLINE Vec zero_below(Vec x, Vec bound) { return from_bits(std::bit_cast<Bits>(x >= bound) & bits_of(x)); }
INLINE Vec max(Vec a, Vec b) { return select(a > b, a, b); }  // b where a or b is NaN
INLINE Vec min(Vec a, Vec b) { return select(a < b, a, b); }

INLINE Vec round_to_integer(Vec x) {
#if defined(__aarch64__)
  return vrndnq_f32(x);
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_nearbyintf(x[i]);
  return out;
#endif
}
INLINE Vec scale_by_power_of_two(Vec x, Vec n) {  // n in -126..127
  const Mask exponent = __builtin_convertvector(n, Mask) + 127;
  return mul(x, from_bits(std::bit_cast<Bits>(exponent) << 23));
}
INLINE float reduce_sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
INLINE float reduce_max(Vec x) {
  const Vec pairs = max(x, Vec{x[2], x[3], x[2], x[3]});
  return max(pairs, broadcast(pairs[1]))[0];
}

INLINE Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
INLINE Vec load(const BFloat16* p) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return from_bits(__builtin_convertvector(halves, Bits) << 16);
}
INLINE void store(BFloat16* p, Vec x) {  // round to nearest even; NaN stays NaN
  const Bits bits = bits_of(x), even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  const Bits is_nan = std::bit_cast<Bits>(x != x);
  const Halves halves = __builtin_convertvector((is_nan & nan) | (~is_nan & even), Halves);
  std::memcpy(p, &halves, sizeof halves);
}
INLINE Vec load(const Float16* p) {
#if defined(__aarch64__)
  float16x4_t halves;
  std::memcpy(&halves, p, sizeof halves);
  return vcvt_f32_f16(halves);
#else
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
#endif
}
INLINE void store(Float16* p, Vec x) {
#if defined(__aarch64__)
  const float16x4_t halves = vcvt_f16_f32(x);
  std::memcpy(p, &halves, sizeof halves);
#else
  for (int i = 0; i < kLanes; ++i) narrow(x[i], p + i);
#endif
}

// bfloat16 pairs, one in the 32 bits of each lane: the first values as floats, the second values, and two into pairs.
INLINE Vec unpack_first(Vec x) { return from_bits(bits_of(x) << 16); }
INLINE Vec unpack_second(Vec x) { return from_bits(bits_of(x) & ~0xFFFFu); }
INLINE Vec pack_pairs(Vec first, Vec second) { return from_bits((bits_of(first) >> 16) | bits_of(second)); }

// Turns rows into columns.
INLINE void transpose(Vec rows[kLanes]) {
  const Vec a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  for (int i = 0; i < kLanes; ++i) rows[i] = Vec{a[i], b[i], c[i], d[i]};
}

}  // namespace

#include "bfloat16_fma.hpp"
