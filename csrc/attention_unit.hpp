// Attention over the segments of a paged cache. Only for isa_*.cpp.
//
// A row's segment is computed alone: scores, their softmax, the weighted values, in the order of positions. Its partial
// result (peak, total, values) is then folded into the row's own, in the order of segments. Which rows are computed
// together, and whether partial results are kept in memory on the way, changes no bit.
#pragma once

#include "dot.hpp"
#include "kernels.hpp"

namespace {

using namespace genssd;

constexpr std::int64_t kLargestSegment = 1024;

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

// One segment of one kv head: where its tokens lie, and its keys with tokens side by side, so that a vector holds the
// scores of several tokens.
template <typename T>
struct Keys {
  std::int64_t* offset;  // [tokens]: of a token's key or value from the first page's
  float* columns;        // [lanes of a key, stride]

  INLINE static std::int64_t stride(const Attention& t) { return (t.segment + kLanes - 1) / kLanes * kLanes; }
  INLINE static std::int64_t lanes(const Attention& t) {
    return (t.width + Products<T>::kPerLane - 1) / Products<T>::kPerLane;
  }
  // Floats of memory: rows of whole vectors are written, and offsets are two floats each.
  INLINE static std::int64_t size(const Attention& t) {
    return stride(t) * ((lanes(t) + kLanes - 1) / kLanes * kLanes + 2);
  }

  Keys(const Attention& t, const Item& item, std::int64_t kv_head, float* memory)
      : offset(reinterpret_cast<std::int64_t*>(memory)), columns(memory + 2 * stride(t)) {
    std::int64_t token = 0;
    for (std::int64_t page = item.page; token < item.tokens; ++page)
      for (std::int64_t slot = t.pages[page] * t.page_size, i = 0; i < t.page_size && token < item.tokens; ++i)
        offset[token++] = ((slot + i) * t.kv_heads + kv_head) * t.width;
    const T* keys = static_cast<const T*>(t.k_pages);
    for (std::int64_t first = 0; first < item.tokens; first += kLanes)
      for (std::int64_t lane = 0; lane < lanes(t); lane += kLanes) {
        F block[kLanes];
        for (std::int64_t i = 0; i < kLanes; ++i)
          block[i] = Products<T>::lanes(keys + offset[least(first + i, item.tokens - 1)], lane, t.width);
        transpose(block);
        for (std::int64_t i = 0; i < kLanes; ++i) store(columns + (lane + i) * stride(t) + first, block[i]);
      }
  }
};

// Up to kTileRows query vectors against one segment.
template <typename T>
struct Strip {
  const Attention& t;
  const Item& item;
  const Keys<T>& keys;
  std::int64_t rows = 0;
  std::int64_t low[kTileRows], high[kTileRows];  // the tokens that each sees, counted from the segment's first
  float* values[kTileRows];
  T* queries;     // [kTileRows, width]
  float* scores;  // [kTileRows, kStride]

  static constexpr std::int64_t kStride = kLargestSegment + kLanes;

  INLINE const T* value(std::int64_t token) const { return static_cast<const T*>(t.v_pages) + keys.offset[token]; }

  // The scores of VECTORS vectors of tokens, from `first` on. Long keys are summed in parts, for the sake of float.
  template <int ROWS, int VECTORS>
  INLINE void score_block(std::int64_t first) {
    using P = Products<T>;
    constexpr std::int64_t kSummed = 64;
    const std::int64_t lanes = Keys<T>::lanes(t), stride = Keys<T>::stride(t);
    for (std::int64_t begin = 0; begin < lanes; begin += kSummed) {
      F total[ROWS][VECTORS];
      for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < VECTORS; ++j) total[r][j] = zero();
      for (std::int64_t lane = begin; lane < least(lanes, begin + kSummed); ++lane) {
        const float* column = keys.columns + lane * stride + first;
        F key[VECTORS];
        for (int j = 0; j < VECTORS; ++j) key[j] = load(column + j * kLanes);
        for (int r = 0; r < ROWS; ++r) {
          const F query = P::everywhere(queries + r * t.width, lane, t.width);
          for (int j = 0; j < VECTORS; ++j) total[r][j] = P::lane_step(key[j], query, total[r][j]);
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < VECTORS; ++j) {
          float* out = scores + r * kStride + first + j * kLanes;
          store(out, begin ? add(load(out), total[r][j]) : total[r][j]);
        }
    }
  }

