"""Attention of packed query rows over a paged key-value cache that sequences share.

Row n stands at a position of its sequence and attends to the positions up to its own. Positions are cut into segments
at absolute multiples of a constant, and below it at its halves, down to 128 tokens. A segment table says which rows
read which: rows whose sequences hold the same pages through a whole segment read it together. For a row n, a head and a
segment s with the scores z of its keys,

    peak_s = max z      total_s = sum e^(z - peak_s)      values_s = sum e^(z - peak_s) v

and these partial results are merged in the order of segments: with p = max(peak_a, peak_b),

    total = total_a e^(peak_a - p) + total_b e^(peak_b - p)      values likewise      output = values / total

So a row's bits depend on its own keys and values alone, not on who shares them, the batch or the page layout. Prefill,
scoring and decoding are the same call with more or fewer rows per sequence.

Shapes:  N rows   P pages   S page size   H query heads   G kv heads   E head dim   R rows of an item   T its tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd import _core
from genssd.kernels.device_table import DeviceTable
from genssd.kernels.inference import refuse_gradients
from genssd.kernels.native import runs_natively

SegmentTable = _core.SegmentTable
"""Who reads what. items: int32 [items, 6] (index into pages of the item's first page, position of its first token,
tokens that its rows see at most, index into entries of its first row, its rows, its unit: items of different units
share no row). entries: int32 [entries, 2] (row, slot of the partial result). pages: int32. position, slot: of every
row. row_partial: int32 [N + 1], a row's first partial slot; the others follow in the order of segments."""

SEGMENT_TOKENS = {"cpu": 256, "cuda": 1024}
"""Tokens of a segment. On a GPU a longer one keeps the traffic of partial results small beside that of the cache."""

QUERY_VECTORS_PER_UNIT = {"cpu": 128, "cuda": 64}
"""Query vectors (rows times query heads per kv head) that read a segment together."""


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
) -> SegmentTable:
    """The table of a batch of sequences. Rows are numbered sequence by sequence.

    All int32, on the CPU. tables: [tables, width], pages in the order of positions (beyond a sequence's end anything).
    table_B: which of them is a sequence's. Its rows stand at first, first + 1, ... (rows of them); keys and values up
    to the last row's position are in the cache when the table is used. window: a row sees at most so many positions,
    its own included; 0: all. unit_rows: rows of an item at most. Relatives need not stand side by side. Raises
    ValueError on a sequence whose pages are not in its table, and unless segment is a multiple of page_size.
    """
    return _core.segment_table(tables, table_B, first_B, rows_B, page_size, segment, window, unit_rows)


