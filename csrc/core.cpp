// Python bindings of the native CPU kernels. Tensors cross as DLPack; nothing of torch is linked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <vector>

#include "device_records.hpp"
#include "operators.hpp"

namespace nb = nanobind;
using namespace genssd;

namespace {

template <typename T>
using Vector = nb::ndarray<nb::numpy, const T, nb::ndim<1>>;
using Int32Matrix = nb::ndarray<nb::numpy, const std::int32_t, nb::ndim<2>>;

template <typename T>
Vector<T> as_vector(const std::vector<T>& values) {
  return Vector<T>(values.data(), {values.size()}, nb::handle());
}

// Returns structs of int32 as the rows of a matrix.
template <typename Struct>
Int32Matrix as_matrix(const std::vector<Struct>& rows) {
  static_assert(sizeof(Struct) % sizeof(std::int32_t) == 0);
  return Int32Matrix(reinterpret_cast<const std::int32_t*>(rows.data()), {rows.size(), sizeof(Struct) / 4},
                     nb::handle());
}

#define NONE(signature) nb::sig("def " signature " -> None")
#define INT(name) nb::sig("def " name "(self) -> int")
#define ARRAY(name) nb::sig("def " name "(self) -> numpy.ndarray")

void bind_device_records(nb::module_& m) {
  using Records = DeviceRecords;
  const auto internal = nb::rv_policy::reference_internal;
  nb::class_<Records>(m, "DeviceRecords",
                      "Segment table as the kernels on a GPU read it; see genssd.kernels.device_table.")
      .def(nb::init<const SegmentTable&>(), nb::arg("table"),
           nb::sig("def __init__(self, table: SegmentTable) -> None"))
      .def_prop_ro(
          "items", [](const Records& r) { return as_matrix(r.items); }, internal, ARRAY("items"),
          "int32 [items, 8]: the items whose partial results are stored, the longest first.")
      .def_prop_ro(
          "entries", [](const Records& r) { return as_matrix(r.entries); }, internal, ARRAY("entries"),
          "int32 [entries, 4]: the rows of the items.")
      .def_prop_ro(
          "units", [](const Records& r) { return as_matrix(r.units); }, internal, ARRAY("units"),
          "int32 [units, 8]: the units whose rows are computed from their first to their last segment at once, the "
          "longest first.")
      .def_prop_ro(
          "rows", [](const Records& r) { return as_matrix(r.rows); }, internal, ARRAY("rows"),
          "int32 [rows, 8]: the partial results of every row, and its last segment where it alone reads that.")
      .def_prop_ro(
          "pages", [](const Records& r) { return as_vector(r.pages); }, internal, ARRAY("pages"),
          "int32: the pages of the segment table, then copies for chains whose pages do not follow each other there.")
      .def_ro("num_partials", &Records::num_partials, INT("num_partials"),
              "Number of partial results that are stored.")
      .def_ro("largest_item", &Records::largest_item, INT("largest_item"), "Largest number of rows of an item.")
      .def_ro("largest_unit", &Records::largest_unit, INT("largest_unit"), "Largest number of rows of a unit.")
      .def_ro("has_other_rows", &Records::has_other_rows, nb::sig("def has_other_rows(self) -> bool"),
              "Whether some row is in no unit.");
}

void bind_segment_table(nb::module_& m) {
  using Table = SegmentTable;
  const auto internal = nb::rv_policy::reference_internal;
  nb::class_<Table>(
      m, "SegmentTable",
      "Table of the segments of the KV cache that each row of a batch reads; see genssd.kernels.attention.")
      .def_prop_ro("num_rows", &Table::num_rows, INT("num_rows"), "Number of query rows.")
      .def_ro("page_size", &Table::page_size, INT("page_size"), "Number of tokens of a page.")
      .def_ro("segment", &Table::segment, INT("segment"), "Number of positions of a segment.")
      .def_prop_ro("shortest", &Table::shortest, INT("shortest"), "Number of positions of the first segment.")
      .def_ro("window", &Table::window, INT("window"),
              "Maximum number of positions that a row sees, its own included; 0: all.")
      .def_ro("chain_programs", &Table::chain_programs, INT("chain_programs"),
              "Number of programs of a kv head over which chains of segments are balanced; 0: no chains.")
      .def_ro("resume_tokens", &Table::resume_tokens, INT("resume_tokens"),
              "Number of tokens of which the shared part of an unfinished segment is a multiple; 0: none is shared.")
      .def_ro("largest_page", &Table::largest_page, INT("largest_page"),
              "Largest page that any row reads; -1 where there is no row.")
      .def_prop_ro(
          "items", [](const Table& t) { return as_matrix(t.items); }, internal, ARRAY("items"),
          "int32 [items, 6]: index into pages of the item's first page, position of its first token, number of tokens "
          "that its rows see at most, index into entries of its first row, number of rows, unit. No row has items in "
          "two units.")
      .def_prop_ro(
          "entries", [](const Table& t) { return as_matrix(t.entries); }, internal, ARRAY("entries"),
          "int32 [entries, 2]: row that reads an item, slot of its partial result.")
      .def_prop_ro(
          "pages", [](const Table& t) { return as_vector(t.pages); }, internal, ARRAY("pages"),
          "int32: pages of all items, item by item.")
      .def_prop_ro(
          "position", [](const Table& t) { return as_vector(t.position); }, internal, ARRAY("position"),
          "int32 [rows]: position of each row in its sequence.")
      .def_prop_ro(
          "row_partial", [](const Table& t) { return as_vector(t.row_partial); }, internal, ARRAY("row_partial"),
          "int32 [rows + 1]: slot of each row's first partial result; one slot per segment follows, in the order of "
          "segments.")
      .def_prop_ro(
          "slot", [](const Table& t) { return as_vector(t.slot); }, internal, ARRAY("slot"),
          "int64 [rows]: slot of each row's own token in the cache, page * page_size + offset.");
  m.def(
      "segment_table", &segment_table, nb::rv_policy::take_ownership, nb::arg("tables"), nb::arg("table"),
      nb::arg("first"), nb::arg("rows"), nb::arg("page_size"), nb::arg("segment"), nb::arg("window"),
      nb::arg("unit_rows"), nb::arg("chain_programs") = 0, nb::arg("resume_tokens") = 0,
      nb::sig("def segment_table(tables: torch.Tensor, table: torch.Tensor, first: torch.Tensor, rows: torch.Tensor, "
              "page_size: int, segment: int, window: int, unit_rows: int, chain_programs: int = 0, "
              "resume_tokens: int = 0) -> SegmentTable"),
      "Build the segment table of a batch: sequence i has the pages tables[table[i]], and rows[i] query rows at the "
      "positions first[i], first[i] + 1, ...; a unit has at most unit_rows rows.");
}

void bind_instruction_sets(nb::module_& m) {
  m.def(
      "instruction_set", [] { return active_kernels() ? active_kernels()->name : nullptr; },
      nb::sig("def instruction_set() -> str | None"),
      "Return the instruction set in use, at first the best of this processor; None where it runs none.");
  m.def(
      "instruction_sets",
      [] {
        nb::list names;
        for (const Kernels* kernels : supported_kernels()) names.append(kernels->name);
        return names;
      },
      nb::sig("def instruction_sets() -> list[str]"),
      "Return the instruction sets that this processor runs, the best first.");
  m.def(
      "use_instruction_set",
      [](const char* name, bool emulated) {
        if (!use_kernels(name, emulated))
          throw std::invalid_argument(std::string("this processor has no kernels of the name ") + name);
      },
      nb::arg("name"), nb::arg("emulated") = false,
      nb::sig("def use_instruction_set(name: str, emulated: bool = False) -> None"),
      "Switch this process to another instruction set, for tests and measurements. Results of the sets differ in "
      "their "
      "rounding. emulated: take also a set that this processor does not run, because something emulates its "
      "instructions. Raises ValueError where this processor does not run it.");
}

void bind_head_operators(nb::module_& m) {
  m.def("gumbel_noise", &gumbel_noise, nb::arg("keys"), nb::arg("out"), nb::arg("threads"),
        NONE("gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int)"),
        "Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.");
  m.def("linear_logprob", &linear_logprob, nb::arg("hidden"), nb::arg("weight"), nb::arg("vocabulary"),
        nb::arg("target"), nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("stats"),
        nb::arg("rank"), nb::arg("top_ids"), nb::arg("top_logprob"), nb::arg("threads"),
        NONE("linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, target: torch.Tensor, "
             "bias: torch.Tensor | None, temperature: float, softcap: float, stats: torch.Tensor, rank: torch.Tensor, "
             "top_ids: torch.Tensor, top_logprob: torch.Tensor, threads: int)"),
        "Score targets under a head: stats [4, rows] are logprob, logsumexp, entropy and sum_p2; softcap 0: none.");
  m.def("linear_sample", &linear_sample, nb::arg("hidden"), nb::arg("weight"), nb::arg("vocabulary"), nb::arg("key"),
        nb::arg("bias").none(), nb::arg("temperature"), nb::arg("softcap"), nb::arg("drawable"), nb::arg("tokens"),
        nb::arg("logprob"), nb::arg("threads"),
        NONE("linear_sample(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, key: torch.Tensor, bias: "
             "torch.Tensor | None, temperature: float, softcap: float, drawable: int, tokens: torch.Tensor, "
             "logprob: torch.Tensor, threads: int)"),
        "Draw a token per row from a head, of the ids below drawable; -1 where the logits of the row are not finite.");
  m.def("sample", &sample, nb::arg("logits"), nb::arg("key"), nb::arg("temperature"), nb::arg("top_k"),
        nb::arg("top_p"), nb::arg("log_min_p"), nb::arg("tokens"), nb::arg("threads"),
        NONE("sample(logits: torch.Tensor, key: torch.Tensor, temperature: float, top_k: int, top_p: float, "
             "log_min_p: float, tokens: torch.Tensor, threads: int)"),
        "Draw a token per row of logits after top-k, top-p and min-p; -1 where the logits of the row are not finite.");
}

void bind_layer_operators(nb::module_& m) {
  m.def("linear", &linear, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("threads"),
        NONE("linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, threads: "
             "int)"),
        "Compute out = x @ weight.T + bias, summed in float32; out has the dtype of x or float32.");
  m.def("packed_rows", &packed_rows, nb::arg("weight"), nb::arg("rows"), nb::arg("index"), nb::arg("out"),
        NONE("packed_rows(weight: torch.Tensor, rows: int, index: torch.Tensor, out: torch.Tensor)"),
        "Copy rows of a packed weight that has `rows` rows: out[i] = weight[index[i]].");
  m.def("rms_norm", &rms_norm, nb::arg("x"), nb::arg("residual").none(), nb::arg("weight"), nb::arg("eps"),
        nb::arg("offset").none(), nb::arg("out"), nb::arg("sum").none(), nb::arg("threads"),
        NONE("rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: "
             "float | None, out: torch.Tensor, sum: torch.Tensor | None, threads: int)"),
        "Compute out = RMS norm of x, or of sum = residual + x, which is stored, too. offset: see "
        "genssd.kernels.norm.rms_norm.");
  m.def("gated", &gated, nb::arg("gate_up"), nb::arg("gate"), nb::arg("alpha"), nb::arg("limit"), nb::arg("out"),
        nb::arg("threads"),
        NONE("gated(gate_up: torch.Tensor, gate: str, alpha: float, limit: float, out: torch.Tensor, threads: int)"),
        "Compute out = silu(gate) * up, gelu(gate) * up with gelu by tanh, or the clamped gate with alpha and limit "
        "(\"silu\", \"gelu\", \"clamped\"); see genssd.kernels.activation.");
  m.def("weighted_sum", &weighted_sum, nb::arg("values"), nb::arg("index"), nb::arg("weight"), nb::arg("out"),
        nb::arg("threads"),
        NONE("weighted_sum(values: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, "
             "threads: int)"),
        "Compute out[row] = sum over k of weight[row, k] * values[index[row, k]], in float32 and in the order of k.");
  m.def("rotary_angles", &rotary_angles, nb::arg("position"), nb::arg("frequency"), nb::arg("factor"), nb::arg("cos"),
        nb::arg("sin"), nb::arg("threads"),
        NONE("rotary_angles(position: torch.Tensor, frequency: torch.Tensor, factor: float, cos: torch.Tensor, sin: "
             "torch.Tensor, threads: int)"),
        "Compute cos and sin [rows, frequencies] of position * frequency, times factor.");
}

void bind_cache_operators(nb::module_& m) {
  m.def("copy_pages", &copy_pages, nb::arg("kv"), nb::arg("source"), nb::arg("destination"), nb::arg("threads"),
        NONE("copy_pages(kv: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, threads: int)"),
        "Copy pages of kv [layers, 2, pages, page_size, kv_heads, head_dim], of any dtype.");
  m.def(
      "write_kv", &write_kv, nb::arg("qkv"), nb::arg("cos"), nb::arg("sin"), nb::arg("k_pages"), nb::arg("v_pages"),
      nb::arg("slot"), nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"),
      nb::arg("norm_offset").none(), nb::arg("q"), nb::arg("threads"),
      NONE("write_kv(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor, v_pages: "
           "torch.Tensor, slot: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, "
           "norm_offset: float | None, q: torch.Tensor, threads: int)"),
      "Write rotated queries to q, and rotated keys and the values to the slots of the cache; a negative slot is not "
      "written. cos and sin [rows, R / 2] rotate the first R values of a head.");
  m.def("paged_attention", &paged_attention, nb::arg("q"), nb::arg("k_pages"), nb::arg("v_pages"), nb::arg("table"),
        nb::arg("out"), nb::arg("scale"), nb::arg("softcap"), nb::arg("sinks").none(), nb::arg("threads"),
        NONE("paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable, "
             "out: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None, threads: int)"),
        "Compute into out the attention of each row of q [rows, heads, head_dim] over its segments in the table.");
}

#undef NONE
#undef INT
#undef ARRAY

}  // namespace

NB_MODULE(_core, m) {
  m.doc() = "Native CPU kernels of genssd; genssd.kernels holds their contracts.";
  bind_segment_table(m);
  bind_device_records(m);
  bind_instruction_sets(m);
  bind_head_operators(m);
  bind_layer_operators(m);
  bind_cache_operators(m);
}
