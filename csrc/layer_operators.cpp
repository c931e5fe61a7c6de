// The parts of a layer beside attention.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "operators.hpp"
#include "threads.hpp"

namespace genssd {

void linear(Array x, Array weight, MaybeArray bias, Array out, int threads) {
  const Arguments args("linear");
  const Kernels& kernels = args.kernels();
  args.shape(x, "x", {-1, -1});
  const auto rows = static_cast<std::int64_t>(x.shape(0)), inputs = static_cast<std::int64_t>(x.shape(1));
  args.shape(out, "out", {rows, -1});
  const auto outputs = static_cast<std::int64_t>(out.shape(1));
  args.contiguous(x, "x", 1);
  args.contiguous(out, "out");
  const Weight matrix = args.weight(weight, outputs, inputs, x, "x");
  const bool wide = out.dtype() == nb::dtype<float>();
  if (!wide) args.same_type(out, "out, unless it is float32,", x, "x");
  threads = threads_for(rows * inputs * outputs / 8, threads);
  const Linear task{args.type(x, "x"),
                    wide,
                    x.data(),
                    args.vector(bias, "bias", outputs, x, "x"),
                    matrix,
                    out.data(),
                    rows,
                    inputs,
                    outputs,
                    stride0(x)};
  const nb::gil_scoped_release release;
  ThreadPool::run(blocks(outputs, kPanel) * blocks(rows, kRowBlock), threads,
                  [&](std::int64_t unit) { kernels.linear(task, unit); });
}

// Rows of a packed weight, as they were.
void packed_rows(Array weight, std::int64_t rows, Array index, Array out) {
  const Arguments args("packed_rows");
  args.shape(out, "out", {-1, -1});
  args.contiguous(out, "out");
  const auto count = static_cast<std::int64_t>(out.shape(0)), width = static_cast<std::int64_t>(out.shape(1));
  const Weight packed = args.weight(weight, rows, width, out, "out");
  args.require(packed.stride == 0, "weight must be packed");
  const std::int64_t* wanted = args.indices<std::int64_t>(index, "index", count);
  const auto values = static_cast<std::int64_t>(weight.shape(3)), size = static_cast<std::int64_t>(out.itemsize());
  const std::int64_t cells = blocks(width, values);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = wanted[i];
    args.require(0 <= row && row < rows, "index " + std::to_string(i) + " names a row outside the weight");
    const char* from =
        static_cast<const char*>(packed.data) + (row / kPanel * cells * kPanel + row % kPanel) * values * size;
    char* to = static_cast<char*>(out.data()) + i * width * size;
    for (std::int64_t cell = 0; cell < cells; ++cell)
      std::memcpy(to + cell * values * size, from + cell * kPanel * values * size,
                  static_cast<std::size_t>(std::min(values, width - cell * values) * size));
  }
}

void rms_norm(Array x, MaybeArray residual, Array weight, float eps, Array out, MaybeArray sum, int threads) {
  const Arguments args("rms_norm");
  const Kernels& kernels = args.kernels();
  args.shape(x, "x", {-1, -1});
  args.contiguous(x, "x", 1);
  const auto rows = static_cast<std::int64_t>(x.shape(0)), width = static_cast<std::int64_t>(x.shape(1));
  args.require(residual.has_value() == sum.has_value(), "residual and sum come together");
  const auto like_x = [&](const Array& a, const char* name) {
    args.shape(a, name, {rows, width});
    args.same_type(a, name, x, "x");
    args.contiguous(a, name);
    return a.data();
  };
  const RmsNorm task{args.type(x, "x"),
                     x.data(),
                     residual ? like_x(*residual, "residual") : nullptr,
                     args.vector(weight, "weight", width, x, "x"),
                     like_x(out, "out"),
                     sum ? like_x(*sum, "sum") : nullptr,
                     rows,
                     width,
                     stride0(x),
                     eps};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(rows * width, threads), [&](std::int64_t row) { kernels.rms_norm(task, row); });
}

void gated(Array gate_up, bool gelu, Array out, int threads) {
  const Arguments args("gated");
  const Kernels& kernels = args.kernels();
  args.shape(out, "out", {-1, -1});
  const auto rows = static_cast<std::int64_t>(out.shape(0)), width = static_cast<std::int64_t>(out.shape(1));
  args.shape(gate_up, "gate_up", {rows, 2 * width});
  args.same_type(out, "out", gate_up, "gate_up");
  args.contiguous(gate_up, "gate_up");
  args.contiguous(out, "out");
  const Gated task{args.type(out, "out"), gate_up.data(), out.data(), rows, width, gelu};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(8 * rows * width, threads), [&](std::int64_t row) { kernels.gated(task, row); });
}

