// Products of bfloat16 rows with the columns of a packed panel on tile registers, for dot.hpp. Only for isa.cpp.
//
// A step multiplies kTileCells cells: 32 values of a row. Every dot product is summed step by step, from the first
// value on, and within a step as the instruction does it; the last step is filled up with zeros. So neither the number
// of rows nor how rows and columns are put into tiles changes a bit of a result.
#pragma once

#include <cstring>

#include "kernels.hpp"
#include "panels.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

constexpr std::int64_t kStepValues = 2 * kTileCells;
constexpr std::int64_t kBlockSteps =
    8;  // steps that many rows take at a time: 64 columns of them stay in the L1 cache
constexpr std::int64_t kPairHeight = 32;  // rows of two tiles

// The shapes that the tile registers of this thread have; 0: none.
inline thread_local unsigned tile_configuration = 0;

// Holds the tile registers while a task runs. Between tasks other code of the thread may use them.
struct TileScope {
  INLINE TileScope() {
    if constexpr (Tiles::kExist) tile_configuration = 0;
  }
  INLINE ~TileScope() {
    if constexpr (Tiles::kExist)
      if (tile_configuration) Tiles::release();
  }
  TileScope(const TileScope&) = delete;
};

// Shapes the registers for a product: sums 0 and 1 and rows 4 have `first` rows, sums 2 and 3 and rows 5 have `second`
// rows, and columns 6 and 7 are full.
INLINE void configure_tiles(std::int64_t first, std::int64_t second) {
  const auto wanted = static_cast<unsigned>(first << 8 | second);
  if (tile_configuration == wanted) return;
  TileShapes shapes;
  const std::int64_t rows[8] = {first, first, second, second, first, second, kTileCells, kTileCells};
  for (int tile = 0; tile < 8; ++tile) {
    shapes.rows[tile] = static_cast<std::uint8_t>(rows[tile]);
    shapes.row_bytes[tile] = kTileBytes;
  }
  Tiles::configure(shapes);
  tile_configuration = wanted;
}

// The values of a product that fill no whole step, filled up with zeros.
struct LastStep {
  alignas(64) BFloat16 rows[kPairHeight][kStepValues];
  alignas(64) std::uint32_t panel[kTileCells][kPanelWidth];
};

// What a tile product reads: `steps` whole steps of rows and panel, and a last one where it is not null. `next` is
// memory that will be read soon, or null: `lines` cache lines of it are brought into the L2 cache with every step.
template <typename Columns>
struct TileInput {
  const BFloat16* x;
  std::int64_t x_stride;
  Columns panel;
  std::int64_t steps;
  const LastStep* last;
  const char* next;
  int lines;
};

// Calls visit.operator()<I>() for I in 0..N - 1.
template <int N, typename Visit>
INLINE void unroll(const Visit& visit) {
  if constexpr (N > 1) unroll<N - 1>(visit);
  visit.template operator()<N - 1>();
}

// Computes ROW_TILES (1 or 2) times COLUMN_TILES tiles, up to four of them, from a column of the panel on. out: where
// the product of the first row and this column goes.
template <int ROW_TILES, int COLUMN_TILES, typename Columns>
INLINE void compute_tiles(const TileInput<Columns>& in, std::int64_t column, bool overwrite, float* out,
                          std::int64_t out_stride) {
  static_assert(ROW_TILES == 1 ? COLUMN_TILES <= 4 : ROW_TILES == 2 && COLUMN_TILES <= 2);
  constexpr int kX = 4, kColumns = 6;
  const auto sum_at = [&](int row, int c) __attribute__((always_inline)) {
    return out + row * kTileHeight * out_stride + c * kTileCells;
  };
  const auto step = [&](const BFloat16* x, std::int64_t x_stride, const auto& columns,
                        std::int64_t cell) __attribute__((always_inline)) {
    unroll<ROW_TILES>([&]<int R>() __attribute__((always_inline)) {
      Tiles::load<kX + R>(x + R * kTileHeight * x_stride, x_stride * sizeof(BFloat16));
    });
    unroll<COLUMN_TILES>([&]<int C>() __attribute__((always_inline)) {
      Tiles::load<kColumns + C % 2>(columns.at(cell, C * kTileCells), columns.stride() * sizeof(std::uint32_t));
      unroll<ROW_TILES>(
          [&]<int R>() __attribute__((always_inline)) { Tiles::multiply_add<2 * R + C, kX + R, kColumns + C % 2>(); });
    });
  };
  unroll<ROW_TILES>([&]<int R>() __attribute__((always_inline)) {
    unroll<COLUMN_TILES>([&]<int C>() __attribute__((always_inline)) {
      if (overwrite)
        Tiles::zero<2 * R + C>();
      else
        Tiles::load<2 * R + C>(sum_at(R, C), out_stride * sizeof(float));
    });
  });
  const char* next = in.next;
  const auto columns = in.panel.skip_columns(column).template vectors<kTileCells, COLUMN_TILES>();
  for (std::int64_t i = 0; i < in.steps; ++i) {
    for (int line = 0; line < in.lines; ++line, next += 64) prefetch_line(next);
    step(in.x + i * kStepValues, in.x_stride, columns, i * kTileCells);
  }
  if (in.last) step(in.last->rows[0], kStepValues, Panel<std::uint32_t>{in.last->panel[0] + column}, 0);
  unroll<ROW_TILES>([&]<int R>() __attribute__((always_inline)) {
    unroll<COLUMN_TILES>([&]<int C>() __attribute__((always_inline)) {
      Tiles::store<2 * R + C>(sum_at(R, C), out_stride * sizeof(float));
    });
  });
}

