"""Attention of packed query rows over a paged key-value cache whose pages sequences share.

Row n has a position in its sequence and attends to the positions up to its own. Positions are cut into segments at
absolute multiples of a constant, and below the first of these at its halves, quarters and so on, down to 128 tokens. A
segment table lists which rows read which segment: rows whose sequences hold the same pages through a whole segment read
it together, as one item. For a row n, a head and a segment s with the scores z of its keys,

    peak_s = max z      total_s = sum e^(z - peak_s)      values_s = sum e^(z - peak_s) v

and these partial results are merged in the order of segments: with p = max(peak_a, peak_b),

    total = total_a e^(peak_a - p) + total_b e^(peak_b - p)      values likewise      output = values / total

So a row's bits depend on its own keys and values alone, not on which rows share them, the batch or the page layout.
Prefill, scoring and decoding are the same call with more or fewer rows per sequence.

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim   R rows of an item
         T tokens of an item   C, v cells of a packed key and numbers of a cell (packed_keys.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.device_table import DeviceTable, TableOptions
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively
from genssd.kernels.packed_keys import numbers_per_cell, unpack_keys
from genssd.kernels.threads import num_threads

SegmentTable = _core.SegmentTable
"""Table that lists which query rows read which segments of the cache.

items: int32 [items, 6]: index into pages of the item's first page, position of the item's first token, largest number
of tokens that one of its rows sees, index into entries of its first row, number of its rows, and its unit (items of
different units have no row in common). entries: int32 [entries, 2]: row, and slot of the row's partial result. pages:
int32, the pages of all items. position: int32 [N], position of every row. slot: int64 [N], place of every row's own
token in the cache, page * page_size + offset. row_partial: int32 [N + 1], slot of a row's first partial result; its
others follow in the order of segments."""

SEGMENT_TOKENS = {"cpu": 256, "cuda": 512}
"""Tokens of a segment, by device type. On a GPU longer segments keep the traffic of partial results small compared with
that of the cache."""

QUERY_VECTORS_PER_UNIT = {"cpu": 128, "cuda": 128}
"""Largest number of query vectors (rows times query heads per kv head) that read a segment together, by device type."""


def choose_table_options(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> TableOptions:
    """Return what segment tables are made with on a device: what was tuned for it, else what ships.

    shape: query heads, kv heads and head dim.
    """
    if device.type == "cuda" and dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.attention_launch_triton import choose_configuration

        configuration = choose_configuration(device, dtype, shape, SEGMENT_TOKENS["cuda"])
        return configuration.table_options(torch.cuda.get_device_properties(device).multi_processor_count, shape[1])
    return TableOptions(segment=SEGMENT_TOKENS[device.type])


def build_segment_table(
    tables: Tensor,
    table_B: Tensor,
    first_B: Tensor,
    rows_B: Tensor,
    *,
    page_size: int,
    segment: int,
    window: int = 0,
    unit_rows: int = 64,
    chain_programs: int = 0,
    resume_tokens: int = 0,
) -> SegmentTable:
    """Build the segment table of a batch of sequences, whose rows are numbered sequence by sequence.

    All tensors are int32 on the CPU. tables: [tables, width], each row the pages of a sequence in the order of
    positions (entries beyond the sequence's end are ignored). table_B: index into tables of every sequence. first_B,
    rows_B: position of the first query row of every sequence, and how many consecutive rows it has; keys and values up
    to the last row's position must be in the cache when the table is used. segment: tokens of a segment. window: the
    largest number of positions that a row sees, its own included; 0 means all. unit_rows: the largest number of rows of
    a unit, which is a set of rows that are computed together. Sequences that share pages may have any order in the
    batch. The last two are read where the table is copied to a GPU, and change no bit of a result. chain_programs: how
    many programs of a kv head run at once, over which chains of segments are balanced; 0 makes no chains.
    resume_tokens: what rows hold in the same pages of their unfinished segments is read once, rounded down to a
    multiple of so many tokens; 0 means by every row. Raises ValueError on a sequence whose pages are not in its table,
    on a negative number, and unless segment is a multiple of page_size.
    """
    return _core.segment_table(
        tables, table_B, first_B, rows_B, page_size, segment, window, unit_rows, chain_programs, resume_tokens
    )


def paged_attention(
    q_NHE: Tensor,
    k_pages: Tensor,
    v_pages_PSGE: Tensor,
    table: SegmentTable | DeviceTable,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return the attention output [N, H, E] in the dtype of q.

    k_pages: keys as rows, [P, S, G, E], or packed, [P, G, C, S, v] (packed_keys.py). A GPU reads rows, and the native
    kernels read packed keys; of keys as rows the CPU computes in plain torch.
    A score is scale * q . k, then softcap * tanh(score / softcap) where softcap is not None. sinks_H: float32, one
    score per head that counts in the softmax and has no value. A row that sees nothing but scores of -inf gets zeros.
    On the CPU (float32, bfloat16, float16) the native kernel computes in float32. On a CUDA device a DeviceTable saves
    the copy of the table to the device; and a value that is not finite makes all rows of its item NaN, which all belong
    to sequences that hold this value.
    Raises ValueError on shapes or dtypes that do not agree, on a table that points outside the cache, on a DeviceTable
    where no Triton kernel would run, and where a gradient is required and a native or Triton kernel would run, because
    these record none.
    """
    if q_NHE.is_cuda and q_NHE.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.attention_launch_triton import choose_launch
        from genssd.kernels.attention_triton import attend_rows

        refuse_gradients("paged_attention", q_NHE, k_pages, v_pages_PSGE, sinks_H)
        _check(q_NHE, k_pages, v_pages_PSGE, table, sinks_H)
        device_table = table if isinstance(table, DeviceTable) else DeviceTable.upload(table, q_NHE.device)
        launch = choose_launch(q_NHE, v_pages_PSGE.shape[2])
        return attend_rows(q_NHE, k_pages, v_pages_PSGE, device_table, scale, softcap, sinks_H, launch=launch)
    if isinstance(table, DeviceTable):
        raise ValueError(
            f"paged_attention: a device table serves Triton's kernels alone; {q_NHE.dtype} on {q_NHE.device} takes the "
            "segment table itself"
        )
    if k_pages.ndim == 5 and runs_natively(q_NHE, k_pages, v_pages_PSGE):
        refuse_gradients("paged_attention", q_NHE, k_pages, v_pages_PSGE, sinks_H)
        out = torch.empty_like(q_NHE, memory_format=torch.contiguous_format)
        _core.paged_attention(
            q_NHE.contiguous(), k_pages, v_pages_PSGE, table, out, scale, softcap or 0.0, sinks_H,
            num_threads(),
        )  # fmt: skip
        return out
    return paged_attention_reference(q_NHE, k_pages, v_pages_PSGE, table, scale=scale, softcap=softcap, sinks_H=sinks_H)


def paged_attention_reference(
    q_NHE: Tensor,
    k_pages: Tensor,
    v_pages_PSGE: Tensor,
    table: SegmentTable,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Compute `paged_attention` in plain torch, item by item; float64 stays float64."""
    _check(q_NHE, k_pages, v_pages_PSGE, table, sinks_H)
    _, H, E = q_NHE.shape
    device, G = q_NHE.device, v_pages_PSGE.shape[2]
    k_pages_PSGE = unpack_keys(k_pages, E) if k_pages.ndim == 5 else k_pages
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    partials = int(table.row_partial[-1])
    peak = torch.full((partials, H), -torch.inf, dtype=wide, device=device)
    total = torch.zeros(partials, H, dtype=wide, device=device)
    values = torch.zeros(partials, H, E, dtype=wide, device=device)
    position_N = torch.tensor(table.position, device=device)
    pages, entries = torch.tensor(table.pages, device=device), torch.tensor(table.entries, device=device)
    for page, first, tokens, entry, count, _ in table.items.tolist():
        item_pages = pages[page : page - (-tokens // table.page_size)]
        row, slot = entries[entry : entry + count].unbind(1)
        k_TGE, v_TGE = (x[item_pages].flatten(0, 1)[:tokens].to(wide) for x in (k_pages_PSGE, v_pages_PSGE))
        position_T = first + torch.arange(tokens, device=device)
        visible_RT = position_T <= position_N[row][:, None]
        if table.window:
            visible_RT &= position_T > position_N[row][:, None] - table.window
        q_RGQE = q_NHE[row].to(wide).view(count, G, H // G, E)
        z_RHT = torch.einsum("rgqe,tge->rgqt", q_RGQE, k_TGE).flatten(1, 2) * scale
        if softcap is not None:
            z_RHT = softcap * torch.tanh(z_RHT / softcap)
        z_RHT = z_RHT.masked_fill(~visible_RT[:, None], -torch.inf)
        peak[slot] = z_RHT.amax(2)
        e_RHT = (z_RHT - peak[slot].clamp_min(torch.finfo(wide).min)[..., None]).exp()
        total[slot] = e_RHT.sum(2)
        # a value that no row sees may be NaN, and 0 * NaN would be NaN
        v_TGE = v_TGE.masked_fill(~visible_RT.any(0)[:, None, None], 0)
        e_RGQT = e_RHT.view(count, G, H // G, tokens)
        values[slot] = torch.einsum("rgqt,tge->rgqe", e_RGQT, v_TGE).flatten(1, 2)
    return _merge(peak, total, values, table, sinks_H).to(q_NHE.dtype)


def _merge(peak: Tensor, total: Tensor, values: Tensor, table: SegmentTable, sinks_H: Tensor | None) -> Tensor:
    """Merge the partial results of every row in the order of segments and return the output [N, H, E]."""
    device, N = peak.device, table.num_rows
    first_N, end_N = (torch.tensor(part, device=device) for part in (table.row_partial[:-1], table.row_partial[1:]))
    start = peak.new_full((peak.shape[1],), -torch.inf) if sinks_H is None else sinks_H.to(peak.dtype)
    p_NH, t_NH = start.repeat(N, 1), (start > -torch.inf).to(peak.dtype).repeat(N, 1)
    o_NHE = values.new_zeros(N, *values.shape[1:])
    for step in range(int((end_N - first_N).max()) if N else 0):
        n = (first_N + step < end_N).nonzero()[:, 0]
        slot = first_N[n] + step
        new_peak = torch.maximum(p_NH[n], peak[slot])
        base = new_peak.clamp_min(torch.finfo(peak.dtype).min)  # for two empty sets -inf - -inf would be NaN
        a, b = (p_NH[n] - base).exp(), (peak[slot] - base).exp()
        p_NH[n] = new_peak
        t_NH[n] = t_NH[n] * a + total[slot] * b
        o_NHE[n] = o_NHE[n] * a[..., None] + values[slot] * b[..., None]
    return torch.where(t_NH[..., None] == 0, 0, o_NHE / t_NH[..., None])


def _check(
    q_NHE: Tensor,
    k_pages: Tensor,
    v_pages_PSGE: Tensor,
    table: SegmentTable | DeviceTable,
    sinks_H: Tensor | None,
) -> None:
    P, S, G, E = pages = v_pages_PSGE.shape
    if q_NHE.shape[0] != table.num_rows or q_NHE.shape[2] != pages[3] or q_NHE.shape[1] % max(1, pages[2]):
        raise ValueError(
            f"paged_attention: q {tuple(q_NHE.shape)} does not fit a table of {table.num_rows} rows and pages "
            f"{tuple(pages)}"
        )
    v = numbers_per_cell(v_pages_PSGE.dtype)
    if k_pages.shape not in (pages, (P, G, -(-E // v), S, v)) or table.page_size != S or table.largest_page >= P:
        raise ValueError(
            f"paged_attention: pages of keys {tuple(k_pages.shape)} and values {tuple(pages)} must agree, have "
            f"{table.page_size} tokens each and number more than {table.largest_page}"
        )
    if not q_NHE.dtype == k_pages.dtype == v_pages_PSGE.dtype:
        raise ValueError("paged_attention: q, k_pages and v_pages must have one dtype")
    if sinks_H is not None and (sinks_H.shape != q_NHE.shape[1:2] or sinks_H.dtype != torch.float32):
        raise ValueError(
            f"paged_attention: sinks must be float32 [{q_NHE.shape[1]}], not {sinks_H.dtype} {list(sinks_H.shape)}"
        )
