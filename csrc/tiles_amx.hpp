// The tile instructions of AMX (AMX-TILE, AMX-BF16). Only for simd.hpp.
#pragma once

#include <cstdint>

#include "tile_shapes.hpp"

namespace {

// The eight tile registers of a thread. The compiler knows nothing of them: no function that it may call between two
// of these uses tiles. Every asm statement is volatile, so that they stay in order, and those that touch memory say
// so.
struct Tiles {
  static constexpr bool kExist = true;

  // Gives the registers their shapes, and zeros.
  INLINE static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }

  // Gives the registers back: what other code of the thread saves and restores is small again.
  INLINE static void release() { asm volatile("tilerelease" ::: "memory"); }

  template <int TILE>
  INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }

  // Loads the rows of a tile, which are `stride` bytes apart.
  template <int TILE>
  INLINE static void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
  }

  template <int TILE>
  INLINE static void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
  }

  // Adds to SUM the products of the rows of X with the columns of PANEL (TDPBF16PS; see tiles_model.hpp).
  template <int SUM, int X, int PANEL>
  INLINE static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(X), "i"(PANEL));
  }
};

}  // namespace
