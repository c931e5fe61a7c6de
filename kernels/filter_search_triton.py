"""Triton kernel of the last step of filter_triton.py: the exact threshold of a row, and a draw above it.

Shapes:  B rows   V vocabulary   S splits of a row   L entries of a row's list at most
"""

from __future__ import annotations

import triton
import triton.language as tl

from genssd.kernels.noise_triton import gumbel, uniform


@triton.jit
def ordered(z):
    """Return an int32 with the same order as the float32 z."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(key):
    """Return the float32 whose ordered value is the int32 key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


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
            bottom = tl.maximum(from_ordered(low.to(tl.int32)), peak - 64.0)
            top = from_ordered(high.to(tl.int32))
            spaced = ordered(bottom + (top - bottom) * (c.to(tl.float32) / CUTS))
            cut = tl.minimum(tl.maximum(spaced, low.to(tl.int32)), high.to(tl.int32))
        above = tl.zeros([CUTS, TILE], tl.float32)
        for start in range(0, n, TILE):
            z = tl.load(x + start + lane, mask=start + lane < n, other=-float("inf")) * scale
            weight = tl.where(start + lane < n, 1.0, 0.0) if COUNT else tl.exp(z - peak)
            above += tl.where(ordered(z)[None, :] > cut[:, None], weight[None, :], 0.0)
        fits = tl.sum(above, 1) < bound
        high = tl.minimum(high, tl.min(tl.where(fits, cut.to(tl.int64), high), 0))
        low = tl.maximum(low, tl.max(tl.where(fits, low, cut.to(tl.int64) + 1), 0))
        passes += 1
        if passes == ROUNDS:
            sums = tl.zeros([TILE], tl.float32)
            for start in range(0, n, TILE):
                value = tl.load(x + start + lane, mask=start + lane < n, other=-float("inf"))
                z = value * scale
                key = ordered(z).to(tl.int64)
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
        key = ordered(z)
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
        kept = (ordered(z) >= floor) & (z > -float("inf"))
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
def _draw_and_judge(values, ids, scores, n, scale, peak, floor, bound, COUNT: tl.constexpr, TILE: tl.constexpr):
    """Return the id of the entry with the largest noisy logit among those of a list that a filter keeps.

    A filter keeps an entry where the entries with larger logits weigh less than bound together; an entry weighs 1
    (COUNT) or e^(z - peak). floor: the smallest ordered value that may be drawn. The winner among all entries is kept
    with the probability that the filter keeps, so it is drawn first and judged then; where it is not kept, neither is
    any entry whose logit is not larger.
    """
    lane = tl.arange(0, TILE)
    token, judged = tl.full([], -1, tl.int32), 0
    while judged == 0:
        best = tl.full([TILE], -float("inf"), tl.float32)
        place = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for start in range(0, n, TILE):
            i = start + lane
            z = tl.load(values + i, mask=i < n, other=-float("inf")) * scale
            score = tl.load(scores + i, mask=i < n, other=-float("inf"))
            score = tl.where((ordered(z) >= floor) & (i < n), score, -float("inf"))
            place = tl.where(score > best, i, place)
            best = tl.maximum(best, score)
        winner = tl.min(tl.where(best == tl.max(best, 0), place, 0x7FFFFFFF), 0)
        value = ordered(tl.load(values + winner) * scale)
        above = tl.zeros([TILE], tl.float32)
        for start in range(0, n, TILE):
            z = tl.load(values + start + lane, mask=start + lane < n, other=-float("inf")) * scale
            weight = 1.0 if COUNT else tl.exp(z - peak)
            above += tl.where((ordered(z) > value) & (start + lane < n), weight, 0.0)
        # nothing is above the largest logit, so that the loop ends
        if (tl.sum(above, 0) < bound) | (value >= ordered(peak)):
            token, judged = tl.load(ids + winner), 1
        floor = value + 1
    return token


@triton.jit
def select_kernel(
    logits, key, bracket, places,  # [B, V] int64 [B] [B, 4] int32 [B, S + 1]
    values, ids, scores, scratch, tokens,  # [B, L] int32 [B, L] [B, L] [B, TILE] int64 [B]
    V, S, L, stride, scale, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    ROUNDS: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr, JUDGED: tl.constexpr,
):  # fmt: skip
    """Search a row's threshold and draw its token: -1 where the row has a NaN, a +inf or no finite entry.

    JUDGED: in a list, draw first and judge the token by the last filter, without a search.
    """
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
        top = ordered(peak)
        high = tl.where(high_cut < peak, ordered(high_cut), top)
        floor = ordered(low_cut)
        least = ordered(peak + log_min_p) if MIN_P else floor
        if TOP_K:
            if not TOP_P:
                floor = tl.maximum(floor, least)
            if JUDGED and not TOP_P:
                high = tl.where(listed, floor, high)  # nothing to search
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
                    sums += tl.where(ordered(z) >= floor, tl.exp(z - peak), 0.0)
                total = tl.sum(sums, 0)
                high = top
            else:
                floor = tl.maximum(floor, least)
            if JUDGED:
                high = tl.where(listed, floor, high)
            floor = _smallest_cut(
                x, scratch + row * TILE, n, scale, peak, floor.to(tl.int64), high.to(tl.int64),
                top_p * total, False, ROUNDS, TILE, SEARCH,
            ).to(tl.int32)  # fmt: skip
        floor = tl.maximum(floor, least)
        seed = tl.load(key + row)
        if JUDGED and (TOP_K or TOP_P):
            if listed:
                bound = top_p * total if TOP_P else tl.minimum(top_k, V).to(tl.float32)
                token = _draw_and_judge(
                    x, ids + row * L, scores + row * L, n, scale, peak, floor, bound, not TOP_P, TILE
                )
            else:
                token = _best_of(x, ids + row * L, scores + row * L, seed, n, listed, scale, floor, TILE)
        else:
            token = _best_of(x, ids + row * L, scores + row * L, seed, n, listed, scale, floor, TILE)
    tl.store(tokens + row, token.to(tl.int64))
