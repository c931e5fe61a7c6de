#include "device_records.hpp"

#include <algorithm>
#include <functional>
#include <utility>

namespace genssd {

namespace {

constexpr std::int32_t kUnitRows = 8;       // a unit of fewer rows fills too little of a tile
constexpr std::int32_t kShortUnit = 2048;   // positions that one program always reads fast enough
constexpr std::int32_t kPrograms = 16;      // that a GPU runs at once for each kv head, about
constexpr std::int32_t kTailTokens = 1024;  // a longer last segment is an item
// tiles that a shared part of unfinished segments must save, added up over its rows: an item takes as long as five
// tiles before it multiplies (docs/log.md, 2026-11-28), and every row reads its sums
constexpr std::int64_t kWorthSharing = 8;
constexpr std::int64_t kItemTokens = 320;  // time that an item takes besides its tiles, in tokens

// Returns the positions of a unit's rows and of all before them that they read.
std::int64_t length_of(const UnitRecord& unit) {
  return std::int64_t{unit.first_position} + unit.num_rows - unit.start;
}

// Items whose segments follow each other and have the same rows.
struct Runs {
  std::vector<std::int32_t> heads, next;  // first item of every run; the item after an item, or -1
  std::int64_t longest = 0;               // tokens of the longest run
};

Runs find_runs(const SegmentTable& table, const std::vector<ItemRecord>& items,
               const std::vector<EntryRecord>& entries, std::int64_t num_rows) {
  Runs runs{{}, std::vector<std::int32_t>(items.size(), -1)};
  std::vector<std::int32_t> last_of_row(num_rows, -1);  // the row's last item so far, where a segment may follow
  std::vector<std::int64_t> length(items.size());
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(items.size()); ++i) {
    const ItemRecord& item = items[i];
    const EntryRecord* of_item = &entries[item.entry_index];
    const bool complete = item.full_high == item.high && item.high == table.length_at(item.start);
    const std::int32_t before = last_of_row[of_item->row];
    length[i] = item.high;
    bool follows = complete && before >= 0 && items[before].start + items[before].high == item.start &&
                   items[before].num_entries == item.num_entries;
    for (std::int32_t k = 0; follows && k < item.num_entries; ++k) {
      const EntryRecord& earlier = entries[items[before].entry_index + k];
      follows = earlier.row == of_item[k].row && earlier.partial + 1 == of_item[k].partial;
    }
    if (follows) {
      runs.next[before] = i;
      length[i] += length[before];
    } else {
      runs.heads.push_back(i);
    }
    runs.longest = std::max(runs.longest, length[i]);
    for (std::int32_t k = 0; k < item.num_entries; ++k) last_of_row[of_item[k].row] = complete ? i : -1;
  }
  return runs;
}

// Returns the time, in tokens, after which a program of a kv head that takes every chain_programs-th item is done,
// where items of a run are joined up to `limit` tokens. The first program has the longest items.
std::int64_t makespan(const SegmentTable& table, const std::vector<ItemRecord>& items, const Runs& runs,
                      std::int64_t limit) {
  std::vector<std::int64_t> lengths;
  for (const std::int32_t head : runs.heads)
    for (std::int32_t i = head; i >= 0;) {
      std::int64_t length = items[i].high;
      for (i = runs.next[i]; i >= 0 && length + items[i].high <= limit; i = runs.next[i]) length += items[i].high;
      lengths.push_back(length);
    }
  std::sort(lengths.begin(), lengths.end(), std::greater<>());
  std::int64_t time = 0;
  for (std::size_t i = 0; i < lengths.size(); i += table.chain_programs) time += kItemTokens + lengths[i];
  return time;
}

// Returns how many tokens, at most `limit` and a multiple of resume_tokens, an item and the pages at an index begin
// with together.
std::int64_t shared_tokens(const SegmentTable& table, std::int32_t page_index, const Item& item, std::int64_t limit) {
  limit = std::min<std::int64_t>(limit, item.num_tokens);
  std::int64_t count = 0;
  while ((count + 1) * table.page_size <= limit &&
         table.pages[page_index + count] == table.pages[item.page_index + count])
    ++count;
  return count * table.page_size / table.resume_tokens * table.resume_tokens;
}

}  // namespace

DeviceRecords::DeviceRecords(const SegmentTable& table) : pages(table.pages) {
  add_units(table);
  add_rows(table);
  if (table.resume_tokens > 0 && table.window == 0) share_ends(table);
  number_partials();
  add_items(table);
  if (table.chain_programs > 0 && table.window == 0) add_chains(table);
  add_shared_ends();
  order_items();
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
}

