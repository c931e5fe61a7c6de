"""Mixing weight alpha of the skewed KL divergences for each completion (DistiLLM-2, 2503.07067, "adaptive alpha").

    alpha_i = clip(1 - (1 - alpha) m / (gap_i + 1e-5), 0.01, alpha)
    gap_i   = q_i - p_i for skew_forward_kl, p_i - q_i for skew_reverse_kl

q_i and p_i are the geometric means of the probabilities that the teacher and the student give the tokens of completion
i, and m is the mean gap. The gradient of a skewed KL has a factor of 1 - alpha times about the gap, which this keeps at
its mean: where the models are closer than that, alpha falls and the student learns more.

The paper's program measures m over the first steps that it logs and then keeps it. Here m is the mean over the
completions of the same forward pass and divergence, so nothing has to be kept in checkpoints; which examples share a
forward pass then counts, and one alone has alpha itself.

Shapes:  M completion tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.distill.train.loss_options import SMALLEST_ALPHA


@torch.no_grad()
def adapt_alpha(
    alpha: float,
    student_logprob_M: Tensor,
    teacher_logprob_M: Tensor,
    counted_M: Tensor,
    lengths: Sequence[int],
    *,
    reverse: bool,
) -> list[tuple[int, float]]:
    """Return runs of rows with their alpha: the number of tokens and the alpha of each completion, in order.

    The log-probabilities are those of the completions' tokens, [M]. counted_M: whether a token counts, bool [M]; a
    completion without such a token has `alpha`, and is left out of m. reverse: for skew_reverse_kl. The host waits once
    for the device.
    """
    student_M, teacher_M, weight_M = torch.stack(
        (student_logprob_M.double(), teacher_logprob_M.double(), counted_M.double())
    ).cpu()
    example_M = torch.arange(len(lengths)).repeat_interleave(torch.tensor(list(lengths)))
    means = []
    counts = weight_M.new_zeros(len(lengths)).index_add(0, example_M, weight_M)
    for logprob_M in (teacher_M, student_M):
        sums = torch.zeros_like(counts).index_add(0, example_M, logprob_M.masked_fill(weight_M == 0, 0.0))
        means.append((sums / counts).exp())
    gap = means[1] - means[0] if reverse else means[0] - means[1]
    has_tokens = counts > 0
    mean = gap[has_tokens].mean()
    adapted = 1.0 - (1.0 - alpha) * mean / (gap + 1e-5)
    adapted = torch.where(has_tokens & adapted.isfinite(), adapted.clamp(SMALLEST_ALPHA, alpha), alpha)
    return list(zip(lengths, adapted.tolist(), strict=True))
