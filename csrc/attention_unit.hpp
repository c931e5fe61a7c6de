// Attention over the segments of a paged cache. Only for isa_*.cpp.
//
// A row's segment is computed alone: scores, their softmax, the weighted values, in the order of positions. Its
// partial result (peak, total, values) is then folded into the row's own, in the order of segments. Which rows are
// computed together, and whether partial results are kept in memory on the way, changes no bit.
#pragma once

#include "kernels.hpp"
#include "panel.hpp"
#include "scratch.hpp"

namespace {

using namespace genssd;

// What a row has seen: the peak of its scores, the sum of their exponentials, and values weighted by them.
struct State {
  float *peak, *total, *values;
  INLINE explicit State(float* at) : peak(at), total(at + 1), values(at + 2) {}
};

INLINE void start(const Attention& t, std::int64_t head, State state) {
  *state.peak = t.sinks ? t.sinks[head] : -kInfinity;
  *state.total = t.sinks ? 1.0f : 0.0f;
  for (std::int64_t d = 0; d < t.width; ++d) state.values[d] = 0.0f;
}

INLINE void fold_in(const Attention& t, State into, State more) {
  if (*more.total == 0.0f) return;  // nothing seen: the difference of two empty peaks would be NaN
  const float peak = *more.peak > *into.peak ? *more.peak : *into.peak;
  const float a = exponential(*into.peak - peak), b = exponential(*more.peak - peak);
  *into.peak = peak;
  *into.total = *into.total * a + *more.total * b;
  for (std::int64_t d = 0; d < t.width; d += kLanes) {
    const F old = load_at(into.values, d, t.width);
    store_at(into.values, fma(load_at(more.values, d, t.width), fill(b), mul(old, fill(a))), d, t.width);
  }
}

template <typename T>
INLINE void finish(const Attention& t, State state, T* out) {
  const float total = *state.total;
  for (std::int64_t d = 0; d < t.width; d += kLanes) {
    const F values = load_at(state.values, d, t.width);
    store_at(out, total == 0.0f ? zero() : div(values, fill(total)), d, t.width);
  }
}

INLINE std::int64_t rounded_up(std::int64_t count, std::int64_t to) { return (count + to - 1) / to * to; }

// What an item is computed in: its keys and values as panels, keys with tokens side by side, values with the width;
// and its rows, kTileRows at a time. Weights are rounded to the type of the values, and those that are summed are the
// rounded ones, so that they still make 1.
template <typename T>
struct Desk {
  std::int64_t key_cells, token_cells, value_panels;  // of a key, in whole blocks; of all tokens; of a value
  std::int64_t row, state;                            // numbers of a row of scores, and of a state
  std::int64_t* offset;                               // [segment]: of a token's key or value from the first page's
  Cell<T>*keys, *values, *half;  // [panels, key_cells, kPanel] [value_panels, token_cells, kPanel] [kPanel]
  T *queries, *weights;          // [kTileRows, width] [kTileRows, row]
  float *scores, *states;        // [kTileRows, row] [kTileRows, state]
  float* row_states;             // [unit_rows, group, width + 2]: of the rows of a unit
  std::int32_t* row_of;          // [unit_rows]
  std::int64_t bytes;            // all of this

  INLINE Desk(const Attention& t, Pieces memory)
      : key_cells(rounded_up(cells_of<T>(t.width), kLanes)),
        token_cells(cells_of<T>(t.segment)),
        value_panels(rounded_up(t.width, kPanel) / kPanel),
        row(rounded_up(t.segment, kPanel)),
        state(2 + value_panels * kPanel),
        offset(memory.take<std::int64_t>(t.segment)),
        keys(memory.take<Cell<T>>(row * key_cells)),
        values(memory.take<Cell<T>>(value_panels * token_cells * kPanel)),
        half(memory.take<Cell<T>>(kPanel)),
        queries(memory.take<T>(kTileRows * t.width)),
        weights(memory.take<T>(kTileRows * row)),
        scores(memory.take<float>(kTileRows * row)),
        states(memory.take<float>(kTileRows * state)),
        row_states(memory.take<float>(t.unit_rows * (t.heads / t.kv_heads) * (t.width + 2))),
        row_of(memory.take<std::int32_t>(t.unit_rows)),
        bytes(memory.bytes()) {}

