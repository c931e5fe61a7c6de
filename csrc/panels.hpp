// Where the columns of a packed panel are in memory (see dot.hpp). C: type of a cell. Only for isa.cpp.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "simd_base.hpp"

namespace {

using namespace genssd;

// Columns that lie side by side, kPanelWidth of them in a row of cells.
template <typename C>
struct Panel {
  static constexpr std::int64_t kStride = kPanelWidth;  // cells from one row to the next
  const C* data;
  INLINE const C* at(std::int64_t cell, std::int64_t column) const { return data + cell * kStride + column; }
  INLINE std::int64_t stride() const { return kStride; }
  INLINE Panel skip_cells(std::int64_t cells) const { return {data + cells * kStride}; }
  INLINE Panel skip_columns(std::int64_t columns) const { return {data + columns}; }
  template <std::int64_t LANES, int VECTORS>
  INLINE Panel vectors() const {
    return *this;
  }
};

// Vectors of LANES columns, of which each begins somewhere else.
template <typename C, std::int64_t LANES, int VECTORS>
struct ApartVectors {
  const C* first[VECTORS];
  std::int64_t row;  // cells from one row to the next
  INLINE const C* at(std::int64_t cell, std::int64_t column) const { return first[column / LANES] + cell * row; }
  INLINE std::int64_t stride() const { return row; }
};

// Columns in blocks of kKeyBlock, each somewhere else, with their rows of cells at one distance.
template <typename C>
struct BlockPanel {
  const C* const* blocks;  // where the first cell of each block's first column is
  std::int64_t row;        // cells from one row to the next
  std::int64_t first_cell = 0, first_column = 0;
  INLINE const C* at(std::int64_t cell, std::int64_t column) const {
    column += first_column;
    return blocks[column / kKeyBlock] + (first_cell + cell) * row + column % kKeyBlock;
  }
  INLINE std::int64_t stride() const { return row; }
  INLINE BlockPanel skip_cells(std::int64_t cells) const { return {blocks, row, first_cell + cells, first_column}; }
  INLINE BlockPanel skip_columns(std::int64_t columns) const {
    return {blocks, row, first_cell, first_column + columns};
  }
  // Returns vectors from the first column on, their addresses read once. A block holds whole vectors.
  template <std::int64_t LANES, int VECTORS>
  INLINE ApartVectors<C, LANES, VECTORS> vectors() const {
    ApartVectors<C, LANES, VECTORS> apart{{}, row};
    for (int j = 0; j < VECTORS; ++j) apart.first[j] = at(0, j * LANES);
    return apart;
  }
};

}  // namespace