// Computes up to kPairHeight rows: two row tiles beside two column tiles, which reads the least; or one row tile
// beside four column tiles.
template <typename Columns>
INLINE void compute_rows(TileInput<Columns> in, std::int64_t rows, std::int64_t columns, bool overwrite, float* out,
                         std::int64_t out_stride) {
  const std::int64_t tiles = (columns + kTileCells - 1) / kTileCells;  // column tiles, at most 4
  if (rows <= kTileHeight) {
    configure_tiles(rows, rows);
    switch (tiles) {
      case 1: return compute_tiles<1, 1>(in, 0, overwrite, out, out_stride);
      case 2: return compute_tiles<1, 2>(in, 0, overwrite, out, out_stride);
      case 3: return compute_tiles<1, 3>(in, 0, overwrite, out, out_stride);
      case 4: return compute_tiles<1, 4>(in, 0, overwrite, out, out_stride);
      default: __builtin_unreachable();
    }
  }
  configure_tiles(kTileHeight, rows - kTileHeight);
  for (std::int64_t tile = 0; tile < tiles; tile += 2, in.next = nullptr, in.lines = 0) {
    const std::int64_t column = tile * kTileCells;
    if (tile + 1 < tiles)
      compute_tiles<2, 2>(in, column, overwrite, out + column, out_stride);
    else
      compute_tiles<2, 1>(in, column, overwrite, out + column, out_stride);
  }
}

// Computes the products of rows with the first columns of a panel over n values: data[i * out_stride + c]. They are
// added to what the output holds, unless they overwrite it. Whole tiles of columns are written, so that the output
// holds meaningless numbers beyond the last column. next: memory that will be read soon, as much as these cells of the
// panel take, or null.
template <typename Columns>
INLINE void dot_tiles(const BFloat16* x, std::int64_t x_stride, std::int64_t rows, const Columns& panel,
                      std::int64_t columns, std::int64_t n, bool overwrite, const void* next, float* out,
                      std::int64_t out_stride) {
  constexpr int kStepLines = kTileCells * kPanelWidth * sizeof(std::uint32_t) / 64;
  const std::int64_t steps = n / kStepValues, rest = n % kStepValues;
  LastStep last;
  if (rest) {
    std::memset(&last, 0, sizeof last);
    // only whole tiles of these columns: the panel may begin in the middle of the last one of a tensor
    for (std::int64_t cell = 0; cell < (rest + 1) / 2; ++cell)
      for (std::int64_t column = 0; column < columns; column += kTileCells)
        std::memcpy(last.panel[cell] + column, panel.at(steps * kTileCells + cell, column), kTileBytes);
  }
  const auto run = [&](std::int64_t first_row, std::int64_t count, std::int64_t begin, std::int64_t end) {
    const BFloat16* from = x + first_row * x_stride + begin * kStepValues;
    const bool is_last = end == steps && rest;
    if (is_last)
      for (std::int64_t i = 0; i < count; ++i)
        std::memcpy(last.rows[i], from + i * x_stride + (end - begin) * kStepValues, rest * sizeof(BFloat16));
    const std::int64_t offset = begin * kTileCells * kPanelWidth;  // of `next`
    const bool prefetches = next && first_row == 0;
    compute_rows<Columns>(
        {.x = from,
         .x_stride = x_stride,
         .panel = panel.skip_cells(begin * kTileCells),
         .steps = end - begin,
         .last = is_last ? &last : nullptr,
         .next = prefetches ? static_cast<const char*>(next) + offset * sizeof(std::uint32_t) : nullptr,
         .lines = prefetches ? kStepLines : 0},
        count, columns, overwrite && begin == 0, out + first_row * out_stride, out_stride);
  };
  const std::int64_t paired = rows <= kPairHeight ? 0 : rows / kPairHeight * kPairHeight;
  for (std::int64_t begin = 0; begin < max(steps, 1) && paired; begin += kBlockSteps)
    for (std::int64_t row = 0; row < paired; row += kPairHeight)
      run(row, kPairHeight, begin, min(steps, begin + kBlockSteps));
  if (paired < rows) run(paired, rows - paired, 0, steps);
}

}  // namespace
