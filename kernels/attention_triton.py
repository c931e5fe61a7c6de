"""Triton kernels of `paged_attention`: two that read the cache, and one that merges and finishes.

A tile holds query vectors (rows times query heads per kv head) and walks tokens in tiles of BLOCK_T, whose borders are
multiples of BLOCK_T from the segment's first token. For every vector it keeps, with scores z in units of ln 2,

    peak = max z        total = sum 2^(z - peak)        values = sum 2^(z - peak) v

_item_kernel        computes these partial results for items, which rows of several sequences can share
_unit_kernel        computes rows of one sequence from first to last segment: prefill, and extension of a prefix
_finish_kernel      computes the last segment of every other row where this row reads it alone, merges the row's partial
                    results in the order of segments, and writes the output

All three add up a tile by the same function and merge segments by the same function, in the order of segments. A tile
of tokens that a vector does not see multiplies the vector's sums by 1 and adds 0, no operation is atomic, and a row of
a product depends on the same row of its factors alone. So a vector's bits depend on its own keys and values, and on
nothing else: neither on the kernel that computes it, nor on its place in a tile.

The number of programs does not depend on the table, and the number of items is read from device memory, so a captured
graph serves every table that is copied into the same buffer.

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim   M vectors of a tile
         T tokens of a tile
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from genssd.kernels import tuned
from genssd.kernels.device_table import ENTRY, ITEM, ROW, UNIT, DeviceTable
from genssd.kernels.head_triton import safe_peak

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTiles:
    """Sizes of one configuration of the kernels, on some of which the bits of results depend; see `choose_tiles`.

    block_t: tokens of a tile. block_m, unit_m, tail_m: query vectors of a tile of the kernel over items, over units and
    over rows. per_sm, unit_per_sm: programs per multiprocessor. tma: whether tiles of keys and values are loaded by the
    tensor memory accelerator, where the layout of the pages permits it; masked_tma, window_tma and tail_tma: so, too,
    where not every vector sees every token of the tile, without a window, with one, and in the kernel over rows.
    overlap: whether the kernel over rows starts while that over items runs, which needs
    Hopper or later. fused: whether score and peak are subtracted in the rounding of the multiplication by the scale.
    flat: whether the tiles of all segments of a unit are in one loop, so that no load waits at the end of a segment.
    """

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    tail_m: int
    tail_warps: int
    tail_stages: int = 2
    unit_m: int
    unit_warps: int
    unit_stages: int
    per_sm: int = 1
    unit_per_sm: int = 1
    tma: bool = False
    masked_tma: bool = False
    window_tma: bool = False
    tail_tma: bool = False
    overlap: bool = False
    fused: bool = True
    flat: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfiguration:
    """Launch configuration for any device of one kind, as a tune file keeps it; bits of results depend on it.

    segment: tokens of a segment (see `attention.choose_segment`).
    """

    tiles: AttentionTiles
    segment: int

    @staticmethod
    def from_values(values: tuned.Configuration) -> AttentionConfiguration:
        """Build from the values of a tune file. Raises ValueError where they are not those of `values`."""
        return tuned.build_from(AttentionConfiguration, values, {"tiles": AttentionTiles})

    def values(self) -> dict[str, int]:
        """Return the values of the tune file."""
        fields = dataclasses.asdict(self)
        return {**fields.pop("tiles"), **fields}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLaunch:
    """Launch configuration of the kernels.

    multiprocessors: of the device; no result depends on it. interpret: whether Triton's interpreter runs the kernels.
    """

    multiprocessors: int
    tiles: AttentionTiles
    interpret: bool = False


@triton.jit
def accumulate_product(a, b, c, INTERPRET: tl.constexpr):
    """Return c + a @ b, each row of which depends on the same row of a and c, and on b, alone."""
    # the interpreter would multiply the bits of bf16 as integers, and round a row differently at other places of a tile
    if INTERPRET:
        return c + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def load_tile(
    tiles, pages, item_pages, page, start, low, high, kv_head, G,
    stride_page, stride_slot, stride_group,
    S: tl.constexpr, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return the tokens start to start + BLOCK_T of an item as [T, E].

    page: the page of `start` where a page holds complete tiles. MASKED: whether the tile may reach beyond the tokens
    low to high, which a vector sees; in place of any other token, which may hold NaN, it holds one of them.
    """
    if TMA:
        tile = tiles.load([(page * G + kv_head) * S + start % S, 0])
    else:
        t, e = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
        if MASKED:
            t = tl.minimum(tl.maximum(t, low - start), high - 1 - start)
        if S % BLOCK_T == 0:
            # one address, and offsets that are the same for all tiles
            first = page.to(tl.int64) * stride_page + kv_head * stride_group + start % S * stride_slot
            at = pages + first + (t[:, None] * stride_slot + e[None, :])
        else:
            token_page = tl.load(item_pages + (start + t) // S).to(tl.int64)
            slots = token_page * stride_page + (start + t) % S * stride_slot + kv_head * stride_group
            at = pages + slots[:, None] + e[None, :]
        if E == BLOCK_E:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=e[None, :] < E, other=0.0)
    return tile


