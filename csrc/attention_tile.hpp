// Attention of a few query vectors over one segment, and how partial results are merged. Only for isa.cpp.
#pragma once

#include "dot.hpp"
#include "kernels.hpp"
#include "workspace.hpp"

namespace {

using namespace genssd;

// The softmax of a row so far, as floats that follow each other: the peak of its scores, the sum of their exponentials
// e^(score - peak), and head_dim sums of values weighted by these.
struct SoftmaxState {
  float *peak, *total, *values;
  INLINE explicit SoftmaxState(float* p) : peak(p), total(p + 1), values(p + 2) {}
};

// Starts the state of a row that saw no token, or only the head's sink: a score without a value.
INLINE void initialize(const AttentionParams& p, std::int64_t head, SoftmaxState state) {
  *state.peak = p.sinks ? p.sinks[head] : -kInfinity;
  *state.total = p.sinks ? 1.0f : 0.0f;
  for (std::int64_t d = 0; d < p.head_dim; ++d) state.values[d] = 0.0f;
}

// Merges the partial result of the next segment into the state of a row.
INLINE void merge(const AttentionParams& p, SoftmaxState into, SoftmaxState partial) {
  if (*partial.total == 0.0f) return;  // the row saw no token: the difference of two peaks of -inf would be NaN
  const float peak = *partial.peak > *into.peak ? *partial.peak : *into.peak;
  const float a = exponential(*into.peak - peak), b = exponential(*partial.peak - peak);
  *into.peak = peak;
  *into.total = *into.total * a + *partial.total * b;
  for (std::int64_t d = 0; d < p.head_dim; d += kLanes) {
    const Vec old = load_bounded(into.values, d, p.head_dim);
    const Vec sum = fma(load_bounded(partial.values, d, p.head_dim), broadcast(b), mul(old, broadcast(a)));
    store_bounded(into.values, sum, d, p.head_dim);
  }
}

// Writes values / total, and zeros for a row that saw nothing.
template <typename T>
INLINE void write_output(const AttentionParams& p, SoftmaxState state, T* out) {
  const float total = *state.total;
  for (std::int64_t d = 0; d < p.head_dim; d += kLanes) {
    const Vec values = load_bounded(state.values, d, p.head_dim);
    store_bounded(out, total == 0.0f ? zero() : div(values, broadcast(total)), d, p.head_dim);
  }
}

INLINE std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Query vectors that are computed together.
template <typename T>
constexpr std::int64_t kQueryRows = kUsesTiles<T> ? kTileHeight : kTileRows;

// From so many query tiles on, an item's keys are copied side by side before they are multiplied, so that the products
// read one stream of memory instead of one per page (measured on AVX-512; tile registers read whole tiles anyway).
constexpr std::int64_t kCopiedFrom = 4;

// The memory that items are computed in: an item's keys, where their pages do not serve, in panels whose columns are
// tokens; its values packed into panels, with dimensions as the columns; a query tile, its scores, weights and states;
// and the states of a unit's rows.
template <typename T>
struct AttentionWorkspace {
  std::int64_t key_cells;      // cells of one key
  std::int64_t token_cells;    // cells of one dimension of the values of all tokens
  std::int64_t value_panels;   // panels that the dimensions of the values take
  std::int64_t score_stride;   // distance of the rows of scores, and of weights
  std::int64_t state_stride;   // distance of the states of a tile
  std::int64_t* offset;        // [segment]: index of a token's value in the pages
  const Cell<T>** key_blocks;  // [key blocks]: first cell of every block of kKeyBlock keys
  Cell<T>*keys, *values;       // [token panels, key_cells, kPanelWidth], [value_panels, token_cells, kPanelWidth]
  Cell<T>* visible_cells;      // [kTileCells, kPanelWidth]: cells of which a row sees a part
  T *queries, *weights;        // [kQueryRows, head_dim], [kQueryRows, score_stride]
  float *scores, *states;      // [kQueryRows, score_stride], [kQueryRows, state_stride]
  float* row_states;           // [unit_rows, heads per kv head, head_dim + 2]
  std::int32_t* unit_rows;     // [unit_rows]: row number that each of row_states belongs to
  std::int64_t bytes;          // size of all arrays together

