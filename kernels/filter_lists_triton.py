"""Triton kernels of the first three steps of filter_triton.py: from logits to a short list of entries per row.

Shapes:  B rows   V vocabulary   S splits of a row   C cuts   L entries of a row's list at most
"""

from __future__ import annotations

import triton
import triton.language as tl

from genssd.kernels.noise_triton import gumbel, uniform


@triton.jit
def split_statistics_kernel(
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
def bracket_kernel(
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
def list_kernel(
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
