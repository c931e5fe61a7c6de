// Python bindings of the native CPU kernels. Tensors cross as DLPack; nothing of torch is linked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <vector>

#include "operators.hpp"

namespace nb = nanobind;
using namespace genssd;

namespace {

using Int32Vector = nb::ndarray<nb::numpy, const std::int32_t, nb::ndim<1>>;
using Int32Matrix = nb::ndarray<nb::numpy, const std::int32_t, nb::ndim<2>>;

// Structs of integers as the rows of a matrix.
template <typename Struct>
Int32Matrix as_matrix(const std::vector<Struct>& rows) {
  static_assert(sizeof(Struct) % sizeof(std::int32_t) == 0);
  return Int32Matrix(reinterpret_cast<const std::int32_t*>(rows.data()), {rows.size(), sizeof(Struct) / 4},
                     nb::handle());
}

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Native CPU kernels of genssd; genssd.kernels holds their contracts.";
  const auto internal = nb::rv_policy::reference_internal;
  nb::class_<SegmentTable>(m, "SegmentTable",
                           "Which rows read which stretch of the cache; see genssd.kernels.attention.")
      .def_prop_ro("num_rows", &SegmentTable::num_rows, nb::sig("def num_rows(self) -> int"), "Query rows.")
      .def_ro("page_size", &SegmentTable::page_size, nb::sig("def page_size(self) -> int"), "Tokens of a page.")
      .def_ro("segment", &SegmentTable::segment, nb::sig("def segment(self) -> int"), "Positions of a segment.")
      .def_ro("window", &SegmentTable::window, nb::sig("def window(self) -> int"),
              "Positions that a row sees at most; 0: all.")
      .def_ro("largest_page", &SegmentTable::largest_page, nb::sig("def largest_page(self) -> int"),
              "The largest page that is read.")
      .def_prop_ro(
          "items", [](const SegmentTable& t) { return as_matrix(t.items); }, internal,
          nb::sig("def items(self) -> numpy.ndarray"),
          "int32 [items, 6]: index into pages, first position, tokens, index into entries, entries, unit.")
      .def_prop_ro(
          "entries", [](const SegmentTable& t) { return as_matrix(t.entries); }, internal,
          nb::sig("def entries(self) -> numpy.ndarray"), "int32 [entries, 2]: row, partial slot.")
      .def_prop_ro(
          "pages", [](const SegmentTable& t) { return Int32Vector(t.pages.data(), {t.pages.size()}, nb::handle()); },
          internal, nb::sig("def pages(self) -> numpy.ndarray"), "int32: the pages of the items, one after the other.")
      .def_prop_ro(
          "position",
          [](const SegmentTable& t) { return Int32Vector(t.position.data(), {t.position.size()}, nb::handle()); },
          internal, nb::sig("def position(self) -> numpy.ndarray"), "int32 [rows]: where each row stands.")
      .def_prop_ro(
          "row_partial",
          [](const SegmentTable& t) {
            return Int32Vector(t.row_partial.data(), {t.row_partial.size()}, nb::handle());
          },
          internal, nb::sig("def row_partial(self) -> numpy.ndarray"),
          "int32 [rows + 1]: the row's first partial slot; they follow in the order of segments.")
      .def_prop_ro(
          "slot",
          [](const SegmentTable& t) {
            return nb::ndarray<nb::numpy, const std::int64_t, nb::ndim<1>>(t.slot.data(), {t.slot.size()},
                                                                           nb::handle());
          },
          internal, nb::sig("def slot(self) -> numpy.ndarray"),
          "int64 [rows]: where the row's own token lies, page * page_size + offset.");

#define TENSORS(names) nb::sig("def " names " -> None")
  m.def(
      "instruction_set", [] { return kernels() ? kernels()->name : nullptr; },
      nb::sig("def instruction_set() -> str | None"),
      "The kernels in use, at first the best for this processor; None: there are none.");
  m.def(
      "instruction_sets",
      [] {
        nb::list names;
        for (const Kernels* const* set = supported(); *set; ++set) names.append((*set)->name);
        return names;
      },
      nb::sig("def instruction_sets() -> list[str]"), "All that run on this processor, the best first.");
  m.def(
      "use_instruction_set",
      [](const char* name) {
        if (!use(name)) throw std::invalid_argument(std::string("this processor has no kernels of the name ") + name);
      },
      nb::arg("name"), nb::sig("def use_instruction_set(name: str) -> None"),
      "Change the kernels of this process, for tests and measurements. Results of other sets differ in their "
      "roundings.");
  m.def(
      "segment_table", &segment_table, nb::rv_policy::take_ownership, nb::arg("tables"), nb::arg("table"),
      nb::arg("first"), nb::arg("rows"), nb::arg("page_size"), nb::arg("segment"), nb::arg("window"),
      nb::arg("unit_rows"),
      nb::sig("def segment_table(tables: torch.Tensor, table: torch.Tensor, first: torch.Tensor, rows: "
              "torch.Tensor, page_size: int, segment: int, window: int, unit_rows: int) -> SegmentTable"),
      "Build the table of a batch: sequence i has the pages tables[table[i]] and rows at first[i], first[i] + 1, ...");
  m.def("gumbel_noise", &gumbel_noise, nb::arg("keys"), nb::arg("out"), nb::arg("threads"),
        TENSORS("gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int)"),
        "Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.");
  m.def("linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("threads"),
        TENSORS("linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, threads: "
                "int)"),
        "out = x @ weight.T + bias, summed in float32; out in the dtype of x or float32.");
  m.def("packed_rows", &packed_rows, nb::arg("weight"), nb::arg("rows"), nb::arg("index"), nb::arg("out"),
        TENSORS("packed_rows(weight: torch.Tensor, rows: int, index: torch.Tensor, out: torch.Tensor)"),
        "Rows of a packed weight of so many rows: out[i] = weight[index[i]].");
  m.def("linear_logprob", &linear_logprob, nb::arg("hidden"), nb::arg("weight"), nb::arg("vocabulary"),
        nb::arg("target"), nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("stats"),
        nb::arg("rank"), nb::arg("top_ids"), nb::arg("top_logprob"), nb::arg("threads"),
        TENSORS("linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, target: torch.Tensor, "
                "bias: torch.Tensor | "
                "None, temperature: float, softcap: float, stats: torch.Tensor, rank: torch.Tensor, top_ids: "
                "torch.Tensor, top_logprob: torch.Tensor, threads: int)"),
        "Score targets under a head: stats [4, rows] are logprob, logsumexp, entropy and sum_p2; softcap 0: none.");
  m.def("linear_sample", &linear_sample, nb::arg("hidden"), nb::arg("weight"), nb::arg("vocabulary"), nb::arg("key"),
        nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("drawable"), nb::arg("tokens"),
        nb::arg("logprob"), nb::arg("threads"),
        TENSORS("linear_sample(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, key: torch.Tensor, bias: "
                "torch.Tensor | None, temperature: float, softcap: float, drawable: int, tokens: torch.Tensor, "
                "logprob: torch.Tensor, "
                "threads: int)"),
        "Draw a token per row from a head; -1 where its logits are not finite.");
  m.def("sample", &sample, nb::arg("logits"), nb::arg("key"), nb::arg("temperature"), nb::arg("top_k"),
        nb::arg("top_p"), nb::arg("log_min_p"), nb::arg("tokens"), nb::arg("threads"),
        TENSORS("sample(logits: torch.Tensor, key: torch.Tensor, temperature: float, top_k: int, top_p: float, "
                "log_min_p: float, tokens: torch.Tensor, threads: int)"),
        "Draw a token per row of logits behind top-k, top-p and min-p; -1 where they are not finite.");
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("weight"), nb::arg("eps"),
        nb::arg("out"), nb::arg("sum").none(), nb::arg("threads"),
        TENSORS("rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: "
                "torch.Tensor, sum: torch.Tensor | None, threads: int)"),
        "out = norm of x, or of sum = residual + x.");
  m.def("gated", &gated, nb::arg("gate_up"), nb::arg("gelu"), nb::arg("out"), nb::arg("threads"),
        TENSORS("gated(gate_up: torch.Tensor, gelu: bool, out: torch.Tensor, threads: int)"),
        "out = silu(gate) * up, or gelu(gate) * up with gelu by tanh.");
  m.def(
      "rotary_angles", &rotary_angles, nb::arg("position"), nb::arg("frequency"), nb::arg("factor"), nb::arg("cos"),
      nb::arg("sin"), nb::arg("threads"),
      TENSORS("rotary_angles(position: torch.Tensor, frequency: torch.Tensor, factor: float, cos: torch.Tensor, sin: "
              "torch.Tensor, threads: int)"),
      "cos and sin [rows, frequencies] of position * frequency, times factor.");
  m.def("copy_pages", &copy_pages, nb::arg("kv"), nb::arg("source"), nb::arg("destination"), nb::arg("threads"),
        TENSORS("copy_pages(kv: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, threads: int)"),
        "Copy pages of kv [layers, 2, pages, page_size, kv_heads, head_dim], of any dtype.");
  m.def("write_kv", &write_kv, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("k_pages"), nb::arg("v_pages"),
        nb::arg("slot"), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"), nb::arg("q"),
        nb::arg("threads"),
        TENSORS(
            "write_kv(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor, v_pages: "
            "torch.Tensor, slot: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, "
            "q: torch.Tensor, threads: int)"),
        "Rotate queries into q, and keys, with the values, into the cache.");
  m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_pages"), nb::arg("v_pages"), nb::arg("table"),
        nb::arg("out"), nb::arg("scale"), nb::arg("softcap"), nb::arg("sinks").none(), nb::arg("threads"),
        TENSORS("paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable, "
                "out: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None, threads: int)"),
        "Attend each row of q [rows, heads, head_dim] over what the table says, into out.");
#undef TENSORS
}
