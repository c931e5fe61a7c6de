// Python bindings of the native CPU kernels. Tensors cross as DLPack; nothing of torch is linked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "segments.hpp"
#include "tensors.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace genssd;

namespace {

constexpr std::int64_t kSmall = 1 << 17;  // operations that take less time than waking a thread

int threads_for(std::int64_t operations, int threads) { return operations < kSmall ? 1 : threads; }

std::int64_t blocks(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

void gumbel_noise(Array keys, Array out, int threads) {
  const Arguments args("gumbel_noise");
  const Kernels& kernels = args.kernels();
  const std::int64_t rows = keys.ndim() ? static_cast<std::int64_t>(keys.shape(0)) : -1;
  const std::int64_t* key = args.indices<std::int64_t>(keys, "keys", rows);
  float* noise = args.floats(out, "out", {rows, -1});
  const auto width = static_cast<std::int64_t>(out.shape(1));
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(16 * rows * width, threads),
                  [&](std::int64_t row) { kernels.gumbel(key[row], noise + row * width, width); });
}

void linear(Array x, Array weight, MaybeArray bias, Array out, int threads) {
  const Arguments args("linear");
  const Kernels& kernels = args.kernels();
  args.shape(x, "x", {-1, -1});
  const auto rows = static_cast<std::int64_t>(x.shape(0)), inputs = static_cast<std::int64_t>(x.shape(1));
  args.shape(weight, "weight", {-1, inputs});
  const auto outputs = static_cast<std::int64_t>(weight.shape(0));
  args.shape(out, "out", {rows, outputs});
  args.same_type(weight, "weight", x, "x");
  args.contiguous(x, "x", 1);
  args.contiguous(weight, "weight", 1);
  args.contiguous(out, "out");
  const bool wide = out.dtype() == nb::dtype<float>();
  if (!wide) args.same_type(out, "out, unless it is float32,", x, "x");
  threads = threads_for(rows * inputs * outputs / 8, threads);
  // long runs of columns for each thread, but enough of them that no thread waits long for the last one
  const std::int64_t run = blocks(outputs, kColumnBlock) / (8 * std::max(threads, 1));
  const std::int64_t unit_columns = kColumnBlock * std::clamp<std::int64_t>(run, 1, 8);
  const Linear task{args.type(x, "x"), wide,    x.data(), weight.data(), args.vector(bias, "bias", outputs, x, "x"),
                    out.data(),        rows,    inputs,   outputs,       stride0(x),
                    stride0(weight),   unit_columns};
  const nb::gil_scoped_release release;
  ThreadPool::run(blocks(outputs, unit_columns) * blocks(rows, kRowBlock), threads,
                  [&](std::int64_t unit) { kernels.linear(task, unit); });
}

// What scoring and drawing have in common.
Head head_of(const Arguments& args, const Array& hidden, const Array& weight, const MaybeArray& bias,
             float temperature, float softcap) {
  args.shape(hidden, "hidden", {-1, -1});
  const auto rows = static_cast<std::int64_t>(hidden.shape(0)), inputs = static_cast<std::int64_t>(hidden.shape(1));
  args.shape(weight, "weight", {-1, inputs});
  const auto vocabulary = static_cast<std::int64_t>(weight.shape(0));
  args.require(vocabulary > 0 && vocabulary < (std::int64_t{1} << 31), "weight must have between 1 and 2^31 rows");
  args.require(softcap >= 0.0f && temperature >= 0.0f, "temperature and softcap must not be negative");
  args.same_type(weight, "weight", hidden, "hidden");
  args.contiguous(hidden, "hidden", 1);
  args.contiguous(weight, "weight", 1);
  Head head{};
  head.type = args.type(hidden, "hidden");
  head.hidden = hidden.data();
  head.weight = weight.data();
  head.bias = args.vector(bias, "bias", vocabulary, hidden, "hidden");
  head.rows = rows;
  head.inputs = inputs;
  head.vocabulary = vocabulary;
  head.stride_hidden = stride0(hidden);
  head.stride_weight = stride0(weight);
  head.temperature = temperature;
  head.softcap = softcap;
  return head;
}

void walk(const Kernels& kernels, const Head& head, int threads) {
  ThreadPool::run(blocks(head.vocabulary, kPartSize) * blocks(head.rows, kRowBlock),
                  threads_for(head.rows * head.inputs * head.vocabulary / 8, threads),
                  [&](std::int64_t unit) { kernels.head(head, unit); });
}

// A row's parts, added up. In double: beside a peak of almost 1, part after part would round a tail away.
struct Sums {
  double peak = -INFINITY, total = 0, slope = 0, square = 0;
  std::int64_t above = 0;
  float best = -INFINITY;
  std::int64_t token = -1;
};

// In the order of the vocabulary.
Sums merged(const Part* parts, std::int64_t count) {
  Sums all;
  for (const Part* part = parts; part != parts + count; ++part) {
    all.above += part->above;
    if (part->best > all.best) {
      all.best = part->best;
      all.token = part->token;
    }
    if (part->total == 0.0f) continue;  // all of it is banned
    const double peak = std::max<double>(all.peak, part->peak);
    const double a = all.total == 0.0 ? 0.0 : std::exp(all.peak - peak), b = std::exp(part->peak - peak);
    const double shift_a = all.total == 0.0 ? 0.0 : all.total * (all.peak - peak);
    all.slope = a * (all.slope + shift_a) + b * (part->slope + part->total * (part->peak - peak));
    all.total = a * all.total + b * part->total;
    all.square = a * a * all.square + b * b * part->square;
    all.peak = peak;
  }
  return all;
}

void linear_logprob(Array hidden, Array weight, Array target, MaybeArray bias, float temperature, float softcap,
                    Array stats, Array rank, Array top_ids, Array top_logprob, int threads) {
  const Arguments args("linear_logprob");
  const Kernels& kernels = args.kernels();
  Head head = head_of(args, hidden, weight, bias, temperature, softcap);
  args.require(temperature > 0.0f, "temperature must be positive");
  head.target = args.indices<std::int64_t>(target, "target", head.rows);
  float* out = args.floats(stats, "stats", {4, head.rows});
  std::int32_t* ranks = args.indices<std::int32_t>(rank, "rank", head.rows);
  args.shape(top_ids, "top_ids", {head.rows, -1});
  head.topk = static_cast<std::int64_t>(top_ids.shape(1));
  args.require(head.topk <= head.vocabulary, "top_ids has more columns than the vocabulary has entries");
  args.dtype<std::int64_t>(top_ids, "top_ids", "int64");
  args.contiguous(top_ids, "top_ids");
  auto* ids = static_cast<std::int64_t*>(top_ids.data());
  float* logprobs = args.floats(top_logprob, "top_logprob", {head.rows, head.topk});
  for (std::int64_t row = 0; row < head.rows; ++row)
    args.require(0 <= head.target[row] && head.target[row] < head.vocabulary,
                 "the target of row " + std::to_string(row) + " lies outside the vocabulary");
  const nb::gil_scoped_release release;
  const std::int64_t count = blocks(head.vocabulary, kPartSize), k = head.topk;
  std::vector<float> chosen(head.rows), top_value(head.rows * count * k);
  std::vector<std::int32_t> top_id(head.rows * count * k);
  std::vector<Part> parts(head.rows * count);
  head.chosen = chosen.data();
  head.top_value = top_value.data();
  head.top_id = top_id.data();
  head.parts = parts.data();
  ThreadPool::run(head.rows, threads_for(head.rows * head.inputs, threads),
                  [&](std::int64_t row) { kernels.target(head, row); });
  walk(kernels, head, threads);
  ThreadPool::run(head.rows, threads_for(head.rows * count * (8 + 4 * k), threads), [&](std::int64_t row) {
    const Sums all = merged(parts.data() + row * count, count);
    const double log_total = std::log(all.total);
    out[row] = static_cast<float>(chosen[row] - all.peak - log_total);
    out[head.rows + row] = static_cast<float>(all.peak + log_total);
    out[2 * head.rows + row] = static_cast<float>(log_total - all.slope / all.total);
    out[3 * head.rows + row] = static_cast<float>(all.square / (all.total * all.total));
    ranks[row] = static_cast<std::int32_t>(all.above) + 1;
    // the largest first; of equal ones the lower id, which comes first in its part and in an earlier part
    std::vector<std::int64_t> next(count, 0);
    for (std::int64_t place = 0; place < k; ++place) {
      std::int64_t best = -1;
      for (std::int64_t part = 0; part < count; ++part) {
        const std::int64_t at = (row * count + part) * k + next[part];
        if (next[part] < k && top_id[at] >= 0 && (best < 0 || top_value[at] > top_value[best])) best = at;
      }
      ids[row * k + place] = best < 0 ? 0 : top_id[best];
      logprobs[row * k + place] = best < 0 ? NAN : static_cast<float>(top_value[best] - all.peak - log_total);
      if (best >= 0) ++next[best / k % count];
    }
  });
}

void linear_sample(Array hidden, Array weight, Array key, MaybeArray bias, float temperature, float softcap,
                   std::int64_t vocabulary, Array tokens, Array logprob, int threads) {
  const Arguments args("linear_sample");
  const Kernels& kernels = args.kernels();
  Head head = head_of(args, hidden, weight, bias, temperature, softcap);
  head.key = args.indices<std::int64_t>(key, "key", head.rows);
  auto* token = args.indices<std::int64_t>(tokens, "tokens", head.rows);
  float* out = args.floats(logprob, "logprob", {head.rows});
  args.require(0 < vocabulary && vocabulary <= head.vocabulary, "vocabulary must lie within the head");
  head.drawable = vocabulary;
  head.greedy = temperature == 0.0f;
  const nb::gil_scoped_release release;
  const std::int64_t count = blocks(head.vocabulary, kPartSize);
  std::vector<Part> parts(head.rows * count);
  std::vector<float> chosen(head.rows);
  head.parts = parts.data();
  walk(kernels, head, threads);
  std::vector<float> logsumexp(head.rows);
  for (std::int64_t row = 0; row < head.rows; ++row) {
    const Sums all = merged(parts.data() + row * count, count);
    logsumexp[row] = static_cast<float>(all.peak + std::log(all.total));
    token[row] = std::isfinite(logsumexp[row]) ? all.token : -1;
  }
  // the drawn token's own logit once more: one row of the head
  Head again = head;
  again.target = token;
  again.chosen = chosen.data();
  again.temperature = 1.0f;
  for (std::int64_t row = 0; row < head.rows; ++row) {
    if (token[row] >= 0) kernels.target(again, row);
    out[row] = token[row] >= 0 ? chosen[row] - logsumexp[row] : NAN;
  }
}

void sample(Array logits, Array key, float temperature, std::int64_t top_k, float top_p, float log_min_p, Array tokens,
            int threads) {
  const Arguments args("sample");
  const Kernels& kernels = args.kernels();
  args.dtype<float>(logits, "logits", "float32");
  args.shape(logits, "logits", {-1, -1});
  args.contiguous(logits, "logits", 1);
  const auto rows = static_cast<std::int64_t>(logits.shape(0)), vocabulary = static_cast<std::int64_t>(logits.shape(1));
  args.require(vocabulary > 0, "logits must have a column");
  const Sample task{static_cast<const float*>(logits.data()),
                    args.indices<std::int64_t>(key, "key", rows),
                    args.indices<std::int64_t>(tokens, "tokens", rows),
                    rows,
                    vocabulary,
                    stride0(logits),
                    top_k,
                    temperature,
                    top_p,
                    log_min_p};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(16 * rows * vocabulary, threads),
                  [&](std::int64_t row) { kernels.sample(task, row); });
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

// The same on every processor: the C library's functions, and no torch operator, whose threads would keep the cores busy
// after it.
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
  args.shape(v_pages, "v_pages", {static_cast<std::int64_t>(k_pages.shape(0)),
                                  static_cast<std::int64_t>(k_pages.shape(1)), kv_heads, width});
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
  ThreadPool::run(halves, threads_for(halves * count * static_cast<std::int64_t>(bytes), threads),
                  [&](std::int64_t half) {
                    for (std::int64_t i = 0; i < count; ++i)
                      std::memmove(data + (half * pages + to[i]) * bytes, data + (half * pages + from[i]) * bytes, bytes);
                  });
}

