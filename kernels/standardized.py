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

from torch import Tensor

from genssd.kernels.head import HeadLoss, check_positive
from genssd.kernels.two_heads import sum_chunk_losses

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
    check_positive(name, temperature=temperature)
    shared = min(len(student_weight_VD), len(teacher_weight_UE))

    def chunk_loss(x_CV: Tensor, target_CV: Tensor, _: Tensor) -> Tensor:
        log_p = _standardized_log_softmax(x_CV, temperature)
        log_q = _standardized_log_softmax(target_CV, temperature)
        return temperature**2 * (log_q.exp() * (log_q - log_p)).sum(1)

    return sum_chunk_losses(
        name,
        chunk_loss,
        student_hidden_ND,
        student_weight_VD[:shared],
        teacher_hidden_NE,
        teacher_weight_UE[:shared],
        row_weight=row_weight,
        copies=1,
    )


def _standardized_log_softmax(z: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of the standardised logits at a temperature."""
    u = (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + EPS)
    return (u / temperature).log_softmax(1)
