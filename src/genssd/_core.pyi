"""Native CPU kernels of genssd; genssd.kernels holds their contracts."""

import numpy
import torch


class SegmentTable:
    """
    Table of the segments of the KV cache that each row of a batch reads; see genssd.kernels.attention.
    """

    @property
    def num_rows(self) -> int:
        """Number of query rows."""

    @property
    def page_size(self) -> int:
        """Number of tokens of a page."""

    @property
    def segment(self) -> int:
        """Number of positions of a segment."""

    @property
    def shortest(self) -> int:
        """Number of positions of the first segment."""

    @property
    def window(self) -> int:
        """Maximum number of positions that a row sees, its own included; 0: all."""

    @property
    def chain_programs(self) -> int:
        """
        Number of programs of a kv head over which chains of segments are balanced; 0: no chains.
        """

    @property
    def resume_tokens(self) -> int:
        """
        Number of tokens of which the shared part of an unfinished segment is a multiple; 0: none is shared.
        """

    @property
    def largest_page(self) -> int:
        """Largest page that any row reads; -1 where there is no row."""

    @property
    def items(self) -> numpy.ndarray:
        """
        int32 [items, 6]: index into pages of the item's first page, position of its first token, number of tokens that its rows see at most, index into entries of its first row, number of rows, unit. No row has items in two units.
        """

    @property
    def entries(self) -> numpy.ndarray:
        """
        int32 [entries, 2]: row that reads an item, slot of its partial result.
        """

    @property
    def pages(self) -> numpy.ndarray:
        """int32: pages of all items, item by item."""

    @property
    def position(self) -> numpy.ndarray:
        """int32 [rows]: position of each row in its sequence."""

    @property
    def row_partial(self) -> numpy.ndarray:
        """
        int32 [rows + 1]: slot of each row's first partial result; one slot per segment follows, in the order of segments.
        """

    @property
    def slot(self) -> numpy.ndarray:
        """
        int64 [rows]: slot of each row's own token in the cache, page * page_size + offset.
        """

def segment_table(tables: torch.Tensor, table: torch.Tensor, first: torch.Tensor, rows: torch.Tensor, page_size: int, segment: int, window: int, unit_rows: int, chain_programs: int = 0, resume_tokens: int = 0) -> SegmentTable:
    """
    Build the segment table of a batch: sequence i has the pages tables[table[i]], and rows[i] query rows at the positions first[i], first[i] + 1, ...; a unit has at most unit_rows rows.
    """

class DeviceRecords:
    """
    Segment table as the kernels on a GPU read it; see genssd.kernels.device_table.
    """

    def __init__(self, table: SegmentTable) -> None: ...

    @property
    def items(self) -> numpy.ndarray:
        """
        int32 [items, 8]: the items whose partial results are stored, the longest first.
        """

    @property
    def entries(self) -> numpy.ndarray:
        """int32 [entries, 4]: the rows of the items."""

    @property
    def units(self) -> numpy.ndarray:
        """
        int32 [units, 8]: the units whose rows are computed from their first to their last segment at once, the longest first.
        """

    @property
    def rows(self) -> numpy.ndarray:
        """
        int32 [rows, 8]: the partial results of every row, and its last segment where it alone reads that.
        """

    @property
    def pages(self) -> numpy.ndarray:
        """
        int32: the pages of the segment table, then copies for chains whose pages do not follow each other there.
        """

    @property
    def num_partials(self) -> int:
        """Number of partial results that are stored."""

    @property
    def largest_item(self) -> int:
        """Largest number of rows of an item."""

    @property
    def largest_unit(self) -> int:
        """Largest number of rows of a unit."""

    @property
    def has_other_rows(self) -> bool:
        """Whether some row is in no unit."""

def instruction_set() -> str | None:
    """
    Return the instruction set in use, at first the best of this processor; None where it runs none.
    """

def instruction_sets() -> list[str]:
    """Return the instruction sets that this processor runs, the best first."""

def use_instruction_set(name: str, emulated: bool = False) -> None:
    """
    Switch this process to another instruction set, for tests and measurements. Results of the sets differ in their rounding. emulated: take also a set that this processor does not run, because something emulates its instructions. Raises ValueError where this processor does not run it.
    """

def gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """
    Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.
    """

def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, target: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float, stats: torch.Tensor, rank: torch.Tensor, top_ids: torch.Tensor, top_logprob: torch.Tensor, threads: int) -> None:
    """
    Score targets under a head: stats [4, rows] are logprob, logsumexp, entropy and sum_p2; softcap 0: none.
    """

def linear_sample(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, key: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float, drawable: int, tokens: torch.Tensor, logprob: torch.Tensor, threads: int) -> None:
    """
    Draw a token per row from a head, of the ids below drawable; -1 where the logits of the row are not finite.
    """

def sample(logits: torch.Tensor, key: torch.Tensor, temperature: float, top_k: int, top_p: float, log_min_p: float, tokens: torch.Tensor, threads: int) -> None:
    """
    Draw a token per row of logits after top-k, top-p and min-p; -1 where the logits of the row are not finite.
    """

def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """
    Compute out = x @ weight.T + bias, summed in float32; out has the dtype of x or float32.
    """

def packed_rows(weight: torch.Tensor, rows: int, index: torch.Tensor, out: torch.Tensor) -> None:
    """
    Copy rows of a packed weight that has `rows` rows: out[i] = weight[index[i]].
    """

def rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float | None, out: torch.Tensor, sum: torch.Tensor | None, threads: int) -> None:
    """
    Compute out = RMS norm of x, or of sum = residual + x, which is stored, too. offset: see genssd.kernels.norm.rms_norm.
    """

def gated(gate_up: torch.Tensor, gate: str, alpha: float, limit: float, out: torch.Tensor, threads: int) -> None:
    """
    Compute out = silu(gate) * up, gelu(gate) * up with gelu by tanh, or the clamped gate with alpha and limit ("silu", "gelu", "clamped"); see genssd.kernels.activation.
    """

def weighted_sum(values: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """
    Compute out[row] = sum over k of weight[row, k] * values[index[row, k]], in float32 and in the order of k.
    """

def rotary_angles(position: torch.Tensor, frequency: torch.Tensor, factor: float, cos: torch.Tensor, sin: torch.Tensor, threads: int) -> None:
    """
    Compute cos and sin [rows, frequencies] of position * frequency, times factor.
    """

def copy_pages(kv: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, threads: int) -> None:
    """
    Copy pages of kv [layers, 2, pages, page_size, kv_heads, head_dim], of any dtype.
    """

def write_kv(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, norm_offset: float | None, q: torch.Tensor, threads: int) -> None:
    """
    Write rotated queries to q, and rotated keys and the values to the slots of the cache; a negative slot is not written. cos and sin [rows, R / 2] rotate the first R values of a head.
    """

def paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable, out: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None, threads: int) -> None:
    """
    Compute into out the attention of each row of q [rows, heads, head_dim] over its segments in the table.
    """
