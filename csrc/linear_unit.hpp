// Matrix products, and the pass over a head that never keeps its logits. Only for isa_*.cpp.
#pragma once

#include "draw.hpp"
#include "kernels.hpp"
#include "panel.hpp"
#include "scratch.hpp"

namespace {

using namespace genssd;

// A run of a panel, and what the rows of a unit have with the panel.
template <typename T>
struct Workspace {
  alignas(64) Cell<T> cells[Cells<T>::kRun * kPanel];
  alignas(64) float out[kRowBlock * kPanel];
};

template <typename T>
INLINE Workspace<T>& workspace() {
  return *new (scratch(sizeof(Workspace<T>))) Workspace<T>;
}

// out[i][c] = row x_i with row `column` + c of the weight, for the columns of one panel; n: values of a row. A packed
// panel is read where it lies, another is packed a run at a time. What lies behind it is fetched meanwhile.
template <typename T>
INLINE void dot_weight(const T* x, std::int64_t stride_x, std::int64_t rows, const Weight& weight, std::int64_t column,
                       std::int64_t columns, std::int64_t n, Cell<T>* memory, float* out) {
  constexpr std::int64_t kValues = Cells<T>::kRun * Cells<T>::kValues;
  const T* from = static_cast<const T*>(weight.data) + column * weight.stride;
  const Cell<T>* panel = static_cast<const Cell<T>*>(weight.data) + column * cells_of<T>(n);
  for (std::int64_t k = 0; k < n; k += kValues) {
    const std::int64_t some = least(kValues, n - k);
    const Cell<T>* cells = panel + k / Cells<T>::kValues * kPanel;
    const void* next = cells + cells_of<T>(some) * kPanel;
    if (weight.stride) {
      pack_columns<T>([&](std::int64_t c) { return from + c * weight.stride + k; }, columns, some, memory);
      cells = memory;
      next = weight.stride == n && some == n ? from + kPanel * n : nullptr;  // the next rows follow in one piece
    }
    dot_run(x + k, stride_x, rows, cells, columns, some, k == 0, next, out, kPanel);
  }
}

// Unit: (a panel, a block of rows).
template <typename T, typename Out>
void linear_of(const Linear& t, std::int64_t unit) {
  const std::int64_t row_blocks = (t.rows + kRowBlock - 1) / kRowBlock, first = unit % row_blocks * kRowBlock;
  const std::int64_t rows = least(kRowBlock, t.rows - first), column = unit / row_blocks * kPanel;
  const std::int64_t columns = least(kPanel, t.outputs - column);
  const T* x = static_cast<const T*>(t.x) + first * t.stride_x;
  const T* bias = static_cast<const T*>(t.bias);
  Workspace<T>& memory = workspace<T>();
  dot_weight(x, t.stride_x, rows, t.weight, column, columns, t.inputs, memory.cells, memory.out);
  for (std::int64_t i = 0; i < rows; ++i) {
    Out* out = static_cast<Out*>(t.out) + (first + i) * t.outputs + column;
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      F y = load(memory.out + i * kPanel + c);
      if (bias) y = add(y, load_at(bias + column, c, columns));
      store_at(out, y, c, columns);
    }
  }
}

void linear_unit(const Linear& t, std::int64_t unit) {
  switch (t.type) {
    case Type::kFloat: return linear_of<float, float>(t, unit);
    case Type::kBFloat16: return t.wide ? linear_of<BFloat16, float>(t, unit) : linear_of<BFloat16, BFloat16>(t, unit);
    case Type::kFloat16: return t.wide ? linear_of<Float16, float>(t, unit) : linear_of<Float16, Float16>(t, unit);
  }
}

template <typename T>
INLINE F squashed(const Head& t, F x, const T* bias, std::int64_t i, std::int64_t n) {
  if (bias) x = add(x, load_at(bias, i, n));
  if (t.softcap > 0.0f) x = mul(fill(t.softcap), hyperbolic_tangent(div(x, fill(t.softcap))));
  return x;
}

// The product of one row with one row of a weight, bit for bit as dot_weight has it.
template <typename T>
INLINE float dot_single(const T* x, const Weight& weight, std::int64_t column, std::int64_t n) {
  using C = Cells<T>;
  const T* row = static_cast<const T*>(weight.data) + column * weight.stride;
  const Cell<T>* panel =
      static_cast<const Cell<T>*>(weight.data) + column / kPanel * kPanel * cells_of<T>(n) + column % kPanel;
  F all = zero();
  for (std::int64_t begin = 0; begin < cells_of<T>(n); begin += C::kRun) {
    F total = zero();
    for (std::int64_t cell = begin; cell < least(cells_of<T>(n), begin + C::kRun); ++cell) {
      T pair[2] = {x[cell * C::kValues], T{}};
      if (cell * C::kValues + 1 < n) pair[1] = x[cell * C::kValues + 1];
      alignas(64) Cell<T> column[kLanes] = {};
      if (weight.stride)
        std::memcpy(column, row + cell * C::kValues, least(C::kValues, n - cell * C::kValues) * sizeof(T));
      else
        column[0] = panel[cell * kPanel];
      for (int step = 0; step < C::kSteps; ++step)
        total = C::add_product(C::widened(column, step), C::factor(pair, step), total);
    }
    all = begin ? add(all, total) : total;
  }
  alignas(64) float out[kLanes];
  store(out, all);
  return out[0];
}

template <typename T>
void target_of(const Head& t, std::int64_t row) {
  const std::int64_t v = t.target[row];
  const T* hidden = static_cast<const T*>(t.hidden) + row * t.stride_hidden;
  const T* bias = t.bias ? static_cast<const T*>(t.bias) + v : nullptr;
  const F x = fill(dot_single(hidden, t.weight, v, t.inputs));
  alignas(64) float z[kLanes];
  store(z, div(squashed(t, x, bias, 0, 1), fill(t.temperature)));
  t.chosen[row] = z[0];
}

