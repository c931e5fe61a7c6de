// Dot products of rows with the columns of packed panels, a register tile at a time: what linear layers, heads and
// attention have in common. Only for isa.cpp.
//
// A panel holds up to kPanelWidth vectors side by side, as its columns: [cells, kPanelWidth]; or its columns lie in
// the pages of the cache, kKeyBlock side by side (see panels.hpp). A cell is one value of a vector; of bfloat16 it is
// a pair of consecutive values in 32 bits (the VNNI layout), which one instruction multiplies where the processor has
// AVX512_BF16.
//
// Every dot product is summed in one fixed order: cell by cell within a block of kBlock cells, and then block by
// block, which loses fewer digits of long sums than a single chain. So neither the number of rows nor where a tile
// ends changes a bit of a result. On instruction sets with tile registers, those of bfloat16 are summed in the order
// of tiles.hpp.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.hpp"
#include "panels.hpp"
#include "simd.hpp"
#include "tiles.hpp"

namespace {

using namespace genssd;

// How the cells of an element type are laid out and multiplied.
template <typename T>
struct Cells {
  using Cell = T;
  static constexpr std::int64_t kValues = 1;   // values of a cell
  static constexpr std::int64_t kBlock = 128;  // cells of a block of the sum
  static constexpr int kSteps = 1;             // multiply-adds that a cell takes
  INLINE static Vec load_column(const Cell* p, int) { return load(p); }
  INLINE static Vec broadcast_factor(const T* x, int) { return broadcast(widen(*x)); }
  INLINE static Vec multiply_add(Vec a, Vec b, Vec total) { return fma(a, b, total); }
  // Loads the cells i..i + kLanes - 1 of a vector of n values, and zeros beyond its end.
  INLINE static Vec load_cells(const T* p, std::int64_t i, std::int64_t n) { return load_bounded(p, i, n); }
  INLINE static void store_cells(Cell* p, Vec x) { store(p, x); }
  // Returns the cells that hold the values of `first`, and of `second` after them where a cell holds two.
  INLINE static Vec join(Vec first, Vec) { return first; }
  // Returns a cell in which only the first or only the second value is kept, and the other is 0.
  INLINE static Cell keep_half(Cell cell, bool) { return cell; }
};

template <>
struct Cells<BFloat16> : PairProduct {
  using Cell = std::uint32_t;
  static constexpr std::int64_t kValues = 2;
  static constexpr std::int64_t kBlock = 512;  // a block of a panel stays in the L2 cache together with the rows
  INLINE static Vec load_column(const Cell* p, int step) {
    return PairProduct::load_column(reinterpret_cast<const float*>(p), step);
  }
  INLINE static Vec load_cells(const BFloat16* p, std::int64_t i, std::int64_t n) {
    if (2 * (i + kLanes) <= n) return load(reinterpret_cast<const float*>(p + 2 * i));
    alignas(64) BFloat16 values[2 * kLanes] = {};
    for (std::int64_t k = 2 * i; k < n; ++k) values[k - 2 * i] = p[k];
    return load(reinterpret_cast<const float*>(values));
  }
  INLINE static void store_cells(Cell* p, Vec x) { store(reinterpret_cast<float*>(p), x); }
  INLINE static Vec join(Vec first, Vec second) { return pack_pairs(first, second); }
  INLINE static Cell keep_half(Cell cell, bool second) { return second ? cell & ~0xFFFFu : cell & 0xFFFFu; }
};

template <typename T>
using Cell = typename Cells<T>::Cell;

// Whether the products of an element type are computed on tile registers.
template <typename T>
constexpr bool kUsesTiles = Tiles::kExist && std::is_same_v<T, BFloat16>;

template <typename T>
INLINE std::int64_t num_cells(std::int64_t values) {
  return (values + Cells<T>::kValues - 1) / Cells<T>::kValues;
}

// Rows that are multiplied, `stride` values apart.
template <typename T>
struct Rows {
  const T* data;
  std::int64_t stride, count;
  INLINE Rows slice(std::int64_t row, std::int64_t rows) const { return {data + row * stride, stride, rows}; }
  INLINE Rows skip_values(std::int64_t k) const { return {data + k, stride, count}; }
};

// Where the products of row i and column c go: data[i * stride + c].
struct Output {
  float* data;
  std::int64_t stride;
  INLINE Output at(std::int64_t row, std::int64_t column) const { return {data + row * stride + column, stride}; }
};

// How a new sum meets the number in the output: it overwrites the number; it is added to the number as a whole; or it
// starts from the number and adds product by product.
enum class Accumulate { kOverwrite, kAdd, kContinue };

// Memory that a tile brings into the L2 cache while it computes: `lines` cache lines with every row of cells.
struct Prefetch {
  const char* from = nullptr;
  int lines = 0;
};

// Computes a register tile: ROWS rows x, in whole cells, with VECTORS vectors of a panel's columns.
template <int ROWS, int VECTORS, typename T, typename Columns>
INLINE void compute_tile(const T* x, std::int64_t x_stride, const Columns& panel, std::int64_t cells, Accumulate mode,
                         Prefetch prefetch, float* out, std::int64_t out_stride) {
  using C = Cells<T>;
  const auto columns = panel.template vectors<kLanes, VECTORS>();
  Vec total[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < VECTORS; ++j)
      total[r][j] = mode == Accumulate::kContinue ? load(out + r * out_stride + j * kLanes) : zero();
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    for (int i = 0; i < prefetch.lines; ++i, prefetch.from += 64) prefetch_line(prefetch.from);
    for (int step = 0; step < C::kSteps; ++step) {
      Vec column[VECTORS];
      for (int j = 0; j < VECTORS; ++j) column[j] = C::load_column(columns.at(cell, j * kLanes), step);
      for (int r = 0; r < ROWS; ++r) {
        const Vec factor = C::broadcast_factor(x + r * x_stride + cell * C::kValues, step);
        for (int j = 0; j < VECTORS; ++j) total[r][j] = C::multiply_add(column[j], factor, total[r][j]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < VECTORS; ++j) {
      float* p = out + r * out_stride + j * kLanes;
      store(p, mode == Accumulate::kAdd ? add(load(p), total[r][j]) : total[r][j]);
    }
}

// compute_tile as a function of its own. With its body in this function gcc stores the sums to the stack at every
// cell; inlined into it, they stay in registers.
template <int ROWS, int VECTORS, typename T, typename Columns>
void call_tile(const T* x, std::int64_t x_stride, Columns panel, std::int64_t cells, Accumulate mode,
               Prefetch prefetch, float* out, std::int64_t out_stride) {
  compute_tile<ROWS, VECTORS>(x, x_stride, panel, cells, mode, prefetch, out, out_stride);
}

// Computes a tile of 1..kTileRows rows, whose number is known at run time. A single row, which is what decoding waits
// for, is inlined: there the prefetches take as long as the products, and the compiler unrolls them.
template <int VECTORS, typename T, typename Columns>
INLINE void dot_tile(const Rows<T>& x, const Columns& panel, std::int64_t cells, Accumulate mode, Prefetch prefetch,
                     Output out) {
  const auto run = [&]<int ROWS>() __attribute__((always_inline)) {
    if constexpr (ROWS == 1)
      compute_tile<1, VECTORS>(x.data, x.stride, panel, cells, mode, prefetch, out.data, out.stride);
    else if constexpr (ROWS <= kTileRows)
      call_tile<ROWS, VECTORS>(x.data, x.stride, panel, cells, mode, prefetch, out.data, out.stride);
    else
      __builtin_unreachable();
  };
  static_assert(kTileRows <= 6);
  switch (x.count) {
    case 1: return run.template operator()<1>();
    case 2: return run.template operator()<2>();
    case 3: return run.template operator()<3>();
    case 4: return run.template operator()<4>();
    case 5: return run.template operator()<5>();
    case 6: return run.template operator()<6>();
    default: __builtin_unreachable();
  }
}

// Computes the products of rows with the first columns of a panel, over whole cells. Whole vectors of columns are
// written, so that the output holds meaningless numbers beyond the last column. next: memory that will be read soon,
// as much as these cells of the panel take, or null; the tiles share out its cache lines.
template <typename T, typename Columns>
void dot_cells(const Rows<T>& x, const Columns& panel, std::int64_t columns, std::int64_t cells, Accumulate mode,
               const void* next, Output out) {
  constexpr std::int64_t kWide = 4 * kLanes;
  constexpr std::int64_t kLines = kPanelWidth * sizeof(Cell<T>) / 64;  // cache lines of a row of cells
  const std::int64_t tiles = (x.count + kTileRows - 1) / kTileRows;
  const std::int64_t lines_per_tile = (kLines + tiles - 1) / tiles;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t row = tile * kTileRows, line = tile * lines_per_tile;
    const Rows<T> tile_x = x.slice(row, min(kTileRows, x.count - row));
    Prefetch prefetch;
    if (next && line < kLines)
      prefetch = {static_cast<const char*>(next) + line * cells * 64,
                  static_cast<int>(min(lines_per_tile, kLines - line))};
    std::int64_t c = 0;
    for (; c + kWide - kLanes < columns; c += kWide, prefetch = {})
      dot_tile<4>(tile_x, panel.skip_columns(c), cells, mode, prefetch, out.at(row, c));
    for (; c < columns; c += kLanes, prefetch = {})
      dot_tile<1>(tile_x, panel.skip_columns(c), cells, mode, prefetch, out.at(row, c));
  }
}

// Computes the products over n values of at most one block, of which the last value may fill half a cell. The first
// block overwrites the output, the others are added to it.
template <typename T, typename Columns>
void dot_block(const Rows<T>& x, const Columns& panel, std::int64_t columns, std::int64_t n, bool first,
               const void* next, Output out) {
  if constexpr (kUsesTiles<T>) {
    dot_tiles(x.data, x.stride, x.count, panel, columns, n, first, next, out.data, out.stride);
  } else {
    const std::int64_t cells = n / Cells<T>::kValues;
    dot_cells(x, panel, columns, cells, first ? Accumulate::kOverwrite : Accumulate::kAdd, next, out);
    if (cells * Cells<T>::kValues == n) return;
    for (std::int64_t i = 0; i < x.count; ++i) {
      const T last[2] = {x.data[i * x.stride + n - 1], T{}};
      dot_cells(Rows<T>{last, 0, 1}, panel.skip_cells(cells), columns, 1, Accumulate::kContinue, nullptr,
                out.at(i, 0));
    }
  }
}

// Computes the products over all n values of the rows, with a panel that holds all of their cells.
template <typename T, typename Columns>
INLINE void dot_panel(const Rows<T>& x, const Columns& panel, std::int64_t columns, std::int64_t n, Output out) {
  constexpr std::int64_t kValues = Cells<T>::kBlock * Cells<T>::kValues;
  for (std::int64_t k = 0; k < n; k += kValues)
    dot_block(x.skip_values(k), panel.skip_cells(k / Cells<T>::kValues), columns, min(kValues, n - k), k == 0, nullptr,
              out);
}

// Packs vectors of n values into the first columns of a panel; vector(c) points to the values of vector c. The panel
// must have room for whole blocks of kLanes cells and kLanes columns; columns beyond the last repeat it.
template <typename T, typename Vector>
INLINE void pack_columns(const Vector& vector, std::int64_t columns, std::int64_t n, Cell<T>* panel) {
  const std::int64_t cells = num_cells<T>(n);
  for (std::int64_t c = 0; c < columns; c += kLanes)
    for (std::int64_t cell = 0; cell < cells; cell += kLanes) {
      Vec block[kLanes];
      for (std::int64_t i = 0; i < kLanes; ++i)
        block[i] = Cells<T>::load_cells(vector(min(c + i, columns - 1)), cell, n);
      transpose(block);
      for (std::int64_t i = 0; i < kLanes; ++i) Cells<T>::store_cells(panel + (cell + i) * kPanelWidth + c, block[i]);
    }
}

}  // namespace
