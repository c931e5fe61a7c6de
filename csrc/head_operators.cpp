// Operators over a head: the statistics of given tokens, and draws; and draws from logits.
#include <algorithm>
#include <cmath>
#include <vector>

#include "operators.hpp"
#include "threads.hpp"

namespace genssd {

namespace {

// Returns the parameters that scoring and drawing have in common.
HeadParams head_params(const Arguments& args, const Array& hidden, const Array& weight, std::int64_t vocabulary,
                       const MaybeArray& bias, float temperature, float softcap) {
  args.shape(hidden, "hidden", {-1, -1});
  const auto rows = size_of(hidden, 0), inputs = size_of(hidden, 1);
  args.require(0 < vocabulary && vocabulary < (std::int64_t{1} << 31), "weight must have between 1 and 2^31 rows");
  args.require(softcap >= 0.0f && temperature >= 0.0f, "temperature and softcap must not be negative");
  args.contiguous(hidden, "hidden", 1);
  HeadParams params{};
  params.dtype = args.float_dtype(hidden, "hidden");
  params.hidden = hidden.data();
  params.weight = args.weight(weight, vocabulary, inputs, hidden, "hidden");
  params.bias = args.vector(bias, "bias", vocabulary, hidden, "hidden");
  params.rows = rows;
  params.inputs = inputs;
  params.vocabulary = vocabulary;
  params.hidden_stride = row_stride(hidden);
  params.temperature = temperature;
  params.softcap = softcap;
  return params;
}

std::int64_t num_blocks(const HeadParams& params) { return ceil_div(params.vocabulary, kVocabularyBlock); }

void run_head(const Kernels& kernels, const HeadParams& params, int threads) {
  ThreadPool::run(num_blocks(params) * ceil_div(params.rows, kRowBlock),
                  threads_for(params.rows * params.inputs * params.vocabulary / 8, threads),
                  [&](std::int64_t task) { kernels.head(params, task); });
}

// The statistics of one row over the whole vocabulary. They are in double, because in float a tail next to a
// probability of almost 1 would be rounded away block after block.
struct RowStats {
  double peak = -INFINITY, sum_e = 0, sum_ed = 0, sum_ee = 0;
  std::int64_t num_above = 0;
  BestToken best;
};

// Merges the blocks of a row, in the order of the vocabulary.
RowStats merge_blocks(const BlockStats* blocks, std::int64_t count) {
  RowStats row;
  for (const BlockStats* block = blocks; block != blocks + count; ++block) {
    row.num_above += block->num_above;
    if (block->best.score > row.best.score) row.best = block->best;
    if (block->sum_e == 0.0f) continue;  // every entry is -inf
    const double peak = std::max<double>(row.peak, block->peak);
    const double a = row.sum_e == 0.0 ? 0.0 : std::exp(row.peak - peak), b = std::exp(block->peak - peak);
    const double shift_a = row.sum_e == 0.0 ? 0.0 : row.sum_e * (row.peak - peak);
    row.sum_ed = a * (row.sum_ed + shift_a) + b * (block->sum_ed + block->sum_e * (block->peak - peak));
    row.sum_e = a * row.sum_e + b * block->sum_e;
    row.sum_ee = a * a * row.sum_ee + b * b * block->sum_ee;
    row.peak = peak;
  }
  return row;
}

// Merges the sorted lists of a row's blocks, the largest first; of equal ones the lower id, which comes first in its
// block and in an earlier block. An id of -1 ends a list.
void merge_top_k(const HeadParams& params, std::int64_t row, double peak, double log_sum_e, std::int64_t* ids,
                 float* logprobs) {
  const std::int64_t blocks = num_blocks(params), k = params.top_k;
  std::vector<std::int64_t> next(blocks, 0);
  for (std::int64_t rank = 0; rank < k; ++rank) {
    std::int64_t best = -1;  // an index into top_ids
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t i = (row * blocks + block) * k + next[block];
      if (next[block] < k && params.top_ids[i] >= 0 && (best < 0 || params.top_values[i] > params.top_values[best]))
        best = i;
    }
    ids[rank] = best < 0 ? 0 : params.top_ids[best];
    logprobs[rank] = best < 0 ? NAN : static_cast<float>(params.top_values[best] - peak - log_sum_e);
    if (best >= 0) ++next[best / k % blocks];
  }
}

}  // namespace

void gumbel_noise(Array keys, Array out, int threads) {
  const Arguments args("gumbel_noise");
  const Kernels& kernels = args.kernels();
  const std::int64_t rows = keys.ndim() ? size_of(keys, 0) : -1;
  const std::int64_t* key = args.integers<std::int64_t>(keys, "keys", rows);
  float* noise = args.floats(out, "out", {rows, -1});
  const auto width = size_of(out, 1);
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(16 * rows * width, threads),
                  [&](std::int64_t row) { kernels.gumbel(key[row], noise + row * width, width); });
}

