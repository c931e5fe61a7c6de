"""How much attention the steps of a sequence pay to some words of it, without a [T, T] tensor.

    A[i, j] = mean over heads of the sum over tokens a of step i and tokens b of word j of I[a, b]
    I = softmax(scale q k^T), causal

Rows are taken in chunks, and computed again in the backward pass (MoLSAKI, 2604.15701).

Shapes:  T tokens   H query heads   G kv heads   E head dim   S steps   W words   C rows of a chunk
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20  # of scores alive at once


def attention_mass(
    q_THE: Tensor, k_TGE: Tensor, step_T: Tensor, word_T: Tensor, *, steps: int, words: int, scale: float
) -> Tensor:
    """A, float32 [S, W] (float64 stays float64), differentiable in q and k.

    step, word: int64 [T], the step and the word that each token belongs to, -1 for none. Every token attends to itself
    and what is before it. Raises ValueError on shapes that do not agree.
    """
    tokens, heads, width = q_THE.shape
    if k_TGE.shape[0] != tokens or k_TGE.shape[2] != width or heads % k_TGE.shape[1]:
        raise ValueError(f"attention_mass: q {tuple(q_THE.shape)} and k {tuple(k_TGE.shape)} do not agree")
    for name, index, count in (("step", step_T, steps), ("word", word_T, words)):
        if index.shape != (tokens,) or index.dtype != torch.int64:
            raise ValueError(f"attention_mass: {name} must be int64 [{tokens}], not {index.dtype} {tuple(index.shape)}")
        if tokens and not -1 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(f"attention_mass: {name} must lie in -1..{count - 1}")
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    # one column more, for tokens of no word, which is cut off at the end
    onto_TW = torch.nn.functional.one_hot(word_T.where(word_T >= 0, words), words + 1).to(wide)[:, :words]
    rows = (step_T >= 0).nonzero()[:, 0]
    size = max(1, CHUNK_BYTES // (heads * max(1, tokens) * wide.itemsize))
    mass = torch.zeros(steps, words, dtype=wide, device=q_THE.device)
    with torch.autocast(q_THE.device.type, enabled=False):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            paid_CW = checkpoint(_rows, q_THE, k_TGE, part, onto_TW, scale, use_reentrant=False)
            mass = mass.index_add(0, step_T[part], paid_CW)
    return mass


def _rows(q_THE: Tensor, k_TGE: Tensor, rows_C: Tensor, onto_TW: Tensor, scale: float) -> Tensor:
    """What some rows pay to the words, mean over heads, [C, W]."""
    groups, width = k_TGE.shape[1:]
    q = q_THE[rows_C].to(onto_TW.dtype).view(len(rows_C), groups, -1, width)  # [C, G, H / G, E]
    scores = torch.einsum("cgre,tge->cgrt", q, k_TGE.to(onto_TW.dtype)) * scale
    later = torch.arange(len(k_TGE), device=rows_C.device) > rows_C[:, None]
    paid = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
    return paid.mean((1, 2)) @ onto_TW
