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

from genssd.kernels.head import HeadLoss, check_positive, squash
from genssd.kernels.two_heads import sum_chunk_losses

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
    check_positive(name, temperature=temperature, student_softcap=student_softcap, teacher_softcap=teacher_softcap)
    log_a_N = _resolve_factor("student_log_factor_N", student_log_factor_N, student_hidden_ND)
    log_b_N = _resolve_factor("teacher_log_factor_N", teacher_log_factor_N, student_hidden_ND).detach()

    def chunk_loss(x_CV: Tensor, target_CU: Tensor, rows_C: Tensor) -> Tensor:
        p_CV = _sort_probabilities(squash(x_CV, temperature, student_softcap), log_a_N[rows_C])
        with torch.no_grad():
            q_CU = _sort_probabilities(squash(target_CU, temperature, teacher_softcap), log_b_N[rows_C])
        shared = min(p_CV.shape[1], q_CU.shape[1])
        difference = (p_CV[:, :shared] - q_CU[:, :shared]).abs().sum(1)
        return difference + p_CV[:, shared:].sum(1) + q_CU[:, shared:].sum(1)

    return sum_chunk_losses(
        name,
        chunk_loss,
        student_hidden_ND,
        student_weight_VD,
        teacher_hidden_NE,
        teacher_weight_UE,
        row_weight=row_weight,
        copies=COPIES,
    )


def _resolve_factor(name: str, log_factor_N: Tensor | None, hidden_ND: Tensor) -> Tensor:
    """Return the logarithms of a side's factors, float32 [N] (float64 for float64 hidden states); None: zeros."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    if log_factor_N is None:
        return torch.zeros(len(hidden_ND), dtype=wide, device=hidden_ND.device)
    if log_factor_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"linear_sorted_distance: {name} must be [{len(hidden_ND)}], not {tuple(log_factor_N.shape)}")
    return log_factor_N.to(wide)


def _sort_probabilities(z: Tensor, log_factor_C: Tensor) -> Tensor:
    """Return the probabilities of every row of logits times its factor, the largest first."""
    # sorting the logits leaves the sum's order to the sorted row: equal multisets give equal bits
    return (z.sort(dim=1, descending=True).values.log_softmax(1) + log_factor_C[:, None]).exp()
