// The operators of a decoder layer except for attention.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include "operators.hpp"
#include "threads.hpp"

namespace genssd {

namespace {

NormWeight norm_weight(const void* data, std::optional<float> offset) {
  return {data, offset.has_value(), offset.value_or(0.0f)};
}

Gate gate_of(const Arguments& args, std::string_view name) {
  if (name == "silu") return Gate::kSilu;
  if (name == "gelu") return Gate::kGelu;
  if (name == "clamped") return Gate::kClamped;
  args.fail("there is no gate of the name " + std::string(name));
}

}  // namespace

void linear(Array x, Array weight, MaybeArray bias, Array out, int threads) {
  const Arguments args("linear");
  const Kernels& kernels = args.kernels();
  args.shape(x, "x", {-1, -1});
  const auto rows = size_of(x, 0), inputs = size_of(x, 1);
  args.shape(out, "out", {rows, -1});
  const auto outputs = size_of(out, 1);
  args.contiguous(x, "x", 1);
  args.contiguous(out, "out");
  const Weight matrix = args.weight(weight, outputs, inputs, x, "x");
  const bool float_out = out.dtype() == nb::dtype<float>();
  if (!float_out) args.same_dtype(out, "out, unless it is float32,", x, "x");
  threads = threads_for(rows * inputs * outputs / 8, threads);
  const LinearParams params{.dtype = args.float_dtype(x, "x"),
                            .float_out = float_out,
                            .x = x.data(),
                            .bias = args.vector(bias, "bias", outputs, x, "x"),
                            .weight = matrix,
                            .out = out.data(),
                            .rows = rows,
                            .inputs = inputs,
                            .outputs = outputs,
                            .x_stride = row_stride(x)};
  const nb::gil_scoped_release release;
  ThreadPool::run(ceil_div(outputs, kPanelWidth) * ceil_div(rows, kRowBlock), threads,
                  [&](std::int64_t task) { kernels.linear(params, task); });
}

void packed_rows(Array weight, std::int64_t rows, Array index, Array out) {
  const Arguments args("packed_rows");
  args.shape(out, "out", {-1, -1});
  args.contiguous(out, "out");
  const auto count = size_of(out, 0), width = size_of(out, 1);
  const Weight packed = args.weight(weight, rows, width, out, "out");
  args.require(packed.row_stride == 0, "weight must be packed");
  const std::int64_t* row_of = args.integers<std::int64_t>(index, "index", count);
  const auto values = size_of(weight, 3), size = static_cast<std::int64_t>(out.itemsize());
  const std::int64_t cells = ceil_div(width, values);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = row_of[i];
    args.require(0 <= row && row < rows, "index " + std::to_string(i) + " names a row outside the weight");
    const char* from = static_cast<const char*>(packed.data) +
                       (row / kPanelWidth * cells * kPanelWidth + row % kPanelWidth) * values * size;
    char* to = static_cast<char*>(out.data()) + i * width * size;
    for (std::int64_t cell = 0; cell < cells; ++cell)
      std::memcpy(to + cell * values * size, from + cell * kPanelWidth * values * size,
                  static_cast<std::size_t>(std::min(values, width - cell * values) * size));
  }
}

void rms_norm(Array x, MaybeArray residual, Array weight, float eps, std::optional<float> offset, Array out,
              MaybeArray sum, int threads) {
  const Arguments args("rms_norm");
  const Kernels& kernels = args.kernels();
  args.shape(x, "x", {-1, -1});
  args.contiguous(x, "x", 1);
  const auto rows = size_of(x, 0), width = size_of(x, 1);
  args.require(residual.has_value() == sum.has_value(), "residual and sum come together");
  const auto data_like_x = [&](const Array& a, const char* name) {
    args.shape(a, name, {rows, width});
    args.same_dtype(a, name, x, "x");
    args.contiguous(a, name);
    return a.data();
  };
  const RmsNormParams params{.dtype = args.float_dtype(x, "x"),
                             .x = x.data(),
                             .residual = residual ? data_like_x(*residual, "residual") : nullptr,
                             .weight = norm_weight(args.vector(weight, "weight", width, x, "x"), offset),
                             .out = data_like_x(out, "out"),
                             .sum = sum ? data_like_x(*sum, "sum") : nullptr,
                             .rows = rows,
                             .width = width,
                             .x_stride = row_stride(x),
                             .eps = eps};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(rows * width, threads), [&](std::int64_t row) { kernels.rms_norm(params, row); });
}

