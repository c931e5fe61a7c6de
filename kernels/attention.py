"""Attention of packed query rows over a paged key-value cache.

Row n belongs to sequence row_sequence[n] and stands at row_position[n]; it attends to positions 0..row_position[n] of
that sequence, whose p-th token lies in page page_table[sequence, p // page_size] at offset p % page_size. Sequences
may share pages. Prefill, scoring and decoding are the same call with more or fewer rows per sequence.

Shapes:  N rows   B sequences   W pages per sequence   P pages   S page size   H query heads   G kv heads   E head dim
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genssd import _core


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Where each query row finds its keys. int32 tensors; page_table is padded with any valid page."""

    page_table_BW: Tensor
    row_sequence_N: Tensor
    row_position_N: Tensor


def paged_attention(
    q_NHE: Tensor, k_pages_PSGE: Tensor, v_pages_PSGE: Tensor, plan: AttentionPlan, *, scale: float, window: int = 0
) -> Tensor:
    """Return the attention output [N, H, E] in the dtype of q.

    window: a row sees at most this many positions, its own included; 0 sees all. On the CPU (float32, bfloat16) each
    row is computed by the native kernel, alone and in the order of positions: its bits do not depend on the batch, the
    number of threads or the page layout.
    Raises ValueError on shapes or dtypes that do not agree and on a plan that points outside the cache.
    """
    if q_NHE.device.type == "cpu" and q_NHE.dtype in (torch.float32, torch.bfloat16):
        out = torch.empty_like(q_NHE, memory_format=torch.contiguous_format)
        _core.paged_attention(
            q_NHE.contiguous(),
            k_pages_PSGE,
            v_pages_PSGE,
            plan.page_table_BW,
            plan.row_sequence_N,
            plan.row_position_N,
            out,
            scale,
            window,
            torch.get_num_threads(),
        )
        return out
    return paged_attention_reference(q_NHE, k_pages_PSGE, v_pages_PSGE, plan, scale=scale, window=window)


def paged_attention_reference(
    q_NHE: Tensor, k_pages_PSGE: Tensor, v_pages_PSGE: Tensor, plan: AttentionPlan, *, scale: float, window: int = 0
) -> Tensor:
    """The same in plain torch: gathers every row's keys, so it is an oracle, not an engine."""
    G, E = k_pages_PSGE.shape[2:]
    table_NW = plan.page_table_BW[plan.row_sequence_N.long()].long()
    k_NLGE = k_pages_PSGE[table_NW].reshape(len(table_NW), -1, G, E)
    v_NLGE = v_pages_PSGE[table_NW].reshape(len(table_NW), -1, G, E)
    position_L = torch.arange(k_NLGE.shape[1], device=q_NHE.device)
    last_N1 = plan.row_position_N[:, None]
    seen_NL = position_L <= last_N1
    if window:
        seen_NL &= position_L > last_N1 - window
    q_NGRE = q_NHE.reshape(len(q_NHE), G, -1, E)
    s_NGRL = torch.einsum("ngre,nlge->ngrl", q_NGRE, k_NLGE).to(torch.promote_types(q_NHE.dtype, torch.float32)) * scale
    p_NGRL = s_NGRL.masked_fill(~seen_NL[:, None, None, :], -torch.inf).softmax(dim=-1).to(q_NHE.dtype)
    # unseen slots may hold anything, NaN included, and 0 * NaN is NaN
    v_NLGE = v_NLGE.masked_fill(~seen_NL[:, :, None, None], 0)
    return torch.einsum("ngrl,nlge->ngre", p_NGRL, v_NLGE).reshape(q_NHE.shape)
