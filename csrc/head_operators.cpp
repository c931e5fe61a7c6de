// What is asked of a head: statistics of tokens, and draws.
#include <algorithm>
#include <cmath>
#include <vector>

#include "operators.hpp"
#include "threads.hpp"

namespace genssd {

namespace {

// What scoring and drawing have in common.
Head head_of(const Arguments& args, const Array& hidden, const Array& weight, std::int64_t vocabulary,
             const MaybeArray& bias, float temperature, float softcap) {
  args.shape(hidden, "hidden", {-1, -1});
  const auto rows = static_cast<std::int64_t>(hidden.shape(0)), inputs = static_cast<std::int64_t>(hidden.shape(1));
  args.require(0 < vocabulary && vocabulary < (std::int64_t{1} << 31), "weight must have between 1 and 2^31 rows");
  args.require(softcap >= 0.0f && temperature >= 0.0f, "temperature and softcap must not be negative");
  args.contiguous(hidden, "hidden", 1);
  Head head{};
  head.type = args.type(hidden, "hidden");
  head.hidden = hidden.data();
  head.weight = args.weight(weight, vocabulary, inputs, hidden, "hidden");
  head.bias = args.vector(bias, "bias", vocabulary, hidden, "hidden");
  head.rows = rows;
  head.inputs = inputs;
  head.vocabulary = vocabulary;
  head.stride_hidden = stride0(hidden);
  head.temperature = temperature;
  head.softcap = softcap;
  return head;
}

void walk(const Kernels& kernels, const Head& head, int threads) {
  ThreadPool::run(blocks(head.vocabulary, kPartSize) * blocks(head.rows, kRowBlock),
                  threads_for(head.rows * head.inputs * head.vocabulary / 8, threads),
                  [&](std::int64_t unit) { kernels.head(head, unit); });
}

// A row's parts, added up. In double: beside a peak of almost 1, part after part would round a tail away.
struct Sums {
  double peak = -INFINITY, total = 0, slope = 0, square = 0;
  std::int64_t above = 0;
  float best = -INFINITY;
  std::int64_t token = -1;
};

// In the order of the vocabulary.
Sums merged(const Part* parts, std::int64_t count) {
  Sums all;
  for (const Part* part = parts; part != parts + count; ++part) {
    all.above += part->above;
    if (part->best > all.best) {
      all.best = part->best;
      all.token = part->token;
    }
    if (part->total == 0.0f) continue;  // all of it is banned
    const double peak = std::max<double>(all.peak, part->peak);
    const double a = all.total == 0.0 ? 0.0 : std::exp(all.peak - peak), b = std::exp(part->peak - peak);
    const double shift_a = all.total == 0.0 ? 0.0 : all.total * (all.peak - peak);
    all.slope = a * (all.slope + shift_a) + b * (part->slope + part->total * (part->peak - peak));
    all.total = a * all.total + b * part->total;
    all.square = a * a * all.square + b * b * part->square;
    all.peak = peak;
  }
  return all;
}

}  // namespace

void gumbel_noise(Array keys, Array out, int threads) {
  const Arguments args("gumbel_noise");
  const Kernels& kernels = args.kernels();
  const std::int64_t rows = keys.ndim() ? static_cast<std::int64_t>(keys.shape(0)) : -1;
  const std::int64_t* key = args.indices<std::int64_t>(keys, "keys", rows);
  float* noise = args.floats(out, "out", {rows, -1});
  const auto width = static_cast<std::int64_t>(out.shape(1));
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(16 * rows * width, threads),
                  [&](std::int64_t row) { kernels.gumbel(key[row], noise + row * width, width); });
}

