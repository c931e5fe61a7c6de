// What each instruction set provides: the same kernels, as functions of a task and one unit of its work.
#pragma once

#include <cstdint>

#include "types.hpp"

namespace genssd {

enum class Type { kFloat, kBFloat16, kFloat16 };

inline constexpr std::int64_t kPanel = 64;       // vectors of a panel
inline constexpr std::int64_t kRowBlock = 128;   // rows of a unit
inline constexpr std::int64_t kPartSize = 2048;  // vocabulary entries of a part, whole panels

// [outputs, inputs], row by row; or packed: panel after panel, each kPanel rows side by side (see panel.hpp).
struct Weight {
  const void* data;
  std::int64_t stride;  // from row to row; 0: packed
};

struct Linear {          // out = x @ weight.T + bias
  Type type;             // of x, weight and bias
  bool wide;             // out is float, not rounded to type
  const void *x, *bias;  // [rows, inputs] [outputs] or null
  Weight weight;
  void* out;  // [rows, outputs]
  std::int64_t rows, inputs, outputs, stride_x;
};

// One pass over a head's vocabulary, in parts whose ends depend on its size alone.
struct Head {
  Type type;
  const void *hidden, *bias;  // [rows, inputs] [vocabulary] or null
  Weight weight;
  std::int64_t rows, inputs, vocabulary, stride_hidden;
  float temperature, softcap;  // softcap 0: none
  // scoring
  const std::int64_t* target;  // [rows], or null: nothing is scored
  float* chosen;               // [rows]: the target's z
  std::int64_t topk;
  float* top_value;      // [rows, parts, topk]
  std::int32_t* top_id;  // [rows, parts, topk]
  // drawing
  const std::int64_t* key;  // [rows], or null: nothing is drawn
  bool greedy;
  std::int64_t drawable;  // ids below it are drawn
  struct Part* parts;     // [rows, parts]
};

struct Part {
  float peak = -__builtin_inff(), total = 0, slope = 0, square = 0;  // sums of e, e d and e e over d = z - peak
  std::int64_t above = 0;                                            // entries larger than the target's
  float best = -__builtin_inff();                                    // of z / temperature + noise
  std::int64_t token = -1;
};

struct Item {
  std::int32_t page;     // index into pages of its first page
  std::int32_t first;    // position of its first token, a multiple of the segment
  std::int32_t tokens;   // what its rows see at most
  std::int32_t entry;    // index into entries of its first row
  std::int32_t entries;  // its rows
  std::int32_t unit;     // items of one unit share no row with another unit's
};

struct Entry {
  std::int32_t row;
  std::int32_t partial;  // the slot of the partial result
};

struct Attention {
  Type type;
  const void *q, *k_pages, *v_pages;  // [rows, heads, width] [pages, page_size, kv_heads, width] twice
  void* out;                          // [rows, heads, width]
  const float* sinks;                 // [heads] or null
  const Item* items;
  const Entry* entries;
  const std::int32_t *pages, *position, *row_partial, *unit_item;  // see SegmentTable
  std::int64_t page_size, segment, window, unit_rows;
  std::int64_t heads, kv_heads, width;
  float scale, softcap;
  float* partial;  // [partials, heads, width + 2] or null: rows are folded where they are computed
};

struct RmsNorm {
  Type type;
  const void *x, *residual, *weight;  // residual may be null
  void *out, *sum;                    // sum = x + residual
  std::int64_t rows, width, stride_x;
  float eps;
};

struct Gated {  // out = activation(gate) * up
  Type type;
  const void* gate_up;  // [rows, 2 width]
  void* out;            // [rows, width]
  std::int64_t rows, width;
  bool gelu;
};

struct WriteKv {
  Type type;
  const void* qkv;              // [rows, heads + 2 kv_heads, width]
  const float *cos, *sin;       // [rows, width / 2]
  const void *q_norm, *k_norm;  // [width] or null
  const std::int64_t* slot;     // [rows], negative: not written
  void *q, *k_pages, *v_pages;
  std::int64_t rows, heads, kv_heads, width;
  float eps;
};

struct Sample {
  const float* logits;  // [rows, stride], of which the first `vocabulary` count
  const std::int64_t* key;
  std::int64_t* token;  // -1 where a row has a NaN, a +inf or no finite logit
  std::int64_t rows, vocabulary, stride, top_k;
  float temperature, top_p, log_min_p;  // log_min_p 0: no such filter
};

struct Kernels {
  const char* name;
  void (*linear)(const Linear&, std::int64_t unit);
  void (*target)(const Head&, std::int64_t row);
  void (*head)(const Head&, std::int64_t unit);
  void (*attention)(const Attention&, std::int64_t unit);
  void (*partial_attention)(const Attention&, std::int64_t unit);
  void (*fold_attention)(const Attention&, std::int64_t row);
  void (*rms_norm)(const RmsNorm&, std::int64_t row);
  void (*gated)(const Gated&, std::int64_t row);
  void (*write_kv)(const WriteKv&, std::int64_t row);
  void (*sample)(const Sample&, std::int64_t row);
  void (*gumbel)(std::int64_t key, float* out, std::int64_t count);
};

extern const Kernels kAvx2, kAvx512, kAvx512Bf16;

// The sets that this processor runs, the best first, with a null behind the last.
const Kernels* const* supported();

// The set in use, at first the best; null: there is none.
const Kernels* kernels();

// Changes to the set of this name; false where this processor does not run it.
bool use(const char* name);

}  // namespace genssd
