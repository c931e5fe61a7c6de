// Attention over the pages of a cache, and the table that says who reads what.
#include <utility>
#include <vector>

#include "operators.hpp"
#include "threads.hpp"

namespace genssd {

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

void paged_attention(Array q, Array k_pages, Array v_pages, const SegmentTable& table, Array out, float scale,
                     float softcap, std::optional<Array> sinks, int threads) {
  const Arguments args("paged_attention");
  const Kernels& kernels = args.kernels();
  args.shape(q, "q", {table.num_rows(), -1, -1});
  const auto heads = static_cast<std::int64_t>(q.shape(1)), width = static_cast<std::int64_t>(q.shape(2));
  args.shape(k_pages, "k_pages", {-1, table.page_size, -1, width});
  const auto pages = static_cast<std::int64_t>(k_pages.shape(0)),
             kv_heads = static_cast<std::int64_t>(k_pages.shape(2));
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

}  // namespace genssd