  INLINE static Desk of(const Attention& t) { return Desk(t, Pieces(scratch(Desk(t, Pieces()).bytes))); }

  INLINE Cell<T>* value_cells(std::int64_t panel, std::int64_t cell) const {
    return values + (panel * token_cells + cell) * kPanel;
  }

  INLINE void lay_out(const Attention& t, const Item& item, std::int64_t kv_head) const {
    std::int64_t token = 0;
    for (std::int64_t page = item.page; token < item.tokens; ++page)
      for (std::int64_t slot = t.pages[page] * t.page_size, i = 0; i < t.page_size && token < item.tokens; ++i)
        offset[token++] = ((slot + i) * t.kv_heads + kv_head) * t.width;
    const T *k = static_cast<const T*>(t.k_pages), *v = static_cast<const T*>(t.v_pages);
    for (std::int64_t first = 0; first < item.tokens; first += kPanel)
      pack_columns<T>([&](std::int64_t c) { return k + offset[first + c]; }, least(kPanel, item.tokens - first),
                      t.width, keys + first * key_cells);
    for (std::int64_t cell = 0; cell < cells_of<T>(item.tokens); ++cell) {
      const std::int64_t at = cell * Cells<T>::kValues, last = at + Cells<T>::kValues - 1;
      for (std::int64_t d = 0; d < t.width; d += kLanes) {
        const F first = load_at(v + offset[at], d, t.width);
        const F second = last < item.tokens ? load_at(v + offset[last], d, t.width) : zero();
        Cells<T>::put(value_cells(d / kPanel, cell) + d % kPanel, Cells<T>::join(first, second));
      }
    }
  }
};

// Up to kTileRows query vectors against the segment on the desk.
template <typename T>
struct Strip {
  const Attention& t;
  const Item& item;
  const Desk<T>& desk;
  std::int64_t rows;
  std::int64_t low[kTileRows], high[kTileRows];  // the tokens that each sees, counted from the segment's first

  INLINE State state(std::int64_t i) const { return State(desk.states + i * desk.state); }

  void score() {
    std::int64_t begin = item.tokens, end = 0;  // what any row sees
    for (std::int64_t i = 0; i < rows; ++i) {
      begin = least(begin, low[i]);
      end = most(end, high[i]);
    }
    for (std::int64_t first = begin / kPanel * kPanel; first < end; first += kPanel)
      dot_panel(desk.queries, t.width, rows, desk.keys + first * desk.key_cells, least(kPanel, end - first), t.width,
                desk.scores + first, desk.row);
  }

  // Scores become weights, 0 for what is not seen.
  INLINE void weigh(std::int64_t i) {
    float* s = desk.scores + i * desk.row;
    T* w = desk.weights + i * desk.row;
    const std::int64_t first = low[i] / kLanes * kLanes;
    F peaks = fill(-kInfinity);
    for (std::int64_t k = first; k < high[i]; k += kLanes) {
      F x = mul(load(s + k), fill(t.scale));
      if (t.softcap > 0.0f) x = mul(fill(t.softcap), hyperbolic_tangent(div(x, fill(t.softcap))));
      store(s + k, x);
      if (k < low[i] || k + kLanes > high[i]) {
        for (std::int64_t j = 0; j < kLanes; ++j)
          if (k + j < low[i] || k + j >= high[i]) s[k + j] = -kInfinity;
        x = load(s + k);
      }
      peaks = larger(peaks, x);
    }
    const float peak = largest(peaks);
    const F base = fill(peak > -kInfinity ? peak : 0.0f);
    F total = zero();
    for (std::int64_t k = first; k < high[i]; k += kLanes) {
      store(w + k, exponential(sub(load(s + k), base)));
      total = add(total, load(w + k));
    }
    *state(i).peak = peak;
    *state(i).total = sum(total);
  }

