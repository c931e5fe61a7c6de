// The segment table: the segments of the KV cache that each row of a batch reads, and where its partial results go.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace genssd {

// The sequences of a batch. Rows are numbered sequence by sequence.
struct Sequences {
  const std::int32_t* tables;  // [num_tables, table_width]: pages of a sequence, in the order of positions
  std::int64_t num_tables, table_width;
  const std::int32_t* table;  // [count]: the row of `tables` of each sequence
  const std::int32_t* first;  // [count]: the position of its first query row
  const std::int32_t* rows;   // [count]: how many query rows follow each other from there
  std::int64_t count;

  const std::int32_t* pages_of(std::int64_t sequence) const { return tables + table[sequence] * table_width; }
  std::int64_t end_of(std::int64_t sequence) const { return std::int64_t{first[sequence]} + rows[sequence]; }
};

// The rows of a unit where they are consecutive rows of one sequence; otherwise count is 0.
struct UnitRows {
  std::int32_t first_row, first_position, count;
};

// Positions are divided into segments at absolute multiples of a constant, and below the first of these at its halves,
// quarters and so on, so that short prefixes have whole segments, too: at 128, 256, 512, 1024, 2048, 3072, say.
//
// Rows whose sequences hold the same pages through a whole segment read it together, as one item; the last, unfinished
// segment of a sequence is an item of its own. A row's partial results are merged in the order of its segments. What a
// row computes depends on its segments alone, so it has the same bits whoever else reads them.
//
// Rows are collected into units of at most unit_rows rows, sequences that share pages next to each other. Each row is
// in one unit, which has all of the row's items, so a unit can be computed without waiting for another.
class SegmentTable {
 public:
  SegmentTable(const Sequences& s, std::int64_t page_size, std::int64_t segment, std::int64_t window,
               std::int64_t unit_rows, std::int64_t chain_programs = 0, std::int64_t resume_tokens = 0);

  std::int64_t num_rows() const { return static_cast<std::int64_t>(position.size()); }
  std::int64_t num_units() const { return static_cast<std::int64_t>(unit_item.size()) - 1; }

  std::int64_t page_size;
  std::int64_t segment;    // positions of a segment, except for the shorter ones before the first multiple
  std::int64_t window;     // maximum number of positions that a row sees, its own included; 0: all
  std::int64_t unit_rows;  // maximum number of rows of a unit
  // for DeviceRecords: programs of a kv head over which chains of segments are balanced, and tokens of which the
  // shared part of an unfinished segment is a multiple; 0: no chains, no shared parts
  std::int64_t chain_programs, resume_tokens;
  std::int32_t largest_page = -1;
  std::vector<Item> items;
  std::vector<Entry> entries;
  std::vector<std::int32_t> pages;
  std::vector<std::int32_t> position;     // [rows]: position of the row in its sequence
  std::vector<std::int64_t> slot;         // [rows]: slot of the row's own token, page * page_size + offset
  std::vector<std::int32_t> row_partial;  // [rows + 1]: slot of the row's first partial result, one per segment
  std::vector<std::int32_t> unit_item;    // [units + 1]: first item of the unit
  std::vector<UnitRows> unit_sequence;    // [units]

  // Returns the length of the first segment.
  std::int64_t shortest() const { return shortest_; }

  // Returns the length of the segment that begins at a position.
  std::int64_t length_at(std::int64_t start) const { return std::min(std::max(start, shortest_), segment); }

 private:
  // Consecutive rows of one sequence.
  struct RowRange {
    std::int32_t sequence, first_row, first_position, rows;
    std::int32_t end_position() const { return first_position + rows; }
  };

  void check(const Sequences& s) const;
  void add_rows(const Sequences& s);
  std::vector<RowRange> ordered_ranges(const Sequences& s) const;
  void add_unit(const Sequences& s, const RowRange* begin, const RowRange* end);
  void add_pages(Item& item, const std::int32_t* segment_pages);

  // Returns the segment of a position, which is also how many whole segments are before it.
  std::int64_t segment_of(std::int64_t p) const;
  // Returns the first position of segment k.
  std::int64_t start_of(std::int64_t k) const;
  // Returns the first segment that a row at a position sees.
  std::int64_t first_segment(std::int64_t p) const;

  std::int64_t shortest_;          // length of the first segment: `segment` halved num_halvings_ times
  std::int64_t num_halvings_ = 0;  // also the number of segments, after the first, that end at twice their start
};

}  // namespace genssd
