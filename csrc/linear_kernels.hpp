// Matrix products with a weight. Only for isa.cpp.
#pragma once

#include <cstring>

#include "dot.hpp"
#include "kernels.hpp"
#include "workspace.hpp"

namespace {

using namespace genssd;

// One block of a panel that is packed on the way, and the products of a task's rows with the panel.
template <typename T>
struct LinearWorkspace {
  alignas(64) Cell<T> cells[Cells<T>::kBlock * kPanelWidth];
  alignas(64) float out[kRowBlock * kPanelWidth];

  INLINE static LinearWorkspace& of_thread() {
    return *new (thread_workspace(sizeof(LinearWorkspace))) LinearWorkspace;
  }
};

// Computes out[i][c] = x_i . (row first_output + c of the weight) for the outputs of one panel; n: values of a row. A
// packed panel is read in place, another weight is packed block by block. What follows it in memory is prefetched.
template <typename T>
INLINE void dot_weight(const Rows<T>& x, const Weight& weight, std::int64_t first_output, std::int64_t outputs,
                       std::int64_t n, LinearWorkspace<T>& workspace) {
  constexpr std::int64_t kValues = Cells<T>::kBlock * Cells<T>::kValues;
  const T* row = static_cast<const T*>(weight.data) + first_output * weight.row_stride;
  const Cell<T>* panel = static_cast<const Cell<T>*>(weight.data) + first_output * num_cells<T>(n);
  for (std::int64_t k = 0; k < n; k += kValues) {
    const std::int64_t block_values = min(kValues, n - k);
    const Cell<T>* cells = panel + k / Cells<T>::kValues * kPanelWidth;
    const void* next = cells + num_cells<T>(block_values) * kPanelWidth;
    if (weight.row_stride) {
      pack_columns<T>([&](std::int64_t c) { return row + c * weight.row_stride + k; }, outputs, block_values,
                      workspace.cells);
      cells = workspace.cells;
      // the next rows follow in one piece
      next = weight.row_stride == n && block_values == n ? row + kPanelWidth * n : nullptr;
    }
    dot_block(x.skip_values(k), Panel<Cell<T>>{cells}, outputs, block_values, k == 0, next,
              Output{workspace.out, kPanelWidth});
  }
}

// Computes x . (row `output` of the weight), bit for bit as dot_weight does.
template <typename T>
INLINE float dot_single(const T* x, Weight weight, std::int64_t output, std::int64_t n) {
  LinearWorkspace<T>& workspace = LinearWorkspace<T>::of_thread();
  if (weight.row_stride) {
    dot_weight(Rows<T>{x, 0, 1}, weight, output, 1, n, workspace);
    return workspace.out[0];
  }
  const std::int64_t column = output % kPanelWidth;  // only its vector of columns is read
  weight.data = static_cast<const Cell<T>*>(weight.data) + column / kLanes * kLanes;
  dot_weight(Rows<T>{x, 0, 1}, weight, output - column, column % kLanes + 1, n, workspace);
  return workspace.out[column % kLanes];
}

// Computes the task (panel, block of rows).
template <typename T, typename Out>
void linear(const LinearParams& p, std::int64_t task) {
  const std::int64_t row_blocks = (p.rows + kRowBlock - 1) / kRowBlock, first_row = task % row_blocks * kRowBlock;
  const std::int64_t rows = min(kRowBlock, p.rows - first_row), first_output = task / row_blocks * kPanelWidth;
  const std::int64_t outputs = min(kPanelWidth, p.outputs - first_output);
  const Rows<T> x{static_cast<const T*>(p.x) + first_row * p.x_stride, p.x_stride, rows};
  const T* bias = static_cast<const T*>(p.bias);
  LinearWorkspace<T>& workspace = LinearWorkspace<T>::of_thread();
  dot_weight(x, p.weight, first_output, outputs, p.inputs, workspace);
  for (std::int64_t i = 0; i < rows; ++i) {
    Out* out = static_cast<Out*>(p.out) + (first_row + i) * p.outputs + first_output;
    for (std::int64_t c = 0; c < outputs; c += kLanes) {
      Vec y = load(workspace.out + i * kPanelWidth + c);
      if (bias) y = add(y, load_bounded(bias + first_output, c, outputs));
      store_bounded(out, y, c, outputs);
    }
  }
}

void linear_task(const LinearParams& p, std::int64_t task) {
  const TileScope scope;
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { p.float_out ? linear<T, float>(p, task) : linear<T, T>(p, task); });
}

}  // namespace