  // values[i..i + some - 1] += weights times values, cells from..to - 1 of the tokens
  INLINE void gather(std::int64_t i, std::int64_t some, std::int64_t from, std::int64_t to) {
    if (from >= to) return;
    for (std::int64_t panel = 0; panel < desk.value_panels; ++panel)
      dot_cells(desk.weights + i * desk.row + from * Cells<T>::kValues, desk.row, some, desk.value_cells(panel, from),
                least(kPanel, t.width - panel * kPanel), to - from, Sum::kContinued, nullptr,
                state(i).values + panel * kPanel, desk.state);
  }

  // The same for a cell of which the row sees one half.
  void gather_half(std::int64_t i, std::int64_t cell, bool second) {
    for (std::int64_t panel = 0; panel < desk.value_panels; ++panel) {
      const Cell<T>* whole = desk.value_cells(panel, cell);
      for (std::int64_t d = 0; d < kPanel; ++d) desk.half[d] = Cells<T>::half(whole[d], second);
      dot_cells(desk.weights + i * desk.row + cell * Cells<T>::kValues, 0, 1, desk.half,
                least(kPanel, t.width - panel * kPanel), 1, Sum::kContinued, nullptr, state(i).values + panel * kPanel,
                0);
    }
  }

  // What a row does not see may hold anything, NaN included: it is never multiplied, not even by 0.
  void attend() {
    constexpr std::int64_t kValues = Cells<T>::kValues;
    score();
    std::int64_t from[kTileRows], to[kTileRows];  // cells that each sees whole; and that all do
    std::int64_t begin = 0, end = desk.token_cells;
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t d = 0; d < t.width; ++d) state(i).values[d] = 0.0f;
      weigh(i);
      from[i] = (low[i] + kValues - 1) / kValues;
      to[i] = low[i] < high[i] ? high[i] / kValues : 0;
      begin = most(begin, from[i]);
      end = least(end, to[i]);
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      if (low[i] < high[i] && low[i] % kValues) gather_half(i, low[i] / kValues, true);
      gather(i, 1, from[i], begin < end ? begin : to[i]);
    }
    if (begin < end) gather(0, rows, begin, end);
    for (std::int64_t i = 0; i < rows; ++i) {
      if (begin < end) gather(i, 1, end, to[i]);
      if (low[i] < high[i] && high[i] % kValues) gather_half(i, high[i] / kValues, false);
    }
  }
};

// Computes an item for one kv head, and hands every partial result to take(entry, head, state).
template <typename T, typename Take>
INLINE void attend_item(const Attention& t, const Item& item, std::int64_t kv_head, const Desk<T>& desk,
                        const Take& take) {
  const std::int64_t group = t.heads / t.kv_heads, vectors = item.entries * group;
  desk.lay_out(t, item, kv_head);
  for (std::int64_t vector = 0; vector < vectors; vector += kTileRows) {
    Strip<T> strip{t, item, desk, least(kTileRows, vectors - vector), {}, {}};
    for (std::int64_t i = 0; i < strip.rows; ++i) {
      const std::int64_t row = t.entries[item.entry + (vector + i) / group].row;
      const std::int64_t head = kv_head * group + (vector + i) % group;
      const std::int64_t position = t.position[row];
      strip.high[i] = least(item.tokens, position + 1 - item.first);
      strip.low[i] = t.window > 0 ? most(0, position - t.window + 1 - item.first) : 0;
      std::memcpy(desk.queries + i * t.width, static_cast<const T*>(t.q) + (row * t.heads + head) * t.width,
                  t.width * sizeof(T));
    }
    strip.attend();
    for (std::int64_t i = 0; i < strip.rows; ++i)
      take(t.entries[item.entry + (vector + i) / group], kv_head * group + (vector + i) % group, strip.state(i));
  }
}