  INLINE AttentionWorkspace(const AttentionParams& p, Arena arena)
      : key_cells(num_cells<T>(p.head_dim)),
        token_cells(round_up(num_cells<T>(p.segment), kUsesTiles<T> ? kTileCells : 1)),
        value_panels(round_up(p.head_dim, kPanelWidth) / kPanelWidth),
        score_stride(round_up(p.segment, kPanelWidth)),
        state_stride(2 + value_panels * kPanelWidth),
        offset(arena.allocate<std::int64_t>(p.segment)),
        key_blocks(arena.allocate<const Cell<T>*>(score_stride / kKeyBlock)),
        keys(arena.allocate<Cell<T>>(score_stride * key_cells)),
        values(arena.allocate<Cell<T>>(value_panels * token_cells * kPanelWidth)),
        visible_cells(arena.allocate<Cell<T>>(kTileCells * kPanelWidth)),
        queries(arena.allocate<T>(kQueryRows<T> * p.head_dim)),
        weights(arena.allocate<T>(kQueryRows<T> * score_stride)),
        scores(arena.allocate<float>(kQueryRows<T> * score_stride)),
        states(arena.allocate<float>(kQueryRows<T> * state_stride)),
        row_states(arena.allocate<float>(p.unit_rows * (p.heads / p.kv_heads) * (p.head_dim + 2))),
        unit_rows(arena.allocate<std::int32_t>(p.unit_rows)),
        bytes(arena.bytes()) {}

  INLINE static AttentionWorkspace of_thread(const AttentionParams& p) {
    return AttentionWorkspace(p, Arena(thread_workspace(AttentionWorkspace(p, Arena()).bytes)));
  }

  INLINE Cell<T>* value_cells(std::int64_t panel, std::int64_t cell) const {
    return values + (panel * token_cells + cell) * kPanelWidth;
  }

  // Finds the blocks of an item's keys for one kv head, for so many query tiles: in the pages, or in `keys`, to which
  // they are copied. Returns how many cells lie between two rows of a block.
  INLINE std::int64_t find_keys(const AttentionParams& p, const Item& item, std::int64_t kv_head,
                                std::int64_t tiles) const {
    const auto key_of = [&](std::int64_t token) {  // the first cell of a token's key
      const std::int64_t page = p.pages[item.page_index + token / p.page_size];
      return static_cast<const Cell<T>*>(p.k_pages) + (page * p.kv_heads + kv_head) * key_cells * p.page_size +
             token % p.page_size;
    };
    const bool has_blocks = p.page_size % kKeyBlock == 0, copies = !kUsesTiles<T> && tiles >= kCopiedFrom;
    for (std::int64_t first = 0; first < item.num_tokens; first += kKeyBlock) {
      Cell<T>* panel = keys + first / kPanelWidth * kPanelWidth * key_cells + first % kPanelWidth;
      key_blocks[first / kKeyBlock] = has_blocks && !copies ? key_of(first) : panel;
      if (has_blocks && !copies) continue;
      if (has_blocks)
        copy_cells<kKeyBlock>(key_of(first), p.page_size, panel);
      else
        for (std::int64_t i = 0; i < min(kKeyBlock, item.num_tokens - first); ++i)
          copy_cells<1>(key_of(first + i), p.page_size, panel + i);
    }
    return has_blocks && !copies ? p.page_size : kPanelWidth;
  }

  // Copies KEYS keys that lie side by side, `row` cells from one row to the next, to columns of a panel.
  template <std::int64_t KEYS>
  INLINE void copy_cells(const Cell<T>* from, std::int64_t row, Cell<T>* panel) const {
    for (std::int64_t cell = 0; cell < key_cells; ++cell)
      std::memcpy(panel + cell * kPanelWidth, from + cell * row, KEYS * sizeof(Cell<T>));
  }