// Finds rows whose last segments begin with the same pages. Rows that share pages are next to each other.
void DeviceRecords::share_ends(const SegmentTable& table) {
  SharedEnd group{0, 0, {}};
  std::int32_t unit = -1, first_position = -1;
  const auto close = [&] {
    const std::int64_t saved = (static_cast<std::int64_t>(group.rows.size()) - 1) * group.tokens;
    if (saved >= kWorthSharing * table.resume_tokens) {
      for (const std::int32_t row : group.rows) rows[row].resumed = group.tokens;
      shared_ends_.push_back(group);
    }
    group.rows.clear();
  };
  for (const Item& item : table.items) {
    if (!is_tail(table, item) || in_unit(table, item)) continue;
    const std::int32_t row = table.entries[item.entry_index].row;
    if (!group.rows.empty() && item.unit == unit && item.first_position == first_position) {
      const std::int64_t tokens = shared_tokens(table, group.page_index, item, group.tokens);
      const auto count = static_cast<std::int64_t>(group.rows.size());
      // a row that shares less shortens what all others share
      if (tokens > 0 && count * tokens >= (count - 1) * group.tokens) {
        group.tokens = static_cast<std::int32_t>(tokens);
        group.rows.push_back(row);
        continue;
      }
    }
    close();
    unit = item.unit;
    first_position = item.first_position;
    group = {item.page_index,
             static_cast<std::int32_t>(item.num_tokens / table.resume_tokens * table.resume_tokens),
             {row}};
  }
  close();
}

void DeviceRecords::number_partials() {
  for (RowRecord& record : rows) {
    record.first_partial = static_cast<std::int32_t>(num_partials);
    num_partials += std::max(record.num_partials, 0) + (record.resumed > 0);
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
                      .full_low = 0,
                      .start = item.first_position};
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
}

// Makes chains of segments that the same rows read completely, of the length with which the programs of a kv head are
// done first. A program takes every chain_programs-th item, the longest first.
void DeviceRecords::add_chains(const SegmentTable& table) {
  const Runs runs = find_runs(table, items, entries, static_cast<std::int64_t>(rows.size()));
  std::int64_t limit = 0, best = makespan(table, items, runs, 0), longest = 0;
  for (const ItemRecord& item : items) longest = std::max<std::int64_t>(longest, item.high);
  for (std::int64_t tried = table.segment; longest > 0; tried *= 2) {
    if (const std::int64_t time = makespan(table, items, runs, tried); time < best) {
      best = time;
      limit = tried;
    }
    if (tried >= runs.longest) break;
  }
  if (!limit) return;
  std::vector<ItemRecord> chained;
  for (const std::int32_t head : runs.heads)
    for (std::int32_t i = head; i >= 0;) {
      ItemRecord chain = items[i];
      for (i = runs.next[i]; i >= 0 && chain.high + items[i].high <= limit; i = runs.next[i]) {
        append_pages(table, chain, items[i]);
        chain.high += items[i].high;
        chain.full_high = chain.high;
      }
      chained.push_back(chain);
    }
  items = std::move(chained);
}

// Appends the pages of a segment to those of a chain.
void DeviceRecords::append_pages(const SegmentTable& table, ItemRecord& chain, const ItemRecord& item) {
  const std::int64_t count = chain.high / table.page_size, more = item.high / table.page_size;
  if (item.page_index == chain.page_index + count) return;
  if (chain.page_index + count != static_cast<std::int64_t>(pages.size())) {
    const auto from = static_cast<std::int64_t>(chain.page_index);
    chain.page_index = static_cast<std::int32_t>(pages.size());
    for (std::int64_t k = 0; k < count; ++k) pages.push_back(pages[from + k]);
  }
  for (std::int64_t k = 0; k < more; ++k) pages.push_back(pages[item.page_index + k]);
}

void DeviceRecords::add_shared_ends() {
  for (const SharedEnd& end : shared_ends_) {
    const auto count = static_cast<std::int32_t>(end.rows.size());
    items.push_back({.page_index = end.page_index,
                     .high = end.tokens,
                     .entry_index = static_cast<std::int32_t>(entries.size()),
                     .num_entries = count,
                     .full_high = end.tokens,
                     .low = 0,
                     .full_low = 0,
                     .start = -1});
    for (const std::int32_t row : end.rows)
      entries.push_back(
          {.row = row, .partial = rows[row].first_partial + rows[row].num_partials, .last = end.tokens - 1});
    largest_item = std::max(largest_item, count);
  }
}

// Puts the longest items first and drops the entries of segments that went into chains.
void DeviceRecords::order_items() {
  std::vector<EntryRecord> kept;
  kept.reserve(entries.size());
  for (ItemRecord& item : items) {
    const auto begin = entries.begin() + item.entry_index;
    item.entry_index = static_cast<std::int32_t>(kept.size());
    kept.insert(kept.end(), begin, begin + item.num_entries);
  }
  entries = std::move(kept);
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
