// The segment table: which rows of a batch read which stretch of the cache, and where their partial results go.
//
// Positions are cut into segments at absolute multiples of a constant, and below the first of these at halves,
// quarters and so on, so that short prefixes have whole segments, too: at 128, 256, 512, 1024, 2048, 3072, say. Rows
// whose sequences hold the same pages through a whole segment read it together, as one item; the last, unfinished
// segment of a sequence is an item of its own. A row's partial results are merged in the order of its segments. What a
// row computes depends on its segments alone, so it has the same bits whoever else reads them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace genssd {

struct Sequences {
  const std::int32_t* tables;  // [num_tables, width]: pages of a sequence, in the order of positions
  std::int64_t num_tables, width;
  const std::int32_t* table;  // [count]: the row of tables of each sequence
  const std::int32_t* first;  // [count]: the position of its first query row
  const std::int32_t* rows;   // [count]: how many query rows follow each other from there
  std::int64_t count;
};

class SegmentTable {
 public:
  SegmentTable(const Sequences& s, std::int64_t page_size, std::int64_t segment, std::int64_t window,
               std::int64_t unit_rows)
      : page_size(page_size),
        segment(segment),
        window(std::min<std::int64_t>(window, INT32_MAX)),
        unit_rows(unit_rows),
        finest_(segment) {
    check(s);
    for (; finest_ % 2 == 0 && finest_ / 2 >= kFinest && finest_ / 2 % page_size == 0; finest_ /= 2) ++halvings_;
    place_rows(s);
    this->unit_rows =
        std::clamp<std::int64_t>(num_rows(), 1, unit_rows);  // what a unit keeps is allocated for so many
    std::int64_t first_part = 0, filled = 0;
    std::vector<Part> parts = split(s);
    for (std::int64_t i = 0; i <= static_cast<std::int64_t>(parts.size()); ++i) {
      const bool end = i == static_cast<std::int64_t>(parts.size());
      if (end || filled + parts[i].rows > unit_rows) {
        if (i > first_part) add_unit(s, parts.data() + first_part, parts.data() + i);
        first_part = i;
        filled = 0;
      }
      if (!end) filled += parts[i].rows;
    }
    unit_item.push_back(static_cast<std::int32_t>(items.size()));
  }

  std::int64_t num_rows() const { return static_cast<std::int64_t>(position.size()); }
  std::int64_t num_units() const { return static_cast<std::int64_t>(unit_item.size()) - 1; }

  std::int64_t page_size, segment, window, unit_rows;
  std::int32_t largest_page = -1;
  std::vector<Item> items;
  std::vector<Entry> entries;
  std::vector<std::int32_t> pages;
  std::vector<std::int32_t> position;     // [rows]
  std::vector<std::int64_t> slot;         // [rows]: where the row's own token lies, page * page_size + offset
  std::vector<std::int32_t> row_partial;  // [rows + 1]: the row's first partial slot; in the order of segments
  std::vector<std::int32_t> unit_item;    // [units + 1]: the unit's first item

 private:
  static constexpr std::int64_t kFinest = 128;  // a shorter segment is not worth a partial result

  struct Part {  // consecutive rows of one sequence
    std::int32_t sequence, row, first, rows;
  };

  [[noreturn]] static void fail(const std::string& why) { throw std::invalid_argument("segment_table: " + why); }

  std::int64_t finest_, halvings_ = 0;  // the first segment; how many segments of doubling size follow it

  void check(const Sequences& s) const {
    if (page_size < 1 || segment < page_size || segment % page_size)
      fail("segment must be a positive multiple of page_size");
    if (segment > INT32_MAX) fail("segment must be less than 2^31");
    if (window < 0 || unit_rows < 1) fail("window must not be negative and unit_rows positive");
    for (std::int64_t i = 0; i < s.count; ++i) {
      if (s.table[i] < 0 || s.table[i] >= s.num_tables) fail("sequence " + std::to_string(i) + " names no page table");
      if (s.first[i] < 0 || s.rows[i] < 1) fail("sequence " + std::to_string(i) + " has no row");
      if ((std::int64_t{s.first[i]} + s.rows[i] - 1) / page_size >= s.width)
        fail("the rows of sequence " + std::to_string(i) + " lie beyond its page table");
      if (std::int64_t{s.first[i]} + s.rows[i] > INT32_MAX)
        fail("the rows of sequence " + std::to_string(i) + " lie beyond position 2^31");
    }
  }

