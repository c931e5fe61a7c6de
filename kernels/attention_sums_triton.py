"""What the kernels of `paged_attention` have in common: partial results of query vectors over tiles of tokens.

A partial result is the peak, total and values of attention_triton.py. Every kernel adds up a tile, and merges two
partial results, by these functions alone, so that a vector has the same bits in each of them.

Shapes:  P pages   S page size   G kv heads   E head dim   M vectors of a tile   T tokens of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl

from genssd.kernels.head_triton import safe_peak


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
def load_tiles(
    k_tiles, v_tiles, k_pages, v_pages, item_pages, page, start, low, high, kv_head, G,
    stride_page, stride_slot, stride_group,
    S: tl.constexpr, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return the keys and the values of a tile of tokens, each [T, E]; see load_tile."""
    # The compiler puts a barrier of all warps between the copy of the tile that is issued last and the first product
    # that reads a tile of the same tensor. With the keys last it is at the top of the loop, where the warps have just
    # waited for each other; with the values last, between the softmax and the second product, no group of warps could
    # multiply while the other computes its softmax. Loads through registers are waited for one by one, and keys first.
    if TMA:
        v_TE = load_tile(
            v_tiles, v_pages, item_pages, page, start, low, high, kv_head, G, stride_page, stride_slot, stride_group,
            S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
    k_TE = load_tile(
        k_tiles, k_pages, item_pages, page, start, low, high, kv_head, G, stride_page, stride_slot, stride_group,
        S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
    )  # fmt: skip
    if not TMA:
        v_TE = load_tile(
            v_tiles, v_pages, item_pages, page, start, low, high, kv_head, G, stride_page, stride_slot, stride_group,
            S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
    return k_TE, v_TE


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
def empty_state(BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the partial results of no token."""
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    return peak, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_E], tl.float32)


@triton.jit
def start_again(peak, total, ends):
    """Return peak and total of no token where a segment ends, else those given.

    The sums are left as they are, and the next tile multiplies them by 0: if they were replaced, the compiler would
    wait for every product instead of multiplying on.
    """
    return tl.where(ends, -float("inf"), peak), tl.where(ends, 0.0, total)


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
def store_partial(
    peaks, totals, values, entry, kv_head, vector, vectors, done, H, peak, total, sums_ME,
    E: tl.constexpr, BLOCK_E: tl.constexpr, GROUP: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Store a partial result of every vector, after `done` others.

    entry: of the item's first row, in the table's entries. Slots are read here, so that no loop has to keep them.
    """
    e, valid = tl.arange(0, BLOCK_E), vector < vectors
    slot = tl.load(entry + ENTRY * (vector // GROUP) + 1, mask=valid, other=0) + done
    at = slot.to(tl.int64) * H + (kv_head * GROUP + vector % GROUP)
    tl.store(peaks + at, peak, mask=valid)
    tl.store(totals + at, total, mask=valid)
    of_values = valid[:, None] if E == BLOCK_E else valid[:, None] & (e[None, :] < E)
    tl.store(values + at[:, None] * E + e[None, :], sums_ME, mask=of_values)


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
        k_TE, v_TE = load_tiles(
            k_tiles, v_tiles, k_pages, v_pages, item_pages, page, tile, low, high, kv_head, G,
            stride_page, stride_slot, stride_group, S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
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
        k_TE, v_TE = load_tiles(
            k_tiles, v_tiles, k_pages, v_pages, item_pages, page, tile, 0, high, kv_head, G,
            stride_page, stride_slot, stride_group, S, E, BLOCK_T, BLOCK_E, MASKED, TMA,
        )  # fmt: skip
        token = tile + tl.arange(0, BLOCK_T)
        if MASKED and TMA:
            v_TE = tl.where((token < high)[:, None], v_TE, 0.0)
        z = accumulate_product(q_ME, tl.trans(k_TE), tl.zeros([BLOCK_M, BLOCK_T], tl.float32), INTERPRET)
        if tile == boundary:
            outer_peak, outer_total, outer_sums = merge(
                outer_peak, outer_total, outer_sums, scale_peak(peak, factor), total, sums_ME
            )
            peak, total, sums_ME = empty_state(BLOCK_M, BLOCK_E)
            boundary += tl.minimum(boundary, SEGMENT)
        peak, total, sums_ME = add_scores(
            peak, total, sums_ME, z, v_TE, token[None, :] <= last[:, None], inner, factor,
            MASKED, SOFTCAP, FUSED, INTERPRET,
        )  # fmt: skip
        page = next_page
    return peak, total, sums_ME, outer_peak, outer_total, outer_sums, boundary


@triton.jit
def add_chain(
    peak, total, sums_ME, boundary, peaks, totals, values, entry, strip, vectors, H,
    q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, stop, high, position,
    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
    S: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr, ENTRY: tl.constexpr, SEGMENT: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr,
    TMA: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the tiles up to stop, all of which every vector sees, and store the partial results where a segment ends.

    Tokens are counted from the first of the item, which has this position. boundary: token where its segment ends.
    entry, strip, vectors: see item_kernel. The last value returned is how many partial results are stored.
    """
    page, done = tl.load(item_pages), tl.full((), 0, tl.int32)
    for tile in tl.range(0, stop, BLOCK_T):
        next_page = tl.load(item_pages + tl.minimum(tile + BLOCK_T, high - 1) // S)
        k_TE, v_TE = load_tiles(
            k_tiles, v_tiles, k_pages, v_pages, item_pages, page, tile, 0, high, kv_head, G,
            stride_page, stride_slot, stride_group, S, E, BLOCK_T, BLOCK_E, False, TMA,
        )  # fmt: skip
        z = accumulate_product(q_ME, tl.trans(k_TE), tl.zeros([BLOCK_M, BLOCK_T], tl.float32), INTERPRET)
        ends = tile == boundary
        if ends:
            store_partial(
                peaks, totals, values, entry, kv_head, strip * BLOCK_M + tl.arange(0, BLOCK_M), vectors, done, H,
                scale_peak(peak, factor), total, sums_ME, E, BLOCK_E, GROUP, ENTRY,
            )  # fmt: skip
            boundary += tl.minimum(position + boundary, SEGMENT)
            done += 1
        peak, total = start_again(peak, total, ends)
        peak, total, sums_ME = add_scores(
            peak, total, sums_ME, z, v_TE, True, inner, factor, False, SOFTCAP, FUSED, INTERPRET
        )
        page = next_page
    return peak, total, sums_ME, done


@triton.jit
def add_segment(
    peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, begin, low, full_low, full_high, high,
    before, last, kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
    S: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr, MASKED_TMA: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Add the tokens of one segment from `begin` on, the first of a tile, to the partial results of the vectors.

    Some vector sees the tokens from low up to high, every vector those from full_low up to full_high. With a WINDOW,
    begin is 0. The peak is in units of z; see scale_peak.
    """
    start, stop = begin, full_high // BLOCK_T * BLOCK_T
    if WINDOW:  # a loop of its own for the tiles that every vector sees would spill registers
        start, stop = low // BLOCK_T * BLOCK_T, 0
    else:
        peak, total, sums_ME = add_tokens(
            peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
            start, stop, low, high, before, last,
            kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
            S, E, BLOCK_M, BLOCK_T, BLOCK_E, False, WINDOW, SOFTCAP, FUSED, TMA, INTERPRET,
        )  # fmt: skip
    return add_tokens(
        peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
        tl.maximum(start, stop), high, low, high, before, last,
        kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
        S, E, BLOCK_M, BLOCK_T, BLOCK_E, True, WINDOW, SOFTCAP, FUSED, MASKED_TMA, INTERPRET,
    )  # fmt: skip
