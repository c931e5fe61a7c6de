"""Triton kernels of `sample`: top-k, top-p and min-p of given logits, and a draw among the tokens that they keep.

Of four kernels, the first and the third run many programs per row, the others one program per row:

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
import triton.language as tl
from torch import Tensor

from genssd.kernels.draw_triton import draw_from_logits
from genssd.kernels.noise_triton import gumbel, uniform


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


@triton.jit
def _ordered(z):
    """Return an int32 with the same order as the float32 z."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unordered(key):
    """Return the float32 whose ordered value is the int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _split_statistics_kernel(
    logits, peaks, totals, counts, masses,  # [B, V] [B, S] [B, S] [B, S, C] [B, S, C]
    V, S, stride, scale, STEP: tl.constexpr, CUTS: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Compute a split's peak (NaN where it has a NaN), its sum of e^(z - peak), and the number and weight of the
    entries at or above each of its cuts, of which the first is the largest multiple of STEP not above the peak."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    all_v = split * SPLIT + tl.arange(0, SPLIT)
    all_z = tl.load(logits + row * stride + all_v, mask=all_v < V, other=-float("inf")) * scale
    broken = tl.sum((all_z != all_z).to(tl.int32), 0) > 0
    peak = tl.max(tl.where(all_z != all_z, -float("inf"), all_z), 0)
    c = tl.arange(0, CUTS)
    cut = (tl.floor(peak / STEP) - c.to(tl.float32)) * STEP
    cut = tl.where(peak > -float("inf"), cut, float("inf"))
    count = tl.zeros([CUTS, PART], tl.float32)
    mass = tl.zeros([CUTS, PART], tl.float32)
    total = tl.zeros([PART], tl.float32)
    # read again, now from the nearest cache, in parts for which all sums fit the registers
    for start in range(0, SPLIT, PART):
        v = split * SPLIT + start + tl.arange(0, PART)
        z = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf")) * scale
        e = tl.where(z > -float("inf"), tl.exp(z - peak), 0.0)
        reached = tl.where(z[None, :] >= cut[:, None], 1.0, 0.0)
        count += reached
        mass += reached * e[None, :]
        total += e
    at = row * S + split
    tl.store(peaks + at, tl.where(broken, float("nan"), peak))
    tl.store(totals + at, tl.sum(total, 0))
    tl.store(counts + at * CUTS + c, tl.sum(count, 1).to(tl.int32))
    tl.store(masses + at * CUTS + c, tl.sum(mass, 1))


@triton.jit
def _bracket_kernel(
    peaks, totals, counts, masses,  # [B, S] [B, S] [B, S, C] [B, S, C]
    bracket, places,  # [B, 4] int32 [B, S + 1]
    S, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    STEP: tl.constexpr, CUTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Compute, for one row, its peak (NaN where it is not sound), its sum of e^(z - peak), the highest cut that no
    filter's threshold is below, and the cut above that; and how many entries reach the former before each split.

    Where no cut is low enough, the cut is -inf and the number of entries too large for any list.
    """
    row = tl.program_id(0).to(tl.int64)
    s, c = tl.arange(0, SPLITS), tl.arange(0, CUTS)
    at = row * S + s
    split_peak = tl.load(peaks + at, mask=s < S, other=-float("inf"))
    broken = tl.sum(((split_peak != split_peak) | (split_peak == float("inf"))).to(tl.int32), 0) > 0
    peak = tl.max(tl.where(split_peak != split_peak, -float("inf"), split_peak), 0)
    weight = tl.where(split_peak > -float("inf"), tl.exp(split_peak - peak), 0.0)
    total = tl.sum(tl.load(totals + at, mask=s < S, other=0.0) * weight, 0)

    first = tl.floor(peak / STEP)
    cut = (first - c.to(tl.float32)) * STEP
    # how many cuts the split's first one is below the row's; above the split's first cut it has no entry
    lag = tl.minimum(first - tl.floor(split_peak / STEP), 1048576.0).to(tl.int32)
    index = c[None, :] - lag[:, None]
    known = (index >= 0) & (index < CUTS) & (s < S)[:, None]
    count = tl.load(counts + at[:, None] * CUTS + index, mask=known, other=0)
    mass = tl.load(masses + at[:, None] * CUTS + index, mask=known, other=0.0) * weight[:, None]
    if TOP_K:
        reached = tl.sum(count, 0) >= top_k
    elif TOP_P:
        reached = tl.sum(mass, 0) >= top_p * total
    else:
        reached = c < 0
    # top-p after top-k renormalises over all that top-k keeps, also below the floor of min-p
    if MIN_P and not (TOP_K and TOP_P):
        reached = reached | (cut <= peak + log_min_p)
    place = tl.min(tl.where(reached, c, CUTS), 0)
    if (first < -1048576.0) | (first > 1048576.0):  # multiples of STEP that large are not exact
        place = CUTS
    low = tl.where(place < CUTS, tl.max(tl.where(c == place, cut, -float("inf")), 0), -float("inf"))
    high = tl.where(place > 0, tl.max(tl.where(c == place - 1, cut, -float("inf")), 0), float("inf"))
    entries = tl.sum(tl.where(c[None, :] == place, count, 0), 1)
    tl.store(bracket + row * 4, tl.where((broken == 0) & (peak > -float("inf")), peak, float("nan")))
    tl.store(bracket + row * 4 + 1, total)
    tl.store(bracket + row * 4 + 2, low)
    tl.store(bracket + row * 4 + 3, high)
    tl.store(places + row * (S + 1) + s, tl.cumsum(entries, 0) - entries, mask=s < S)
    tl.store(places + row * (S + 1) + S, tl.where(place < CUTS, tl.sum(entries, 0), 0x7FFFFFFF))


