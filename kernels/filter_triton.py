"""Triton kernels of `sample`: top-k, top-p and min-p of given logits, and a draw among the tokens that they keep.

Of four kernels (filter_lists_triton.py, filter_search_triton.py), the first and the third run many programs per row,
the others one program per row:

1. For every split of a row: its peak and sum of e^(z - peak), and the number and weight of the entries at or above a
   few cuts. The cuts are multiples of STEP, the same for all splits, so the splits' numbers add up to the row's.
2. The highest cut below which no filter keeps an entry follows from these sums.
3. The entries at or above it are copied to a short list per row, in the order of their ids: the sums of step 1 give
   every split its place in the list. Noise is made for these entries alone.
4. The exact threshold is searched in the list, and the token with the largest noisy logit above it is drawn.

A row whose list would not fit (more than half of the vocabulary), or that needs a cut below the lowest, is
searched in the logits themselves. Without filters, or at temperature 0, one pass over splits and a merge draw the
token.

Boundaries of splits depend on the vocabulary alone, sums have a fixed order, and no operation is atomic: a row's token
depends on that row alone.

Shapes:  B rows   V vocabulary   S splits of a row   C cuts   L entries of a row's list at most
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from genssd.kernels.draw_triton import draw_from_logits
from genssd.kernels.filter_lists_triton import bracket_kernel, list_kernel, split_statistics_kernel
from genssd.kernels.filter_search_triton import select_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterTiles:
    """Sizes of one configuration of the filters' kernels. Results up to the rounding of sums do not depend on them."""

    split: int = 8192
    """Number of entries of a row that one program of the kernels over splits computes."""
    part: int = 1024
    """Number of entries whose sums the first kernel adds up at a time."""
    list_part: int = 2048
    """Number of entries that the kernel that fills the lists holds at once."""
    cuts: int = 8
    """Number of cuts below a row's peak."""
    step: float = 2.0
    """Distance between two cuts in nats, a power of 2."""
    split_warps: int = 8
    """Warps of a program of the kernels over splits."""
    tile: int = 1024
    """Number of entries of a row's list that the last kernel holds at once."""
    rounds: int = 1
    """Number of passes over a list longer than a tile that narrow the search before the rest is copied to a tile."""
    row_warps: int = 8
    """Warps of a program of the last kernel."""
    capacity: int = 2
    """A row's list holds at most the vocabulary's size divided by this number."""


SHIPPED = FilterTiles()
SEARCH_CUTS = 16
"""Number of thresholds that one round of the search tries at once."""


def sample_rows(
    logits_BV: Tensor,
    key_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    log_min_p: float,
    *,
    tiles: FilterTiles = SHIPPED,
) -> Tensor:
    """Draw one token per row of logits, int64 [B]; -1 where a row has a NaN, a +inf or no finite entry."""
    B, V = logits_BV.shape
    S = -(-V // tiles.split)
    splits = triton.next_power_of_2(S)
    device = logits_BV.device
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    filters = {"TOP_K": 0 < top_k < V, "TOP_P": top_p < 1.0, "MIN_P": min_p > 0.0}
    stride, scale, grid = logits_BV.stride(0), 1.0 / (temperature or 1.0), (S, B)
    if temperature == 0.0 or not any(filters.values()):
        return draw_from_logits(logits_BV, key_B, temperature, V)[0]
    L, C = max(1, V // tiles.capacity), tiles.cuts
    statistics = (
        *torch.empty(2, B, S, dtype=torch.float32, device=device).unbind(),
        torch.empty(B, S, C, dtype=torch.int32, device=device),
        torch.empty(B, S, C, dtype=torch.float32, device=device),
    )
    bracket = torch.empty(B, 4, dtype=torch.float32, device=device)
    places = torch.empty(B, S + 1, dtype=torch.int32, device=device)
    values = torch.empty(B, L, dtype=torch.float32, device=device)
    ids = torch.empty(B, L, dtype=torch.int32, device=device)
    scores = torch.empty(B, L, dtype=torch.float32, device=device)
    scratch = torch.empty(B, tiles.tile, dtype=torch.float32, device=device)
    cuts, options = {"STEP": tiles.step, "CUTS": C}, (top_k, top_p, log_min_p)
    split_statistics_kernel[grid](
        logits_BV, *statistics, V, S, stride, scale, **cuts, SPLIT=tiles.split, PART=tiles.part,
        num_warps=tiles.split_warps,
    )  # fmt: skip
    bracket_kernel[(B,)](*statistics, bracket, places, S, *options, **filters, **cuts, SPLITS=splits, num_warps=4)
    lists = (logits_BV, key_B, bracket, places, values, ids, scores)
    list_kernel[grid](
        *lists, V, S, L, stride, scale, SPLIT=tiles.split, PART=tiles.list_part, NOISE=tiles.part // 2,
        num_warps=tiles.split_warps,
    )  # fmt: skip
    select_kernel[(B,)](
        *lists, scratch, tokens, V, S, L, stride, scale, *options, **filters, ROUNDS=tiles.rounds, TILE=tiles.tile,
        SEARCH=SEARCH_CUTS, num_warps=tiles.row_warps,
    )  # fmt: skip
    return tokens
