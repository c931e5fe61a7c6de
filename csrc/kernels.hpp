// The kernels that each instruction set provides: functions of an operator's parameters and the index of one task of
// its work. Tasks share no result, so they run in any order on any thread.
#pragma once

#include <cstdint>

#include "dtypes.hpp"

namespace genssd {

inline constexpr std::int64_t kPanelWidth = 64;         // vectors side by side in a packed panel
inline constexpr std::int64_t kRowBlock = 128;          // rows that share one pass over a weight
inline constexpr std::int64_t kVocabularyBlock = 2048;  // vocabulary entries of one BlockStats; whole panels
inline constexpr std::int64_t kMaxHeadDim = 1024;       // largest head_dim that write_kv takes
inline constexpr std::int64_t kKeyBlock = 16;           // keys side by side that attention reads in place

// A matrix [outputs, inputs]: row-major; or packed into panels of kPanelWidth rows side by side (see dot.hpp).
struct Weight {
  const void* data;
  std::int64_t row_stride;  // values from one row to the next; 0: packed
};

// out = x @ weight.T + bias
struct LinearParams {
  DType dtype;           // dtype of x, weight and bias
  bool float_out;        // whether out is float32 instead of dtype
  const void *x, *bias;  // [rows, inputs], [outputs] or null
  Weight weight;
  void* out;  // [rows, outputs]
  std::int64_t rows, inputs, outputs, x_stride;
};

// The token with the largest score so far; -1 before the first.
struct BestToken {
  float score = -__builtin_inff();
  std::int64_t token = -1;
};

// Statistics of the logits z of one row over one block of the vocabulary. With d = z - peak and e = exp(d), they hold
// the sums of e, of e d and of e^2.
struct BlockStats {
  float peak = -__builtin_inff();  // largest z
  float sum_e = 0, sum_ed = 0, sum_ee = 0;
  std::int64_t num_above = 0;  // number of entries whose z is larger than the target's
  BestToken best;              // token with the largest z / temperature + noise
};

// One pass over a language-model head, which scores tokens, draws tokens, or both, and never stores the logits. Where
// the blocks of the vocabulary begin and end depends on its size alone.
//
// z is the logit after bias and softcap; where targets are scored, it is divided by the temperature, too.
struct HeadParams {
  DType dtype;
  const void *hidden, *bias;  // [rows, inputs], [vocabulary] or null
  Weight weight;
  std::int64_t rows, inputs, vocabulary, hidden_stride;
  float temperature, softcap;  // softcap 0: none

  // Scoring.
  const std::int64_t* target;  // [rows], or null: nothing is scored
  float* target_z;             // [rows]: z of the target
  std::int64_t top_k;          // number of the largest z that are kept
  float* top_values;           // [rows, blocks, top_k]: largest z of a block, descending
  std::int32_t* top_ids;       // [rows, blocks, top_k]: their token ids; -1 where the block has fewer entries

  // Drawing.
  const std::int64_t* key;    // [rows]: keys of the noise, or null: nothing is drawn
  bool greedy;                // whether the largest z is drawn, without noise
  std::int64_t num_drawable;  // number of token ids, from 0 on, that may be drawn