// Unit: (a unit of the table, a kv head). Rows of a unit follow each other in its items, in no particular order: their
// states are found by the place of their row among the unit's rows.
template <typename T>
void attention_of(const Attention& t, std::int64_t unit) {
  const std::int64_t kv_head = unit % t.kv_heads, which = unit / t.kv_heads, group = t.heads / t.kv_heads;
  const std::int64_t size = t.width + 2, begin = t.unit_item[which], end = t.unit_item[which + 1];
  const Desk<T> desk = Desk<T>::of(t);
  float* states = desk.row_states;
  std::int32_t* rows = desk.row_of;
  std::int64_t known = 0, hint = 0;
  const auto place = [&](std::int32_t row) {
    for (std::int64_t tried = 0; tried < known; ++tried, hint = hint + 1 < known ? hint + 1 : 0)
      if (rows[hint] == row) return hint;
    rows[known] = row;
    for (std::int64_t g = 0; g < group; ++g) start(t, kv_head * group + g, State(states + (known * group + g) * size));
    return hint = known++;
  };
  for (std::int64_t i = begin; i < end; ++i)
    attend_item<T>(t, t.items[i], kv_head, desk, [&](const Entry& entry, std::int64_t head, State more) {
      fold_in(t, State(states + (place(entry.row) * group + head % group) * size), more);
    });
  for (std::int64_t i = 0; i < known; ++i)
    for (std::int64_t g = 0; g < group; ++g)
      finish(t, State(states + (i * group + g) * size),
             static_cast<T*>(t.out) + (rows[i] * t.heads + kv_head * group + g) * t.width);
}

// Unit: (an item, a kv head).
template <typename T>
void partial_attention_of(const Attention& t, std::int64_t unit) {
  const std::int64_t size = t.width + 2;
  attend_item<T>(t, t.items[unit / t.kv_heads], unit % t.kv_heads, Desk<T>::of(t),
                 [&](const Entry& entry, std::int64_t head, State more) {
                   float* to = t.partial + (entry.partial * t.heads + head) * size;
                   std::memcpy(to, more.peak, size * sizeof(float));
                 });
}

template <typename T>
void fold_attention_of(const Attention& t, std::int64_t row) {
  const std::int64_t size = t.width + 2;
  const State state(reinterpret_cast<float*>(scratch(size * sizeof(float))));
  for (std::int64_t head = 0; head < t.heads; ++head) {
    start(t, head, state);
    for (std::int64_t i = t.row_partial[row]; i < t.row_partial[row + 1]; ++i)
      fold_in(t, state, State(t.partial + (i * t.heads + head) * size));
    finish(t, state, static_cast<T*>(t.out) + (row * t.heads + head) * t.width);
  }
}

void attention_unit(const Attention& t, std::int64_t unit) {
  switch (t.type) {
    case Type::kFloat: return attention_of<float>(t, unit);
    case Type::kBFloat16: return attention_of<BFloat16>(t, unit);
    case Type::kFloat16: return attention_of<Float16>(t, unit);
  }
}

void partial_attention_unit(const Attention& t, std::int64_t unit) {
  switch (t.type) {
    case Type::kFloat: return partial_attention_of<float>(t, unit);
    case Type::kBFloat16: return partial_attention_of<BFloat16>(t, unit);
    case Type::kFloat16: return partial_attention_of<Float16>(t, unit);
  }
}

void fold_attention_row(const Attention& t, std::int64_t row) {
  switch (t.type) {
    case Type::kFloat: return fold_attention_of<float>(t, row);
    case Type::kBFloat16: return fold_attention_of<BFloat16>(t, row);
    case Type::kFloat16: return fold_attention_of<Float16>(t, row);
  }
}

}  // namespace
