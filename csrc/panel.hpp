// Products of rows with panels, a register tile at a time: what linear layers, heads and attention have in common.
// Only for isa_*.cpp.
//
// A panel holds up to kPanel vectors side by side: cell [i][c] is the i-th of vector c. A cell is one value; of
// bfloat16 it is two that follow each other, which one instruction multiplies where AVX512_BF16 is at hand.
//
// Every product of a row with a vector is summed in one fixed order: cell by cell within a run of kRun cells, and run
// by run, which keeps digits of long sums. So neither the number of rows nor where a tile ends changes a bit.
#pragma once

#include <cstring>

#include "kernels.hpp"
#include "simd.hpp"

namespace {

using namespace genssd;

// How cells of a type are multiplied: in kSteps products of vectors.
template <typename T>
struct Cells {
  using Cell = T;
  static constexpr std::int64_t kValues = 1;  // of a cell
  static constexpr std::int64_t kRun = 128;   // cells
  static constexpr int kSteps = 1;
  INLINE static F widened(const Cell* p, int) { return load(p); }
  INLINE static F factor(const T* x, int) { return fill(widen(*x)); }
  INLINE static F add_product(F a, F b, F total) { return fma(a, b, total); }
  // The cells i..i + kLanes - 1 of a vector of n values, zeros beyond its end; and into a panel.
  INLINE static F load_cells(const T* p, std::int64_t i, std::int64_t n) { return load_at(p, i, n); }
  INLINE static void put(Cell* p, F x) { store(p, x); }
  // Values of two vectors as the halves of cells; and a cell without its other half.
  INLINE static F join(F first, F) { return first; }
  INLINE static Cell half(Cell cell, bool) { return cell; }
};

template <>
struct Cells<BFloat16> {
  using Cell = std::uint32_t;
  static constexpr std::int64_t kValues = 2;
  static constexpr std::int64_t kRun = 512;  // as long as a panel's run stays in the second cache beside the rows
#if defined(__AVX512BF16__)
  static constexpr int kSteps = 1;
  INLINE static F widened(const Cell* p, int) { return load(reinterpret_cast<const float*>(p)); }
  INLINE static F factor(const BFloat16* x, int) {
    std::uint32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return fill(std::bit_cast<float>(pair));
  }
  INLINE static F add_product(F a, F b, F total) {
    return _mm512_dpbf16_ps(total, std::bit_cast<__m512bh>(a), std::bit_cast<__m512bh>(b));
  }
#else
  static constexpr int kSteps = 2;
  INLINE static F widened(const Cell* p, int step) {
    const F pair = load(reinterpret_cast<const float*>(p));
    return step == 0 ? first_of_pairs(pair) : second_of_pairs(pair);
  }
  INLINE static F factor(const BFloat16* x, int step) { return fill(widen(x[step])); }
  INLINE static F add_product(F a, F b, F total) { return fma(a, b, total); }
#endif
  INLINE static F load_cells(const BFloat16* p, std::int64_t i, std::int64_t n) {
    if (2 * (i + kLanes) <= n) return load(reinterpret_cast<const float*>(p + 2 * i));
    alignas(64) BFloat16 values[2 * kLanes] = {};
    for (std::int64_t k = 2 * i; k < n; ++k) values[k - 2 * i] = p[k];
    return load(reinterpret_cast<const float*>(values));
  }
  INLINE static void put(Cell* p, F x) { store(reinterpret_cast<float*>(p), x); }
  INLINE static F join(F first, F second) { return pairs_of(first, second); }
  INLINE static Cell half(Cell cell, bool second) { return second ? cell & ~0xFFFFu : cell & 0xFFFFu; }
};

template <typename T>
using Cell = typename Cells<T>::Cell;

template <typename T>
INLINE std::int64_t cells_of(std::int64_t values) {
  return (values + Cells<T>::kValues - 1) / Cells<T>::kValues;
}

// What becomes of the numbers that are there.
enum class Sum { kNew, kAdded, kContinued };  // replaced; the whole sum is added; the sum goes on from them

// Memory to bring into the second cache meanwhile, `lines` cache lines with every row of cells.
struct Fetch {
  const char* from = nullptr;
  int lines = 0;
};

// out[r][c] of ROWS rows x, in whole cells, with VECTORS vectors of a panel's columns.
template <int ROWS, int VECTORS, typename T>
void dot_tile(const T* x, std::int64_t stride_x, const Cell<T>* panel, std::int64_t cells, Sum sum, Fetch fetch,
              float* out, std::int64_t stride_out) {
  using C = Cells<T>;
  F total[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < VECTORS; ++j)
      total[r][j] = sum == Sum::kContinued ? load(out + r * stride_out + j * kLanes) : zero();
  for (std::int64_t cell = 0; cell < cells; ++cell) {
    for (int i = 0; i < fetch.lines; ++i, fetch.from += 64) _mm_prefetch(fetch.from, _MM_HINT_T1);
    for (int step = 0; step < C::kSteps; ++step) {
      F column[VECTORS];
      for (int j = 0; j < VECTORS; ++j) column[j] = C::widened(panel + cell * kPanel + j * kLanes, step);
      for (int r = 0; r < ROWS; ++r) {
        const F factor = C::factor(x + r * stride_x + cell * C::kValues, step);
        for (int j = 0; j < VECTORS; ++j) total[r][j] = C::add_product(column[j], factor, total[r][j]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int j = 0; j < VECTORS; ++j) {
      float* to = out + r * stride_out + j * kLanes;
      store(to, sum == Sum::kAdded ? add(load(to), total[r][j]) : total[r][j]);
    }
}

template <int VECTORS, typename T>
INLINE void dot_tile(std::int64_t rows, const T* x, std::int64_t stride_x, const Cell<T>* panel, std::int64_t cells,
                     Sum sum, Fetch fetch, float* out, std::int64_t stride_out) {
  switch (rows) {
    case 1: return dot_tile<1, VECTORS>(x, stride_x, panel, cells, sum, fetch, out, stride_out);
    case 2: return dot_tile<2, VECTORS>(x, stride_x, panel, cells, sum, fetch, out, stride_out);
#if defined(__AVX512F__)
    case 3: return dot_tile<3, VECTORS>(x, stride_x, panel, cells, sum, fetch, out, stride_out);
    case 4: return dot_tile<4, VECTORS>(x, stride_x, panel, cells, sum, fetch, out, stride_out);
    case 5: return dot_tile<5, VECTORS>(x, stride_x, panel, cells, sum, fetch, out, stride_out);
    case 6: return dot_tile<6, VECTORS>(x, stride_x, panel, cells, sum, fetch, out, stride_out);
#endif
    default: __builtin_unreachable();
  }
}

// out[i][c] of rows of x with the first columns of a panel, over whole cells; a few columns more are written and mean
// nothing. out has room for whole vectors. next: memory that will be read soon, as much as this run takes.
template <typename T>
void dot_cells(const T* x, std::int64_t stride_x, std::int64_t rows, const Cell<T>* panel, std::int64_t columns,
               std::int64_t cells, Sum sum, const void* next, float* out, std::int64_t stride_out) {
  constexpr std::int64_t kWide = 4 * kLanes;
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  constexpr std::int64_t kLines = kPanel * sizeof(Cell<T>) / 64;  // of a row of cells
  const std::int64_t share = (kLines + tiles - 1) / tiles;        // of every register tile, while there is any left
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t i = tile * kTileRows, some = least(kTileRows, rows - i);
    Fetch fetch;
    if (next && tile * share < kLines)
      fetch = {static_cast<const char*>(next) + tile * share * cells * 64,
               static_cast<int>(least(share, kLines - tile * share))};
    std::int64_t c = 0;
    for (; c + kWide - kLanes < columns; c += kWide, fetch = {})
      dot_tile<4>(some, x + i * stride_x, stride_x, panel + c, cells, sum, fetch, out + i * stride_out + c,
                  stride_out);
    for (; c < columns; c += kLanes, fetch = {})
      dot_tile<1>(some, x + i * stride_x, stride_x, panel + c, cells, sum, fetch, out + i * stride_out + c,
                  stride_out);
  }
}

// The same over n values of at most one run, of which the last may fill half a cell.
template <typename T>
void dot_run(const T* x, std::int64_t stride_x, std::int64_t rows, const Cell<T>* panel, std::int64_t columns,
             std::int64_t n, bool first, const void* next, float* out, std::int64_t stride_out) {
  const std::int64_t whole = n / Cells<T>::kValues;
  dot_cells(x, stride_x, rows, panel, columns, whole, first ? Sum::kNew : Sum::kAdded, next, out, stride_out);
  if (whole * Cells<T>::kValues == n) return;
  for (std::int64_t i = 0; i < rows; ++i) {
    const T last[2] = {x[i * stride_x + n - 1], T{}};
    dot_cells(last, 0, 1, panel + whole * kPanel, columns, 1, Sum::kContinued, nullptr, out + i * stride_out,
              stride_out);
  }
}

// The same over all of n values, with all of whose cells the panel is there.
template <typename T>
INLINE void dot_panel(const T* x, std::int64_t stride_x, std::int64_t rows, const Cell<T>* panel, std::int64_t columns,
                      std::int64_t n, float* out, std::int64_t stride_out) {
  constexpr std::int64_t kValues = Cells<T>::kRun * Cells<T>::kValues;
  for (std::int64_t k = 0; k < n; k += kValues)
    dot_run(x + k, stride_x, rows, panel + k / Cells<T>::kValues * kPanel, columns, least(kValues, n - k), k == 0,
            nullptr, out, stride_out);
}

// Vectors of n values become columns of a panel, from its first on: vector(c) is where vector c begins. The panel has
// room for whole blocks of kLanes cells and columns; columns beyond the last repeat it.
template <typename T, typename Vector>
INLINE void pack_columns(const Vector& vector, std::int64_t columns, std::int64_t n, Cell<T>* panel) {
  const std::int64_t cells = cells_of<T>(n);
  for (std::int64_t c = 0; c < columns; c += kLanes)
    for (std::int64_t cell = 0; cell < cells; cell += kLanes) {
      F block[kLanes];
      for (std::int64_t i = 0; i < kLanes; ++i)
        block[i] = Cells<T>::load_cells(vector(least(c + i, columns - 1)), cell, n);
      transpose(block);
      for (std::int64_t i = 0; i < kLanes; ++i) Cells<T>::put(panel + (cell + i) * kPanel + c, block[i]);
    }
}

}  // namespace
