#include "device_records.hpp"

#include <algorithm>

namespace genssd {

namespace {

constexpr std::int32_t kUnitRows = 8;       // a unit of fewer rows fills too little of a tile
constexpr std::int32_t kShortUnit = 2048;   // positions that one program always reads fast enough
constexpr std::int32_t kPrograms = 16;      // that a GPU runs at once for each kv head, about
constexpr std::int32_t kTailTokens = 1024;  // a longer last segment is an item

// Returns the positions of a unit's rows and of all before them that they read.
std::int64_t length_of(const UnitRecord& unit) {
  return std::int64_t{unit.first_position} + unit.num_rows - unit.start;
}

}  // namespace

DeviceRecords::DeviceRecords(const SegmentTable& table) {
  add_units(table);
  add_rows(table);
  add_items(table);
}

// Chooses the units that one program each computes. If the longest would keep it busy while the others are done
// already, all are computed item by item.
void DeviceRecords::add_units(const SegmentTable& table) {
  std::int64_t total = 0, longest = 0;
  for (std::int64_t i = 0; i < table.num_units(); ++i) {
    const UnitRows& rows = table.unit_sequence[i];
    if (rows.count < kUnitRows) continue;
    const Item& first = table.items[table.unit_item[i]];
    units.push_back({.page_index = first.page_index,
                     .start = first.first_position,
                     .first_row = rows.first_row,
                     .first_position = rows.first_position,
                     .num_rows = rows.count});
    total += length_of(units.back());
    longest = std::max(longest, length_of(units.back()));
    largest_unit = std::max(largest_unit, rows.count);
  }
  if (longest > kShortUnit && longest * kPrograms > total + total / 4) {
    units.clear();
    largest_unit = 0;
  }
  std::stable_sort(units.begin(), units.end(),
                   [](const UnitRecord& a, const UnitRecord& b) { return length_of(a) > length_of(b); });
}

void DeviceRecords::add_rows(const SegmentTable& table) {
  rows.resize(table.num_rows());
  for (std::int64_t n = 0; n < table.num_rows(); ++n)
    rows[n].num_partials = table.row_partial[n + 1] - table.row_partial[n];
  for (const UnitRecord& unit : units)
    for (std::int32_t i = 0; i < unit.num_rows; ++i) rows[unit.first_row + i].num_partials = -1;
  for (const Item& item : table.items) {
    if (!is_tail(table, item) || in_unit(table, item)) continue;
    const std::int32_t row = table.entries[item.entry_index].row;
    RowRecord& record = rows[row];
    --record.num_partials;
    record.page_index = item.page_index;
    record.high = item.num_tokens;
    const std::int64_t first_seen =
        table.window > 0 ? table.position[row] - table.window + 1 - item.first_position : 0;
    record.low = static_cast<std::int32_t>(std::max<std::int64_t>(first_seen, 0));
  }
  for (RowRecord& record : rows) {
    record.first_partial = static_cast<std::int32_t>(num_partials);
    num_partials += std::max(record.num_partials, 0);
    has_other_rows |= record.num_partials >= 0;
  }
}

void DeviceRecords::add_items(const SegmentTable& table) {
  for (const Item& item : table.items) {
    if (in_unit(table, item) || is_tail(table, item)) continue;
    ItemRecord record{.page_index = item.page_index,
                      .high = item.num_tokens,
                      .entry_index = static_cast<std::int32_t>(entries.size()),
                      .num_entries = item.num_entries,
                      .full_high = item.num_tokens,
                      .low = 0,
                      .full_low = 0};
    std::int64_t least = INT32_MAX, most = 0;
    for (std::int32_t i = item.entry_index; i < item.entry_index + item.num_entries; ++i) {
      const auto [row, partial] = table.entries[i];
      const std::int32_t last = table.position[row] - item.first_position;
      least = std::min<std::int64_t>(least, last);
      most = std::max<std::int64_t>(most, last);
      entries.push_back(
          {.row = row, .partial = rows[row].first_partial + partial - table.row_partial[row], .last = last});
    }
    record.full_high = static_cast<std::int32_t>(std::min<std::int64_t>(least + 1, item.num_tokens));
    if (table.window > 0) {
      record.low = static_cast<std::int32_t>(std::max<std::int64_t>(least - table.window + 1, 0));
      record.full_low = static_cast<std::int32_t>(std::max<std::int64_t>(most - table.window + 1, 0));
    }
    largest_item = std::max(largest_item, record.num_entries);
    items.push_back(record);
  }
  std::stable_sort(items.begin(), items.end(),
                   [](const ItemRecord& a, const ItemRecord& b) { return a.high > b.high; });
}

bool DeviceRecords::in_unit(const SegmentTable& table, const Item& item) const {
  return rows[table.entries[item.entry_index].row].num_partials < 0;
}

// Returns whether an item is the last segment of the one row that reads it.
bool DeviceRecords::is_tail(const SegmentTable& table, const Item& item) {
  if (item.num_entries != 1 || item.num_tokens > kTailTokens) return false;
  const auto [row, partial] = table.entries[item.entry_index];
  return partial + 1 == table.row_partial[row + 1];
}

}  // namespace genssd
