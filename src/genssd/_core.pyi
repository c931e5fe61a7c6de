"""Native CPU kernels of genssd; genssd.kernels holds their contracts."""

import numpy
import torch


class SegmentTable:
    """
    Which rows read which stretch of the cache; see genssd.kernels.attention.
    """

    @property
    def num_rows(self) -> int:
        """Query rows."""

    @property
    def page_size(self) -> int:
        """Tokens of a page."""

    @property
    def segment(self) -> int:
        """Positions of a segment."""

    @property
    def window(self) -> int:
        """Positions that a row sees at most; 0: all."""

    @property
    def largest_page(self) -> int:
        """The largest page that is read."""

    @property
    def items(self) -> numpy.ndarray:
        """
        int32 [items, 6]: index into pages, first position, tokens, index into entries, entries, unit.
        """

    @property
    def entries(self) -> numpy.ndarray:
        """int32 [entries, 2]: row, partial slot."""

    @property
    def pages(self) -> numpy.ndarray:
        """int32: the pages of the items, one after the other."""

    @property
    def position(self) -> numpy.ndarray:
        """int32 [rows]: where each row stands."""

    @property
    def row_partial(self) -> numpy.ndarray:
        """
        int32 [rows + 1]: the row's first partial slot; they follow in the order of segments.
        """

    @property
    def slot(self) -> numpy.ndarray:
        """
        int64 [rows]: where the row's own token lies, page * page_size + offset.
        """

def instruction_set() -> str | None:
    """
    The kernels in use, at first the best for this processor; None: there are none.
    """

def instruction_sets() -> list[str]:
    """All that run on this processor, the best first."""

def use_instruction_set(name: str) -> None:
    """
    Change the kernels of this process, for tests and measurements. Results of other sets differ in their roundings.
    """

def segment_table(tables: torch.Tensor, table: torch.Tensor, first: torch.Tensor, rows: torch.Tensor, page_size: int, segment: int, window: int, unit_rows: int) -> SegmentTable:
    """
    Build the table of a batch: sequence i has the pages tables[table[i]] and rows at first[i], first[i] + 1, ...
    """

def gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """
    Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.
    """

def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, threads: int) -> None:
    """
    out = x @ weight.T + bias, summed in float32; out in the dtype of x or float32.
    """

def packed_rows(weight: torch.Tensor, rows: int, index: torch.Tensor, out: torch.Tensor) -> None:
    """Rows of a packed weight of so many rows: out[i] = weight[index[i]]."""

def linear_logprob(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, target: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float, stats: torch.Tensor, rank: torch.Tensor, top_ids: torch.Tensor, top_logprob: torch.Tensor, threads: int) -> None:
    """
    Score targets under a head: stats [4, rows] are logprob, logsumexp, entropy and sum_p2; softcap 0: none.
    """

def linear_sample(hidden: torch.Tensor, weight: torch.Tensor, vocabulary: int, key: torch.Tensor, bias: torch.Tensor | None, temperature: float, softcap: float, drawable: int, tokens: torch.Tensor, logprob: torch.Tensor, threads: int) -> None:
    """Draw a token per row from a head; -1 where its logits are not finite."""

def sample(logits: torch.Tensor, key: torch.Tensor, temperature: float, top_k: int, top_p: float, log_min_p: float, tokens: torch.Tensor, threads: int) -> None:
    """
    Draw a token per row of logits behind top-k, top-p and min-p; -1 where they are not finite.
    """

def rms_norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor, sum: torch.Tensor | None, threads: int) -> None:
    """out = norm of x, or of sum = residual + x."""

def gated(gate_up: torch.Tensor, gelu: bool, out: torch.Tensor, threads: int) -> None:
    """out = silu(gate) * up, or gelu(gate) * up with gelu by tanh."""

def rotary_angles(position: torch.Tensor, frequency: torch.Tensor, factor: float, cos: torch.Tensor, sin: torch.Tensor, threads: int) -> None:
    """cos and sin [rows, frequencies] of position * frequency, times factor."""

def copy_pages(kv: torch.Tensor, source: torch.Tensor, destination: torch.Tensor, threads: int) -> None:
    """
    Copy pages of kv [layers, 2, pages, page_size, kv_heads, head_dim], of any dtype.
    """

def write_kv(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slot: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, q: torch.Tensor, threads: int) -> None:
    """Rotate queries into q, and keys, with the values, into the cache."""

def paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, table: SegmentTable, out: torch.Tensor, scale: float, softcap: float, sinks: torch.Tensor | None, threads: int) -> None:
    """
    Attend each row of q [rows, heads, head_dim] over what the table says, into out.
    """