def paged_attention(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: SegmentTable | DeviceTable,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return the attention output [N, H, E] in the dtype of q.

    A score is scale * q . k, then softcap * tanh(score / softcap) where softcap is given. sinks_H: float32, a score of
    each head that counts in the softmax and has no value. A row that sees nothing but scores of -inf gets zeros. On the
    CPU (float32, bfloat16, float16) the native kernel computes in float32. On a CUDA device a table that is there
    already saves its way; and there a value that is not finite makes every row of its item NaN, which are all rows of
    sequences that hold it.
    Raises ValueError on shapes or dtypes that do not agree, on a table that points outside the cache or lies where it
    is not read, and where a gradient is asked for and a kernel of ours runs.
    """
    if q_NHE.is_cuda and q_NHE.dtype != torch.float64:
        # imported here, because Triton need not be installed where there is no GPU
        from genssd.kernels.attention_triton import attend_rows, choose_launch

        refuse_gradients("paged_attention", q_NHE, k_pages_PSGE, v_pages_PSGE, sinks_H)
        _check(q_NHE, k_pages_PSGE, v_pages_PSGE, table, sinks_H)
        there = table if isinstance(table, DeviceTable) else DeviceTable.upload(table, q_NHE.device)
        launch = choose_launch(q_NHE)
        return attend_rows(q_NHE, k_pages_PSGE, v_pages_PSGE, there, scale, softcap, sinks_H, launch=launch)
    if isinstance(table, DeviceTable):
        raise ValueError(
            f"paged_attention: a device table serves Triton's kernels alone; {q_NHE.dtype} on {q_NHE.device} takes the "
            "segment table itself"
        )
    if runs_natively(q_NHE, k_pages_PSGE, v_pages_PSGE):
        refuse_gradients("paged_attention", q_NHE, k_pages_PSGE, v_pages_PSGE, sinks_H)
        out = torch.empty_like(q_NHE, memory_format=torch.contiguous_format)
        _core.paged_attention(
            q_NHE.contiguous(), k_pages_PSGE, v_pages_PSGE, table, out, scale, softcap or 0.0, sinks_H,
            torch.get_num_threads(),
        )  # fmt: skip
        return out
    return paged_attention_reference(
        q_NHE, k_pages_PSGE, v_pages_PSGE, table, scale=scale, softcap=softcap, sinks_H=sinks_H
    )


def paged_attention_reference(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: SegmentTable,
    *,
    scale: float,
    softcap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, item by item; float64 stays float64."""
    _check(q_NHE, k_pages_PSGE, v_pages_PSGE, table, sinks_H)
    _, H, E = q_NHE.shape
    device, G = q_NHE.device, k_pages_PSGE.shape[2]
    wide = torch.promote_types(q_NHE.dtype, torch.float32)
    partials = int(table.row_partial[-1])
    peak = torch.full((partials, H), -torch.inf, dtype=wide, device=device)
    total = torch.zeros(partials, H, dtype=wide, device=device)
    values = torch.zeros(partials, H, E, dtype=wide, device=device)
    position_N = torch.tensor(table.position, device=device)
    pages, entries = torch.tensor(table.pages, device=device), torch.tensor(table.entries, device=device)
    for page, first, tokens, entry, count, _ in table.items.tolist():
        held = pages[page : page - (-tokens // table.page_size)]
        row, slot = entries[entry : entry + count].unbind(1)
        k_TGE, v_TGE = (x[held].flatten(0, 1)[:tokens].to(wide) for x in (k_pages_PSGE, v_pages_PSGE))
        at_T = first + torch.arange(tokens, device=device)
        seen_RT = at_T <= position_N[row][:, None]
        if table.window:
            seen_RT &= at_T > position_N[row][:, None] - table.window
        q_RGQE = q_NHE[row].to(wide).view(count, G, H // G, E)
        z_RHT = torch.einsum("rgqe,tge->rgqt", q_RGQE, k_TGE).flatten(1, 2) * scale
        if softcap is not None:
            z_RHT = softcap * torch.tanh(z_RHT / softcap)
        z_RHT = z_RHT.masked_fill(~seen_RT[:, None], -torch.inf)
        peak[slot] = z_RHT.amax(2)
        e_RHT = (z_RHT - peak[slot].clamp_min(torch.finfo(wide).min)[..., None]).exp()
        total[slot] = e_RHT.sum(2)
        # what no row sees may hold anything, NaN included, and 0 * NaN is NaN
        v_TGE = v_TGE.masked_fill(~seen_RT.any(0)[:, None, None], 0)
        e_RGQT = e_RHT.view(count, G, H // G, tokens)
        values[slot] = torch.einsum("rgqt,tge->rgqe", e_RGQT, v_TGE).flatten(1, 2)
    return _merge(peak, total, values, table, sinks_H).to(q_NHE.dtype)


def _merge(peak: Tensor, total: Tensor, values: Tensor, table: SegmentTable, sinks_H: Tensor | None) -> Tensor:
    """Fold the partial results of every row, in the order of segments."""
    device, N = peak.device, table.num_rows
    first_N, end_N = (torch.tensor(part, device=device) for part in (table.row_partial[:-1], table.row_partial[1:]))
    start = peak.new_full((peak.shape[1],), -torch.inf) if sinks_H is None else sinks_H.to(peak.dtype)
    p_NH, t_NH = start.repeat(N, 1), (start > -torch.inf).to(peak.dtype).repeat(N, 1)
    o_NHE = values.new_zeros(N, *values.shape[1:])
    for step in range(int((end_N - first_N).max()) if N else 0):
        n = (first_N + step < end_N).nonzero()[:, 0]
        at = first_N[n] + step
        now = torch.maximum(p_NH[n], peak[at])
        base = now.clamp_min(torch.finfo(peak.dtype).min)  # of two empty sets: -inf - -inf would be NaN
        a, b = (p_NH[n] - base).exp(), (peak[at] - base).exp()
        p_NH[n] = now
        t_NH[n] = t_NH[n] * a + total[at] * b
        o_NHE[n] = o_NHE[n] * a[..., None] + values[at] * b[..., None]
    return torch.where(t_NH[..., None] == 0, 0, o_NHE / t_NH[..., None])


def _check(
    q_NHE: Tensor,
    k_pages_PSGE: Tensor,
    v_pages_PSGE: Tensor,
    table: SegmentTable | DeviceTable,
    sinks_H: Tensor | None,
) -> None:
    pages = k_pages_PSGE.shape
    if q_NHE.shape[0] != table.num_rows or q_NHE.shape[2] != pages[3] or q_NHE.shape[1] % max(1, pages[2]):
        raise ValueError(
            f"paged_attention: q {tuple(q_NHE.shape)} does not fit a table of {table.num_rows} rows and pages "
            f"{tuple(pages)}"
        )
    if v_pages_PSGE.shape != pages or pages[1] != table.page_size or table.largest_page >= pages[0]:
        raise ValueError(
            f"paged_attention: pages of keys {tuple(pages)} and values {tuple(v_pages_PSGE.shape)} must agree, have "
            f"{table.page_size} tokens each and number more than {table.largest_page}"
        )
    if not q_NHE.dtype == k_pages_PSGE.dtype == v_pages_PSGE.dtype:
        raise ValueError("paged_attention: q, k_pages and v_pages must have one dtype")
    if sinks_H is not None and (sinks_H.shape != q_NHE.shape[1:2] or sinks_H.dtype != torch.float32):
        raise ValueError(
            f"paged_attention: sinks must be float32 [{q_NHE.shape[1]}], not {sinks_H.dtype} {list(sinks_H.shape)}"
        )
