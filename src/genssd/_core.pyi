"""Native CPU kernels of genssd; genssd.kernels holds their contracts."""

import torch


def gumbel_noise(keys: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    """
    Fill out[row, token] with Gumbel(0, 1) noise that depends on (keys[row], token) alone.
    """

def paged_attention(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, row_sequence: torch.Tensor, row_position: torch.Tensor, out: torch.Tensor, scale: float, window: int, threads: int) -> None:
    """
    Attend each row of q [rows, heads, head_dim] over positions 0..row_position of its sequence, into out.
    """
