"""Attention that the steps of a sequence pay to chosen words of the sequence, without a [T, T] tensor.

    A[i, j] = mean over heads of the sum over tokens a of step i and tokens b of word j of I[a, b]
    I = softmax(scale q k^T), causal

The loss on this attention is that of MoLSAKI (2604.15701). For bfloat16 and float16 on CUDA, torch sees one operator,
genssd::attention_mass, which keeps the log-sum-exp of every row for its backward pass (attention_mass_triton.py).
Elsewhere, and in float32, which no matrix unit multiplies exactly, rows are processed in chunks, and computed again in
the backward pass.

Shapes:  T tokens   H query heads   G kv heads   E head dim   S steps   W words   C rows of a chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20  # largest size of the scores of one chunk of rows
MAX_WIDTH = 256  # largest head dim for which the Triton kernels keep a tile in registers


def attention_mass(
    q_THE: Tensor, k_TGE: Tensor, step_T: Tensor, word_T: Tensor, *, steps: int, words: int, scale: float
) -> Tensor:
    """Return the attention mass A that every step pays to every word, float32 [S, W] (float64 for float64 inputs).

    A[i, j] is the mean over heads of the causal softmax(scale q k^T), summed over the rows of step i and the columns of
    word j. It is differentiable in q and k.
    step_T, word_T: int64 [T], the step and the word that each token belongs to, -1 for none. Every token attends to
    itself and the tokens before it. Raises ValueError on shapes or dtypes that do not agree and on a step or a word out
    of range.
    """
    tokens, heads, width = q_THE.shape
    if k_TGE.shape[0] != tokens or k_TGE.shape[2] != width or heads % k_TGE.shape[1]:
        raise ValueError(f"attention_mass: q {tuple(q_THE.shape)} and k {tuple(k_TGE.shape)} do not agree")
    if q_THE.dtype != k_TGE.dtype:
        raise ValueError(f"attention_mass: q is {q_THE.dtype} and k is {k_TGE.dtype}; they must be the same")
    for name, index, count in (("step", step_T, steps), ("word", word_T, words)):
        if index.shape != (tokens,) or index.dtype != torch.int64:
            raise ValueError(f"attention_mass: {name} must be int64 [{tokens}], not {index.dtype} {tuple(index.shape)}")
        if tokens and not -1 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(f"attention_mass: {name} must lie in -1..{count - 1}")
    if q_THE.is_cuda and q_THE.dtype in (torch.bfloat16, torch.float16) and q_THE.shape[2] <= MAX_WIDTH:
        places = step_T.to(q_THE.device), word_T.to(q_THE.device)
        mass_SW: Tensor = _attention_mass(q_THE, k_TGE, *places, steps, words, scale)[0]
        return mass_SW
    return attention_mass_reference(q_THE, k_TGE, step_T, word_T, steps=steps, words=words, scale=scale)


def attention_mass_reference(
    q_THE: Tensor, k_TGE: Tensor, step_T: Tensor, word_T: Tensor, *, steps: int, words: int, scale: float
) -> Tensor:
    """Compute `attention_mass` in plain torch, a chunk of rows at a time."""
    step_T, word_T = step_T.to(q_THE.device), word_T.to(q_THE.device)
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    # tokens that belong to no word fall into one more column, which is cut off
    word_one_hot_TW = torch.nn.functional.one_hot(word_T.where(word_T >= 0, words), words + 1).to(wide)[:, :words]
    rows = (step_T >= 0).nonzero()[:, 0]
    size = max(1, CHUNK_BYTES // (q_THE.shape[1] * max(1, len(q_THE)) * wide.itemsize))
    mass = torch.zeros(steps, words, dtype=wide, device=q_THE.device)
    with torch.autocast(q_THE.device.type, enabled=False):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            mass_CW = checkpoint(_row_masses, q_THE, k_TGE, part, word_one_hot_TW, scale, use_reentrant=False)
            mass = mass.index_add(0, step_T[part], mass_CW)
    return mass


def _row_masses(q_THE: Tensor, k_TGE: Tensor, rows_C: Tensor, word_one_hot_TW: Tensor, scale: float) -> Tensor:
    """Return the attention that the rows pay to each word, averaged over heads, [C, W]."""
    groups, width = k_TGE.shape[1:]
    q = q_THE[rows_C].to(word_one_hot_TW.dtype).view(len(rows_C), groups, -1, width)  # [C, G, H / G, E]
    scores = torch.einsum("cgre,tge->cgrt", q, k_TGE.to(word_one_hot_TW.dtype)) * scale
    later = torch.arange(len(k_TGE), device=rows_C.device) > rows_C[:, None]
    attention = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1)
    return attention.mean((1, 2)) @ word_one_hot_TW


@torch.library.custom_op("genssd::attention_mass", mutates_args=(), device_types="cuda")
def _attention_mass(
    q_THE: Tensor, k_TGE: Tensor, step_T: Tensor, word_T: Tensor, steps: int, words: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attention mass, float32 [S, W], and the log-sum-exp of every row that has a step, float32 [T, H]."""
    # imported here, because Triton need not be installed where there is no GPU
    from genssd.kernels.attention_mass_triton import choose_tiles, compute_mass

    q, k = _with_contiguous_heads(q_THE), _with_contiguous_heads(k_TGE)
    return compute_mass(q, k, step_T, word_T, steps, words, scale, tiles=choose_tiles(q.shape[2], gradient=False))


@_attention_mass.register_fake
def _(q_THE: Tensor, k_TGE: Tensor, step_T: Tensor, word_T: Tensor, steps: int, words: int, *_: Any) -> Any:
    return (
        q_THE.new_empty(steps, words, dtype=torch.float32),
        q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32),
    )


@torch.library.custom_op("genssd::attention_mass_backward", mutates_args=(), device_types="cuda")
def _mass_gradients(
    d_mass_SW: Tensor, q_THE: Tensor, k_TGE: Tensor, step_T: Tensor, word_T: Tensor, lse_TH: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from genssd.kernels.attention_mass_triton import choose_tiles, compute_mass_gradients

    q, k = _with_contiguous_heads(q_THE), _with_contiguous_heads(k_TGE)
    return compute_mass_gradients(
        d_mass_SW, q, k, step_T, word_T, lse_TH, scale, tiles=choose_tiles(q.shape[2], gradient=True)
    )


@_mass_gradients.register_fake
def _(d_mass_SW: Tensor, q_THE: Tensor, k_TGE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_THE.new_empty(q_THE.shape), k_TGE.new_empty(k_TGE.shape)


def _with_contiguous_heads(x_THE: Tensor) -> Tensor:
    """Return x with the entries of each head contiguous; tokens and heads may have any stride."""
    return x_THE if x_THE.stride(2) == 1 else x_THE.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, step, word, _, _, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, step, word, output[1])


@once_differentiable
def _backward(ctx: Any, d_mass: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, step, word, lse = ctx.saved_tensors
    return *_mass_gradients(d_mass, q, k, step, word, lse, ctx.scale), None, None, None, None, None


_attention_mass.register_autograd(_backward, setup_context=_setup_context)
