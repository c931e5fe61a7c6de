// Python bindings of the native CPU kernels. Tensors cross as DLPack; nothing of torch is linked.
//
// The callers in kernels/ validate for their users; the checks here keep a wrong call from reading outside a buffer.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "attention.hpp"
#include "philox.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GENSSD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GENSSD_CLONES
#endif

namespace nb = nanobind;
using namespace genssd;

namespace {

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// Runs body(begin, end) over blocks of [0, count). Blocks do not share results, so who runs one does not matter.
template <typename Body>
void parallel_for(std::int64_t count, std::int64_t block, int threads, const Body& body) {
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t begin; (begin = next.fetch_add(block)) < count;) body(begin, std::min(begin + block, count));
  };
  const std::int64_t blocks = (count + block - 1) / block;
  std::vector<std::thread> pool;
  for (int i = 1; i < std::min<std::int64_t>(threads, blocks); ++i) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
}

using Rows32 = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table32 = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Noise = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tensor3 = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Tensor4 = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;

GENSSD_CLONES void fill_gumbel(const std::int64_t* keys, float* out, std::int64_t width, std::int64_t begin,
                               std::int64_t end) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::uint64_t key = static_cast<std::uint64_t>(keys[row]);
    for (std::int64_t first = 0; first < width; first += kLanes) {
      std::uint32_t bits[kLanes];
      float noise[kLanes];
      philox(key, static_cast<std::uint64_t>(first), bits);
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) noise[i] = gumbel(bits[i]);
      std::copy(noise, noise + std::min<std::int64_t>(kLanes, width - first), out + row * width + first);
    }
  }
}

void gumbel_noise(Keys keys, Noise out, int threads) {
  require(keys.shape(0) == out.shape(0), "gumbel_noise: keys [rows] and out [rows, vocabulary] differ in rows");
  const std::int64_t rows = out.shape(0), width = out.shape(1);
  const std::int64_t* key = keys.data();
  float* noise = out.data();
  nb::gil_scoped_release release;
  if (rows * width < 65536) threads = 1;  // starting a thread costs more than the work
  parallel_for(rows, 1, threads, [&](std::int64_t begin, std::int64_t end) { fill_gumbel(key, noise, width, begin, end); });
}

GENSSD_CLONES void attend_rows(const AttentionTask<float>& task, std::int64_t begin, std::int64_t end) {
  std::vector<float> scratch;
  for (std::int64_t row = begin; row < end; ++row) attend_row(task, row, scratch);
}

GENSSD_CLONES void attend_rows_bf16(const AttentionTask<BFloat16>& task, std::int64_t begin, std::int64_t end) {
  std::vector<float> scratch;
  for (std::int64_t row = begin; row < end; ++row) attend_row(task, row, scratch);
}

void run(const AttentionTask<float>& task, std::int64_t begin, std::int64_t end) { attend_rows(task, begin, end); }
void run(const AttentionTask<BFloat16>& task, std::int64_t begin, std::int64_t end) {
  attend_rows_bf16(task, begin, end);
}

template <typename T>
void attend(const Tensor3& q, const Tensor4& k_pages, const Tensor4& v_pages, const Table32& page_table,
            const Rows32& row_sequence, const Rows32& row_position, const Tensor3& out, float scale,
            std::int64_t window, int threads) {
  const std::int64_t rows = q.shape(0);
  const AttentionTask<T> task{
      static_cast<const T*>(q.data()),
      static_cast<const T*>(k_pages.data()),
      static_cast<const T*>(v_pages.data()),
      page_table.data(),
      row_sequence.data(),
      row_position.data(),
      static_cast<T*>(const_cast<void*>(static_cast<const void*>(out.data()))),
      static_cast<std::int64_t>(q.shape(1)),
      static_cast<std::int64_t>(k_pages.shape(2)),
      static_cast<std::int64_t>(q.shape(2)),
      static_cast<std::int64_t>(k_pages.shape(1)),
      static_cast<std::int64_t>(page_table.shape(1)),
      window,
      scale,
  };
  nb::gil_scoped_release release;
  std::int64_t seen = 0;
  for (std::int64_t row = 0; row < rows; ++row) seen += task.row_position[row] + 1;
  if (seen * task.heads * task.head_dim < 262144) threads = 1;  // starting a thread costs more than the work
  parallel_for(rows, std::max<std::int64_t>(1, rows / (8 * std::max(threads, 1))), threads,
               [&](std::int64_t begin, std::int64_t end) { run(task, begin, end); });
}

void paged_attention(Tensor3 q, Tensor4 k_pages, Tensor4 v_pages, Table32 page_table, Rows32 row_sequence,
                     Rows32 row_position, Tensor3 out, float scale, std::int64_t window, int threads) {
  const std::int64_t rows = q.shape(0), pages = k_pages.shape(0), page_size = k_pages.shape(1);
  require(k_pages.dtype() == q.dtype() && v_pages.dtype() == q.dtype() && out.dtype() == q.dtype(),
          "paged_attention: q, k_pages, v_pages and out must have one dtype");
  for (int d = 0; d < 3; ++d) require(out.shape(d) == q.shape(d), "paged_attention: out must have the shape of q");
  for (int d = 0; d < 4; ++d)
    require(k_pages.shape(d) == v_pages.shape(d), "paged_attention: k_pages and v_pages differ in shape");
  require(page_size > 0 && window >= 0, "paged_attention: page_size must be positive and window not negative");
  require(k_pages.shape(3) == q.shape(2), "paged_attention: q and k_pages differ in head_dim");
  require(k_pages.shape(2) > 0 && q.shape(1) % k_pages.shape(2) == 0,
          "paged_attention: the number of query heads must be a multiple of the number of kv heads");
  require(row_sequence.shape(0) == q.shape(0) && row_position.shape(0) == q.shape(0),
          "paged_attention: row_sequence and row_position must have one entry per query row");
  const std::int64_t sequences = page_table.shape(0), width = page_table.shape(1);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t sequence = row_sequence.data()[row], position = row_position.data()[row];
    require(0 <= sequence && sequence < sequences, "paged_attention: a row names a sequence outside page_table");
    require(0 <= position && position / page_size < width, "paged_attention: a row's position lies beyond its page_table");
  }
  for (std::int64_t i = 0; i < sequences * width; ++i)
    require(0 <= page_table.data()[i] && page_table.data()[i] < pages, "paged_attention: page_table names a page outside the pool");

  if (q.dtype() == nb::dtype<float>())
    attend<float>(q, k_pages, v_pages, page_table, row_sequence, row_position, out, scale, window, threads);
  else if (q.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1})
    attend<BFloat16>(q, k_pages, v_pages, page_table, row_sequence, row_position, out, scale, window, threads);
  else
    throw std::invalid_argument("paged_attention: the native kernel takes float32 and bfloat16");
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Native CPU kernels of genssd; genssd.kernels holds their contracts.";
  m.def("gumbel_noise", &gumbel_noise, nb::arg("keys"), nb::arg("out"), nb::arg("threads"),
        nb::sig("def gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int) -> None"),
        "Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.");
  m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_pages"), nb::arg("v_pages"),
        nb::arg("page_table"), nb::arg("row_sequence"), nb::arg("row_position"), nb::arg("out"), nb::arg("scale"),
        nb::arg("window"), nb::arg("threads"),
        nb::sig("def paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: "
                "torch.Tensor, row_sequence: torch.Tensor, row_position: torch.Tensor, out: torch.Tensor, scale: float, "
                "window: int, threads: int) -> None"),
        "Attend each row of q [rows, heads, head_dim] over positions 0..row_position of its sequence, into out.");
}