void linear_logprob(Array hidden, Array weight, std::int64_t vocabulary, Array target, MaybeArray bias,
                    float temperature, float softcap, Array stats, Array rank, Array top_ids, Array top_logprob,
                    int threads) {
  const Arguments args("linear_logprob");
  const Kernels& kernels = args.kernels();
  HeadParams params = head_params(args, hidden, weight, vocabulary, bias, temperature, softcap);
  args.require(temperature > 0.0f, "temperature must be positive");
  params.target = args.integers<std::int64_t>(target, "target", params.rows);
  float* out = args.floats(stats, "stats", {4, params.rows});
  std::int32_t* ranks = args.integers<std::int32_t>(rank, "rank", params.rows);
  args.shape(top_ids, "top_ids", {params.rows, -1});
  const std::int64_t k = params.top_k = size_of(top_ids, 1);
  args.require(k <= params.vocabulary, "top_ids has more columns than the vocabulary has entries");
  args.dtype<std::int64_t>(top_ids, "top_ids", "int64");
  args.contiguous(top_ids, "top_ids");
  auto* ids = static_cast<std::int64_t*>(top_ids.data());
  float* logprobs = args.floats(top_logprob, "top_logprob", {params.rows, k});
  for (std::int64_t row = 0; row < params.rows; ++row)
    args.require(0 <= params.target[row] && params.target[row] < params.vocabulary,
                 "the target of row " + std::to_string(row) + " lies outside the vocabulary");
  const nb::gil_scoped_release release;
  const std::int64_t rows = params.rows, blocks = num_blocks(params);
  std::vector<float> target_z(rows), top_values(rows * blocks * k);
  std::vector<std::int32_t> block_top_ids(rows * blocks * k);
  std::vector<BlockStats> block_stats(rows * blocks);
  params.target_z = target_z.data();
  params.top_values = top_values.data();
  params.top_ids = block_top_ids.data();
  params.stats = block_stats.data();
  ThreadPool::run(rows, threads_for(rows * params.inputs, threads),
                  [&](std::int64_t row) { kernels.target(params, row); });
  run_head(kernels, params, threads);
  ThreadPool::run(rows, threads_for(rows * blocks * (8 + 4 * k), threads), [&](std::int64_t row) {
    const RowStats all = merge_blocks(params.stats + row * blocks, blocks);
    const double log_sum_e = std::log(all.sum_e);
    out[row] = static_cast<float>(target_z[row] - all.peak - log_sum_e);
    out[rows + row] = static_cast<float>(all.peak + log_sum_e);
    out[2 * rows + row] = static_cast<float>(log_sum_e - all.sum_ed / all.sum_e);
    out[3 * rows + row] = static_cast<float>(all.sum_ee / (all.sum_e * all.sum_e));
    ranks[row] = static_cast<std::int32_t>(all.num_above) + 1;
    merge_top_k(params, row, all.peak, log_sum_e, ids + row * k, logprobs + row * k);
  });
}

void linear_sample(Array hidden, Array weight, std::int64_t vocabulary, Array key, MaybeArray bias, float temperature,
                   float softcap, std::int64_t drawable, Array tokens, Array logprob, int threads) {
  const Arguments args("linear_sample");
  const Kernels& kernels = args.kernels();
  HeadParams params = head_params(args, hidden, weight, vocabulary, bias, temperature, softcap);
  const std::int64_t rows = params.rows;
  params.key = args.integers<std::int64_t>(key, "key", rows);
  auto* token = args.integers<std::int64_t>(tokens, "tokens", rows);
  float* out = args.floats(logprob, "logprob", {rows});
  args.require(0 < drawable && drawable <= vocabulary, "drawable must lie within the vocabulary");
  params.num_drawable = drawable;
  params.greedy = temperature == 0.0f;
  const nb::gil_scoped_release release;
  const std::int64_t blocks = num_blocks(params);
  std::vector<BlockStats> block_stats(rows * blocks);
  params.stats = block_stats.data();
  run_head(kernels, params, threads);
  std::vector<float> logsumexp(rows);
  for (std::int64_t row = 0; row < rows; ++row) {
    const RowStats all = merge_blocks(params.stats + row * blocks, blocks);
    logsumexp[row] = static_cast<float>(all.peak + std::log(all.sum_e));
    token[row] = std::isfinite(logsumexp[row]) ? all.best.token : -1;
  }
  // the logit of the drawn token was not kept: one more product of the row
  std::vector<float> target_z(rows);
  HeadParams drawn = params;
  drawn.target = token;
  drawn.target_z = target_z.data();
  drawn.temperature = 1.0f;
  for (std::int64_t row = 0; row < rows; ++row) {
    if (token[row] >= 0) kernels.target(drawn, row);
    out[row] = token[row] >= 0 ? target_z[row] - logsumexp[row] : NAN;
  }
}

void sample(Array logits, Array key, float temperature, std::int64_t top_k, float top_p, float log_min_p, Array tokens,
            int threads) {
  const Arguments args("sample");
  const Kernels& kernels = args.kernels();
  args.dtype<float>(logits, "logits", "float32");
  args.shape(logits, "logits", {-1, -1});
  args.contiguous(logits, "logits", 1);
  const auto rows = size_of(logits, 0), vocabulary = size_of(logits, 1);
  args.require(vocabulary > 0, "logits must have a column");
  const SampleParams params{.logits = static_cast<const float*>(logits.data()),
                            .key = args.integers<std::int64_t>(key, "key", rows),
                            .token = args.integers<std::int64_t>(tokens, "tokens", rows),
                            .rows = rows,
                            .vocabulary = vocabulary,
                            .stride = row_stride(logits),
                            .top_k = top_k,
                            .temperature = temperature,
                            .top_p = top_p,
                            .log_min_p = log_min_p};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(16 * rows * vocabulary, threads),
                  [&](std::int64_t row) { kernels.sample(params, row); });
}

}  // namespace genssd
