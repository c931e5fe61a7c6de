// Attention over a paged KV cache, and the segment table that it follows.
#include <utility>
#include <vector>

#include "operators.hpp"
#include "threads.hpp"

namespace genssd {

SegmentTable* segment_table(Array tables, Array table, Array first, Array rows, std::int64_t page_size,
                            std::int64_t segment, std::int64_t window, std::int64_t unit_rows,
                            std::int64_t chain_programs, std::int64_t resume_tokens) {
  const Arguments args("segment_table");
  args.shape(tables, "tables", {-1, -1});
  args.dtype<std::int32_t>(tables, "tables", "int32");
  args.contiguous(tables, "tables");
  const std::int64_t count = table.ndim() ? size_of(table, 0) : -1;
  const Sequences sequences{.tables = static_cast<const std::int32_t*>(tables.data()),
                            .num_tables = size_of(tables, 0),
                            .table_width = size_of(tables, 1),
                            .table = args.integers<std::int32_t>(table, "table", count),
                            .first = args.integers<std::int32_t>(first, "first", count),
                            .rows = args.integers<std::int32_t>(rows, "rows", count),
                            .count = count};
  return new SegmentTable(sequences, page_size, segment, window, unit_rows, chain_programs, resume_tokens);
}

void paged_attention(Array q, Array k_pages, Array v_pages, const SegmentTable& table, Array out, float scale,
                     float softcap, MaybeArray sinks, int threads) {
  const Arguments args("paged_attention");
  const Kernels& kernels = args.kernels();
  args.shape(q, "q", {table.num_rows(), -1, -1});
  const auto heads = size_of(q, 1), head_dim = size_of(q, 2);
  args.shape(v_pages, "v_pages", {-1, table.page_size, -1, head_dim});
  const auto pages = size_of(v_pages, 0), kv_heads = size_of(v_pages, 2);
  args.keys(k_pages, "k_pages", v_pages);
  args.shape(out, "out", {table.num_rows(), heads, head_dim});
  args.require(kv_heads > 0 && heads % kv_heads == 0,
               "the number of query heads must be a multiple of the number of kv heads");
  for (const auto& [a, name] : {std::pair{&q, "q"}, {&k_pages, "k_pages"}, {&v_pages, "v_pages"}, {&out, "out"}}) {
    args.contiguous(*a, name);
    args.same_dtype(*a, name, q, "q");
  }
  args.require(table.largest_page < pages, "the table names a page outside the pool");
  args.require(table.segment <= 1024, "a segment may have at most 1024 tokens");
  args.require(softcap >= 0.0f, "softcap must not be negative");
  AttentionParams params{.dtype = args.float_dtype(q, "q"),
                         .q = q.data(),
                         .k_pages = k_pages.data(),
                         .v_pages = v_pages.data(),
                         .out = out.data(),
                         .sinks = sinks ? args.floats(*sinks, "sinks", {heads}) : nullptr,
                         .items = table.items.data(),
                         .entries = table.entries.data(),
                         .pages = table.pages.data(),
                         .position = table.position.data(),
                         .row_partial = table.row_partial.data(),
                         .unit_item = table.unit_item.data(),
                         .page_size = table.page_size,
                         .segment = table.segment,
                         .window = table.window,
                         .unit_rows = table.unit_rows,
                         .heads = heads,
                         .kv_heads = kv_heads,
                         .head_dim = head_dim,
                         .scale = scale,
                         .softcap = softcap,
                         .partial = nullptr};
  const nb::gil_scoped_release release;
  std::int64_t visible = 0;  // pairs of a row and a token
  for (const Item& item : table.items) visible += std::int64_t{item.num_tokens} * item.num_entries;
  threads = threads_for(visible * heads * head_dim / 4, threads);
  const auto items = static_cast<std::int64_t>(table.items.size()), units = table.num_units();
  if (units * kv_heads >= 2 * threads || items == units || threads == 1) {
    ThreadPool::run(units * kv_heads, threads, [&](std::int64_t task) { kernels.attention(params, task); });
    return;
  }
  // too few units for the threads: one task per segment, and the partial results are merged from memory
  std::vector<float> partial(table.row_partial.back() * heads * (head_dim + 2));
  params.partial = partial.data();
  ThreadPool::run(items * kv_heads, threads, [&](std::int64_t task) { kernels.partial_attention(params, task); });
  ThreadPool::run(table.num_rows(), threads, [&](std::int64_t row) { kernels.merge_attention(params, row); });
}

}  // namespace genssd