  // Packs the values of an item for one kv head; returns whether all of them are known to be finite.
  INLINE bool pack_values(const AttentionParams& p, const Item& item, std::int64_t kv_head) const {
    std::int64_t token = 0;
    for (std::int64_t page = item.page_index; token < item.num_tokens; ++page)
      for (std::int64_t slot = p.pages[page] * p.page_size, i = 0; i < p.page_size && token < item.num_tokens; ++i)
        offset[token++] = ((slot + i) * p.kv_heads + kv_head) * p.head_dim;
    const T* v = static_cast<const T*>(p.v_pages);
    const std::int64_t cells = num_cells<T>(item.num_tokens);
    unsigned finite_bits = ~0u;
    for (std::int64_t cell = 0; cell < cells; ++cell) {
      const std::int64_t first = cell * Cells<T>::kValues, last = first + Cells<T>::kValues - 1;
      for (std::int64_t d = 0; d < p.head_dim; d += kLanes) {
        const Vec first_value = load_bounded(v + offset[first], d, p.head_dim);
        const Vec last_value = last < item.num_tokens ? load_bounded(v + offset[last], d, p.head_dim) : zero();
        Cells<T>::store_cells(value_cells(d / kPanelWidth, cell) + d % kPanelWidth,
                              Cells<T>::join(first_value, last_value));
        if constexpr (kUsesTiles<T>)  // the difference of NaN or infinity with itself is NaN
          finite_bits &= greater_bits(broadcast(1.0f), sub(first_value, first_value)) &
                         greater_bits(broadcast(1.0f), sub(last_value, last_value));
      }
    }
    if constexpr (kUsesTiles<T>)
      for (std::int64_t panel = 0; panel < value_panels; ++panel)
        std::memset(value_cells(panel, cells), 0,
                    (round_up(cells, kTileCells) - cells) * kPanelWidth * sizeof(Cell<T>));
    return kUsesTiles<T> && (finite_bits & ((1u << kLanes) - 1)) == (1u << kLanes) - 1;
  }
};

// Up to kQueryRows query vectors, which attend to the item whose keys and values are in the workspace. Row i
// sees the tokens visible_begin[i]..visible_end[i] - 1, counted from the segment's first. What a row does not see may
// hold anything, NaN included: it changes nothing.
template <typename T>
struct QueryTile {
  const AttentionParams& p;
  const Item& item;
  const AttentionWorkspace<T>& workspace;
  std::int64_t key_row;  // cells from one row of the blocks of keys to the next
  bool is_finite;        // whether all values of the item are known to be finite
  std::int64_t rows;
  std::int64_t visible_begin[kQueryRows<T>], visible_end[kQueryRows<T>];

  INLINE SoftmaxState state(std::int64_t i) const {
    return SoftmaxState(workspace.states + i * workspace.state_stride);
  }

  // Computes the scores of all rows, for the tokens that any of them sees.
  void compute_scores() {
    std::int64_t begin = item.num_tokens, end = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      begin = min(begin, visible_begin[i]);
      end = max(end, visible_end[i]);
    }
    const Rows<T> queries{workspace.queries, p.head_dim, rows};
    for (std::int64_t first = begin / kPanelWidth * kPanelWidth; first < end; first += kPanelWidth)
      dot_panel(queries, BlockPanel<Cell<T>>{workspace.key_blocks + first / kKeyBlock, key_row},
                min(kPanelWidth, end - first), p.head_dim, Output{workspace.scores + first, workspace.score_stride});
  }