void target_row(const Head& t, std::int64_t row) {
  switch (t.type) {
    case Type::kFloat: return target_of<float>(t, row);
    case Type::kBFloat16: return target_of<BFloat16>(t, row);
    case Type::kFloat16: return target_of<Float16>(t, row);
  }
}

// Running sums over a part of the vocabulary, for one row.
struct Running {
  F total, slope, square;
  Part part;
};

constexpr float kLowest = -3.4028234663852886e38f;
constexpr float kVanished = -1e3f;  // e^ it is 0; a shift far below would make 0 times infinity of a slope

INLINE void sum_up(Running& run, const float* z, std::int64_t columns) {
  unsigned rises = 0;
  for (std::int64_t c = 0; c < columns; c += kLanes) rises |= above(load(z + c), fill(run.part.peak));
  if (rises) {
    F peak = load(z);
    for (std::int64_t c = kLanes; c < columns; c += kLanes) peak = larger(peak, load(z + c));
    const float old = run.part.peak, now = largest(peak);
    if (old > -kInfinity) {
      const F shift = larger(fill(kVanished), fill(old - now)), factor = exponential(shift);
      run.slope = mul(factor, fma(run.total, shift, run.slope));
      run.total = mul(factor, run.total);
      run.square = mul(mul(factor, factor), run.square);
    }
    run.part.peak = now;
  }
  const F base = fill(run.part.peak > -kInfinity ? run.part.peak : 0.0f);
  for (std::int64_t c = 0; c < columns; c += kLanes) {
    const F d = larger(fill(kLowest), sub(load(z + c), base));  // 0 log 0 is 0; NaN is handed through
    const F e = exponential(d);
    run.total = add(run.total, e);
    run.slope = fma(e, d, run.slope);
    run.square = fma(e, e, run.square);
  }
}

INLINE void keep_top(const Head& t, std::int64_t at, const float* z, std::int64_t column, std::int64_t columns,
                     std::int64_t& held) {
  float* value = t.top_value + at * t.topk;
  std::int32_t* id = t.top_id + at * t.topk;
  for (std::int64_t c = 0; c < columns; ++c) {
    if (held == t.topk && !(z[c] > value[held - 1])) continue;
    std::int64_t i = held < t.topk ? held++ : held - 1;
    for (; i > 0 && z[c] > value[i - 1]; --i) value[i] = value[i - 1], id[i] = id[i - 1];
    value[i] = z[c];
    id[i] = static_cast<std::int32_t>(column + c);
  }
}

template <typename T>
void head_of(const Head& t, std::int64_t unit) {
  const std::int64_t parts = (t.vocabulary + kPartSize - 1) / kPartSize;
  const std::int64_t row_blocks = (t.rows + kRowBlock - 1) / kRowBlock;
  const std::int64_t part = unit / row_blocks, first = unit % row_blocks * kRowBlock;
  const std::int64_t rows = least(kRowBlock, t.rows - first);
  const std::int64_t end = least(t.vocabulary, (part + 1) * kPartSize);
  const T* hidden = static_cast<const T*>(t.hidden) + first * t.stride_hidden;
  const T* bias = static_cast<const T*>(t.bias);
  Running running[kRowBlock];
  std::int64_t held[kRowBlock];
  for (std::int64_t i = 0; i < rows; ++i) {
    running[i] = {zero(), zero(), zero(), {}};
    held[i] = 0;
  }
  Workspace<T>& memory = workspace<T>();
  const bool plain = !bias && t.softcap == 0.0f;
  for (std::int64_t column = part * kPartSize; column < end; column += kPanel) {
    const std::int64_t columns = least(kPanel, end - column);
    dot_weight(hidden, t.stride_hidden, rows, t.weight, column, columns, t.inputs, memory.cells, memory.out);
    for (std::int64_t i = 0; i < rows; ++i) {
      float* z = memory.out + i * kPanel;
      Running& run = running[i];
      for (std::int64_t c = 0; c < columns; c += kLanes) {
        F x = load(z + c);
        if (!plain) x = squashed(t, x, bias ? bias + column : nullptr, c, columns);
        if (t.target && t.temperature != 1.0f) x = div(x, fill(t.temperature));
        store(z + c, x);
      }
      for (std::int64_t c = columns; c < kPanel; ++c) z[c] = -kInfinity;
      sum_up(run, z, columns);
      if (t.target) {
        const F chosen = fill(t.chosen[first + i]);
        for (std::int64_t c = 0; c < columns; c += kLanes)
          run.part.above += __builtin_popcount(above(load(z + c), chosen));
        if (t.topk) keep_top(t, (first + i) * parts + part, z, column, columns, held[i]);
      }
      if (t.key && column < t.drawable)
        draw_from(z, t.key[first + i], column, least(columns, t.drawable - column), t.temperature, t.greedy,
                  run.part.best, run.part.token);
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    Part& out = t.parts[(first + i) * parts + part];
    out = running[i].part;
    out.total = sum(running[i].total);
    out.slope = sum(running[i].slope);
    out.square = sum(running[i].square);
    for (std::int64_t k = held[i]; k < t.topk; ++k) t.top_id[((first + i) * parts + part) * t.topk + k] = -1;
  }
}

void head_unit(const Head& t, std::int64_t unit) {
  switch (t.type) {
    case Type::kFloat: return head_of<float>(t, unit);
    case Type::kBFloat16: return head_of<BFloat16>(t, unit);
    case Type::kFloat16: return head_of<Float16>(t, unit);
  }
}

}  // namespace