@triton.jit
def _list_kernel(
    logits, key, bracket, places,  # [B, V] int64 [B] [B, 4] int32 [B, S + 1]
    values, ids, scores,  # [B, L] int32 [B, L] [B, L]
    V, S, L, stride, scale, SPLIT: tl.constexpr, PART: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Copy the logits (before temperature), ids and noisy logits of a split's entries at or above the row's cut to the
    row's list."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low = tl.load(bracket + row * 4 + 2)
    first = tl.load(places + row * (S + 1) + split)
    end = tl.load(places + row * (S + 1) + split + 1)
    if (end > first) & (tl.load(places + row * (S + 1) + S) <= L):
        place = first
        for start in range(split * SPLIT, (split + 1) * SPLIT, PART):
            v = start + tl.arange(0, PART)
            x = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf"))
            kept = ((x * scale >= low) & (v < V)).to(tl.int32)
            number = tl.sum(kept, 0)
            if number > 0:
                at = row * L + place + tl.cumsum(kept, 0) - 1
                tl.store(values + at, x, mask=kept > 0)
                tl.store(ids + at, v, mask=kept > 0)
            place += number
        # noise is dear: it is made for the entries of the list alone, once they lie side by side
        tl.debug_barrier()
        seed = tl.load(key + row)
        for start in range(first, end, NOISE):
            i = start + tl.arange(0, NOISE)
            value = tl.load(values + row * L + i, mask=i < end, other=0.0)
            entry = tl.load(ids + row * L + i, mask=i < end, other=0)
            tl.store(scores + row * L + i, value * scale + gumbel(uniform(seed, entry)), mask=i < end)


@triton.jit
def _smallest_cut(
    x, scratch, n, scale, peak, low, high, bound,
    COUNT: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """Return the smallest ordered value t in [low, high] such that the entries above t weigh less than bound together.

    x: pointer to n entries, before temperature, of which an entry weighs 1 (COUNT) or e^(z - peak). scratch: pointer to
    memory for TILE entries. low, high: int64, because the range of all floats overflows 32 bits. Every round tries CUTS
    thresholds and keeps the range between two of them. Entries longer than a tile are searched in ROUNDS passes over
    thresholds at equal distances; then those in range fit a tile, or else the passes go on.
    """
    lane, c = tl.arange(0, TILE), tl.arange(0, CUTS)
    passes, held, base = 0, 0, 0.0
    resident = n <= TILE
    source = x
    if resident:
        held = n
    while (low < high) & (resident == 0):
        span = high - low
        cut = (low + (span * c) // CUTS).to(tl.int32)
        if passes < ROUNDS:
            # at equal distances between the values: most floats are near 0
            bottom = tl.maximum(_unordered(low.to(tl.int32)), peak - 64.0)
            top = _unordered(high.to(tl.int32))
            spaced = _ordered(bottom + (top - bottom) * (c.to(tl.float32) / CUTS))
            cut = tl.minimum(tl.maximum(spaced, low.to(tl.int32)), high.to(tl.int32))
        above = tl.zeros([CUTS, TILE], tl.float32)
        for start in range(0, n, TILE):
            z = tl.load(x + start + lane, mask=start + lane < n, other=-float("inf")) * scale
            weight = tl.where(start + lane < n, 1.0, 0.0) if COUNT else tl.exp(z - peak)
            above += tl.where(_ordered(z)[None, :] > cut[:, None], weight[None, :], 0.0)
        fits = tl.sum(above, 1) < bound
        high = tl.minimum(high, tl.min(tl.where(fits, cut.to(tl.int64), high), 0))
        low = tl.maximum(low, tl.max(tl.where(fits, low, cut.to(tl.int64) + 1), 0))
        passes += 1
        if passes == ROUNDS:
            sums = tl.zeros([TILE], tl.float32)
            for start in range(0, n, TILE):
                value = tl.load(x + start + lane, mask=start + lane < n, other=-float("inf"))
                z = value * scale
                key = _ordered(z).to(tl.int64)
                weight = tl.where(start + lane < n, 1.0, 0.0) if COUNT else tl.exp(z - peak)
                sums += tl.where(key > high, weight, 0.0)
                inside = (key >= low) & (key <= high) & (start + lane < n)
                place = held + tl.cumsum(inside.to(tl.int32), 0) - 1
                tl.store(scratch + place, value, mask=inside & (place < TILE))
                held += tl.sum(inside.to(tl.int32), 0)
            tl.debug_barrier()
            base = tl.sum(sums, 0)
            resident = held <= TILE
            source = scratch
    if low < high:
        z = tl.load(source + lane, mask=lane < held, other=-float("inf")) * scale
        key = _ordered(z)
        weight = tl.where(lane < held, 1.0, 0.0) if COUNT else tl.exp(z - peak)
        while low < high:
            cut = (low + ((high - low) * c) // CUTS).to(tl.int32)
            above = tl.sum(tl.where(key[None, :] > cut[:, None], weight[None, :], 0.0), 1)
            fits = base + above < bound
            high = tl.minimum(high, tl.min(tl.where(fits, cut.to(tl.int64), high), 0))
            low = tl.maximum(low, tl.max(tl.where(fits, low, cut.to(tl.int64) + 1), 0))
    return low


@triton.jit
def _best_of(x, ids, scores, key, n, listed, scale, floor, TILE: tl.constexpr):
    """Return the id of the entry with the largest noisy logit among n entries whose ordered value is at least floor.

    listed: whether ids and scores hold the ids and noisy logits of the entries; else their places are the ids.
    """
    lane = tl.arange(0, TILE)
    best = tl.full([TILE], -float("inf"), tl.float32)
    chosen = tl.full([TILE], 0x7FFFFFFF, tl.int32)
    for start in range(0, n, TILE):
        i = start + lane
        z = tl.load(x + i, mask=i < n, other=-float("inf")) * scale
        kept = (_ordered(z) >= floor) & (z > -float("inf"))
        if listed:
            score = tl.load(scores + i, mask=i < n, other=-float("inf"))
        else:
            score = z
            if tl.max(kept.to(tl.int32), 0) > 0:
                score += gumbel(uniform(key, i))
        score = tl.where(kept, score, -float("inf"))
        chosen = tl.where(score > best, i, chosen)
        best = tl.maximum(best, score)
    token = tl.min(tl.where(best == tl.max(best, 0), chosen, 0x7FFFFFFF), 0)
    if listed:
        token = tl.load(ids + token)
    return token


@triton.jit
def _select_kernel(
    logits, key, bracket, places,  # [B, V] int64 [B] [B, 4] int32 [B, S + 1]
    values, ids, scores, scratch, tokens,  # [B, L] int32 [B, L] [B, L] [B, TILE] int64 [B]
    V, S, L, stride, scale, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    ROUNDS: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """Search a row's threshold and draw its token: -1 where the row has a NaN, a +inf or no finite entry."""
    row = tl.program_id(0).to(tl.int64)
    peak, total = tl.load(bracket + row * 4), tl.load(bracket + row * 4 + 1)
    low_cut, high_cut = tl.load(bracket + row * 4 + 2), tl.load(bracket + row * 4 + 3)
    n = tl.load(places + row * (S + 1) + S)
    token = tl.full([], -1, tl.int32)
    if peak == peak:
        listed = n <= L
        x = logits + row * stride
        if listed:
            x = values + row * L
        n = tl.where(listed, n, V)
        # all entries at or above the next cut together are too few, or weigh too little
        top = _ordered(peak)
        high = tl.where(high_cut < peak, _ordered(high_cut), top)
        floor = _ordered(low_cut)
        least = _ordered(peak + log_min_p) if MIN_P else floor
        if TOP_K:
            if not TOP_P:
                floor = tl.maximum(floor, least)
            floor = _smallest_cut(
                x, scratch + row * TILE, n, scale, peak, floor.to(tl.int64), high.to(tl.int64),
                tl.minimum(top_k, V).to(tl.float32), True, ROUNDS, TILE, SEARCH,
            ).to(tl.int32)  # fmt: skip
        if TOP_P:
            if TOP_K:
                sums = tl.zeros([TILE], tl.float32)
                for start in range(0, n, TILE):
                    i = start + tl.arange(0, TILE)
                    z = tl.load(x + i, mask=i < n, other=-float("inf")) * scale
                    sums += tl.where(_ordered(z) >= floor, tl.exp(z - peak), 0.0)
                total = tl.sum(sums, 0)
                high = top
            else:
                floor = tl.maximum(floor, least)
            floor = _smallest_cut(
                x, scratch + row * TILE, n, scale, peak, floor.to(tl.int64), high.to(tl.int64),
                top_p * total, False, ROUNDS, TILE, SEARCH,
            ).to(tl.int32)  # fmt: skip
        floor = tl.maximum(floor, least)
        seed = tl.load(key + row)
        token = _best_of(x, ids + row * L, scores + row * L, seed, n, listed, scale, floor, TILE)
    tl.store(tokens + row, token.to(tl.int64))


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
    _split_statistics_kernel[grid](
        logits_BV, *statistics, V, S, stride, scale, **cuts, SPLIT=tiles.split, PART=tiles.part,
        num_warps=tiles.split_warps,
    )  # fmt: skip
    _bracket_kernel[(B,)](*statistics, bracket, places, S, *options, **filters, **cuts, SPLITS=splits, num_warps=4)
    lists = (logits_BV, key_B, bracket, places, values, ids, scores)
    _list_kernel[grid](
        *lists, V, S, L, stride, scale, SPLIT=tiles.split, PART=tiles.list_part, NOISE=tiles.part // 2,
        num_warps=tiles.split_warps,
    )  # fmt: skip
    _select_kernel[(B,)](
        *lists, scratch, tokens, V, S, L, stride, scale, *options, **filters, ROUNDS=tiles.rounds, TILE=tiles.tile,
        SEARCH=SEARCH_CUTS, num_warps=tiles.row_warps,
    )  # fmt: skip
    return tokens