void linear_logprob(Array hidden, Array weight, std::int64_t vocabulary, Array target, MaybeArray bias,
                    float temperature, float softcap, Array stats, Array rank, Array top_ids, Array top_logprob,
                    int threads) {
  const Arguments args("linear_logprob");
  const Kernels& kernels = args.kernels();
  Head head = head_of(args, hidden, weight, vocabulary, bias, temperature, softcap);
  args.require(temperature > 0.0f, "temperature must be positive");
  head.target = args.indices<std::int64_t>(target, "target", head.rows);
  float* out = args.floats(stats, "stats", {4, head.rows});
  std::int32_t* ranks = args.indices<std::int32_t>(rank, "rank", head.rows);
  args.shape(top_ids, "top_ids", {head.rows, -1});
  head.topk = static_cast<std::int64_t>(top_ids.shape(1));
  args.require(head.topk <= head.vocabulary, "top_ids has more columns than the vocabulary has entries");
  args.dtype<std::int64_t>(top_ids, "top_ids", "int64");
  args.contiguous(top_ids, "top_ids");
  auto* ids = static_cast<std::int64_t*>(top_ids.data());
  float* logprobs = args.floats(top_logprob, "top_logprob", {head.rows, head.topk});
  for (std::int64_t row = 0; row < head.rows; ++row)
    args.require(0 <= head.target[row] && head.target[row] < head.vocabulary,
                 "the target of row " + std::to_string(row) + " lies outside the vocabulary");
  const nb::gil_scoped_release release;
  const std::int64_t count = blocks(head.vocabulary, kPartSize), k = head.topk;
  std::vector<float> chosen(head.rows), top_value(head.rows * count * k);
  std::vector<std::int32_t> top_id(head.rows * count * k);
  std::vector<Part> parts(head.rows * count);
  head.chosen = chosen.data();
  head.top_value = top_value.data();
  head.top_id = top_id.data();
  head.parts = parts.data();
  ThreadPool::run(head.rows, threads_for(head.rows * head.inputs, threads),
                  [&](std::int64_t row) { kernels.target(head, row); });
  walk(kernels, head, threads);
  ThreadPool::run(head.rows, threads_for(head.rows * count * (8 + 4 * k), threads), [&](std::int64_t row) {
    const Sums all = merged(parts.data() + row * count, count);
    const double log_total = std::log(all.total);
    out[row] = static_cast<float>(chosen[row] - all.peak - log_total);
    out[head.rows + row] = static_cast<float>(all.peak + log_total);
    out[2 * head.rows + row] = static_cast<float>(log_total - all.slope / all.total);
    out[3 * head.rows + row] = static_cast<float>(all.square / (all.total * all.total));
    ranks[row] = static_cast<std::int32_t>(all.above) + 1;
    // the largest first; of equal ones the lower id, which comes first in its part and in an earlier part
    std::vector<std::int64_t> next(count, 0);
    for (std::int64_t place = 0; place < k; ++place) {
      std::int64_t best = -1;
      for (std::int64_t part = 0; part < count; ++part) {
        const std::int64_t at = (row * count + part) * k + next[part];
        if (next[part] < k && top_id[at] >= 0 && (best < 0 || top_value[at] > top_value[best])) best = at;
      }
      ids[row * k + place] = best < 0 ? 0 : top_id[best];
      logprobs[row * k + place] = best < 0 ? NAN : static_cast<float>(top_value[best] - all.peak - log_total);
      if (best >= 0) ++next[best / k % count];
    }
  });
}

void linear_sample(Array hidden, Array weight, std::int64_t vocabulary, Array key, MaybeArray bias, float temperature,
                   float softcap, std::int64_t drawable, Array tokens, Array logprob, int threads) {
  const Arguments args("linear_sample");
  const Kernels& kernels = args.kernels();
  Head head = head_of(args, hidden, weight, vocabulary, bias, temperature, softcap);
  head.key = args.indices<std::int64_t>(key, "key", head.rows);
  auto* token = args.indices<std::int64_t>(tokens, "tokens", head.rows);
  float* out = args.floats(logprob, "logprob", {head.rows});
  args.require(0 < drawable && drawable <= vocabulary, "drawable must lie within the vocabulary");
  head.drawable = drawable;
  head.greedy = temperature == 0.0f;
  const nb::gil_scoped_release release;
  const std::int64_t count = blocks(head.vocabulary, kPartSize);
  std::vector<Part> parts(head.rows * count);
  std::vector<float> chosen(head.rows);
  head.parts = parts.data();
  walk(kernels, head, threads);
  std::vector<float> logsumexp(head.rows);
  for (std::int64_t row = 0; row < head.rows; ++row) {
    const Sums all = merged(parts.data() + row * count, count);
    logsumexp[row] = static_cast<float>(all.peak + std::log(all.total));
    token[row] = std::isfinite(logsumexp[row]) ? all.token : -1;
  }
  // the drawn token's own logit once more: one row of the head
  Head again = head;
  again.target = token;
  again.chosen = chosen.data();
  again.temperature = 1.0f;
  for (std::int64_t row = 0; row < head.rows; ++row) {
    if (token[row] >= 0) kernels.target(again, row);
    out[row] = token[row] >= 0 ? chosen[row] - logsumexp[row] : NAN;
  }
}

void sample(Array logits, Array key, float temperature, std::int64_t top_k, float top_p, float log_min_p, Array tokens,
            int threads) {
  const Arguments args("sample");
  const Kernels& kernels = args.kernels();
  args.dtype<float>(logits, "logits", "float32");
  args.shape(logits, "logits", {-1, -1});
  args.contiguous(logits, "logits", 1);
  const auto rows = static_cast<std::int64_t>(logits.shape(0)),
             vocabulary = static_cast<std::int64_t>(logits.shape(1));
  args.require(vocabulary > 0, "logits must have a column");
  const Sample task{static_cast<const float*>(logits.data()),
                    args.indices<std::int64_t>(key, "key", rows),
                    args.indices<std::int64_t>(tokens, "tokens", rows),
                    rows,
                    vocabulary,
                    stride0(logits),
                    top_k,
                    temperature,
                    top_p,
                    log_min_p};
  const nb::gil_scoped_release release;
  ThreadPool::run(rows, threads_for(16 * rows * vocabulary, threads),
                  [&](std::int64_t row) { kernels.sample(task, row); });
}

}  // namespace genssd
