"""Triton kernels of `sample`: top-k, top-p and min-p of given logits, and a draw among the tokens that they keep.

Of four kernels (filter_lists_triton.py, filter_search_triton.py), the first and the third run many programs per row,
the others one program per row:

1. For every split of a row: its peak and sum of e^(z - peak), and the number and weight of the entries at or above a
   few cuts. The cuts are multiples of STEP, the same for all splits, so the splits' numbers add up to the row's.
2. The highest cut below which no filter keeps an entry follows from these sums.
3. The entries at or above it are copied to a short list per row, in the order of their ids: the sums of step 1 give
   every split its place in the list. Noise is made for these entries alone.
4. The exact threshold is searched in the list, and the token with the largest noisy logit above it is drawn. With
   `FilterTiles.judged` the token is drawn from the whole list first, and judged by the weight of the larger logits.

With `FilterTiles.judged` and without top-k, other kernels do the work with two reads of the logits
(filter_judge_triton.py).

A row whose list would not fit (more than half of the vocabulary), or that needs a cut below the lowest, is
searched in the logits themselves. Without filters, or at temperature 0, one pass over splits and a merge draw the
token.

Boundaries of splits depend on the vocabulary alone, sums have a fixed order, and no operation is atomic: a row's token
depends on that row alone.

Shapes:  B rows   V vocabulary   S splits of a row   C cuts   L entries of a row's list at most
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from genssd.kernels import tune_file, tuned
from genssd.kernels.draw_triton import draw_from_logits
from genssd.kernels.filter_judge_triton import draw_kernel, judge_kernel, peaks_kernel, take_kernel
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
    steps: int = 2
    """Number of cuts in four nats, a power of 2."""
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
    judged: bool = False
    """Whether a token is drawn first and judged then, in place of a search for the threshold. Not measured on a GPU
    yet."""

    @property
    def step(self) -> float:
        """Distance between two cuts in nats."""
        return 4.0 / self.steps

    @staticmethod
    def from_values(values: tune_file.Configuration) -> FilterTiles:
        """Build from the values of a tune file. Raises ValueError where they are not those of this class."""
        tiles = tuned.build_from(FilterTiles, values)
        for name in ("split", "part", "list_part", "steps", "cuts", "tile"):
            if (size := getattr(tiles, name)) & (size - 1):
                raise ValueError(f"{name} must be a power of two, not {size}")
        return tiles

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        return dataclasses.asdict(self)


SHIPPED = FilterTiles()
SEARCH_CUTS = 16
"""Number of thresholds that one round of the search tries at once."""


def choose_filter_tiles(device: torch.device, vocabulary: int, rows: int) -> FilterTiles:
    """Return the sizes of the filters' kernels on a device: what was tuned for it, else the shipped ones."""
    shape = (vocabulary,)
    return tuned.find("filter", torch.float32, shape, device, rows, FilterTiles.from_values) or SHIPPED


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
    if tiles.judged and not filters["TOP_K"]:
        return judge_draws(logits_BV, key_B, scale, top_p, min_p, log_min_p, tiles=tiles)
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
        SEARCH=SEARCH_CUTS, JUDGED=tiles.judged, num_warps=tiles.row_warps,
    )  # fmt: skip
    return tokens


def judge_draws(
    logits_BV: Tensor, key_B: Tensor, scale: float, top_p: float, min_p: float, log_min_p: float, *, tiles: FilterTiles
) -> Tensor:
    """Draw one token per row by top-p or min-p or both, as `sample_rows` does, with the kernels that draw first.

    scale: 1 / temperature.
    """
    B, V = logits_BV.shape
    S, device = -(-V // tiles.split), logits_BV.device
    tokens = torch.empty(B, dtype=torch.int64, device=device)
    peaks, totals, winner_scores, weights = torch.empty(4, B, S, dtype=torch.float32, device=device).unbind()
    counts, winner_places = torch.empty(2, B, S, dtype=torch.int32, device=device).unbind()
    values, scores = torch.empty(2, B, S * tiles.split, dtype=torch.float32, device=device).unbind()
    ids = torch.empty(B, S * tiles.split, dtype=torch.int32, device=device)
    # a hundredth is far more than the rounding of sums; 1 - top_p is 0 where top_p is no filter
    log_tail = math.log((1.0 - top_p) / V) - 0.01 if top_p < 1.0 else 0.0
    sizes = {"SPLIT": tiles.split, "SPLITS": triton.next_power_of_2(S)}
    winners = (counts, winner_scores, winner_places)
    peaks_kernel[(S, B)](
        logits_BV, peaks, totals, V, S, logits_BV.stride(0), scale, SPLIT=tiles.split, num_warps=tiles.split_warps
    )
    draw_kernel[(S, B)](
        logits_BV, key_B, peaks, totals, values, ids, scores, *winners, V, S, logits_BV.stride(0), scale, log_tail,
        log_min_p, TOP_P=top_p < 1.0, MIN_P=min_p > 0.0, PART=tiles.list_part, NOISE=tiles.part // 2, **sizes,
        num_warps=tiles.split_warps,
    )  # fmt: skip
    if top_p < 1.0:
        judge_kernel[(S, B)](
            peaks, totals, values, *winners, weights, S, TILE=tiles.tile, **sizes, num_warps=tiles.split_warps
        )
    take_kernel[(B,)](
        peaks, totals, values, ids, scores, *winners, weights, tokens, S, top_p, TOP_P=top_p < 1.0, TILE=tiles.tile,
        **sizes, num_warps=tiles.row_warps,
    )  # fmt: skip
    return tokens
