// Dot products of rows with rows, a register tile at a time. Only for isa_*.cpp.
//
// Every product of two rows is summed in one fixed order, lane by lane along the row and then over the lanes, whatever
// tile it is computed in. So neither the number of rows nor where a tile ends changes a bit.
#pragma once

#include "simd.hpp"

namespace {

#if defined(__AVX512BF16__)

// The vector a type is multiplied in, its values, and one step of the sum.
INLINE __m512bh raw(__m512i bits) { return std::bit_cast<__m512bh>(bits); }
struct PairsOfBFloat16 {
  using Vector = __m512bh;
  static constexpr std::int64_t kValues = 32;
  INLINE static Vector get(const BFloat16* p) { return raw(_mm512_loadu_si512(p)); }
  INLINE static Vector some(const BFloat16* p, std::int64_t n) {
    return raw(_mm512_maskz_loadu_epi16((1u << n) - 1u, p));
  }
  INLINE static F step(Vector a, Vector b, F total) { return _mm512_dpbf16_ps(total, a, b); }
  // As 32-bit lanes: pairs of values.
  static constexpr std::int64_t kPerLane = 2;
  INLINE static F lanes(const BFloat16* p, std::int64_t i, std::int64_t n) {
    return std::bit_cast<F>(2 * i + kValues <= n ? get(p + 2 * i) : some(p + 2 * i, n - 2 * i));
  }
  INLINE static F everywhere(const BFloat16* p, std::int64_t i, std::int64_t n) {
    const std::uint32_t second = 2 * i + 1 < n ? p[2 * i + 1].bits : 0;
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(p[2 * i].bits | second << 16)));
  }
  INLINE static F lane_step(F a, F b, F total) {
    return step(std::bit_cast<Vector>(a), std::bit_cast<Vector>(b), total);
  }
};

#endif

template <typename T>
struct Floats {
  using Vector = F;
  static constexpr std::int64_t kValues = kLanes;
  INLINE static Vector get(const T* p) { return load(p); }
  INLINE static Vector some(const T* p, std::int64_t n) { return load_some(p, n); }
  INLINE static F step(Vector a, Vector b, F total) { return fma(a, b, total); }
  static constexpr std::int64_t kPerLane = 1;
  INLINE static F lanes(const T* p, std::int64_t i, std::int64_t n) { return load_at(p, i, n); }
  INLINE static F everywhere(const T* p, std::int64_t i, std::int64_t) { return fill(widen(p[i])); }
  INLINE static F lane_step(F a, F b, F total) { return fma(a, b, total); }
};

template <typename T>
struct Products : Floats<T> {};
#if defined(__AVX512BF16__)
template <>
struct Products<BFloat16> : PairsOfBFloat16 {};
#endif

// out[i * stride_out + 0..3] = rows a + i * stride_a with the four rows b[0..3], i in 0..ROWS - 1; all of length n.
// fetch: rows of memory that will be read soon, up to four; they are brought into the cache meanwhile.
struct Fetch {
  const char* rows[4] = {};
  int count = 0;
};

template <int ROWS, typename T>
void dot_tile(const T* a, std::int64_t stride_a, const T* const b[4], std::int64_t n, const Fetch& fetch, float* out,
              std::int64_t stride_out) {
  using P = Products<T>;
  F total[ROWS][4];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < 4; ++j) total[i][j] = zero();
  std::int64_t k = 0;
  for (; k + P::kValues <= n; k += P::kValues) {
    typename P::Vector right[4];
    for (int j = 0; j < 4; ++j) right[j] = P::get(b[j] + k);
    for (int j = 0; j < fetch.count; ++j) _mm_prefetch(fetch.rows[j] + k * sizeof(T), _MM_HINT_T1);
    for (int i = 0; i < ROWS; ++i) {
      const typename P::Vector left = P::get(a + i * stride_a + k);
      for (int j = 0; j < 4; ++j) total[i][j] = P::step(left, right[j], total[i][j]);
    }
  }
  if (k < n) {
    typename P::Vector right[4];
    for (int j = 0; j < 4; ++j) right[j] = P::some(b[j] + k, n - k);
    for (int i = 0; i < ROWS; ++i) {
      const typename P::Vector left = P::some(a + i * stride_a + k, n - k);
      for (int j = 0; j < 4; ++j) total[i][j] = P::step(left, right[j], total[i][j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    _mm_storeu_ps(out + i * stride_out, sums(total[i][0], total[i][1], total[i][2], total[i][3]));
}

template <typename T>
INLINE void dot_rows(const T* a, std::int64_t stride_a, std::int64_t rows, const T* const b[4], std::int64_t n,
                     const Fetch& fetch, float* out, std::int64_t stride_out) {
  switch (rows) {
    case 1: return dot_tile<1>(a, stride_a, b, n, fetch, out, stride_out);
    case 2: return dot_tile<2>(a, stride_a, b, n, fetch, out, stride_out);
#if defined(__AVX512F__)
    case 3: return dot_tile<3>(a, stride_a, b, n, fetch, out, stride_out);
    case 4: return dot_tile<4>(a, stride_a, b, n, fetch, out, stride_out);
    case 5: return dot_tile<5>(a, stride_a, b, n, fetch, out, stride_out);
    case 6: return dot_tile<6>(a, stride_a, b, n, fetch, out, stride_out);
#endif
    default: __builtin_unreachable();
  }
}

}  // namespace