  void place_rows(const Sequences& s) {
    std::int64_t partial = 0;
    for (std::int64_t i = 0; i < s.count; ++i) {
      const std::int32_t* pages_of = s.tables + s.table[i] * s.width;
      for (std::int32_t p = s.first[i]; p < s.first[i] + s.rows[i]; ++p) {
        position.push_back(p);
        slot.push_back(pages_of[p / page_size] * page_size + p % page_size);
        row_partial.push_back(static_cast<std::int32_t>(partial));
        partial += segment_of(p) - first_segment(p) + 1;
        if (partial > INT32_MAX) fail("its rows read more than 2^31 segments");
      }
    }
    row_partial.push_back(static_cast<std::int32_t>(partial));
  }

  // The segment of a position, which is also how many whole segments are before it; and where a segment starts.
  std::int64_t segment_of(std::int64_t p) const {
    return p >= segment ? halvings_ + p / segment : std::bit_width(static_cast<std::uint64_t>(p / finest_));
  }
  std::int64_t start_of(std::int64_t k) const {
    return k > halvings_ ? (k - halvings_) * segment : k > 0 ? finest_ << (k - 1) : 0;
  }
  std::int64_t first_segment(std::int64_t p) const {
    return window > 0 && p >= window ? segment_of(p - window + 1) : 0;
  }

  // Relatives side by side, in the order of the batch otherwise; long sequences in several parts.
  std::vector<Part> split(const Sequences& s) const {
    std::vector<std::int32_t> order(s.count), row(s.count);
    for (std::int32_t i = 0, next = 0; i < s.count; next += s.rows[i++]) order[i] = i, row[i] = next;
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      const std::int32_t *ta = s.tables + s.table[a] * s.width, *tb = s.tables + s.table[b] * s.width;
      const std::int64_t whole_a = segment_of(s.first[a] + s.rows[a]), whole_b = segment_of(s.first[b] + s.rows[b]);
      if (ta[0] != tb[0]) return ta[0] < tb[0];
      for (std::int64_t k = 1; k <= std::min(whole_a, whole_b); ++k) {
        const std::int64_t last = start_of(k) / page_size - 1;
        if (ta[last] != tb[last]) return ta[last] < tb[last];
      }
      return whole_a < whole_b;  // or a short one would equal two that differ, and equals would not lie side by side
    });
    std::vector<Part> parts;
    for (const std::int32_t i : order)
      for (std::int32_t done = 0; done < s.rows[i];) {
        const std::int32_t rows = std::min<std::int32_t>(static_cast<std::int32_t>(unit_rows), s.rows[i] - done);
        parts.push_back({i, row[i] + done, s.first[i] + done, rows});
        done += rows;
      }
    return parts;
  }

  void add_unit(const Sequences& s, const Part* begin, const Part* end) {
    unit_item.push_back(static_cast<std::int32_t>(items.size()));
    std::int64_t low = INT64_MAX, high = 0;
    for (const Part* part = begin; part != end; ++part) {
      low = std::min(low, first_segment(part->first));
      high = std::max(high, segment_of(part->first + part->rows - 1));
    }
    for (std::int64_t k = low; k <= high; ++k) {
      const std::int32_t* open = nullptr;  // the pages of the item before, if others may join it
      for (const Part* part = begin; part != end; ++part) {
        const std::int64_t start = start_of(k), stop = start_of(k + 1);
        const std::int64_t from = std::max<std::int64_t>(part->first, start);
        std::int64_t to = part->first + part->rows;  // rows at positions from..to - 1 see some of the segment
        if (window > 0) to = std::min(to, stop + window - 1);
        if (from >= to) continue;
        const std::int32_t* table = s.tables + s.table[part->sequence] * s.width;
        const std::int32_t* held = table + start / page_size;
        const bool whole = s.first[part->sequence] + s.rows[part->sequence] >= stop;
        if (!whole || !open || !std::equal(open, open + (stop - start) / page_size, held)) {
          items.push_back({static_cast<std::int32_t>(pages.size()), static_cast<std::int32_t>(start), 0,
                           static_cast<std::int32_t>(entries.size()), 0,
                           static_cast<std::int32_t>(unit_item.size()) - 1});
        }
        open = whole ? held : nullptr;
        Item& item = items.back();
        item.tokens = std::max(item.tokens, static_cast<std::int32_t>(std::min(stop, to) - start));
        for (std::int64_t i = static_cast<std::int64_t>(pages.size()) - item.page; i * page_size < item.tokens; ++i) {
          if (held[i] < 0) fail("a page table holds a negative page");
          largest_page = std::max(largest_page, held[i]);
          pages.push_back(held[i]);
        }
        for (std::int64_t p = from; p < to; ++p) {
          const auto row = static_cast<std::int32_t>(part->row + (p - part->first));
          entries.push_back({row, static_cast<std::int32_t>(row_partial[row] + (k - first_segment(p)))});
        }
        item.entries = static_cast<std::int32_t>(entries.size()) - item.entry;
      }
    }
  }
};

}  // namespace genssd
