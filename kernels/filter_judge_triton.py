"""Triton kernels that draw by top-p and min-p with two reads of the logits: a token is drawn first, and judged then.

A filter that keeps a fraction top_p of the probability keeps the token that would be drawn without it as often. So no
threshold is searched:

1. For every split of a row: its peak and its sum of e^(z - peak).
2. Entries less likely than (1 - top_p) / V are less than 1 - top_p together, so that top-p keeps none of them. The
   others, which min-p keeps too, are copied to the split's part of a list, in the order of their ids; noise is made for
   them alone, and the split's largest noisy logit is its winner.
3. The row's winner is kept where the entries with larger logits weigh less than top_p of the row; every program adds up
   those of its split.
4. One program per row takes the verdict. Where the winner is not kept, nothing that is not more likely is kept either:
   it looks for the winner among what is left of the list and judges again, until one is kept.

Borders of splits depend on the vocabulary alone, sums have a fixed order, and no operation is atomic: a row's token
depends on that row alone.

Shapes:  B rows   V vocabulary   S splits of a row   L = S times the entries of a split
"""

from __future__ import annotations

import triton
import triton.language as tl

from genssd.kernels.filter_search_triton import ordered
from genssd.kernels.noise_triton import gumbel, uniform


@triton.jit
def peaks_kernel(logits, peaks, totals, V, S, stride, scale, SPLIT: tl.constexpr):
    """Compute a split's peak, NaN where it has a NaN or +inf, and its sum of e^(z - peak)."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v = split * SPLIT + tl.arange(0, SPLIT)
    z = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf")) * scale
    broken = tl.sum(((z != z) | (z == float("inf"))).to(tl.int32), 0) > 0
    peak = tl.max(tl.where(z != z, -float("inf"), z), 0)
    total = tl.sum(tl.where(z > -float("inf"), tl.exp(z - peak), 0.0), 0)
    tl.store(peaks + row * S + split, tl.where(broken, float("nan"), peak))
    tl.store(totals + row * S + split, total)


@triton.jit
def row_total(peaks, totals, row, S, SPLITS: tl.constexpr):
    """Return a row's peak, NaN where the row is not sound, and its sum of e^(z - peak)."""
    s = tl.arange(0, SPLITS)
    peak_S = tl.load(peaks + row * S + s, mask=s < S, other=-float("inf"))
    broken = tl.sum((peak_S != peak_S).to(tl.int32), 0) > 0
    peak = tl.max(tl.where(peak_S != peak_S, -float("inf"), peak_S), 0)
    weight_S = tl.where(peak_S > -float("inf"), tl.exp(peak_S - peak), 0.0)
    total = tl.sum(tl.load(totals + row * S + s, mask=s < S, other=0.0) * weight_S, 0)
    return tl.where(broken | (peak == -float("inf")), float("nan"), peak), total


