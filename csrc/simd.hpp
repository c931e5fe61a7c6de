// Vectors of floats on one instruction set: the primitives of the set's own header, GENSSD_SIMD, and what is made of
// them; and the set's tile registers, GENSSD_TILES. Only for isa.cpp.
//
// Everything is in an unnamed namespace: the same names are compiled once per instruction set, and the linker must
// never take one set's copy of a function for another's. For the same reason no inline function of the standard
// library is called, but for std::bit_cast, which the compiler replaces by nothing.
//
// A set's header defines
//   Vec, kLanes             a vector of floats and how many it holds
//   kTileRows               rows of a register tile of products, at most 6; a tile is four vectors wide
//   zero, broadcast, load, store, add, sub, mul, div, fma, min, max, round_to_integer, scale_by_power_of_two,
//   reduce_sum, reduce_max  (load and store convert from and to every dtype)
//   Mask, less, select, zero_where, negate_where, greater_bits, zero_below
//   unpack_first, unpack_second, pack_pairs, PairProduct    of pairs of bfloat16
//   transpose               of kLanes vectors
// and may overload rounded(Vec, BFloat16).
#pragma once

#include "simd_base.hpp"

#include GENSSD_SIMD
#include GENSSD_TILES

namespace {

// x rounded to T, as a vector again.
template <typename T>
INLINE Vec rounded(Vec x, T) {
  alignas(64) T values[kLanes];
  store(values, x);
  return load(values);
}
INLINE Vec rounded(Vec x, float) { return x; }

// Loads the first n < kLanes values, and zeros.
template <typename T>
INLINE Vec load_partial(const T* p, std::int64_t n) {
  alignas(64) T values[kLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) values[i] = p[i];
  return load(values);
}

// Stores the first n < kLanes values.
template <typename T>
INLINE void store_partial(T* p, Vec x, std::int64_t n) {
  alignas(64) T values[kLanes];
  store(values, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = values[i];
}

// Loads the values i..i + kLanes - 1 of n, and zeros beyond the end.
template <typename T>
INLINE Vec load_bounded(const T* p, std::int64_t i, std::int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_partial(p + i, n - i);
}

// Stores those of the values i..i + kLanes - 1 that are among n.
template <typename T>
INLINE void store_bounded(T* p, Vec x, std::int64_t i, std::int64_t n) {
  if (i + kLanes <= n)
    store(p + i, x);
  else
    store_partial(p + i, x, n - i);
}

// e^x (Cephes polynomial); 0 below the smallest normal, e^88.376 above that; NaN stays NaN.
INLINE Vec exponential(Vec x) {
  const Vec clamped = min(broadcast(88.3762626f), max(broadcast(-87.3365447f), x));  // NaN is kept
  const Vec n = round_to_integer(mul(clamped, broadcast(1.44269504088896341f)));
  Vec r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  const Vec y = scale_by_power_of_two(add(fma(mul(p, r), r, r), broadcast(1.0f)), n);
  return zero_where(less(x, broadcast(-87.3365447f)), y);
}

INLINE float exponential(float x) {
  float out[kLanes];
  store(out, exponential(broadcast(x)));
  return out[0];
}

// tanh x = (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x; near 0, where that loses digits, its series.
INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec size = max(x, sub(zero(), x));
  const Vec e = exponential(mul(broadcast(-2.0f), size));
  const Vec far = div(sub(broadcast(1.0f), e), add(broadcast(1.0f), e));
  const Vec x2 = mul(x, x);
  Vec near = fma(x2, broadcast(-17.0f / 315.0f), broadcast(2.0f / 15.0f));
  near = fma(near, x2, broadcast(-1.0f / 3.0f));
  near = mul(size, fma(near, x2, broadcast(1.0f)));
  return negate_where(less(x, zero()), select(less(size, broadcast(0.25f)), near, far));
}

}  // namespace
