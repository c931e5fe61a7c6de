"""Selection of tokens as weights on the loss: by the entropy of a model, and by the position in the completion.

    w_t = w_t(row, chunk) * s_t / mean(s)       s_t = [t is among the tokens of highest entropy] * 2^(-t / half_life)

t counts the tokens of a completion from 0. The mean of s and the choice by entropy run over the tokens of the
completion whose weight is above 0, so a completion keeps its part in the step, and no split of a batch changes it.

Entropy: few tokens of high entropy decide where a response goes, and training on the top fifth of them keeps or raises
the gain (2506.01939, for reinforcement learning by the student's entropy; 2604.14084 and 2605.26844, for distillation).
Position: the teacher's feedback loses its contrast along the student's own text (2605.13643, "Prefix Teach, Suffix
Fade"). The paper cuts each completion at a change point of the teacher's margin; a weight that halves every half_life
tokens is our reading of it, and needs no threshold.

Shapes:  M completion tokens   n tokens of one completion   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.distill.train.token_weight_options import TokenWeightOptions
from genssd.kernels.logprob import linear_logprob


@torch.no_grad()
def compute_entropy(hidden_MD: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    """Return the entropy of the next-token distribution at every row, nats, [M]; NaN where logits are not finite."""
    unused = torch.zeros(len(hidden_MD), dtype=torch.int64, device=hidden_MD.device)
    return linear_logprob(hidden_MD, weight_VD, unused, softcap=softcap, checked=False).entropy


def weigh_tokens(
    options: TokenWeightOptions, weight_M: Tensor, lengths: Sequence[int], entropy_M: Tensor | None
) -> Tensor:
    """Return the weights of the tokens, float [M], from those by rows and chunks.

    lengths: number of tokens of each completion, in order. entropy_M: of the model that chooses; None without one. Of
    equal entropies the earlier token is chosen.
    """
    parts: list[Tensor] = []
    start = 0
    for length in lengths:
        weight_n = weight_M[start : start + length]
        counted_n = weight_n > 0.0
        scale_n = counted_n.to(weight_n.dtype)
        if options.half_life is not None:
            place_n = torch.arange(length, device=weight_n.device, dtype=weight_n.dtype)
            scale_n = scale_n * torch.exp2(-place_n / options.half_life)
        if entropy_M is not None:
            order_n = entropy_M[start : start + length].masked_fill(~counted_n, -torch.inf)
            # the number of chosen tokens stays on the device, so that the host does not wait for it
            rank_n = order_n.argsort(descending=True, stable=True).argsort()
            scale_n = scale_n * (rank_n < torch.ceil(options.fraction * counted_n.sum()))
        mean = scale_n.sum() / counted_n.sum().clamp_min(1)
        parts.append(weight_n * torch.where(mean > 0.0, scale_n / mean, 0.0))
        start += length
    return torch.cat(parts)