@triton.jit
def draw_kernel(
    logits, key, peaks, totals,  # [B, V] int64 [B] [B, S] [B, S]
    values, ids, scores,  # [B, L] int32 [B, L] [B, L]
    counts, winner_scores, winner_places,  # int32 [B, S] [B, S] int32 [B, S]
    V, S, stride, scale, log_tail, log_min_p,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, SPLIT: tl.constexpr, PART: tl.constexpr, NOISE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """List the logits (after temperature), ids and noisy logits of a split's entries that may be kept, and its winner.

    log_tail: a little less than log((1 - top_p) / V).
    """
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    peak, total = row_total(peaks, totals, row, S, SPLITS)
    # relative to the peak, which may be far from 0
    tail = tl.log(total) + log_tail
    first = row * S * SPLIT + split * SPLIT
    count = 0
    if peak == peak:
        for start in range(0, SPLIT, PART):
            v = split * SPLIT + start + tl.arange(0, PART)
            z = tl.load(logits + row * stride + v, mask=v < V, other=-float("inf")) * scale
            may_be_kept = z > -float("inf")
            if TOP_P:
                may_be_kept &= z - peak >= tail
            if MIN_P:
                may_be_kept &= ordered(z) >= ordered(peak + log_min_p)
            kept = may_be_kept.to(tl.int32)
            number = tl.sum(kept, 0)
            if number > 0:
                at = first + count + tl.cumsum(kept, 0) - 1
                tl.store(values + at, z, mask=kept > 0)
                tl.store(ids + at, v, mask=kept > 0)
            count += number
    # noise is dear: it is made for the entries of the list alone, once they lie side by side
    tl.debug_barrier()
    seed = tl.load(key + row)
    best = tl.full([NOISE], -float("inf"), tl.float32)
    place = tl.full([NOISE], 0x7FFFFFFF, tl.int32)
    for start in range(0, count, NOISE):
        i = start + tl.arange(0, NOISE)
        z = tl.load(values + first + i, mask=i < count, other=-float("inf"))
        entry = tl.load(ids + first + i, mask=i < count, other=0)
        score = tl.where(i < count, z + gumbel(uniform(seed, entry)), -float("inf"))
        tl.store(scores + first + i, score, mask=i < count)
        place = tl.where(score > best, split * SPLIT + i, place)
        best = tl.maximum(best, score)
    highest = tl.max(best, 0)
    tl.store(counts + row * S + split, count)
    tl.store(winner_scores + row * S + split, highest)
    tl.store(winner_places + row * S + split, tl.min(tl.where(best == highest, place, 0x7FFFFFFF), 0))


@triton.jit
def row_winner(winner_scores, winner_places, row, S, SPLITS: tl.constexpr):
    """Return the place in the row's list of the largest noisy logit; of equal ones, that of the lowest id."""
    s = tl.arange(0, SPLITS)
    score_S = tl.load(winner_scores + row * S + s, mask=s < S, other=-float("inf"))
    place_S = tl.load(winner_places + row * S + s, mask=s < S, other=0x7FFFFFFF)
    return tl.min(tl.where(score_S == tl.max(score_S, 0), place_S, 0x7FFFFFFF), 0)


@triton.jit
def weigh_above(values, first, count, value, peak, TILE: tl.constexpr):
    """Return the sum of e^(z - peak) over the entries of a part of a list whose ordered logits are above value."""
    above = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        i = start + tl.arange(0, TILE)
        z = tl.load(values + first + i, mask=i < count, other=-float("inf"))
        above += tl.where((ordered(z) > value) & (i < count), tl.exp(z - peak), 0.0)
    return tl.sum(above, 0)


@triton.jit
def judge_kernel(
    peaks, totals, values, counts, winner_scores, winner_places,  # as in draw_kernel
    weights,  # [B, S]
    S, SPLIT: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the weight of the entries of a split whose logits are above that of the row's winner."""
    split, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    peak, _ = row_total(peaks, totals, row, S, SPLITS)
    weight = tl.zeros([], tl.float32)
    if peak == peak:
        first = row * S * SPLIT
        value = ordered(tl.load(values + first + row_winner(winner_scores, winner_places, row, S, SPLITS)))
        count = tl.load(counts + row * S + split)
        weight = weigh_above(values, first + split * SPLIT, count, value, peak, TILE)
    tl.store(weights + row * S + split, weight)


@triton.jit
def take_kernel(
    peaks, totals, values, ids, scores, counts, winner_scores, winner_places, weights,  # as in judge_kernel
    tokens,  # int64 [B]
    S, top_p, TOP_P: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Take a row's winner where top-p keeps it, else the first that it keeps: -1 where the row is not sound."""
    row = tl.program_id(0).to(tl.int64)
    first = row * S * SPLIT
    peak, total = row_total(peaks, totals, row, S, SPLITS)
    token = tl.full([], -1, tl.int32)
    if peak == peak:
        place = row_winner(winner_scores, winner_places, row, S, SPLITS)
        if TOP_P:
            s = tl.arange(0, SPLITS)
            above = tl.sum(tl.load(weights + row * S + s, mask=s < S, other=0.0), 0)
            value = ordered(tl.load(values + first + place))
            # nothing is above the largest logit, so that the loop ends
            while (above >= top_p * total) & (value < ordered(peak)):
                best = tl.full([TILE], -float("inf"), tl.float32)
                places = tl.full([TILE], 0x7FFFFFFF, tl.int32)
                for split in range(0, S):
                    count = tl.load(counts + row * S + split)
                    for start in range(0, count, TILE):
                        i = start + tl.arange(0, TILE)
                        at = first + split * SPLIT + i
                        z = tl.load(values + at, mask=i < count, other=-float("inf"))
                        score = tl.load(scores + at, mask=i < count, other=-float("inf"))
                        score = tl.where((ordered(z) > value) & (i < count), score, -float("inf"))
                        places = tl.where(score > best, split * SPLIT + i, places)
                        best = tl.maximum(best, score)
                place = tl.min(tl.where(best == tl.max(best, 0), places, 0x7FFFFFFF), 0)
                value = ordered(tl.load(values + first + place))
                above = tl.zeros([], tl.float32)
                for split in range(0, S):
                    count = tl.load(counts + row * S + split)
                    above += weigh_above(values, first + split * SPLIT, count, value, peak, TILE)
        token = tl.load(ids + first + place)
    tl.store(tokens + row, token.to(tl.int64))