void gated(Array gate_up, const char* gate, float alpha, float limit, Array out, int threads) {
  const Arguments args("gated");
  const Kernels& kernels = args.kernels();
  args.shape(out, "out", {-1, -1});
  const auto rows = size_of(out, 0), width = size_of(out, 1);
  args.shape(gate_up, "gate_up", {rows, 2 * width});
  args.same_dtype(out, "out", gate_up, "gate_up");
  args.contiguous(gate_up, "gate_up");
  args.contiguous(out, "out");
  const GatedParams params{.dtype = args.float_dtype(out, "out"),
                           .gate_up = gate_up.data(),
                           .out = out.data(),
                           .rows = rows,
                           .width = width,
                           .gate = gate_of(args, gate),
                           .alpha = alpha,
                           .limit = limit};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(8 * rows * width, threads), [&](std::int64_t row) { kernels.gated(params, row); });
}

void weighted_sum(Array values, Array index, Array weight, Array out, int threads) {
  const Arguments args("weighted_sum");
  const Kernels& kernels = args.kernels();
  args.shape(values, "values", {-1, -1});
  args.shape(index, "index", {-1, -1});
  const auto entries = size_of(values, 0), width = size_of(values, 1), rows = size_of(index, 0),
             terms = size_of(index, 1);
  args.dtype<std::int64_t>(index, "index", "int64");
  args.shape(weight, "weight", {rows, terms});
  args.shape(out, "out", {rows, width});
  args.same_dtype(weight, "weight", values, "values");
  args.same_dtype(out, "out", values, "values");
  for (const auto& [a, name] : {std::pair{&values, "values"}, {&index, "index"}, {&weight, "weight"}, {&out, "out"}})
    args.contiguous(*a, name);
  const WeightedSumParams params{.dtype = args.float_dtype(values, "values"),
                                 .values = values.data(),
                                 .weight = weight.data(),
                                 .index = static_cast<const std::int64_t*>(index.data()),
                                 .out = out.data(),
                                 .rows = rows,
                                 .terms = terms,
                                 .width = width};
  for (std::int64_t i = 0; i < rows * terms; ++i)
    args.require(0 <= params.index[i] && params.index[i] < entries,
                 "index of row " + std::to_string(i / terms) + " lies outside the values");
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(rows * terms * width, threads),
                  [&](std::int64_t row) { kernels.weighted_sum(params, row); });
}

// Has the same bits on every processor, because it calls the functions of the C library. A torch operator in its place
// would leave torch's threads spinning on the cores.
void rotary_angles(Array position, Array frequency, float factor, Array cos, Array sin, int threads) {
  const Arguments args("rotary_angles");
  args.shape(frequency, "frequency", {-1});
  args.shape(position, "position", {-1});
  const auto rows = size_of(position, 0), half = size_of(frequency, 0);
  const std::int32_t* positions = args.integers<std::int32_t>(position, "position", rows);
  const float* frequencies = args.floats(frequency, "frequency", {half});
  float *out_cos = args.floats(cos, "cos", {rows, half}), *out_sin = args.floats(sin, "sin", {rows, half});
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(64 * rows * half, threads), [&](std::int64_t row) {
    for (std::int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(positions[row]) * frequencies[i];
      out_cos[row * half + i] = std::cos(angle) * factor;
      out_sin[row * half + i] = std::sin(angle) * factor;
    }
  });
}

