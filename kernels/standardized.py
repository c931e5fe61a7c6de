"""KL divergence between standardised logits, without a [tokens, vocabulary] tensor (logit standardisation, 2403.01427).

    u = (z - mean_v z) / (std_v z + 1e-7) of each row of the teacher and of the student       (std with N - 1, as
                                                                                               torch.std)
    loss = temperature^2 KL(softmax(u_teacher / temperature) | softmax(u_student / temperature))

The loss depends on the shape of a row of logits, not on its scale: z -> a z + b with a > 0 leaves it unchanged. Chunks
of rows are computed again in the backward pass.

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
)

EPS = 1e-7


def linear_standardized_kl(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    *,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
) -> HeadLoss:
    """Return the loss of every row and their weighted sum, differentiable in the student's hidden and weight.

    row_weight: float [N]; rows of weight 0 count as nothing. Heads of different widths are compared over their first
    min(V, U) ids. total and rows are float32 (float64 for float64 hidden states). Raises ValueError on shapes that do
    not agree and on an option out of range.
    """
    name = "linear_standardized_kl"
    check_head(name, student_hidden_ND, student_weight_VD, "student ")
    check_head(name, teacher_hidden_NE, teacher_weight_UE, "teacher ")
    if len(student_hidden_ND) != len(teacher_hidden_NE):
        raise ValueError(
            f"{name}: {len(student_hidden_ND)} rows of the student, {len(teacher_hidden_NE)} of the teacher"
        )
    check_positive(name, temperature=temperature)
    weight_N = resolve_row_weights(name, row_weight, student_hidden_ND)
    shared = min(len(student_weight_VD), len(teacher_weight_UE))
    used = weight_N.nonzero()[:, 0]  # rows of weight 0 may not be finite, so they are left out of every product
    dtype = choose_product_dtype(student_hidden_ND)
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        student, teacher = student_hidden_ND.to(dtype)[used], teacher_hidden_NE.detach().to(dtype)[used]
        heads = student_weight_VD[:shared].to(dtype), teacher_weight_UE.detach()[:shared].to(dtype)
        size = rows_per_chunk(len(used), 2 * shared, student.device)  # both models' logits
        parts = [
            checkpoint(
                _chunk_losses,
                student[i : i + size],
                heads[0],
                teacher[i : i + size],
                heads[1],
                temperature,
                use_reentrant=False,
            )
            for i in range(0, len(used), size)
        ]
    wide = torch.promote_types(dtype, torch.float32)
    nothing = student_hidden_ND[:0].sum(dtype=wide) + student_weight_VD[:0].sum(dtype=wide)  # gradients without rows
    losses = torch.cat(parts) if parts else weight_N[used]
    total = (losses * weight_N[used]).sum() + nothing
    losses_N = torch.zeros(len(weight_N), dtype=wide, device=student.device)
    losses_N[used] = losses.detach()
    return HeadLoss(total, losses_N)


def _chunk_losses(
    student_CD: Tensor, weight_VD: Tensor, teacher_CE: Tensor, weight_VE: Tensor, temperature: float
) -> Tensor:
    log_p = _standardized_log_softmax(student_CD @ weight_VD.T, temperature)
    log_q = _standardized_log_softmax(teacher_CE @ weight_VE.T, temperature)
    return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)


def _standardized_log_softmax(logits_CV: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of the standardised logits at a temperature."""
    z = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    u = (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + EPS)
    return (u / temperature).log_softmax(1)