  template <int ROWS>
  void score() {
    std::int64_t first = 0;
    for (; first + 3 * kLanes < item.tokens; first += 4 * kLanes) score_block<ROWS, 4>(first);
    for (; first < item.tokens; first += kLanes) score_block<ROWS, 1>(first);
  }

  void score_all() {
    switch (rows) {
      case 1: return score<1>();
      case 2: return score<2>();
#if defined(__AVX512F__)
      case 3: return score<3>();
      case 4: return score<4>();
      case 5: return score<5>();
      case 6: return score<6>();
#endif
      default: __builtin_unreachable();
    }
  }

  INLINE void weigh(std::int64_t i, State state) {
    float* s = scores + i * kStride;
    const std::int64_t first = low[i] / kLanes * kLanes;
    for (std::int64_t k = first; k < high[i]; k += kLanes) {
      F x = mul(load(s + k), fill(t.scale));
      if (t.softcap > 0.0f) x = mul(fill(t.softcap), hyperbolic_tangent(div(x, fill(t.softcap))));
      store(s + k, x);
    }
    for (std::int64_t k = first; k < low[i]; ++k) s[k] = -kInfinity;
    for (std::int64_t k = high[i]; k % kLanes; ++k) s[k] = -kInfinity;
    F peaks = fill(-kInfinity);
    for (std::int64_t k = first; k < high[i]; k += kLanes) peaks = larger(peaks, load(s + k));
    const float peak = largest(peaks);
    const F base = fill(peak > -kInfinity ? peak : 0.0f);
    F total = zero();
    for (std::int64_t k = first; k < high[i]; k += kLanes) {
      const F e = exponential(sub(load(s + k), base));
      store(s + k, e);
      total = add(total, e);
    }
    *state.peak = peak;
    *state.total = sum(total);
  }

  // values[i..i + ROWS - 1] += weights of tokens from..to - 1 times their values
  template <int ROWS>
  INLINE void gather(std::int64_t i, std::int64_t from, std::int64_t to) {
    constexpr std::int64_t kWide = 4 * kLanes;
    for (std::int64_t d = 0; d < t.width; d += kWide) {
      F total[ROWS][4];
      for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4; ++j)
          total[r][j] = d + j * kLanes < t.width ? load_at(values[i + r], d + j * kLanes, t.width) : zero();
      if (d + kWide <= t.width) {
        for (std::int64_t k = from; k < to; ++k) {
          const T* v = value(k) + d;
          const F part[4] = {load(v), load(v + kLanes), load(v + 2 * kLanes), load(v + 3 * kLanes)};
          for (int r = 0; r < ROWS; ++r) {
            const F weight = fill(scores[(i + r) * kStride + k]);
            for (int j = 0; j < 4; ++j) total[r][j] = fma(weight, part[j], total[r][j]);
          }
        }
      } else {
        for (std::int64_t k = from; k < to; ++k) {
          const T* v = value(k);
          for (int j = 0; j < 4 && d + j * kLanes < t.width; ++j) {
            const F part = load_at(v, d + j * kLanes, t.width);
            for (int r = 0; r < ROWS; ++r) total[r][j] = fma(fill(scores[(i + r) * kStride + k]), part, total[r][j]);
          }
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < 4 && d + j * kLanes < t.width; ++j)
          store_at(values[i + r], total[r][j], d + j * kLanes, t.width);
    }
  }

  void gather_all(std::int64_t from, std::int64_t to) {
    switch (rows) {
      case 1: return gather<1>(0, from, to);
      case 2: return gather<2>(0, from, to);
#if defined(__AVX512F__)
      case 3: return gather<3>(0, from, to);
      case 4: return gather<4>(0, from, to);
      case 5: return gather<5>(0, from, to);
      case 6: return gather<6>(0, from, to);
#endif
      default: __builtin_unreachable();
    }
  }

