// A model of the tile instructions of AMX in plain C++: for tests on machines that lack them. Only for simd.hpp.
//
// TDPBF16PS as Intel documents it (Software Developer's Manual, volume 2; the same in the instruction set reference of
// architecture extensions): for each row of x and each column of the panel there are two chains of fused multiply-adds
// over the cells of the tile, one over the first values of the cells and one over the second values. Both begin at 0.
// Their sum is rounded, and then added to the old number of the tile. Everything is rounded to the nearest even;
// denormal numbers are 0, those that go in and those that come out; MXCSR is neither read nor written.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "tile_shapes.hpp"

namespace {

// The eight tile registers of a thread. Where the hardware raises an exception of an undefined instruction, a function
// throws std::logic_error.
struct Tiles {
  static constexpr bool kExist = true;

  static void configure(const TileShapes& shapes) {
    require(shapes.palette == 1 && shapes.start_row == 0);
    for (int tile = 0; tile < 16; ++tile)
      require(tile < 8 ? shapes.rows[tile] <= kTileHeight && shapes.row_bytes[tile] <= kTileBytes
                       : shapes.rows[tile] == 0 && shapes.row_bytes[tile] == 0);
    State& state = state_of_thread();
    state = State{};
    state.shapes = shapes;
  }

  static void release() {
    state_of_thread() = State{};
    state_of_thread().shapes.palette = 0;
  }

  template <int TILE>
  static void zero() {
    std::memset(used(TILE).data[TILE], 0, sizeof(Data));
  }

  template <int TILE>
  static void load(const void* from, std::int64_t stride) {
    State& state = used(TILE);
    std::memset(state.data[TILE], 0, sizeof(Data));
    for (int row = 0; row < state.shapes.rows[TILE]; ++row)
      std::memcpy(state.data[TILE][row], static_cast<const char*>(from) + row * stride, state.shapes.row_bytes[TILE]);
  }

  template <int TILE>
  static void store(void* to, std::int64_t stride) {
    State& state = used(TILE);
    for (int row = 0; row < state.shapes.rows[TILE]; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, state.data[TILE][row], state.shapes.row_bytes[TILE]);
  }

  template <int SUM, int X, int PANEL>
  static void multiply_add() {
    State& state = used(SUM);
    const TileShapes& shapes = used(X).shapes;
    used(PANEL);
    const int rows = shapes.rows[SUM], cells = shapes.rows[PANEL], columns = shapes.row_bytes[SUM] / 4;
    require(SUM != X && SUM != PANEL && X != PANEL);
    require(shapes.rows[X] == rows && shapes.row_bytes[X] == 4 * cells && shapes.row_bytes[PANEL] == 4 * columns);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1F80 | 0x8040);  // to nearest even, exceptions masked, denormals are zero on both sides
    multiply(state.data[SUM], state.data[X], state.data[PANEL], rows, cells, columns);
    _mm_setcsr(before);
  }

 private:
  using Data = std::uint32_t[kTileHeight][kTileCells];

  struct State {
    TileShapes shapes{.palette = 0};
    Data data[8] = {};
  };

  // A function of its own: the compiler must not move its arithmetic past a change of MXCSR.
  [[gnu::noinline]] static void multiply(Data& sum, const Data& x, const Data& panel, int rows, int cells,
                                         int columns) {
    for (int row = 0; row < rows; ++row) {
      float first[kTileCells] = {}, second[kTileCells] = {};
      for (int cell = 0; cell < cells; ++cell) {
        const std::uint32_t pair = x[row][cell];
        for (int c = 0; c < kTileCells; ++c) {
          first[c] = __builtin_fmaf(as_float(pair << 16), as_float(panel[cell][c] << 16), first[c]);
          second[c] = __builtin_fmaf(as_float(pair & ~0xFFFFu), as_float(panel[cell][c] & ~0xFFFFu), second[c]);
        }
      }
      for (int c = 0; c < columns; ++c)
        sum[row][c] = std::bit_cast<std::uint32_t>(as_float(sum[row][c]) + (first[c] + second[c]));
    }
  }

  static State& state_of_thread() {
    static thread_local State state;
    return state;
  }

  static State& used(int tile) {
    State& state = state_of_thread();
    require(state.shapes.palette == 1 && state.shapes.rows[tile] > 0 && state.shapes.row_bytes[tile] > 0);
    return state;
  }

  static float as_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }

  static void require(bool condition) {
    if (!condition) throw std::logic_error("tile instruction without a valid configuration");
  }
};

}  // namespace
