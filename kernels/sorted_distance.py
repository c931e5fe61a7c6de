"""Distance between the sorted probabilities of two heads with different vocabularies, a chunk of rows at a time.

    z = softcap * tanh(x / softcap) / temperature,  x = hidden @ weight.T       (no softcap: z = x / temperature)
    p = softmax(z)  sorted from the largest         q = the same of the teacher
    loss = sum_k |a p_k - b q_k|                    the shorter one is padded with zeros

This is the universal logit distillation loss (2402.12030, equation 4) with a factor for each side: where a row stands
for several tokens that cover the same bytes, p is the distribution of the last of them and a the probability of those
before it (the chain rule; as "bayesian" merging in TRL's GOLD). Which token is which plays no part, so the vocabularies
need nothing in common. Chunks of rows are computed again in the backward pass.

Shapes:  N rows   C rows of a chunk   V student's vocabulary   U teacher's vocabulary   D student's width
         E teacher's width
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genssd.kernels.head import (
    HeadLoss,
    check_head,
    check_positive,
    choose_product_dtype,
    resolve_row_weights,
    rows_per_chunk,
    squash,
)

COPIES = 12
"""Arrays as large as a chunk's logits that the two passes over it have in memory at once, float32; sorting has indices
of twice their size."""


def linear_sorted_distance(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    *,
    student_log_factor_N: Tensor | None = None,
    teacher_log_factor_N: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weight: Tensor | None = None,
) -> HeadLoss:
    """Return the loss of every row and their weighted sum, differentiable in the student's hidden, weight and factor.

    student_log_factor_N, teacher_log_factor_N: log a and log b, float [N], at most 0; None: zeros. row_weight: float
    [N]; rows of weight 0 count as nothing, whatever their values. total and rows are float32 (float64 for float64
    hidden states). Raises ValueError on shapes that do not agree and on an option out of range.
    """
    name = "linear_sorted_distance"
    check_head(name, student_hidden_ND, student_weight_VD, "student ")
    check_head(name, teacher_hidden_NE, teacher_weight_UE, "teacher ")
    num_rows = len(student_hidden_ND)
    if num_rows != len(teacher_hidden_NE):
        raise ValueError(f"{name}: {num_rows} rows of the student, {len(teacher_hidden_NE)} of the teacher")
    check_positive(name, temperature=temperature, student_softcap=student_softcap, teacher_softcap=teacher_softcap)
    weight_N = resolve_row_weights(name, row_weight, student_hidden_ND)
    log_a_N = _resolve_factor(name, "student_log_factor_N", student_log_factor_N, weight_N)
    log_b_N = _resolve_factor(name, "teacher_log_factor_N", teacher_log_factor_N, weight_N).detach()
    # rows of weight 0 may not be finite, so they are left out of every product
    used = torch.arange(num_rows, device=weight_N.device) if row_weight is None else weight_N.nonzero()[:, 0]
    dtype = choose_product_dtype(student_hidden_ND)
    wide = torch.promote_types(dtype, torch.float32)
    parts = []
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        student, teacher = student_hidden_ND.to(dtype)[used], teacher_hidden_NE.detach().to(dtype)[used]
        heads = student_weight_VD.to(dtype), teacher_weight_UE.detach().to(dtype)
        size = rows_per_chunk(len(used), COPIES * (len(heads[0]) + len(heads[1])), student.device)
        for start in range(0, len(used), size):
            rows = slice(start, start + size)
            parts.append(
                checkpoint(
                    _chunk_losses,
                    student[rows],
                    heads[0],
                    log_a_N[used[rows]],
                    teacher[rows],
                    heads[1],
                    log_b_N[used[rows]],
                    temperature,
                    (student_softcap, teacher_softcap),
                    use_reentrant=False,
                )
            )
    nothing = student_hidden_ND[:0].sum(dtype=wide) + student_weight_VD[:0].sum(dtype=wide)  # gradients without rows
    losses = torch.cat(parts) if parts else weight_N[used]
    total = (losses * weight_N[used]).sum() + nothing
    losses_N = torch.zeros(num_rows, dtype=wide, device=student.device)
    losses_N[used] = losses.detach()
    return HeadLoss(total, losses_N)


def _resolve_factor(function: str, name: str, log_factor_N: Tensor | None, weight_N: Tensor) -> Tensor:
    """Return the logarithms of a side's factors in the dtype of the row weights; zeros where there are none."""
    if log_factor_N is None:
        return torch.zeros_like(weight_N)
    if log_factor_N.shape != weight_N.shape:
        raise ValueError(f"{function}: {name} must be [{len(weight_N)}], not {tuple(log_factor_N.shape)}")
    return log_factor_N.to(weight_N.dtype)


def _chunk_losses(
    student_CD: Tensor,
    weight_VD: Tensor,
    log_a_C: Tensor,
    teacher_CE: Tensor,
    weight_UE: Tensor,
    log_b_C: Tensor,
    temperature: float,
    softcaps: tuple[float | None, float | None],
) -> Tensor:
    """Return the loss of every row of a chunk. The teacher's side is computed again, too: kept, it would be [N, U]."""
    p_CV = _sorted_probabilities(student_CD, weight_VD, log_a_C, temperature, softcaps[0])
    with torch.no_grad():
        target_CU = _sorted_probabilities(teacher_CE, weight_UE, log_b_C, temperature, softcaps[1])
    shared = min(p_CV.shape[1], target_CU.shape[1])
    difference = (p_CV[:, :shared] - target_CU[:, :shared]).abs().sum(1)
    return difference + p_CV[:, shared:].sum(1) + target_CU[:, shared:].sum(1)


def _sorted_probabilities(
    hidden_CD: Tensor, weight_VD: Tensor, log_factor_C: Tensor, temperature: float, softcap: float | None
) -> Tensor:
    """Return the probabilities of every row times its factor, [C, V], the largest first."""
    x = hidden_CD @ weight_VD.T
    z = squash(x.to(torch.promote_types(x.dtype, torch.float32)), temperature, softcap)
    # sorting the logits leaves the sum's order to the sorted row: equal multisets give equal bits
    z = z.sort(dim=1, descending=True).values
    return (z.log_softmax(1) + log_factor_C[:, None]).exp()
