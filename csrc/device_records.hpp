// A segment table as the kernels on a GPU read it: records of fixed size, so that no address needs a chain of loads.
#pragma once

#include <cstdint>
#include <vector>

#include "segments.hpp"

namespace genssd {

// An item whose partial results are stored: a segment, or a chain of segments that follow each other, which the same
// rows read completely. Tokens are counted from the first token of its first segment; a row's partial results of a
// chain lie in consecutive slots.
struct ItemRecord {
  std::int32_t page_index;
  std::int32_t high;  // number of tokens up to the last that a row sees
  std::int32_t entry_index;
  std::int32_t num_entries;
  std::int32_t full_high;  // number of tokens up to the last that every row sees
  std::int32_t low;        // first token that a row sees
  std::int32_t full_low;   // first token that every row sees
  std::int32_t start;      // position of its first token; -1: a shared part, whose sums the rows go on from
};

struct EntryRecord {
  std::int32_t row;
  std::int32_t partial;  // slot of the row's (first) partial result
  std::int32_t last;     // last token of the item that the row sees
  std::int32_t unused = 0;
};

// Consecutive rows of one sequence, which are computed together from their first to their last segment.
struct UnitRecord {
  std::int32_t page_index;
  std::int32_t start;  // position of the first token of the first page
  std::int32_t first_row;
  std::int32_t first_position;  // position of the first row
  std::int32_t num_rows;
  std::int32_t unused[3] = {};
};

// A row, with its last segment where no other row reads that and its partial result is not stored.
struct RowRecord {
  std::int32_t first_partial = 0;
  std::int32_t num_partials = 0;  // -1: a unit computes the row
  std::int32_t page_index = 0;
  std::int32_t high = 0;  // number of tokens of the last segment that the row sees; 0: it is an item, or none
  std::int32_t low = 0;   // first token of the last segment that the row sees
  // number of tokens of the last segment whose sums are in the slot after the row's partial results: what other rows
  // hold in the same pages, computed once
  std::int32_t resumed = 0;
  std::int32_t unused[2] = {};
};

class DeviceRecords {
 public:
  explicit DeviceRecords(const SegmentTable& table);

  std::vector<ItemRecord> items;  // the longest first
  std::vector<EntryRecord> entries;
  std::vector<UnitRecord> units;  // the longest first
  std::vector<RowRecord> rows;
  std::vector<std::int32_t> pages;  // those of the segment table, then copies for chains
  std::int64_t num_partials = 0;
  std::int32_t largest_item = 0;  // number of rows
  std::int32_t largest_unit = 0;  // number of rows
  bool has_other_rows = false;    // whether some row is computed by no unit

 private:
  void add_units(const SegmentTable& table);
  void add_rows(const SegmentTable& table);
  void share_ends(const SegmentTable& table);
  void number_partials();
  void add_items(const SegmentTable& table);
  void add_chains(const SegmentTable& table);
  void append_pages(const SegmentTable& table, ItemRecord& chain, const ItemRecord& item);
  void add_shared_ends();
  void order_items();
  bool in_unit(const SegmentTable& table, const Item& item) const;
  static bool is_tail(const SegmentTable& table, const Item& item);

  // Rows whose unfinished segments begin with the same pages.
  struct SharedEnd {
    std::int32_t page_index, tokens;
    std::vector<std::int32_t> rows;
  };
  std::vector<SharedEnd> shared_ends_;
};

}  // namespace genssd
