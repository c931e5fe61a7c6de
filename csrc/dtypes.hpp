// Element types of tensors, as they are stored; all arithmetic is in float.
#pragma once

#include <bit>
#include <cstdint>

namespace genssd {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

enum class DType { kFloat32, kBFloat16, kFloat16 };

// The namespace is unnamed because every instruction set must keep its own copy of a template (see simd.hpp).
namespace {

// Stands for the type T in a call: `with_dtype(dtype, [&]<typename T>(Tag<T>) { ... })`.
template <typename T>
struct Tag {};

// Calls function(Tag<T>) with the element type T of a dtype.
template <typename Function>
[[gnu::always_inline]] inline void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32: return function(Tag<float>{});
    case DType::kBFloat16: return function(Tag<BFloat16>{});
    case DType::kFloat16: return function(Tag<Float16>{});
  }
}

}  // namespace

}  // namespace genssd