  // Turns the scores of row i into weights, 0 for tokens that it does not see. Weights are rounded to the dtype of the
  // values, and the rounded ones are added, so that they still sum to 1 after the division by the total.
  INLINE void compute_weights(std::int64_t i) {
    const std::int64_t begin = visible_begin[i], end = visible_end[i], first = begin / kLanes * kLanes;
    float* s = workspace.scores + i * workspace.score_stride;
    T* w = workspace.weights + i * workspace.score_stride;
    Vec peaks = broadcast(-kInfinity);
    for (std::int64_t k = first; k < end; k += kLanes) {
      Vec x = mul(load(s + k), broadcast(p.scale));
      if (p.softcap > 0.0f) x = mul(broadcast(p.softcap), hyperbolic_tangent(div(x, broadcast(p.softcap))));
      store(s + k, x);
      if (k < begin || k + kLanes > end) {
        for (std::int64_t j = 0; j < kLanes; ++j)
          if (k + j < begin || k + j >= end) s[k + j] = -kInfinity;
        x = load(s + k);
      }
      peaks = max(peaks, x);
    }
    const float peak = reduce_max(peaks);
    const Vec base = broadcast(peak > -kInfinity ? peak : 0.0f);
    Vec total = zero();
    for (std::int64_t k = first; k < end; k += kLanes) {
      store(w + k, exponential(sub(load(s + k), base)));
      total = add(total, load(w + k));
    }
    *state(i).peak = peak;
    *state(i).total = reduce_sum(total);
  }

