// Matrix products, and the pass over a head that never keeps its logits. Only for isa_*.cpp.
#pragma once

#include "dot.hpp"
#include "draw.hpp"
#include "kernels.hpp"

namespace {

using namespace genssd;

// With few rows the weight comes from memory: every four of its rows meet all of x before the next four do. With many
// rows a block of the weight stays in the cache, and a register tile of x meets all of it before the next does. What lies
// some way ahead is fetched meanwhile.
constexpr std::int64_t kFewRows = 48;
constexpr std::int64_t kAheadBytes = 48 << 10;

INLINE std::int64_t rows_together(std::int64_t rows) { return rows <= kFewRows ? rows : kTileRows; }

// tile[i][c] = row a_i with row b + c, for columns c in 0..columns - 1 (a few more are computed and mean nothing).
// rest: the columns from b on that the caller will want, these among them.
template <typename T>
INLINE void dot_block(const T* a, std::int64_t stride_a, std::int64_t rows, const T* b, std::int64_t stride_b,
                      std::int64_t columns, std::int64_t rest, std::int64_t n, float* tile) {
  const std::int64_t bytes = most(1, stride_b) * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t distance = most(4, kAheadBytes / bytes / 4 * 4);
  for (std::int64_t c = 0; c < columns; c += 4) {
    const T* four[4];
    for (std::int64_t j = 0; j < 4; ++j) four[j] = b + least(c + j, columns - 1) * stride_b;
    // every register tile fetches its share of the four rows
    const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows, wanted = c + distance + 4 <= rest ? 4 : 0;
    for (std::int64_t tile_of = 0, next = 0; tile_of < tiles; ++tile_of) {
      Fetch fetch;
      for (const std::int64_t end = wanted * (tile_of + 1) / tiles; next < end; ++next)
        fetch.rows[fetch.count++] = reinterpret_cast<const char*>(b + (c + distance + next) * stride_b);
      const std::int64_t i = tile_of * kTileRows;
      dot_rows(a + i * stride_a, stride_a, least(kTileRows, rows - i), four, n, fetch, tile + i * kColumnBlock + c,
               kColumnBlock);
    }
  }
}

template <typename T, typename Out>
void linear_of(const Linear& t, std::int64_t unit) {
  const std::int64_t row_blocks = (t.rows + kRowBlock - 1) / kRowBlock, first = unit % row_blocks * kRowBlock;
  const std::int64_t rows = least(kRowBlock, t.rows - first), begin = unit / row_blocks * t.unit_columns;
  const std::int64_t end = least(t.outputs, begin + t.unit_columns);
  const T* x = static_cast<const T*>(t.x) + first * t.stride_x;
  const T* bias = static_cast<const T*>(t.bias);
  alignas(64) float tile[kFewRows * kColumnBlock];
  for (std::int64_t column = begin; column < end; column += kColumnBlock) {
    const std::int64_t columns = least(kColumnBlock, end - column);
    const T* weight = static_cast<const T*>(t.weight) + column * t.stride_weight;
    for (std::int64_t row = 0; row < rows; row += rows_together(rows)) {
      const std::int64_t some = least(rows_together(rows), rows - row);
      dot_block(x + row * t.stride_x, t.stride_x, some, weight, t.stride_weight, columns, end - column, t.inputs, tile);
      for (std::int64_t i = 0; i < some; ++i) {
        Out* out = static_cast<Out*>(t.out) + (first + row + i) * t.outputs + column;
        for (std::int64_t c = 0; c < columns; c += kLanes) {
          F y = load(tile + i * kColumnBlock + c);
          if (bias) y = add(y, load_at(bias + column, c, columns));
          store_at(out, y, c, columns);
        }
      }
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

template <typename T>
void target_of(const Head& t, std::int64_t row) {
  const std::int64_t v = t.target[row];
  const T* hidden = static_cast<const T*>(t.hidden) + row * t.stride_hidden;
  const T* weight = static_cast<const T*>(t.weight) + v * t.stride_weight;
  const T* four[4] = {weight, weight, weight, weight};
  alignas(64) float x[4];
  dot_tile<1>(hidden, t.stride_hidden, four, t.inputs, {}, x, 4);
  const T* bias = t.bias ? static_cast<const T*>(t.bias) + v : nullptr;
  alignas(64) float z[kLanes];
  store(z, div(squashed(t, fill(x[0]), bias, 0, 1), fill(t.temperature)));
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
  alignas(64) float tile[kFewRows * kColumnBlock];
  for (std::int64_t column = part * kPartSize; column < end; column += kColumnBlock) {
    const std::int64_t columns = least(kColumnBlock, end - column);
    const T* weight = static_cast<const T*>(t.weight) + column * t.stride_weight;
    for (std::int64_t row = 0; row < rows; row += rows_together(rows)) {
      const std::int64_t some = least(rows_together(rows), rows - row);
      dot_block(hidden + row * t.stride_hidden, t.stride_hidden, some, weight, t.stride_weight, columns, end - column,
                t.inputs, tile);
      for (std::int64_t i = 0; i < some; ++i) {
        float* z = tile + i * kColumnBlock;
        Running& run = running[row + i];
        const bool plain = !bias && t.softcap == 0.0f;
        for (std::int64_t c = 0; c < columns; c += kLanes) {
          F x = load(z + c);
          if (!plain) x = squashed(t, x, bias ? bias + column : nullptr, c, columns);
          if (t.target && t.temperature != 1.0f) x = div(x, fill(t.temperature));
          store(z + c, x);
        }
        for (std::int64_t c = columns; c < kColumnBlock; ++c) z[c] = -kInfinity;
        sum_up(run, z, columns);
        if (t.target) {
          const F chosen = fill(t.chosen[first + row + i]);
          for (std::int64_t c = 0; c < columns; c += kLanes)
            run.part.above += __builtin_popcount(above(load(z + c), chosen));
          if (t.topk) keep_top(t, (first + row + i) * parts + part, z, column, columns, held[row + i]);
        }
        if (t.key && column < t.drawable)
          draw_from(z, t.key[first + row + i], column, least(columns, t.drawable - column), t.temperature, t.greedy,
                    run.part.best, run.part.token);
      }
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
