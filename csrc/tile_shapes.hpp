// Shapes of the tile registers of AMX. Only for tiles_*.hpp.
#pragma once

#include <cstdint>

namespace {

constexpr std::int64_t kTileHeight = 16;  // rows of a full tile
constexpr std::int64_t kTileCells = 16;   // cells (32 bits each) of a row of a full tile
constexpr std::int64_t kTileBytes = 64;   // bytes of a row of a full tile

// The 64 bytes that LDTILECFG reads.
struct alignas(64) TileShapes {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

}  // namespace
