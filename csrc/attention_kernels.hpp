// Attention over the segments of a paged KV cache. Only for isa.cpp.
//
// A row attends to each segment by itself: scores, their softmax, the weighted sum of the values, in the order of
// positions. This partial result (peak, total, values) is then merged into the row's own, in the order of segments.
// Which rows are computed together, and whether partial results are stored in between, changes no bit.
#pragma once

#include <cstring>

#include "attention_tile.hpp"
#include "dot.hpp"
#include "kernels.hpp"
#include "workspace.hpp"

namespace {

using namespace genssd;

// Computes an item for one kv head, and calls emit(entry, head, state) with every partial result.
template <typename T, typename Emit>
INLINE void attend_item(const AttentionParams& p, const Item& item, std::int64_t kv_head,
                        const AttentionWorkspace<T>& workspace, const Emit& emit) {
  const std::int64_t group = p.heads / p.kv_heads, queries = item.num_entries * group;
  const std::int64_t tiles = (queries + kQueryRows<T> - 1) / kQueryRows<T>;
  const std::int64_t key_row = workspace.find_keys(p, item, kv_head, tiles);
  const bool is_finite = workspace.pack_values(p, item, kv_head);
  for (std::int64_t first = 0; first < queries; first += kQueryRows<T>) {
    QueryTile<T> tile{p, item, workspace, key_row, is_finite, min(kQueryRows<T>, queries - first), {}, {}};
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const std::int64_t row = p.entries[item.entry_index + (first + i) / group].row;
      const std::int64_t head = kv_head * group + (first + i) % group;
      const std::int64_t position = p.position[row];
      tile.visible_end[i] = min(item.num_tokens, position + 1 - item.first_position);
      tile.visible_begin[i] = p.window > 0 ? max(0, position - p.window + 1 - item.first_position) : 0;
      std::memcpy(workspace.queries + i * p.head_dim, static_cast<const T*>(p.q) + (row * p.heads + head) * p.head_dim,
                  p.head_dim * sizeof(T));
    }
    tile.attend();
    for (std::int64_t i = 0; i < tile.rows; ++i)
      emit(p.entries[item.entry_index + (first + i) / group], kv_head * group + (first + i) % group, tile.state(i));
  }
}

// Computes the task (unit of the segment table, kv head). The rows of a unit may come in any order in each of its
// items, so the state of a row is found by its place among the unit's rows.
template <typename T>
void attention(const AttentionParams& p, std::int64_t task) {
  const std::int64_t kv_head = task % p.kv_heads, unit = task / p.kv_heads, group = p.heads / p.kv_heads;
  const std::int64_t state_size = p.head_dim + 2, begin = p.unit_item[unit], end = p.unit_item[unit + 1];
  const AttentionWorkspace<T> workspace = AttentionWorkspace<T>::of_thread(p);
  float* states = workspace.row_states;
  std::int32_t* rows = workspace.unit_rows;
  std::int64_t num_rows = 0, next = 0;  // next: where the next row is looked for first
  const auto find_or_add = [&](std::int32_t row) {
    for (std::int64_t tries = 0; tries < num_rows; ++tries, next = next + 1 < num_rows ? next + 1 : 0)
      if (rows[next] == row) return next;
    rows[num_rows] = row;
    for (std::int64_t g = 0; g < group; ++g)
      initialize(p, kv_head * group + g, SoftmaxState(states + (num_rows * group + g) * state_size));
    return next = num_rows++;
  };
  for (std::int64_t i = begin; i < end; ++i)
    attend_item<T>(p, p.items[i], kv_head, workspace,
                   [&](const Entry& entry, std::int64_t head, SoftmaxState partial) {
                     const std::int64_t place = find_or_add(entry.row) * group + head % group;
                     merge(p, SoftmaxState(states + place * state_size), partial);
                   });
  for (std::int64_t i = 0; i < num_rows; ++i)
    for (std::int64_t g = 0; g < group; ++g)
      write_output(p, SoftmaxState(states + (i * group + g) * state_size),
                   static_cast<T*>(p.out) + (rows[i] * p.heads + kv_head * group + g) * p.head_dim);
}

// Computes the task (item, kv head), and stores the partial results instead of merging them.
template <typename T>
void partial_attention(const AttentionParams& p, std::int64_t task) {
  const std::int64_t state_size = p.head_dim + 2;
  attend_item<T>(p, p.items[task / p.kv_heads], task % p.kv_heads, AttentionWorkspace<T>::of_thread(p),
                 [&](const Entry& entry, std::int64_t head, SoftmaxState partial) {
                   float* out = p.partial + (entry.partial * p.heads + head) * state_size;
                   std::memcpy(out, partial.peak, state_size * sizeof(float));
                 });
}

// Merges the stored partial results of a row.
template <typename T>
void merge_attention(const AttentionParams& p, std::int64_t row) {
  const std::int64_t state_size = p.head_dim + 2;
  const SoftmaxState state(reinterpret_cast<float*>(thread_workspace(state_size * sizeof(float))));
  for (std::int64_t head = 0; head < p.heads; ++head) {
    initialize(p, head, state);
    for (std::int64_t i = p.row_partial[row]; i < p.row_partial[row + 1]; ++i)
      merge(p, state, SoftmaxState(p.partial + (i * p.heads + head) * state_size));
    write_output(p, state, static_cast<T*>(p.out) + (row * p.heads + head) * p.head_dim);
  }
}

void attention_task(const AttentionParams& p, std::int64_t task) {
  const TileScope scope;
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { attention<T>(p, task); });
}

void partial_attention_task(const AttentionParams& p, std::int64_t task) {
  const TileScope scope;
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { partial_attention<T>(p, task); });
}

void merge_attention_row(const AttentionParams& p, std::int64_t row) {
  with_dtype(p.dtype, [&]<typename T>(Tag<T>) { merge_attention<T>(p, row); });
}

}  // namespace