@triton.jit
def add_scores(
    peak, total, sums_ME, z, v_TE, visible, inner, factor,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add a tile of tokens to the partial results of the vectors. z: products of queries and keys, float32 [M, T].

    With SOFTCAP, z is replaced by the hyperbolic tangent of z * inner / (2 log2 e). The score in units of ln 2 is then
    factor * z, and peak is in units of z; factor is positive.
    """
    if SOFTCAP:
        z = 1.0 - 2.0 / (tl.exp2(z * inner) + 1.0)
    if MASKED:
        z = tl.where(visible, z, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(z, 1))
    if FUSED:
        # the product below is not rounded before the subtraction, but base * factor is: where that were off by more
        # than a few units, no key counts
        base = tl.where(new_peak > -67108864.0, new_peak, 0.0)
        weight = tl.exp2(tl.fma(z, factor, -(base * factor)[:, None]))
    else:
        base = safe_peak(new_peak)
        weight = tl.exp2((z - base[:, None]) * factor)
    shrink = tl.exp2((peak - base) * factor)
    total = tl.fma(total, shrink, tl.sum(weight, 1))
    sums_ME = accumulate_product(weight.to(v_TE.dtype), v_TE, sums_ME * shrink[:, None], INTERPRET)
    return new_peak, total, sums_ME


@triton.jit
def scale_peak(peak, factor):
    """Return peak * factor with a rounding of its own: the compiler cannot fuse it with an addition that follows."""
    return tl.fma(peak, factor, 0.0)


@triton.jit
def initial_state(sinks, head, valid, HEADS: tl.constexpr, BLOCK_E: tl.constexpr, SINKS: tl.constexpr):
    """Return the partial results of the sinks alone, or of nothing."""
    peak = tl.full([HEADS], -float("inf"), tl.float32)
    if SINKS:
        peak = scale_peak(tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32), 1.4426950408889634)
    total = tl.where(peak > -float("inf"), 1.0, 0.0)
    return peak, total, tl.zeros([HEADS, BLOCK_E], tl.float32)


@triton.jit
def load_partial(
    peaks, totals, values, partial, end, head, valid, valid_entries, H, E: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Return a partial result, or that of nothing where partial is not before end."""
    at, exists = tl.cast(partial, tl.int64) * H + head, valid & (partial + tl.zeros_like(head) < end)
    peak = tl.load(peaks + at, mask=exists, other=-float("inf"))
    total = tl.load(totals + at, mask=exists, other=0.0)
    entries = at[:, None] * E + tl.arange(0, BLOCK_E)[None, :]
    return peak, total, tl.load(values + entries, mask=valid_entries & exists[:, None], other=0.0)


@triton.jit
def merge(peak, total, sums, other_peak, other_total, other_sums):
    """Return the partial results of two sets of tokens together."""
    new_peak = tl.maximum(peak, other_peak)
    base = safe_peak(new_peak)  # for two empty sets -inf - -inf would be NaN
    a, b = tl.exp2(peak - base), tl.exp2(other_peak - base)
    total = tl.fma(other_total, b, total * a)
    sums = tl.fma(other_sums, b[:, None], sums * a[:, None])
    return new_peak, total, sums


@triton.jit
def add_tokens(
    peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, start, stop, low, high,
    before, last, kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
    S: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the tiles from start up to stop to the partial results of the vectors.

    A vector sees the tokens after `before`, up to `last`, and all of a tile that is not MASKED.
    """
    page = tl.load(item_pages + tl.minimum(start, high - 1) // S)
    for tile in tl.range(start, stop, BLOCK_T):
        # read one step ahead, so that no address waits for it
        next_page = tl.load(item_pages + tl.minimum(tile + BLOCK_T, high - 1) // S)
        k_TE = load_tile(
            k_tiles, k_pages, item_pages, page, tile, low, high, kv_head, G, stride_page, stride_slot, stride_group,
            S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
        v_TE = load_tile(
            v_tiles, v_pages, item_pages, page, tile, low, high, kv_head, G, stride_page, stride_slot, stride_group,
            S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
        token = tile + tl.arange(0, BLOCK_T)
        if MASKED and TMA:
            v_TE = tl.where(((token >= low) & (token < high))[:, None], v_TE, 0.0)
        visible = token[None, :] <= last[:, None]
        if WINDOW:
            visible &= token[None, :] > before[:, None]
        z = accumulate_product(q_ME, tl.trans(k_TE), tl.zeros([BLOCK_M, BLOCK_T], tl.float32), INTERPRET)
        peak, total, sums_ME = add_scores(
            peak, total, sums_ME, z, v_TE, visible, inner, factor, MASKED, SOFTCAP, FUSED, INTERPRET
        )
        page = next_page
    return peak, total, sums_ME


@triton.jit
def add_segments(
    peak, total, sums_ME, outer_peak, outer_total, outer_sums, boundary,
    q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, start, stop, high, last,
    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
    S: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the tiles from start up to stop, positions of a sequence, and merge the partial results of every segment.

    boundary: position where the segment of the first tile ends.
    """
    page = tl.load(item_pages + tl.minimum(start, high - 1) // S)
    for tile in tl.range(start, stop, BLOCK_T):
        next_page = tl.load(item_pages + tl.minimum(tile + BLOCK_T, high - 1) // S)
        k_TE = load_tile(
            k_tiles, k_pages, item_pages, page, tile, 0, high, kv_head, G, stride_page, stride_slot, stride_group,
            S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
        v_TE = load_tile(
            v_tiles, v_pages, item_pages, page, tile, 0, high, kv_head, G, stride_page, stride_slot, stride_group,
            S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
        token = tile + tl.arange(0, BLOCK_T)
        if MASKED and TMA:
            v_TE = tl.where((token < high)[:, None], v_TE, 0.0)
        z = accumulate_product(q_ME, tl.trans(k_TE), tl.zeros([BLOCK_M, BLOCK_T], tl.float32), INTERPRET)
        if tile == boundary:
            outer_peak, outer_total, outer_sums = merge(
                outer_peak, outer_total, outer_sums, scale_peak(peak, factor), total, sums_ME
            )
            peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            sums_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
            boundary += tl.minimum(boundary, SEGMENT)
        peak, total, sums_ME = add_scores(
            peak, total, sums_ME, z, v_TE, token[None, :] <= last[:, None], inner, factor,
            MASKED, SOFTCAP, FUSED, INTERPRET,
        )  # fmt: skip
        page = next_page
    return peak, total, sums_ME, outer_peak, outer_total, outer_sums, boundary


@triton.jit
def add_segment(
    q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, low, full_low, full_high, high,
    before, last, kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
    S: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr, MASKED_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Return the partial results of vectors over one segment.

    Some vector sees the tokens from low up to high, every vector those from full_low up to full_high.
    """
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums_ME = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    start, stop = 0, full_high // BLOCK_T * BLOCK_T
    if WINDOW:  # a loop of its own for the tiles that every vector sees would spill registers
        start, stop = low // BLOCK_T * BLOCK_T, 0
    else:
        peak, total, sums_ME = add_tokens(
            peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
            start, stop, low, high, before, last,
            kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
            S, E, BLOCK_M, BLOCK_T, BLOCK_E, False, WINDOW, SOFTCAP, FUSED, TMA, INTERPRET,
        )  # fmt: skip
    peak, total, sums_ME = add_tokens(
        peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
        tl.maximum(start, stop), high, low, high, before, last,
        kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
        S, E, BLOCK_M, BLOCK_T, BLOCK_E, True, WINDOW, SOFTCAP, FUSED, MASKED_TMA, INTERPRET,
    )  # fmt: skip
    return scale_peak(peak, factor), total, sums_ME


# what depends on the batch is not specialised on: other code might round differently
@triton.jit(do_not_specialize=("strips",))
def _item_kernel(
    q, k_tiles, v_tiles, k_pages, v_pages,  # [N, H, E] descriptors [P, S, G, E] [P, S, G, E]
    header, items, entries, pages,  # int32 [4] [items, ITEM] [entries, ENTRY] [pages]
    peaks, totals, values,  # [partials, H] [partials, H] [partials, H, E]
    G, strips, stride_n, stride_h, stride_page, stride_slot, stride_group, window, inner, factor,
    S: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    MASKED_TMA: tl.constexpr,
    OVERLAP: tl.constexpr, INTERPRET: tl.constexpr, ITEM: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Compute the partial results of every item. strips: largest number of tiles that an item's query vectors fill."""
    if OVERLAP:
        gdc_launch_dependents()
    H = G * GROUP
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    for task in range(tl.program_id(0), tl.load(header) * G * strips, tl.num_programs(0)):
        item = items + task // (G * strips) * ITEM
        kv_head, strip = task % G, task // G % strips
        item_pages, high = pages + tl.load(item), tl.load(item + 1)
        entry_index, vectors = tl.load(item + 2), tl.load(item + 3) * GROUP
        full_high, low, full_low = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
        if strip * BLOCK_M < vectors:
            vector = strip * BLOCK_M + m
            valid = vector < vectors
            entry = entries + ENTRY * (entry_index + vector // GROUP)
            row = tl.load(entry, mask=valid, other=0)
            slot = tl.load(entry + 1, mask=valid, other=0)
            last = tl.load(entry + 2, mask=valid, other=-1)
            before = last - window
            head = kv_head * GROUP + vector % GROUP
            of_q = valid[:, None] if E == BLOCK_E else valid[:, None] & (e[None, :] < E)
            at_q = row.to(tl.int64)[:, None] * stride_n + head[:, None] * stride_h + e[None, :]
            q_ME = tl.load(q + at_q, mask=of_q, other=0.0)
            peak, total, sums_ME = add_segment(
                q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, low, full_low, full_high, high,
                before, tl.minimum(last, high - 1), kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                S, E, BLOCK_M, BLOCK_T, BLOCK_E, WINDOW, SOFTCAP, FUSED, TMA, MASKED_TMA, INTERPRET,
            )  # fmt: skip
            partial = slot.to(tl.int64) * H + head
            tl.store(peaks + partial, peak, mask=valid)
            tl.store(totals + partial, total, mask=valid)
            tl.store(values + partial[:, None] * E + e[None, :], sums_ME, mask=of_q)


@triton.jit
def _finish_kernel(
    q, k_tiles, v_tiles, k_pages, v_pages,  # [N, H, E] descriptors [P, S, G, E] [P, S, G, E]
    rows, pages,  # int32 [N, ROW] [pages]
    peaks, totals, values, sinks, out,  # [partials, H] [partials, H] [partials, H, E] [H] [N, H, E]
    G, stride_n, stride_h, stride_page, stride_slot, stride_group, window, inner, factor,
    S: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    MASKED_TMA: tl.constexpr,
    OVERLAP: tl.constexpr, INTERPRET: tl.constexpr, SINKS: tl.constexpr, ROW: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Compute the last segment of a row for HEADS heads, merge it with the partial results, and write the output."""
    H = G * GROUP
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    STRIPS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    row, kv_head = tl.program_id(0) // (G * STRIPS), tl.program_id(0) // STRIPS % G
    first_head = tl.program_id(0) % STRIPS * HEADS  # of those that share the kv head
    record = rows + row * ROW
    first, count = tl.load(record), tl.load(record + 1)
    item_pages, high, low = pages + tl.load(record + 2), tl.load(record + 3), tl.load(record + 4)
    if count >= 0:
        # every SPREAD-th vector of the tile is a head: then the tile's rows are added up to the heads without rounding
        SPREAD: tl.constexpr = BLOCK_M // HEADS
        h = tl.arange(0, HEADS)
        is_head = (m % SPREAD == 0) & (first_head + m // SPREAD < GROUP)
        of_q = is_head[:, None] if E == BLOCK_E else is_head[:, None] & (e[None, :] < E)
        at_q = (
            row.to(tl.int64) * stride_n + (kv_head * GROUP + first_head + m // SPREAD)[:, None] * stride_h + e[None, :]
        )
        q_ME = tl.load(q + at_q, mask=of_q, other=0.0)
        last = tl.full([BLOCK_M], 0, tl.int32) + (high - 1)
        peak_M, total_M, sums_ME = add_segment(
            q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, low, low, high, high, last - window, last,
            kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
            S, E, BLOCK_M, BLOCK_T, BLOCK_E, WINDOW, SOFTCAP, FUSED, TMA, MASKED_TMA, INTERPRET,
        )  # fmt: skip
        if SPREAD == 1:
            tail_peak, tail_total, tail_sums = peak_M, total_M, sums_ME
        else:
            tail_peak = tl.max(tl.reshape(tl.where(is_head, peak_M, -float("inf")), (HEADS, SPREAD)), 1)
            tail_total = tl.sum(tl.reshape(tl.where(is_head, total_M, 0.0), (HEADS, SPREAD)), 1)
            tail_sums = tl.sum(tl.reshape(tl.where(is_head[:, None], sums_ME, 0.0), (HEADS, SPREAD, BLOCK_E)), 1)
        if OVERLAP:
            gdc_wait()
        head = kv_head * GROUP + first_head + h
        valid = first_head + h < GROUP
        valid_entries = valid[:, None] if E == BLOCK_E else valid[:, None] & (e[None, :] < E)
        peak, total, sums = initial_state(sinks, head, valid, HEADS, BLOCK_E, SINKS)
        end = first + count
        for partial in tl.range(first, end, 4):
            # four are loaded before the first is merged
            peak_a, total_a, sums_a = load_partial(
                peaks, totals, values, partial, end, head, valid, valid_entries, H, E, BLOCK_E
            )
            peak_b, total_b, sums_b = load_partial(
                peaks, totals, values, partial + 1, end, head, valid, valid_entries, H, E, BLOCK_E
            )
            peak_c, total_c, sums_c = load_partial(
                peaks, totals, values, partial + 2, end, head, valid, valid_entries, H, E, BLOCK_E
            )
            peak_d, total_d, sums_d = load_partial(
                peaks, totals, values, partial + 3, end, head, valid, valid_entries, H, E, BLOCK_E
            )
            peak, total, sums = merge(peak, total, sums, peak_a, total_a, sums_a)
            peak, total, sums = merge(peak, total, sums, peak_b, total_b, sums_b)
            peak, total, sums = merge(peak, total, sums, peak_c, total_c, sums_c)
            peak, total, sums = merge(peak, total, sums, peak_d, total_d, sums_d)
        peak, total, sums = merge(peak, total, sums, tail_peak, tail_total, tail_sums)
        merged = sums / tl.where(total == 0.0, 1.0, total)[:, None]  # zeros where no position was seen
        at_out = (row.to(tl.int64) * H + head)[:, None] * E + e[None, :]
        tl.store(out + at_out, merged.to(out.dtype.element_ty), mask=valid_entries)


@triton.jit(do_not_specialize=("strips",))
def _unit_kernel(
    q, k_tiles, v_tiles, k_pages, v_pages,  # [N, H, E] descriptors [P, S, G, E] [P, S, G, E]
    header, units, pages,  # int32 [4] [units, UNIT] [pages]
    sinks, out,  # [H] [N, H, E]
    G, strips, stride_n, stride_h, stride_page, stride_slot, stride_group, window, inner, factor,
    S: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, SEGMENT: tl.constexpr, SHORTEST: tl.constexpr, FLAT: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, FUSED: tl.constexpr,
    TMA: tl.constexpr, MASKED_TMA: tl.constexpr, INTERPRET: tl.constexpr, SINKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Compute the output of consecutive rows of one sequence, segment by segment."""
    H = G * GROUP
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    for task in range(tl.program_id(0), tl.load(header + 1) * G * strips, tl.num_programs(0)):
        unit = units + task // (G * strips) * UNIT
        kv_head, strip = task % G, task // G % strips
        unit_pages, start = pages + tl.load(unit), tl.load(unit + 1)
        first_row, first_position, vectors = tl.load(unit + 2), tl.load(unit + 3), tl.load(unit + 4) * GROUP
        if strip * BLOCK_M < vectors:
            vector = strip * BLOCK_M + m
            valid = vector < vectors
            row, position = first_row + vector // GROUP, first_position + vector // GROUP
            first = first_position + strip * BLOCK_M // GROUP
            end = first_position + (tl.minimum(vectors, strip * BLOCK_M + BLOCK_M) - 1) // GROUP + 1
            head = kv_head * GROUP + vector % GROUP
            of_q = valid[:, None] if E == BLOCK_E else valid[:, None] & (e[None, :] < E)
            at_q = row.to(tl.int64)[:, None] * stride_n + head[:, None] * stride_h + e[None, :]
            q_ME = tl.load(q + at_q, mask=of_q, other=0.0)
            peak, total, sums_ME = initial_state(sinks, head, valid, BLOCK_M, BLOCK_E, SINKS)
            if FLAT and not WINDOW:
                other_peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
                other_total = tl.zeros([BLOCK_M], tl.float32)
                other_sums = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
                full = (first + 1) // BLOCK_T * BLOCK_T
                boundary = SHORTEST
                other_peak, other_total, other_sums, peak, total, sums_ME, boundary = add_segments(
                    other_peak, other_total, other_sums, peak, total, sums_ME, boundary,
                    q_ME, k_tiles, v_tiles, k_pages, v_pages, unit_pages, 0, full, end, position,
                    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                    S, E, BLOCK_M, BLOCK_T, BLOCK_E, SEGMENT, False, SOFTCAP, FUSED, TMA, INTERPRET,
                )  # fmt: skip
                other_peak, other_total, other_sums, peak, total, sums_ME, boundary = add_segments(
                    other_peak, other_total, other_sums, peak, total, sums_ME, boundary,
                    q_ME, k_tiles, v_tiles, k_pages, v_pages, unit_pages, full, end, end, position,
                    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                    S, E, BLOCK_M, BLOCK_T, BLOCK_E, SEGMENT, True, SOFTCAP, FUSED, MASKED_TMA, INTERPRET,
                )  # fmt: skip
                peak, total, sums_ME = merge(
                    peak, total, sums_ME, scale_peak(other_peak, factor), other_total, other_sums
                )
            else:
                segment = start
                while segment < end:
                    stop = segment + tl.minimum(tl.maximum(segment, SHORTEST), SEGMENT)
                    high = tl.minimum(stop, end) - segment
                    low, full_low = 0, 0
                    if WINDOW:
                        low, full_low = (
                            tl.maximum(first - window + 1 - segment, 0),
                            tl.maximum(end - window - segment, 0),
                        )
                    if low < high:
                        other_peak, other_total, other_sums = add_segment(
                            q_ME, k_tiles, v_tiles, k_pages, v_pages, unit_pages + (segment - start) // S,
                            low, full_low, tl.maximum(tl.minimum(first + 1 - segment, high), 0), high,
                            position - segment - window, tl.minimum(position - segment, high - 1),
                            kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                            S, E, BLOCK_M, BLOCK_T, BLOCK_E, WINDOW, SOFTCAP, FUSED, TMA, MASKED_TMA, INTERPRET,
                        )  # fmt: skip
                        peak, total, sums_ME = merge(peak, total, sums_ME, other_peak, other_total, other_sums)
                    segment = stop
            merged = sums_ME / tl.where(total == 0.0, 1.0, total)[:, None]
            at_out = (row.to(tl.int64) * H + head)[:, None] * E + e[None, :]
            tl.store(out + at_out, merged.to(out.dtype.element_ty), mask=of_q)


def choose_tiles(dtype: torch.dtype, head_dim: int, *, amd: bool, capability: int) -> AttentionTiles:
    """Return the shipped tile sizes. capability: NVIDIA's compute capability, 80 for sm_80; ignored on AMD.

    The three kernels multiply by the same instruction, with the same tokens of a tile, and add up a row's weights in
    the same order, or a row would have other bits in each of them.
    """
    hopper = 90 <= capability < 100
    if dtype == torch.float32:  # no matrix unit computes exact products; found by trial, to spill no registers
        block_t = 32 if 64 < head_dim <= 128 and not amd else 16
        stages = 3 if head_dim > 128 and not amd else 2
        tiles = equal_tiles(block_m=16, block_t=block_t, num_warps=4, num_stages=stages, per_sm=2)
        return dataclasses.replace(tiles, num_stages=3) if head_dim <= 64 and not amd else tiles
    if amd:  # 64 KiB of local memory
        return equal_tiles(block_m=64, block_t=16 if head_dim > 128 else 32, num_warps=4, per_sm=2)
    if head_dim > 128:  # larger tiles spill registers
        tiles = equal_tiles(block_m=64 if hopper else 32, block_t=32, num_warps=8, tma=capability >= 90)
        if hopper:
            return dataclasses.replace(tiles, masked_tma=False, window_tma=False)
        return dataclasses.replace(tiles, num_stages=3)
    if not hopper:
        return equal_tiles(block_m=64, block_t=64, num_warps=8, tma=capability >= 90)
    # every warp holds 16 vectors, whatever the size of the tile
    return AttentionTiles(
        block_m=128, block_t=64, num_warps=8, num_stages=3, tail_m=64, tail_warps=4, tail_stages=1,
        unit_m=128, unit_warps=8, unit_stages=3, tma=True, window_tma=True, tail_tma=True, overlap=True,
    )  # fmt: skip


def equal_tiles(
    *, block_m: int, block_t: int, num_warps: int, per_sm: int = 1, tma: bool = False, num_stages: int = 2
) -> AttentionTiles:
    """Return tile sizes that are the same for all kernels."""
    return AttentionTiles(
        block_m=block_m, block_t=block_t, num_warps=num_warps, num_stages=num_stages, tail_m=block_m,
        tail_warps=num_warps, tail_stages=num_stages, unit_m=block_m, unit_warps=num_warps, unit_stages=num_stages,
        per_sm=per_sm, unit_per_sm=per_sm, tma=tma, masked_tma=tma, window_tma=tma, tail_tma=tma,
    )  # fmt: skip


def find_tuned(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> AttentionConfiguration | None:
    """Return the configuration that was tuned for a device, one for all numbers of rows; None where none was.

    shape: query heads, kv heads and head dim.
    """
    return tuned.find("attention", dtype, shape, device, 1, AttentionConfiguration.from_values)


def choose_configuration(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], segment: int
) -> AttentionConfiguration:
    """Return the configuration on a device: what was tuned for it, else the shipped one, with that segment length."""
    configuration = find_tuned(device, dtype, shape)
    if configuration is not None:
        return configuration
    properties = torch.cuda.get_device_properties(device)
    tiles = choose_tiles(
        dtype, shape[2], amd=torch.version.hip is not None, capability=10 * properties.major + properties.minor
    )
    return AttentionConfiguration(tiles=tiles, segment=segment)


def choose_launch(q_NHE: Tensor, kv_heads: int) -> AttentionLaunch:
    """Choose the launch configuration for the device, dtype and shape of the queries."""
    shape = (q_NHE.shape[1], kv_heads, q_NHE.shape[2])
    return make_launch(choose_configuration(q_NHE.device, q_NHE.dtype, shape, 1), q_NHE.device)


def make_launch(configuration: AttentionConfiguration, device: torch.device) -> AttentionLaunch:
    """Return the launch of a configuration on a device."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return AttentionLaunch(multiprocessors=multiprocessors, tiles=configuration.tiles)


def tile_descriptor(pages_PSGE: Tensor, block_t: int, block_e: int) -> TensorDescriptor | None:
    """Return a descriptor of tiles [block_t, block_e] of the pages, or None where the layout permits none.

    The pages must be contiguous in the order [P, G, S, E], and a page must hold complete tiles.
    """
    P, S, G, E = pages_PSGE.shape
    if S % block_t or not pages_PSGE.transpose(1, 2).is_contiguous() or E * pages_PSGE.element_size() % 16:
        return None
    if pages_PSGE.data_ptr() % 16 or block_e * pages_PSGE.element_size() < 16:
        return None
    return TensorDescriptor(pages_PSGE, [P * G * S, E], [E, 1], [block_t, block_e])


def attend_rows(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: DeviceTable,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    *,
    launch: AttentionLaunch,
) -> Tensor:
    """Compute `attention.paged_attention` on a CUDA device.

    Rows and heads of q, and pages, slots and heads of the cache, may have any stride. Raises ValueError unless the
    pages of keys and values have the same strides and the entries of each head are contiguous, and unless scale and
    softcap are positive.
    """
    if k_pages_PSGE.stride() != v_pages_PSGE.stride() or k_pages_PSGE.stride(3) != 1:
        raise ValueError(
            "paged_attention: pages of keys and values must have the same strides, with contiguous heads; their "
            f"strides are {k_pages_PSGE.stride()} and {v_pages_PSGE.stride()}"
        )
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"paged_attention: scale and softcap must be positive, not {scale} and {softcap}")
    if q_NHE.stride(2) != 1:
        q_NHE = q_NHE.contiguous()
    out_NHE = torch.empty(q_NHE.shape, dtype=q_NHE.dtype, device=q_NHE.device)
    for call in plan_calls(
        q_NHE, k_pages_PSGE, v_pages_PSGE, table, scale, softcap, sinks_H, out_NHE=out_NHE, launch=launch
    ):
        call.run()
    return out_NHE


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCall:
    """A kernel with the number of its programs, its arguments, and its constants and options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        self.kernel[(self.programs,)](*self.arguments, **self.options)


def plan_calls(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: DeviceTable,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
    *,
    out_NHE: Tensor,
    launch: AttentionLaunch,
) -> list[KernelCall]:
    """Return the calls that compute `attend_rows` into out_NHE, in order."""
    N, H, E = q_NHE.shape
    if not N:
        return []
    G, tiles, capacity, device = k_pages_PSGE.shape[2], launch.tiles, table.capacity, q_NHE.device
    group, block_e = H // G, max(16, int(triton.next_power_of_2(E)))
    boxes = [tile_descriptor(x, tiles.block_t, block_e) if tiles.tma else None for x in (k_pages_PSGE, v_pages_PSGE)]
    tma = None not in boxes
    sources = (q_NHE, *(boxes if tma else (k_pages_PSGE, v_pages_PSGE)), k_pages_PSGE, v_pages_PSGE)
    # see add_scores
    inner = 1.0 if softcap is None else 2 * scale * LOG2_E / softcap
    factor = (scale if softcap is None else softcap) * LOG2_E
    numbers = (*q_NHE.stride()[:2], *k_pages_PSGE.stride()[:3], table.window, inner, factor)
    shared: dict[str, Any] = {
        "S": table.page_size, "E": E, "GROUP": group, "BLOCK_T": tiles.block_t, "BLOCK_E": block_e,
        "WINDOW": table.window > 0, "SOFTCAP": softcap is not None, "FUSED": tiles.fused, "TMA": tma,
        "MASKED_TMA": tma and (tiles.window_tma if table.window > 0 else tiles.masked_tma),
        "INTERPRET": launch.interpret,
    }  # fmt: skip
    sinks = q_NHE if sinks_H is None else sinks_H.contiguous()
    calls = []
    if capacity.units:
        flat = tiles.flat and table.shortest % tiles.block_t == 0
        strips = -(-capacity.unit_rows * group // tiles.unit_m)
        calls.append(
            KernelCall(
                kernel=_unit_kernel, programs=tiles.unit_per_sm * launch.multiprocessors,
                arguments=(*sources, table.header, table.units, table.pages, sinks, out_NHE, G, strips, *numbers),
                options={
                    **shared, "BLOCK_M": tiles.unit_m, "SEGMENT": table.segment, "SHORTEST": table.shortest,
                    "FLAT": flat, "SINKS": sinks_H is not None, "UNIT": UNIT, "num_warps": tiles.unit_warps,
                    "num_stages": tiles.unit_stages,
                },
            )
        )  # fmt: skip
    peaks, totals = torch.empty(2, capacity.partials, H, dtype=torch.float32, device=device)
    partials = (peaks, totals, torch.empty(capacity.partials, H, E, dtype=torch.float32, device=device))
    if capacity.items:
        strips = -(-capacity.item_rows * group // tiles.block_m)
        parts = (table.header, table.items, table.entries, table.pages)
        calls.append(
            KernelCall(
                kernel=_item_kernel, programs=tiles.per_sm * launch.multiprocessors,
                arguments=(*sources, *parts, *partials, G, strips, *numbers),
                options={
                    **shared, "BLOCK_M": tiles.block_m, "OVERLAP": tiles.overlap, "ITEM": ITEM, "ENTRY": ENTRY,
                    "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
                },
            )
        )  # fmt: skip
    if capacity.finishes:
        heads = min(tiles.tail_m, int(triton.next_power_of_2(group)))
        overlap = tiles.overlap and capacity.items > 0
        calls.append(
            KernelCall(
                kernel=_finish_kernel, programs=N * G * -(-group // heads),
                arguments=(*sources, table.rows, table.pages, *partials, sinks, out_NHE, G, *numbers),
                options={
                    **shared, "MASKED_TMA": tma and tiles.tail_tma, "BLOCK_M": tiles.tail_m, "OVERLAP": overlap,
                    "SINKS": sinks_H is not None, "ROW": ROW,
                    "HEADS": heads, "num_warps": tiles.tail_warps, "num_stages": tiles.tail_stages,
                    **({"launch_pdl": True} if overlap else {}),
                },
            )
        )  # fmt: skip
    return calls