// The same on every processor: the C library's functions, and no torch operator, whose threads would keep the cores
// busy after it.
void rotary_angles(Array position, Array frequency, float factor, Array cos, Array sin, int threads) {
  const Arguments args("rotary_angles");
  args.shape(frequency, "frequency", {-1});
  args.shape(position, "position", {-1});
  const auto rows = static_cast<std::int64_t>(position.shape(0)), half = static_cast<std::int64_t>(frequency.shape(0));
  const std::int32_t* at = args.indices<std::int32_t>(position, "position", rows);
  const float* turn = args.floats(frequency, "frequency", {half});
  float *out_cos = args.floats(cos, "cos", {rows, half}), *out_sin = args.floats(sin, "sin", {rows, half});
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(64 * rows * half, threads), [&](std::int64_t row) {
    for (std::int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(at[row]) * turn[i];
      out_cos[row * half + i] = std::cos(angle) * factor;
      out_sin[row * half + i] = std::sin(angle) * factor;
    }
  });
}

void write_kv(Array qkv, Array cos, Array sin, Array k_pages, Array v_pages, Array slot, MaybeArray q_norm,
              MaybeArray k_norm, float eps, Array q, int threads) {
  const Arguments args("write_kv");
  const Kernels& kernels = args.kernels();
  args.shape(q, "q", {-1, -1, -1});
  args.shape(k_pages, "k_pages", {-1, -1, -1, -1});
  const auto rows = static_cast<std::int64_t>(q.shape(0)), heads = static_cast<std::int64_t>(q.shape(1)),
             width = static_cast<std::int64_t>(q.shape(2)), kv_heads = static_cast<std::int64_t>(k_pages.shape(2)),
             slots = static_cast<std::int64_t>(k_pages.shape(0) * k_pages.shape(1));
  args.require(width > 0 && width % 2 == 0 && width <= 1024, "heads must have an even width of at most 1024");
  args.shape(qkv, "qkv", {rows, heads + 2 * kv_heads, width});
  args.shape(k_pages, "k_pages", {-1, -1, kv_heads, width});
  args.shape(
      v_pages, "v_pages",
      {static_cast<std::int64_t>(k_pages.shape(0)), static_cast<std::int64_t>(k_pages.shape(1)), kv_heads, width});
  for (const auto& [a, name] : {std::pair{&q, "q"}, {&qkv, "qkv"}, {&k_pages, "k_pages"}, {&v_pages, "v_pages"}}) {
    args.contiguous(*a, name);
    args.same_type(*a, name, qkv, "qkv");
  }
  const WriteKv task{args.type(q, "q"),
                     qkv.data(),
                     args.floats(cos, "cos", {rows, width / 2}),
                     args.floats(sin, "sin", {rows, width / 2}),
                     args.vector(q_norm, "q_norm", width, q, "q"),
                     args.vector(k_norm, "k_norm", width, q, "q"),
                     args.indices<std::int64_t>(slot, "slot", rows),
                     q.data(),
                     k_pages.data(),
                     v_pages.data(),
                     rows,
                     heads,
                     kv_heads,
                     width,
                     eps};
  for (std::int64_t row = 0; row < rows; ++row)
    args.require(task.slot[row] < slots, "the slot of row " + std::to_string(row) + " lies outside the cache");
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(4 * rows * (heads + 2 * kv_heads) * width, threads),
                  [&](std::int64_t row) { kernels.write_kv(task, row); });
}

void copy_pages(Array kv, Array source, Array destination, int threads) {
  const Arguments args("copy_pages");
  args.shape(kv, "kv", {-1, 2, -1, -1, -1, -1});
  args.contiguous(kv, "kv");
  args.require(source.ndim() == 1, "source must have one axis");
  const auto count = static_cast<std::int64_t>(source.shape(0)), pages = static_cast<std::int64_t>(kv.shape(2));
  const std::int64_t* from = args.indices<std::int64_t>(source, "source", count);
  const std::int64_t* to = args.indices<std::int64_t>(destination, "destination", count);
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
