"""The three Triton kernels of `paged_attention`; attention_triton.py says what each computes, and launches them.

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim   M vectors of a tile
         T tokens of a tile
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from genssd.kernels.attention_sums_triton import (
    add_chain,
    add_segment,
    add_segments,
    add_tokens,
    empty_state,
    initial_state,
    load_partial,
    merge,
    scale_peak,
    store_partial,
)


# what depends on the batch is not specialised on: other code might round differently
@triton.jit(do_not_specialize=("strips",))
def item_kernel(
    q, k_tiles, v_tiles, k_pages, v_pages,  # [N, H, E] descriptors [P, S, G, E] [P, S, G, E]
    header, items, entries, pages,  # int32 [4] [items, ITEM] [entries, ENTRY] [pages]
    peaks, totals, values,  # [partials, H] [partials, H] [partials, H, E]
    G, strips, stride_n, stride_h, stride_page, stride_slot, stride_group, window, inner, factor,
    S: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    MASKED_TMA: tl.constexpr, CHAINED: tl.constexpr, RESUMED: tl.constexpr, SEGMENT: tl.constexpr,
    SHORTEST: tl.constexpr, OVERLAP: tl.constexpr, INTERPRET: tl.constexpr, ITEM: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Compute the partial results of every item. strips: largest number of tiles that an item's query vectors fill.

    CHAINED: whether an item can be several segments. RESUMED: whether an item can be a shared part of unfinished
    segments, whose sums finish_kernel goes on from.
    """
    if OVERLAP:
        gdc_launch_dependents()
    H = G * GROUP
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    programs, tasks = tl.num_programs(0), tl.load(header) * G * strips
    end = tasks
    if CHAINED:  # every program makes as many turns, so that they can change their order
        end = (tasks + programs - 1) // programs * programs
    for index in range(tl.program_id(0), end, programs):
        task = index
        if CHAINED:  # the longest items come first: who had the longest of a turn has the shortest of the next
            turn = index // programs
            task = tl.where(turn % 2 == 0, index, (2 * turn + 1) * programs - 1 - index)
            exists = task < tasks
            task = tl.minimum(task, tasks - 1)
        item = items + task // (G * strips) * ITEM
        kv_head, strip = task % G, task // G % strips
        item_pages, high = pages + tl.load(item), tl.load(item + 1)
        entry_index, vectors = tl.load(item + 2), tl.load(item + 3) * GROUP
        full_high, low, full_low = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
        fills = strip * BLOCK_M < vectors
        if CHAINED:
            fills = fills & exists
        if fills:
            vector = strip * BLOCK_M + m
            valid = vector < vectors
            first_entry = entries + ENTRY * entry_index
            entry = first_entry + ENTRY * (vector // GROUP)
            row = tl.load(entry, mask=valid, other=0)
            last = tl.load(entry + 2, mask=valid, other=-1)
            before = last - window
            head = kv_head * GROUP + vector % GROUP
            of_q = valid[:, None] if E == BLOCK_E else valid[:, None] & (e[None, :] < E)
            at_q = row.to(tl.int64)[:, None] * stride_n + head[:, None] * stride_h + e[None, :]
            q_ME = tl.load(q + at_q, mask=of_q, other=0.0)
            unit_of_peak, done = factor, 0
            if RESUMED:
                unit_of_peak = tl.where(tl.load(item + 7) < 0, 1.0, factor)
            peak, total, sums_ME = empty_state(BLOCK_M, BLOCK_E)
            if CHAINED:
                position = tl.load(item + 7)
                boundary = tl.minimum(tl.maximum(position, SHORTEST), SEGMENT)
                if RESUMED:
                    boundary = tl.where(position < 0, high, boundary)
                stop = full_high // BLOCK_T * BLOCK_T
                peak, total, sums_ME, done = add_chain(
                    peak, total, sums_ME, boundary, peaks, totals, values, first_entry, strip, vectors, H,
                    q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages, stop, high, position,
                    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                    S, E, BLOCK_M, BLOCK_T, BLOCK_E, GROUP, ENTRY, SEGMENT, SOFTCAP, FUSED, TMA, INTERPRET,
                )  # fmt: skip
                peak, total, sums_ME = add_tokens(
                    peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
                    stop, high, low, high, before, tl.minimum(last, high - 1),
                    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                    S, E, BLOCK_M, BLOCK_T, BLOCK_E, True, WINDOW, SOFTCAP, FUSED, MASKED_TMA, INTERPRET,
                )  # fmt: skip
            else:
                peak, total, sums_ME = add_segment(
                    peak, total, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
                    0, low, full_low, full_high, high, before, tl.minimum(last, high - 1),
                    kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                    S, E, BLOCK_M, BLOCK_T, BLOCK_E, WINDOW, SOFTCAP, FUSED, TMA, MASKED_TMA, INTERPRET,
                )  # fmt: skip
            store_partial(
                peaks, totals, values, first_entry, kv_head, vector, vectors, done, H,
                scale_peak(peak, unit_of_peak), total, sums_ME, E, BLOCK_E, GROUP, ENTRY,
            )  # fmt: skip


@triton.jit
def finish_kernel(
    q, k_tiles, v_tiles, k_pages, v_pages,  # [N, H, E] descriptors [P, S, G, E] [P, S, G, E]
    rows, pages,  # int32 [N, ROW] [pages]
    peaks, totals, values, sinks, out,  # [partials, H] [partials, H] [partials, H, E] [H] [N, H, E]
    G, stride_n, stride_h, stride_page, stride_slot, stride_group, window, inner, factor,
    S: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr, TMA: tl.constexpr,
    MASKED_TMA: tl.constexpr, RESUMED: tl.constexpr,
    OVERLAP: tl.constexpr, INTERPRET: tl.constexpr, SINKS: tl.constexpr, ROW: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Compute the last segment of a row for HEADS heads, merge it with the partial results, and write the output.

    RESUMED: whether the sums over a shared part of the last segment can be in the slot after the row's partial results.
    """
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
        peak_M, total_M, sums_ME = empty_state(BLOCK_M, BLOCK_E)
        begin = 0
        if RESUMED:
            begin = tl.load(record + 5)
            if begin > 0:
                if OVERLAP:
                    gdc_wait()
                peak_M, total_M, sums_ME = load_partial(
                    peaks, totals, values, first + count, first + count + 1,
                    kv_head * GROUP + first_head + m // SPREAD, is_head, of_q, H, E, BLOCK_E,
                )  # fmt: skip
        peak_M, total_M, sums_ME = add_segment(
            peak_M, total_M, sums_ME, q_ME, k_tiles, v_tiles, k_pages, v_pages, item_pages,
            begin, low, low, high, high, last - window, last,
            kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
            S, E, BLOCK_M, BLOCK_T, BLOCK_E, WINDOW, SOFTCAP, FUSED, TMA, MASKED_TMA, INTERPRET,
        )  # fmt: skip
        peak_M = scale_peak(peak_M, factor)
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
def unit_kernel(
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
                other_peak, other_total, other_sums = empty_state(BLOCK_M, BLOCK_E)
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
                        other_peak, other_total, other_sums = empty_state(BLOCK_M, BLOCK_E)
                        other_peak, other_total, other_sums = add_segment(
                            other_peak, other_total, other_sums, q_ME, k_tiles, v_tiles, k_pages, v_pages,
                            unit_pages + (segment - start) // S, 0,
                            low, full_low, tl.maximum(tl.minimum(first + 1 - segment, high), 0), high,
                            position - segment - window, tl.minimum(position - segment, high - 1),
                            kv_head, G, stride_page, stride_slot, stride_group, inner, factor,
                            S, E, BLOCK_M, BLOCK_T, BLOCK_E, WINDOW, SOFTCAP, FUSED, TMA, MASKED_TMA, INTERPRET,
                        )  # fmt: skip
                        peak, total, sums_ME = merge(
                            peak, total, sums_ME, scale_peak(other_peak, factor), other_total, other_sums
                        )
                    segment = stop
            merged = sums_ME / tl.where(total == 0.0, 1.0, total)[:, None]
            at_out = (row.to(tl.int64) * H + head)[:, None] * E + e[None, :]
            tl.store(out + at_out, merged.to(out.dtype.element_ty), mask=of_q)