void paged_attention(Array q, Array k_pages, Array v_pages, const SegmentTable& table, Array out, float scale,
                     float softcap, std::optional<Array> sinks, int threads) {
  const Arguments args("paged_attention");
  const Kernels& kernels = args.kernels();
  args.shape(q, "q", {table.num_rows(), -1, -1});
  const auto heads = static_cast<std::int64_t>(q.shape(1)), width = static_cast<std::int64_t>(q.shape(2));
  args.shape(k_pages, "k_pages", {-1, table.page_size, -1, width});
  const auto pages = static_cast<std::int64_t>(k_pages.shape(0)), kv_heads = static_cast<std::int64_t>(k_pages.shape(2));
  args.shape(v_pages, "v_pages", {pages, table.page_size, kv_heads, width});
  args.shape(out, "out", {table.num_rows(), heads, width});
  args.require(kv_heads > 0 && heads % kv_heads == 0,
               "the number of query heads must be a multiple of the number of kv heads");
  for (const auto& [a, name] : {std::pair{&q, "q"}, {&k_pages, "k_pages"}, {&v_pages, "v_pages"}, {&out, "out"}}) {
    args.contiguous(*a, name);
    args.same_type(*a, name, q, "q");
  }
  args.require(table.largest_page < pages, "the table names a page outside the pool");
  args.require(table.segment <= 1024, "a segment may have at most 1024 tokens");
  args.require(softcap >= 0.0f, "softcap must not be negative");
  Attention task{args.type(q, "q"),
                 q.data(),
                 k_pages.data(),
                 v_pages.data(),
                 out.data(),
                 sinks ? args.floats(*sinks, "sinks", {heads}) : nullptr,
                 table.items.data(),
                 table.entries.data(),
                 table.pages.data(),
                 table.position.data(),
                 table.row_partial.data(),
                 table.unit_item.data(),
                 table.page_size,
                 table.segment,
                 table.window,
                 table.unit_rows,
                 heads,
                 kv_heads,
                 width,
                 scale,
                 softcap,
                 nullptr};
  const nb::gil_scoped_release release;
  std::int64_t work = 0;
  for (const Item& item : table.items) work += std::int64_t{item.tokens} * item.entries;
  threads = threads_for(work * heads * width / 4, threads);
  const auto items = static_cast<std::int64_t>(table.items.size()), units = table.num_units();
  if (units * kv_heads >= 2 * threads || items == units || threads == 1) {
    ThreadPool::run(units * kv_heads, threads, [&](std::int64_t unit) { kernels.attention(task, unit); });
    return;
  }
  // too few units for the threads: every segment by itself, and the partial results through memory
  std::vector<float> partial(table.row_partial.back() * heads * (width + 2));
  task.partial = partial.data();
  ThreadPool::run(items * kv_heads, threads, [&](std::int64_t unit) { kernels.partial_attention(task, unit); });
  ThreadPool::run(table.num_rows(), threads, [&](std::int64_t row) { kernels.fold_attention(task, row); });
}