  // What a row does not see may hold anything, NaN included: it is never multiplied, not even by 0.
  void attend(float* const* state) {
    score_all();
    std::int64_t low_of_all = low[0], high_of_all = high[0];
    for (std::int64_t i = 0; i < rows; ++i) {
      const State row(state[i]);
      weigh(i, row);
      values[i] = row.values;
      for (std::int64_t d = 0; d < t.width; ++d) row.values[d] = 0.0f;
      low_of_all = most(low_of_all, low[i]);
      high_of_all = least(high_of_all, high[i]);
    }
    if (low_of_all >= high_of_all) {
      for (std::int64_t i = 0; i < rows; ++i) gather<1>(i, low[i], high[i]);
      return;
    }
    for (std::int64_t i = 0; i < rows; ++i) gather<1>(i, low[i], low_of_all);
    gather_all(low_of_all, high_of_all);
    for (std::int64_t i = 0; i < rows; ++i) gather<1>(i, high_of_all, high[i]);
  }
};

// Computes an item for one kv head, and hands every partial result to take(entry, head, state).
template <typename T, typename Take>
INLINE void attend_item(const Attention& t, const Item& item, std::int64_t kv_head, float* scratch, const Take& take) {
  const std::int64_t group = t.heads / t.kv_heads, vectors = item.entries * group, size = t.width + 2;
  const Keys<T> keys(t, item, kv_head, scratch);
  float* states = scratch + Keys<T>::size(t);
  float* scores = states + kTileRows * size;
  T* queries = reinterpret_cast<T*>(scores + kTileRows * Strip<T>::kStride);
  for (std::int64_t vector = 0; vector < vectors; vector += kTileRows) {
    Strip<T> strip{t, item, keys, least(kTileRows, vectors - vector), {}, {}, {}, queries, scores};
    float* state[kTileRows];
    for (std::int64_t i = 0; i < strip.rows; ++i) {
      const std::int64_t row = t.entries[item.entry + (vector + i) / group].row;
      const std::int64_t head = kv_head * group + (vector + i) % group;
      const std::int64_t position = t.position[row];
      strip.high[i] = least(item.tokens, position + 1 - item.first);
      strip.low[i] = t.window > 0 ? most(0, position - t.window + 1 - item.first) : 0;
      const T* q = static_cast<const T*>(t.q) + (row * t.heads + head) * t.width;
      for (std::int64_t d = 0; d < t.width; ++d) queries[i * t.width + d] = q[d];
      state[i] = states + i * size;
    }
    strip.attend(state);
    for (std::int64_t i = 0; i < strip.rows; ++i)
      take(t.entries[item.entry + (vector + i) / group], kv_head * group + (vector + i) % group,
           State(state[i]));
  }
}

// Floats of scratch that an item needs.
template <typename T>
INLINE std::int64_t item_floats(const Attention& t) {
  return Keys<T>::size(t) + kTileRows * (t.width + 2 + Strip<T>::kStride + t.width) + 2;
}

// Memory that a thread keeps from unit to unit.
float* scratch_of(std::int64_t floats) {
  struct Memory {
    ~Memory() { delete[] held; }
    float* held = nullptr;
    std::int64_t size = 0;
  };
  static thread_local Memory memory;
  if (memory.size < floats) {
    delete[] memory.held;
    memory.held = nullptr;
    memory.size = 0;
    memory.held = new float[static_cast<std::size_t>(floats)];
    memory.size = floats;
  }
  return memory.held;
}

// Unit: (a unit of the table, a kv head). Rows of a unit follow each other in its items, in no particular order: their
// states are found by the place of their row among the unit's rows.
template <typename T>
void attention_of(const Attention& t, std::int64_t unit) {
  const std::int64_t kv_head = unit % t.kv_heads, which = unit / t.kv_heads, group = t.heads / t.kv_heads;
  const std::int64_t size = t.width + 2, begin = t.unit_item[which], end = t.unit_item[which + 1];
  float* scratch = scratch_of(item_floats<T>(t) + t.unit_rows * (group * size + 1));
  float* states = scratch + item_floats<T>(t);
  std::int32_t* rows = reinterpret_cast<std::int32_t*>(states + t.unit_rows * group * size);
  std::int64_t known = 0, hint = 0;
  const auto place = [&](std::int32_t row) {
    for (std::int64_t tried = 0; tried < known; ++tried, hint = hint + 1 < known ? hint + 1 : 0)
      if (rows[hint] == row) return hint;
    rows[known] = row;
    for (std::int64_t g = 0; g < group; ++g)
      start(t, kv_head * group + g, State(states + (known * group + g) * size));
    return hint = known++;
  };
  for (std::int64_t i = begin; i < end; ++i)
    attend_item<T>(t, t.items[i], kv_head, scratch, [&](const Entry& entry, std::int64_t head, State more) {
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
  attend_item<T>(t, t.items[unit / t.kv_heads], unit % t.kv_heads, scratch_of(item_floats<T>(t)),
                 [&](const Entry& entry, std::int64_t head, State more) {
                   float* to = t.partial + (entry.partial * t.heads + head) * size;
                   for (std::int64_t d = 0; d < size; ++d) to[d] = more.peak[d];
                 });
}

template <typename T>
void fold_attention_of(const Attention& t, std::int64_t row) {
  const std::int64_t size = t.width + 2;
  const State state(scratch_of(size));
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
