"""Gradient of `linear_logprob`, which computes the logits of a chunk of rows once more.

    z = softcap * tanh(x / softcap) / temperature,  x = hidden @ weight.T + bias      (no softcap: z = x / temperature)

torch sees one operator, genssd::linear_logprob_backward.

Shapes:  N rows   C rows of a chunk   V vocabulary   D model width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genssd.kernels.head import (
    ChunkLogits,
    compute_losses_and_gradients,
    make_fake_outputs,
    rows_per_chunk,
    softmax_gradient,
    unsquash_gradient,
)


def save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward pass of genssd::linear_logprob requires."""
    hidden, weight, target, bias, *ctx.options, _, _ = inputs
    logprob, logsumexp, entropy, sum_p2, rank, ids, values = output
    ctx.mark_non_differentiable(rank, ids, values)
    ctx.save_for_backward(hidden, weight, target, bias, logprob, logsumexp, entropy, sum_p2)


@once_differentiable
def backward(
    ctx: Any, d_logprob: Tensor, d_logsumexp: Tensor, d_entropy: Tensor, d_sum_p2: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of hidden and weight for genssd::linear_logprob, and None for its other inputs."""
    hidden, weight, target, bias, logprob, logsumexp, entropy, sum_p2 = ctx.saved_tensors
    temperature, softcap = ctx.options
    want_hidden, want_weight = ctx.needs_input_grad[:2]
    d_hidden, d_weight = _logprob_gradients(
        hidden, weight, target, bias, torch.stack((logprob, logsumexp, entropy, sum_p2)),
        torch.stack((d_logprob, d_logsumexp, d_entropy, d_sum_p2)), temperature, softcap, want_hidden, want_weight,
    )  # fmt: skip
    d_weight = d_weight.to(weight.dtype)
    return d_hidden if want_hidden else None, d_weight if want_weight else None, *(None,) * 6


@torch.library.custom_op("genssd::linear_logprob_backward", mutates_args=())
def _logprob_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    bias: Tensor | None,
    stats_4N: Tensor,
    upstream_4N: Tensor,
    temperature: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of hidden and weight, the latter in float32 or float64 (empty where not requested).

    With p the probability of token j, the statistics have these derivatives in its logit z_j:

    logprob: 1[j = target] - p     logsumexp: p     entropy: -p (log p + entropy)     sum_p2: 2 p (p - sum_p2)
    """
    logprob, logsumexp, entropy, sum_p2 = stats_4N.unbind()
    d_logprob, d_logsumexp, d_entropy, d_sum_p2 = upstream_4N.unbind()
    flat = d_logsumexp - d_logprob - d_entropy * entropy - 2.0 * d_sum_p2 * sum_p2
    coefficients_3N = torch.stack((flat, -d_entropy, 2.0 * d_sum_p2))

    def row_loss(logits: ChunkLogits, span: slice) -> tuple[Tensor, Tensor]:
        x_CV = logits.x
        if bias is not None:
            x_CV += bias
        target_C1, log_p = target_N[span, None], logprob[span, None]
        x_target = x_CV.gather(1, target_C1)
        dx = softmax_gradient(x_CV, logsumexp[span], coefficients_3N[:, span], temperature, softcap, hidden_ND.dtype)
        # the target's entry is computed as a whole: where p is near 1, adding 1 to a rounded sum would cancel
        p = log_p.exp()
        rest = flat[span, None] + d_logprob[span, None] - d_entropy[span, None] * log_p.clamp_min(-1e30)
        dz = -d_logprob[span, None] * torch.expm1(log_p) + p * (rest + 2.0 * d_sum_p2[span, None] * p)
        dx.scatter_(1, target_C1, unsquash_gradient(dz, x_target, temperature, softcap).to(dx.dtype))
        return logsumexp[span], dx

    _, d_hidden, d_weight = compute_losses_and_gradients(
        row_loss,
        hidden_ND,
        weight_VD,
        torch.ones_like(logprob),
        rows=rows_per_chunk(len(hidden_ND), weight_VD.shape[0], hidden_ND.device),
        want_hidden=want_hidden,
        want_weight=want_weight,
    )
    return d_hidden, d_weight


@_logprob_gradients.register_fake
def _(hidden_ND: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return make_fake_outputs(hidden_ND, weight_VD, *rest[-2:])[2:]
