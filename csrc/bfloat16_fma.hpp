// Products of bfloat16 pairs for instruction sets without an instruction for them. Only for the headers of such sets.
#pragma once

namespace {

// A pair is two consecutive values of one vector in the 32 bits of one lane. Its first product is added before its
// second one.
struct PairProduct {
  static constexpr int kSteps = 2;  // fused multiply-adds of a pair
  INLINE static Vec load_column(const float* pairs, int step) {
    return step == 0 ? unpack_first(load(pairs)) : unpack_second(load(pairs));
  }
  INLINE static Vec broadcast_factor(const BFloat16* pair, int step) { return broadcast(widen(pair[step])); }
  INLINE static Vec multiply_add(Vec a, Vec b, Vec total) { return fma(a, b, total); }
};

}  // namespace
