#include "segments.hpp"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

namespace genssd {

namespace {

constexpr std::int64_t kShortest = 128;  // a shorter segment is not worth a partial result

[[noreturn]] void fail(const std::string& why) { throw std::invalid_argument("segment_table: " + why); }

}  // namespace

SegmentTable::SegmentTable(const Sequences& s, std::int64_t page_size, std::int64_t segment, std::int64_t window,
                           std::int64_t unit_rows, std::int64_t chain_programs, std::int64_t resume_tokens)
    : page_size(page_size),
      segment(segment),
      window(std::min<std::int64_t>(window, INT32_MAX)),
      unit_rows(unit_rows),
      chain_programs(chain_programs),
      resume_tokens(resume_tokens),
      shortest_(segment) {
  check(s);
  for (; shortest_ % 2 == 0 && shortest_ / 2 >= kShortest && shortest_ / 2 % page_size == 0; shortest_ /= 2)
    ++num_halvings_;
  add_rows(s);
  this->unit_rows = std::clamp<std::int64_t>(num_rows(), 1, unit_rows);  // the workspace of a unit is made for so many
  const std::vector<RowRange> ranges = ordered_ranges(s);
  const RowRange *begin = ranges.data(), *const end = begin + ranges.size();
  std::int64_t rows = 0;
  for (const RowRange* range = begin; range != end; ++range) {
    if (rows + range->rows > unit_rows) {
      add_unit(s, begin, range);
      begin = range;
      rows = 0;
    }
    rows += range->rows;
  }
  if (begin != end) add_unit(s, begin, end);
  unit_item.push_back(static_cast<std::int32_t>(items.size()));
}

void SegmentTable::check(const Sequences& s) const {
  if (page_size < 1 || segment < page_size || segment % page_size)
    fail("segment must be a positive multiple of page_size");
  if (segment > INT32_MAX) fail("segment must be less than 2^31");
  if (window < 0 || unit_rows < 1) fail("window must not be negative and unit_rows positive");
  if (chain_programs < 0 || resume_tokens < 0) fail("chain_programs and resume_tokens must not be negative");
  for (std::int64_t i = 0; i < s.count; ++i) {
    if (s.table[i] < 0 || s.table[i] >= s.num_tables) fail("sequence " + std::to_string(i) + " names no page table");
    if (s.first[i] < 0 || s.rows[i] < 1) fail("sequence " + std::to_string(i) + " has no row");
    if ((s.end_of(i) - 1) / page_size >= s.table_width)
      fail("the rows of sequence " + std::to_string(i) + " lie beyond its page table");
    if (s.end_of(i) > INT32_MAX) fail("the rows of sequence " + std::to_string(i) + " lie beyond position 2^31");
  }
}

void SegmentTable::add_rows(const Sequences& s) {
  std::int64_t partial = 0;
  for (std::int64_t i = 0; i < s.count; ++i) {
    const std::int32_t* sequence_pages = s.pages_of(i);
    for (std::int32_t p = s.first[i]; p < s.end_of(i); ++p) {
      position.push_back(p);
      slot.push_back(sequence_pages[p / page_size] * page_size + p % page_size);
      row_partial.push_back(static_cast<std::int32_t>(partial));
      partial += segment_of(p) - first_segment(p) + 1;
      if (partial > INT32_MAX) fail("its rows read more than 2^31 segments");
    }
  }
  row_partial.push_back(static_cast<std::int32_t>(partial));
}

std::int64_t SegmentTable::segment_of(std::int64_t p) const {
  return p >= segment ? num_halvings_ + p / segment : std::bit_width(static_cast<std::uint64_t>(p / shortest_));
}

std::int64_t SegmentTable::start_of(std::int64_t k) const {
  return k > num_halvings_ ? (k - num_halvings_) * segment : k > 0 ? shortest_ << (k - 1) : 0;
}

std::int64_t SegmentTable::first_segment(std::int64_t p) const {
  return window > 0 && p >= window ? segment_of(p - window + 1) : 0;
}

// Returns the rows of all sequences. Sequences that share pages are next to each other, and otherwise in the order of
// the batch; a sequence of more than unit_rows rows is in several ranges.
std::vector<SegmentTable::RowRange> SegmentTable::ordered_ranges(const Sequences& s) const {
  std::vector<std::int32_t> order(s.count), first_row(s.count);
  std::iota(order.begin(), order.end(), 0);
  std::exclusive_scan(s.rows, s.rows + s.count, first_row.begin(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    const std::int32_t *pages_a = s.pages_of(a), *pages_b = s.pages_of(b);
    const std::int64_t whole_a = segment_of(s.end_of(a)), whole_b = segment_of(s.end_of(b));
    if (pages_a[0] != pages_b[0]) return pages_a[0] < pages_b[0];
    for (std::int64_t k = 1; k <= std::min(whole_a, whole_b); ++k) {
      const std::int64_t last = start_of(k) / page_size - 1;
      if (pages_a[last] != pages_b[last]) return pages_a[last] < pages_b[last];
    }
    return whole_a < whole_b;  // or a short one would equal two that differ, and equals would not be neighbours
  });
  std::vector<RowRange> ranges;
  for (const std::int32_t i : order)
    for (std::int32_t done = 0; done < s.rows[i];) {
      const std::int32_t rows = std::min<std::int32_t>(static_cast<std::int32_t>(unit_rows), s.rows[i] - done);
      ranges.push_back({i, first_row[i] + done, s.first[i] + done, rows});
      done += rows;
    }
  return ranges;
}

void SegmentTable::add_unit(const Sequences& s, const RowRange* begin, const RowRange* end) {
  const auto unit = static_cast<std::int32_t>(unit_item.size());
  unit_item.push_back(static_cast<std::int32_t>(items.size()));
  unit_sequence.push_back({begin->first_row, begin->first_position, end - begin == 1 ? begin->rows : 0});
  std::int64_t low = INT64_MAX, high = 0;
  for (const RowRange* range = begin; range != end; ++range) {
    low = std::min(low, first_segment(range->first_position));
    high = std::max(high, segment_of(range->end_position() - 1));
  }
  for (std::int64_t k = low; k <= high; ++k) {
    const std::int64_t start = start_of(k), stop = start_of(k + 1);
    const std::int32_t* joinable = nullptr;  // the pages of the last item, where other sequences may join it
    for (const RowRange* range = begin; range != end; ++range) {
      const std::int64_t from = std::max<std::int64_t>(range->first_position, start);
      std::int64_t to = range->end_position();  // rows at positions from..to - 1 see some of the segment
      if (window > 0) to = std::min(to, stop + window - 1);
      if (from >= to) continue;
      const std::int32_t* segment_pages = s.pages_of(range->sequence) + start / page_size;
      const bool whole = s.end_of(range->sequence) >= stop;
      if (!whole || !joinable || !std::equal(joinable, joinable + (stop - start) / page_size, segment_pages))
        items.push_back({.page_index = static_cast<std::int32_t>(pages.size()),
                         .first_position = static_cast<std::int32_t>(start),
                         .num_tokens = 0,
                         .entry_index = static_cast<std::int32_t>(entries.size()),
                         .num_entries = 0,
                         .unit = unit});
      joinable = whole ? segment_pages : nullptr;
      Item& item = items.back();
      item.num_tokens = std::max(item.num_tokens, static_cast<std::int32_t>(std::min(stop, to) - start));
      add_pages(item, segment_pages);
      for (std::int64_t p = from; p < to; ++p) {
        const auto row = static_cast<std::int32_t>(range->first_row + (p - range->first_position));
        entries.push_back({row, static_cast<std::int32_t>(row_partial[row] + (k - first_segment(p)))});
      }
      item.num_entries = static_cast<std::int32_t>(entries.size()) - item.entry_index;
    }
  }
}

// Adds the pages of the last item that its tokens need and that it does not have yet.
void SegmentTable::add_pages(Item& item, const std::int32_t* segment_pages) {
  for (std::int64_t i = static_cast<std::int64_t>(pages.size()) - item.page_index; i * page_size < item.num_tokens;
       ++i) {
    if (segment_pages[i] < 0) fail("a page table holds a negative page");
    largest_page = std::max(largest_page, segment_pages[i]);
    pages.push_back(segment_pages[i]);
  }
}

}  // namespace genssd