  BlockStats* stats;  // [rows, blocks]
};

// One segment of the cache, and the rows that read it together.
struct Item {
  std::int32_t page_index;      // index into `pages` of the first page
  std::int32_t first_position;  // position of the first token, which is where a segment starts
  std::int32_t num_tokens;      // number of tokens, from the first on, that any of the rows sees
  std::int32_t entry_index;     // index into `entries` of the first row
  std::int32_t num_entries;     // number of rows
  std::int32_t unit;            // unit of the rows; no row has items in two units
};

// A row that reads an item.
struct Entry {
  std::int32_t row;
  std::int32_t partial;  // slot of the row's partial result
};

struct AttentionParams {
  DType dtype;
  const void* q;        // [rows, heads, head_dim]
  const void* k_pages;  // [pages, kv_heads, cells of a key, page_size, values of a cell] (see dot.hpp)
  const void* v_pages;  // [pages, page_size, kv_heads, head_dim]
  void* out;            // [rows, heads, head_dim]
  const float* sinks;   // [heads] or null
  const Item* items;
  const Entry* entries;
  const std::int32_t *pages, *position, *row_partial, *unit_item;  // see SegmentTable
  std::int64_t page_size, segment, window, unit_rows;
  std::int64_t heads, kv_heads, head_dim;
  float scale, softcap;  // softcap 0: none
  float* partial;        // [partial slots, heads, head_dim + 2]; null where units merge their rows themselves
};

// The weight of a norm, and how the normalised values meet it: in the dtype of the values, to which they are rounded
// before the product; or, where it has an offset, in float32, multiplied by offset + weight and rounded once.
struct NormWeight {
  const void* data;  // [width], or null: no norm
  bool has_offset;
  float offset;
};

struct RmsNormParams {
  DType dtype;
  const void *x, *residual;  // [rows, width]; residual may be null
  NormWeight weight;
  void *out, *sum;  // [rows, width]; sum = residual + x, null without residual
  std::int64_t rows, width, x_stride;
  float eps;
};

// kClamped: the gate is silu with a slope, alpha, and is bounded by `limit` from above; up by it on both sides,
// plus 1.
enum class Gate { kSilu, kGelu, kClamped };

// out = activation(gate) * up
struct GatedParams {
  DType dtype;
  const void* gate_up;  // [rows, 2 width]
  void* out;            // [rows, width]
  std::int64_t rows, width;
  Gate gate;
  float alpha, limit;  // of kClamped
};

// out = sum of weight * values over the terms of a row, in their order
struct WeightedSumParams {
  DType dtype;
  const void *values, *weight;  // [entries, width], [rows, terms]
  const std::int64_t* index;    // [rows, terms]: entries of values
  void* out;                    // [rows, width]
  std::int64_t rows, terms, width;
};

struct WriteKvParams {
  DType dtype;
  const void* qkv;              // [rows, heads + 2 kv_heads, head_dim]
  const float *cos, *sin;       // [rows, half], of the first 2 half values of a head; the others are not rotated
  NormWeight q_norm, k_norm;    // of head_dim values
  const std::int64_t* slot;     // [rows]: page * page_size + offset; negative: not written
  void *q, *k_pages, *v_pages;  // k_pages and v_pages: see AttentionParams
  std::int64_t rows, rows_of_task, page_size, heads, kv_heads, head_dim, half;
  float eps;
};

struct SampleParams {
  const float* logits;  // [rows, vocabulary]
  const std::int64_t* key;
  std::int64_t* token;  // [rows]: -1 where a row has a NaN, +inf or no finite logit
  std::int64_t rows, vocabulary, stride, top_k;
  float temperature, top_p, log_min_p;  // top_k 0, top_p 1 and log_min_p 0: no such filter
};

struct Kernels {
  const char* name;  // name of the instruction set, as Python knows it
  void (*linear)(const LinearParams&, std::int64_t task);
  void (*target)(const HeadParams&, std::int64_t row);
  void (*head)(const HeadParams&, std::int64_t task);
  void (*attention)(const AttentionParams&, std::int64_t task);
  void (*partial_attention)(const AttentionParams&, std::int64_t task);
  void (*merge_attention)(const AttentionParams&, std::int64_t row);
  void (*rms_norm)(const RmsNormParams&, std::int64_t row);
  void (*gated)(const GatedParams&, std::int64_t row);
  void (*weighted_sum)(const WeightedSumParams&, std::int64_t row);
  void (*write_kv)(const WriteKvParams&, std::int64_t task);
  void (*sample)(const SampleParams&, std::int64_t row);
  void (*gumbel)(std::int64_t key, float* out, std::int64_t count);
};

}  // namespace genssd