SegmentTable* segment_table(Array tables, Array table, Array first, Array rows, std::int64_t page_size,
                                            std::int64_t segment, std::int64_t window, std::int64_t unit_rows) {
  const Arguments args("segment_table");
  args.shape(tables, "tables", {-1, -1});
  args.dtype<std::int32_t>(tables, "tables", "int32");
  args.contiguous(tables, "tables");
  const std::int64_t count = table.ndim() ? static_cast<std::int64_t>(table.shape(0)) : -1;
  const Sequences sequences{static_cast<const std::int32_t*>(tables.data()),
                            static_cast<std::int64_t>(tables.shape(0)),
                            static_cast<std::int64_t>(tables.shape(1)),
                            args.indices<std::int32_t>(table, "table", count),
                            args.indices<std::int32_t>(first, "first", count),
                            args.indices<std::int32_t>(rows, "rows", count),
                            count};
  return new SegmentTable(sequences, page_size, segment, window, unit_rows);
}

using Int32Vector = nb::ndarray<nb::numpy, const std::int32_t, nb::ndim<1>>;
using Int32Matrix = nb::ndarray<nb::numpy, const std::int32_t, nb::ndim<2>>;

// Structs of integers as the rows of a matrix.
template <typename Struct>
Int32Matrix as_matrix(const std::vector<Struct>& rows) {
  static_assert(sizeof(Struct) % sizeof(std::int32_t) == 0);
  return Int32Matrix(reinterpret_cast<const std::int32_t*>(rows.data()), {rows.size(), sizeof(Struct) / 4}, nb::handle());
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Native CPU kernels of genssd; genssd.kernels holds their contracts.";
  const auto internal = nb::rv_policy::reference_internal;
  nb::class_<SegmentTable>(m, "SegmentTable", "Which rows read which stretch of the cache; see genssd.kernels.attention.")
      .def_prop_ro("num_rows", &SegmentTable::num_rows, nb::sig("def num_rows(self) -> int"), "Query rows.")
      .def_ro("page_size", &SegmentTable::page_size, nb::sig("def page_size(self) -> int"), "Tokens of a page.")
      .def_ro("segment", &SegmentTable::segment, nb::sig("def segment(self) -> int"), "Positions of a segment.")
      .def_ro("window", &SegmentTable::window, nb::sig("def window(self) -> int"),
              "Positions that a row sees at most; 0: all.")
      .def_ro("largest_page", &SegmentTable::largest_page, nb::sig("def largest_page(self) -> int"),
              "The largest page that is read.")
      .def_prop_ro(
          "items",
          [](const SegmentTable& t) { return as_matrix(t.items); },
          internal, nb::sig("def items(self) -> numpy.ndarray"),
          "int32 [items, 6]: index into pages, first position, tokens, index into entries, entries, unit.")
      .def_prop_ro(
          "entries",
          [](const SegmentTable& t) { return as_matrix(t.entries); },
          internal, nb::sig("def entries(self) -> numpy.ndarray"), "int32 [entries, 2]: row, partial slot.")
      .def_prop_ro(
          "pages", [](const SegmentTable& t) { return Int32Vector(t.pages.data(), {t.pages.size()}, nb::handle()); },
          internal, nb::sig("def pages(self) -> numpy.ndarray"), "int32: the pages of the items, one after the other.")
      .def_prop_ro(
          "position",
          [](const SegmentTable& t) { return Int32Vector(t.position.data(), {t.position.size()}, nb::handle()); },
          internal, nb::sig("def position(self) -> numpy.ndarray"), "int32 [rows]: where each row stands.")
      .def_prop_ro(
          "row_partial",
          [](const SegmentTable& t) { return Int32Vector(t.row_partial.data(), {t.row_partial.size()}, nb::handle()); },
          internal, nb::sig("def row_partial(self) -> numpy.ndarray"),
          "int32 [rows + 1]: the row's first partial slot; they follow in the order of segments.")
      .def_prop_ro(
          "slot",
          [](const SegmentTable& t) {
            return nb::ndarray<nb::numpy, const std::int64_t, nb::ndim<1>>(t.slot.data(), {t.slot.size()},
                                                                            nb::handle());
          },
          internal, nb::sig("def slot(self) -> numpy.ndarray"),
          "int64 [rows]: where the row's own token lies, page * page_size + offset.");

#define TENSORS(names) nb::sig("def " names " -> None")
  m.def("instruction_set", [] { return kernels() ? kernels()->name : nullptr; },
        nb::sig("def instruction_set() -> str | None"), "The kernels in use, at first the best for this processor; None: there are none.");
  m.def("instruction_sets",
        [] {
          nb::list names;
          for (const Kernels* const* set = supported(); *set; ++set) names.append((*set)->name);
          return names;
        },
        nb::sig("def instruction_sets() -> list[str]"), "All that run on this processor, the best first.");
  m.def("use_instruction_set",
        [](const char* name) {
          if (!use(name)) throw std::invalid_argument(std::string("this processor has no kernels of the name ") + name);
        },
        nb::arg("name"), nb::sig("def use_instruction_set(name: str) -> None"),
        "Change the kernels of this process, for tests and measurements. Results of other sets differ in their roundings.");
  m.def("segment_table", &segment_table, nb::rv_policy::take_ownership, nb::arg("tables"), nb::arg("table"), nb::arg("first"), nb::arg("rows"),
        nb::arg("page_size"), nb::arg("segment"), nb::arg("window"), nb::arg("unit_rows"),
        nb::sig("def segment_table(tables: torch.Tensor, table: torch.Tensor, first: torch.Tensor, rows: "
                "torch.Tensor, page_size: int, segment: int, window: int, unit_rows: int) -> SegmentTable"),
        "Build the table of a batch: sequence i has the pages tables[table[i]] and rows at first[i], first[i] + 1, ...");
  m.def("gumbel_noise", &gumbel_noise, nb::arg("keys"), nb::arg("out"), nb::arg("threads"),
        TENSORS("gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int)"),
        "Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.");
  m.def("linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("threads"),
        TENSORS("linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, threads: "
                "int)"),
        "out = x @ weight.T + bias, summed in float32; out in the dtype of x or float32.");
  m.def("linear_logprob", &linear_logprob, nb::arg("hidden"), nb::arg("weight"), nb::arg("target"),
        nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("stats"), nb::arg("rank"),
        nb::arg("top_ids"), nb::arg("top_logprob"), nb::arg("threads"),
        TENSORS("linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | "
                "None, temperature: float, softcap: float, stats: torch.Tensor, rank: torch.Tensor, top_ids: "
                "torch.Tensor, top_logprob: torch.Tensor, threads: int)"),
        "Score targets under a head: stats [4, rows] are logprob, logsumexp, entropy and sum_p2; softcap 0: none.");
  m.def("linear_sample", &linear_sample, nb::arg("hidden"), nb::arg("weight"), nb::arg("key"), nb::arg("bias").none(),
        nb::arg("temperature"), nb::arg("softcap"), nb::arg("vocabulary"), nb::arg("tokens"), nb::arg("logprob"),
        nb::arg("threads"),
        TENSORS("linear_sample(hidden: torch.Tensor, weight: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, "
                "temperature: float, softcap: float, vocabulary: int, tokens: torch.Tensor, logprob: torch.Tensor, "
                "threads: int)"),
        "Draw a token per row from a head; -1 where its logits are not finite.");
  m.def("sample", &sample, nb::arg("logits"), nb::arg("key"), nb::arg("temperature"), nb::arg("top_k"),
        nb::arg("top_p"), nb::arg("log_min_p"), nb::arg("tokens"), nb::arg("threads"),
        TENSORS("sample(logits: torch.Tensor, key: torch.Tensor, temperature: float, top_k: int, top_p: float, "
                "log_min_p: float, tokens: torch.Tensor, threads: int)"),
        "Draw a token per row of logits behind top-k, top-p and min-p; -1 where they are not finite.");
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("weight"), nb::arg("eps"),
        nb::arg("out"), nb::arg("sum").none(), nb::arg("threads"),
        TENSORS("rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: "
                "torch.Tensor, sum: torch.Tensor | None, threads: int)"),
        "out = norm of x, or of sum = residual + x.");
  m.def("gated", &gated, nb::arg("gate_up"), nb::arg("gelu"), nb::arg("out"), nb::arg("threads"),
        TENSORS("gated(gate_up: torch.Tensor, gelu: bool, out: torch.Tensor, threads: int)"),
        "out = silu(gate) * up, or gelu(gate) * up with gelu by tanh.");
  m.def("rotary_angles", &rotary_angles, nb::arg("position"), nb::arg("frequency"), nb::arg("factor"), nb::arg("cos"),
        nb::arg("sin"), nb::arg("threads"),
        TENSORS("rotary_angles(position: torch.Tensor, frequency: torch.Tensor, factor: float, cos: torch.Tensor, sin: "
                "torch.Tensor, threads: int)"),
        "cos and sin [rows, frequencies] of position * frequency, times factor.");
  m.def("copy_pages", &copy_pages, nb::arg("kv"), nb::arg("source"), nb::arg("destination"), nb::arg("threads"),
        TENSORS("copy_pages(kv: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, threads: int)"),
        "Copy pages of kv [layers, 2, pages, page_size, kv_heads, head_dim], of any dtype.");
  m.def("write_kv", &write_kv, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("k_pages"), nb::arg("v_pages"),
        nb::arg("slot"), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"), nb::arg("q"),
        nb::arg("threads"),
        TENSORS("write_kv(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor, v_pages: "
                "torch.Tensor, slot: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, "
                "q: torch.Tensor, threads: int)"),
        "Rotate queries into q, and keys, with the values, into the cache.");
  m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_pages"), nb::arg("v_pages"), nb::arg("table"),
        nb::arg("out"), nb::arg("scale"), nb::arg("softcap"), nb::arg("sinks").none(), nb::arg("threads"),
        TENSORS("paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable, "
                "out: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None, threads: int)"),
        "Attend each row of q [rows, heads, head_dim] over what the table says, into out.");
#undef TENSORS
}