  // Computes the states of all rows.
  void attend() {
    compute_scores();
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t d = 0; d < p.head_dim; ++d) state(i).values[d] = 0.0f;
      compute_weights(i);
    }
    if constexpr (kUsesTiles<T>)
      add_steps();
    else
      add_visible_cells();
  }

  // Adds weights times values to the states of all rows, in steps of the tile registers that begin at the segment's
  // first token. A weight of 0 times a finite value adds nothing, which is how tokens that a row does not see are left
  // out; where a value may not be finite, they are taken out of the values, row by row. The bits are the same.
  void add_steps() {
    std::int64_t begin = item.num_tokens, end = 0;
    for (std::int64_t i = 0; i < rows; ++i)
      if (visible_begin[i] < visible_end[i]) begin = min(begin, visible_begin[i]), end = max(end, visible_end[i]);
    if (begin >= end) return;
    begin = begin / kStepValues * kStepValues;
    end = round_up(end, kStepValues);
    for (std::int64_t i = 0; i < rows; ++i) {
      T* weights = workspace.weights + i * workspace.score_stride;
      const bool sees_any = visible_begin[i] < visible_end[i];
      const std::int64_t written_begin = sees_any ? visible_begin[i] / kLanes * kLanes : end;
      const std::int64_t written_end = sees_any ? round_up(visible_end[i], kLanes) : end;
      for (std::int64_t k = begin; k < written_begin; k += kLanes) store(weights + k, zero());
      for (std::int64_t k = written_end; k < end; k += kLanes) store(weights + k, zero());
    }
    for (std::int64_t panel = 0; panel < workspace.value_panels; ++panel) {
      if (is_finite) {
        add_products(0, rows, begin, end, panel, workspace.value_cells(panel, begin / Cells<T>::kValues));
        continue;
      }
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t k = begin; k < end; k += kStepValues) {
          copy_visible_cells(i, k, panel);
          add_products(i, 1, k, k + kStepValues, panel, workspace.visible_cells);
        }
    }
  }

  // Adds the weights of the tokens begin..end - 1 times their values, as many dimensions as a panel holds, to the
  // states of rows i..i + count - 1. cells: the values of these tokens.
  INLINE void add_products(std::int64_t i, std::int64_t count, std::int64_t begin, std::int64_t end,
                           std::int64_t panel, const Cell<T>* cells) {
    dot_tiles(workspace.weights + i * workspace.score_stride + begin, workspace.score_stride, count,
              Panel<Cell<T>>{cells}, min(kPanelWidth, p.head_dim - panel * kPanelWidth), end - begin, false, nullptr,
              state(i).values + panel * kPanelWidth, workspace.state_stride);
  }

  // Copies the values of a step from token `begin` on to visible_cells, with zeros for tokens that row i does not see.
  void copy_visible_cells(std::int64_t i, std::int64_t begin, std::int64_t panel) {
    const auto sees = [&](std::int64_t token) { return visible_begin[i] <= token && token < visible_end[i]; };
    for (std::int64_t cell = 0; cell < kTileCells; ++cell) {
      const Cell<T>* from = workspace.value_cells(panel, begin / Cells<T>::kValues + cell);
      Cell<T>* to = workspace.visible_cells + cell * kPanelWidth;
      const bool first = sees(begin + 2 * cell), second = sees(begin + 2 * cell + 1);
      for (std::int64_t d = 0; d < kPanelWidth; ++d)
        to[d] = first && second ? from[d] : first || second ? Cells<T>::keep_half(from[d], second) : Cell<T>{};
    }
  }

  // Adds weights times values to the states of all rows, cell by cell, and half a cell where a row sees only that.
  void add_visible_cells() {
    constexpr std::int64_t kValues = Cells<T>::kValues;
    std::int64_t first_cell[kQueryRows<T>], end_cell[kQueryRows<T>];    // cells of which row i sees every token
    std::int64_t shared_first = 0, shared_end = workspace.token_cells;  // cells of which all rows see every token
    for (std::int64_t i = 0; i < rows; ++i) {
      first_cell[i] = (visible_begin[i] + kValues - 1) / kValues;
      end_cell[i] = visible_begin[i] < visible_end[i] ? visible_end[i] / kValues : 0;
      shared_first = max(shared_first, first_cell[i]);
      shared_end = min(shared_end, end_cell[i]);
    }
    const bool any_shared = shared_first < shared_end;
    for (std::int64_t i = 0; i < rows; ++i) {
      if (visible_begin[i] < visible_end[i] && visible_begin[i] % kValues)
        add_half_cell(i, visible_begin[i] / kValues, true);
      add_cells(i, 1, first_cell[i], any_shared ? shared_first : end_cell[i]);
    }
    if (any_shared) add_cells(0, rows, shared_first, shared_end);
    for (std::int64_t i = 0; i < rows; ++i) {
      if (any_shared) add_cells(i, 1, shared_end, end_cell[i]);
      if (visible_begin[i] < visible_end[i] && visible_end[i] % kValues)
        add_half_cell(i, visible_end[i] / kValues, false);
    }
  }

  // Adds weights times values to the states of rows i..i + count - 1, for the cells begin..end - 1 of the tokens.
  INLINE void add_cells(std::int64_t i, std::int64_t count, std::int64_t begin, std::int64_t end) {
    if (begin >= end) return;
    const T* weights = workspace.weights + i * workspace.score_stride + begin * Cells<T>::kValues;
    for (std::int64_t panel = 0; panel < workspace.value_panels; ++panel)
      dot_cells(Rows<T>{weights, workspace.score_stride, count}, Panel<Cell<T>>{workspace.value_cells(panel, begin)},
                min(kPanelWidth, p.head_dim - panel * kPanelWidth), end - begin, Accumulate::kContinue, nullptr,
                Output{state(i).values + panel * kPanelWidth, workspace.state_stride});
  }

  // Adds weights times values to the state of row i, for a cell of which it sees only one half.
  void add_half_cell(std::int64_t i, std::int64_t cell, bool second) {
    const T* weights = workspace.weights + i * workspace.score_stride + cell * Cells<T>::kValues;
    for (std::int64_t panel = 0; panel < workspace.value_panels; ++panel) {
      const Cell<T>* cells = workspace.value_cells(panel, cell);
      for (std::int64_t d = 0; d < kPanelWidth; ++d)
        workspace.visible_cells[d] = Cells<T>::keep_half(cells[d], second);
      dot_cells(Rows<T>{weights, 0, 1}, Panel<Cell<T>>{workspace.visible_cells},
                min(kPanelWidth, p.head_dim - panel * kPanelWidth), 1, Accumulate::kContinue, nullptr,
                Output{state(i).values + panel * kPanelWidth, 0});
    }
  }
};

}  // namespace