void write_kv(Array qkv, Array cos, Array sin, Array k_pages, Array v_pages, Array slot, MaybeArray q_norm,
              MaybeArray k_norm, float eps, std::optional<float> norm_offset, Array q, int threads) {
  const Arguments args("write_kv");
  const Kernels& kernels = args.kernels();
  args.shape(q, "q", {-1, -1, -1});
  args.shape(v_pages, "v_pages", {-1, -1, -1, -1});
  args.shape(cos, "cos", {-1, -1});
  const auto rows = size_of(q, 0), heads = size_of(q, 1), head_dim = size_of(q, 2), kv_heads = size_of(v_pages, 2),
             half = size_of(cos, 1), num_slots = static_cast<std::int64_t>(v_pages.shape(0) * v_pages.shape(1));
  args.require(head_dim > 0 && head_dim % 2 == 0 && head_dim <= kMaxHeadDim,
               "heads must have an even width of at most 1024");
  args.require(0 < half && 2 * half <= head_dim, "cos must have 1 to head_dim / 2 columns");
  args.shape(qkv, "qkv", {rows, heads + 2 * kv_heads, head_dim});
  args.shape(v_pages, "v_pages", {-1, -1, kv_heads, head_dim});
  args.keys(k_pages, "k_pages", v_pages);
  for (const auto& [a, name] : {std::pair{&q, "q"}, {&qkv, "qkv"}, {&k_pages, "k_pages"}, {&v_pages, "v_pages"}}) {
    args.contiguous(*a, name);
    args.same_dtype(*a, name, qkv, "qkv");
  }
  threads = threads_for(4 * rows * (heads + 2 * kv_heads) * head_dim, threads);
  const WriteKvParams params{.dtype = args.float_dtype(q, "q"),
                             .qkv = qkv.data(),
                             .cos = args.floats(cos, "cos", {rows, half}),
                             .sin = args.floats(sin, "sin", {rows, half}),
                             .q_norm = norm_weight(args.vector(q_norm, "q_norm", head_dim, q, "q"), norm_offset),
                             .k_norm = norm_weight(args.vector(k_norm, "k_norm", head_dim, q, "q"), norm_offset),
                             .slot = args.integers<std::int64_t>(slot, "slot", rows),
                             .q = q.data(),
                             .k_pages = k_pages.data(),
                             .v_pages = v_pages.data(),
                             .rows = rows,
                             .rows_of_task = std::clamp<std::int64_t>(rows / (4 * threads), 1, 16),
                             .page_size = size_of(v_pages, 1),
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = head_dim,
                             .half = half,
                             .eps = eps};
  for (std::int64_t row = 0; row < rows; ++row)
    args.require(params.slot[row] < num_slots, "the slot of row " + std::to_string(row) + " lies outside the cache");
  const nb::gil_scoped_release release;
  ThreadPool::run(ceil_div(rows, params.rows_of_task), threads,
                  [&](std::int64_t task) { kernels.write_kv(params, task); });
}

void copy_pages(Array kv, Array source, Array destination, int threads) {
  const Arguments args("copy_pages");
  args.shape(kv, "kv", {-1, 2, -1, -1, -1, -1});
  args.contiguous(kv, "kv");
  args.require(source.ndim() == 1, "source must have one axis");
  const auto count = size_of(source, 0), pages = size_of(kv, 2);
  const std::int64_t* from = args.integers<std::int64_t>(source, "source", count);
  const std::int64_t* to = args.integers<std::int64_t>(destination, "destination", count);
  for (std::int64_t i = 0; i < count; ++i)
    args.require(0 <= from[i] && from[i] < pages && 0 <= to[i] && to[i] < pages,
                 "copy " + std::to_string(i) + " names a page outside the pool");
  const std::size_t bytes = kv.shape(3) * kv.shape(4) * kv.shape(5) * kv.itemsize();
  auto* data = static_cast<char*>(kv.data());
  const auto halves = static_cast<std::int64_t>(2 * kv.shape(0));  // keys and values of every layer
  const nb::gil_scoped_release release;
  ThreadPool::run(
      halves, threads_for(halves * count * static_cast<std::int64_t>(bytes), threads), [&](std::int64_t half) {
        for (std::int64_t i = 0; i < count; ++i)
          std::memmove(data + (half * pages + to[i]) * bytes, data + (half * pages + from[i]) * bytes, bytes);
      });
}

}  // namespace genssd
