// Stands in for the tile instructions on instruction sets without them. Only for simd.hpp.
#pragma once

#include <cstdint>

#include "tile_shapes.hpp"

namespace {

struct Tiles {
  static constexpr bool kExist = false;
  static void configure(const TileShapes&) {}
  static void release() {}
  template <int TILE>
  static void zero() {}
  template <int TILE>
  static void load(const void*, std::int64_t) {}
  template <int TILE>
  static void store(void*, std::int64_t) {}
  template <int SUM, int X, int PANEL>
  static void multiply_add() {}
};

}  // namespace
