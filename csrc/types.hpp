// The element types of tensors, as storage. Arithmetic is in float.
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

}  // namespace genssd
