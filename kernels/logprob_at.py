"""Log-probabilities of several tokens per row under a linear head, without a [tokens, vocabulary] tensor or gradients.

A teacher in memory is asked for the probabilities of tokens that another model chose. The logits are computed a chunk
of rows at a time (head.py).

Shapes:  N rows   C rows of a chunk   V vocabulary   D model width   K tokens of a row
"""

from __future__ import annotations

import torch
from torch import Tensor

from genssd.kernels.head import (
    check_head,
    check_positive,
    choose_product_dtype,
    multiply_into,
    row_logsumexp,
    rows_per_chunk,
    squash,
)


@torch.no_grad()
def linear_logprob_at(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_NK: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the log-probabilities of ids_NK (int64 [N, K]) under softmax(z), float32 [N, K] (float64 for float64).

    z: the head's logits, see head.py. A negative id marks an unused place and has the log-probability -inf. Raises
    ValueError on shapes that do not agree and on an option out of range and, on the CPU, on an id that the head does
    not have.
    """
    check_head("linear_logprob_at", hidden_ND, weight_VD)
    check_positive("linear_logprob_at", temperature=temperature, softcap=softcap)
    N, V = len(hidden_ND), len(weight_VD)
    if ids_NK.ndim != 2 or len(ids_NK) != N or ids_NK.dtype != torch.int64:
        raise ValueError(f"linear_logprob_at: ids must be int64 [{N}, K], not {ids_NK.dtype} {tuple(ids_NK.shape)}")
    if ids_NK.device.type == "cpu" and bool((ids_NK >= V).any()):
        raise ValueError(f"linear_logprob_at: the id {int(ids_NK.max())} lies outside the vocabulary of {V}")
    dtype = choose_product_dtype(hidden_ND)
    wide = torch.promote_types(dtype, torch.float32)
    out_NK = torch.empty(ids_NK.shape, dtype=wide, device=hidden_ND.device)
    rows = rows_per_chunk(N, 2 * V, hidden_ND.device)  # no more than topk_divergence takes after it
    with torch.autocast(hidden_ND.device.type, enabled=False):
        hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
        x_CV = torch.empty(min(rows, N), V, dtype=wide, device=hidden_ND.device)
        for start in range(0, N, rows):
            span = slice(start, start + rows)
            h = hidden_ND[span]
            x = multiply_into(h, weight_VD, out=x_CV[: len(h)])
            z_CK = squash(x.gather(1, ids_NK[span].clamp(0, V - 1)), temperature, softcap)
            out_NK[span] = z_CK - row_logsumexp(x, temperature, softcap)[:, None]
    return out_NK.masked_fill_(ids_NK < 0, -torch.inf)
