"""Cross-entropy under a linear head, without a [tokens, vocabulary] tensor.

    total = sum_n row_weight_n * -log softmax(z_n)[target_n]        z: the head's logits, see head.py

torch sees one operator, genssd::linear_cross_entropy, which computes losses and gradients in one pass over the chunks.

Shapes:  N rows   C rows of a chunk   V vocabulary   D model width
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genssd.kernels.head import (
    ChunkLogits,
    HeadLoss,
    check_head,
    check_positive,
    choose_product_dtype,
    compute_losses_and_gradients,
    make_fake_outputs,
    require_in_vocabulary,
    resolve_row_weights,
    row_logsumexp,
    rows_per_chunk,
    save_gradients,
    scale_gradients,
    softmax_gradient,
    squash,
    unsquash_gradient,
)

if TYPE_CHECKING:
    from genssd.kernels.loss_launch_triton import LossConfiguration


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> HeadLoss:
    """Return the negative log-likelihoods of target_N (int64 [N]), in nats, and their weighted sum.

    total is a float32 scalar (float64 for float64 inputs), differentiable in hidden and weight; for an input that
    requires no gradient none is computed, so a frozen head costs no product. row_weight: float [N]. Rows whose target
    is ignore_index or whose weight is 0 count as nothing: their loss is 0 and their gradient exactly 0, even where
    their hidden states are not finite. The product is taken in the dtype of hidden (or autocast's), everything after it
    in float32. Gradients are formed at the scale of row_weight in the dtype of the product: with float16 keep the
    weights near 1 and divide the total. Raises ValueError on shapes that do not agree and on an option out of range; a
    target outside the vocabulary is a ValueError on the CPU and a NaN loss on CUDA, where the check would make the host
    wait.
    """
    check_head("linear_cross_entropy", hidden_ND, weight_VD)
    check_positive("linear_cross_entropy", temperature=temperature, softcap=softcap)
    if target_N.shape != hidden_ND.shape[:1] or target_N.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: target must be int64 [{hidden_ND.shape[0]}], not {target_N.dtype} "
            f"{tuple(target_N.shape)}"
        )
    row_weight_N = resolve_row_weights("linear_cross_entropy", row_weight, hidden_ND)
    row_weight_N = torch.where(target_N != ignore_index, row_weight_N, 0.0)
    target_N = torch.where(row_weight_N != 0.0, target_N, 0)
    grad = torch.is_grad_enabled()
    dtype = choose_product_dtype(hidden_ND)
    with torch.autocast(hidden_ND.device.type, enabled=False):
        total, rows, _, _ = _linear_cross_entropy(
            hidden_ND.to(dtype),
            weight_VD,
            target_N,
            row_weight_N,
            temperature,
            softcap,
            grad and hidden_ND.requires_grad,
            grad and weight_VD.requires_grad,
        )
    return HeadLoss(total, rows)


@torch.library.custom_op("genssd::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    row_weight_N: Tensor,
    temperature: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the total, the losses [N], and the gradients of hidden and weight (unrounded; empty if not wanted)."""
    configuration = None
    if hidden_ND.is_cuda and row_weight_N.dtype == torch.float32 and (want_hidden or want_weight):
        from genssd.kernels.loss_launch_triton import choose_configuration

        shape = (len(weight_VD), weight_VD.shape[1])
        configuration = choose_configuration("cross_entropy", hidden_ND.device, hidden_ND.dtype, shape)
    return compute_cross_entropy(
        hidden_ND, weight_VD, target_N, row_weight_N, temperature, softcap, want_hidden, want_weight,
        configuration=configuration,
    )  # fmt: skip


def compute_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    row_weight_N: Tensor,
    temperature: float,
    softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
    *,
    configuration: LossConfiguration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute genssd::linear_cross_entropy. configuration: of the kernels on a CUDA device; None for plain torch.

    Rows of row weight 0 count as nothing; the target of each other row is in the vocabulary, or its loss is NaN.
    """
    valid_N = (target_N >= 0) & (target_N < weight_VD.shape[0])
    if target_N.device.type == "cpu":
        require_in_vocabulary("linear_cross_entropy", target_N, weight_VD.shape[0])
    target_N = torch.where(valid_N, target_N, 0)

    def row_loss(logits: ChunkLogits, span: slice) -> tuple[Tensor, Tensor]:
        x_CV = logits.x
        if configuration is not None:
            from genssd.kernels.rows_triton import cross_entropy_rows

            return cross_entropy_rows(
                x_CV, target_N[span], row_weight_N[span], temperature, softcap, hidden_ND.dtype,
                normalizer_C2=logits.normalizer_C2, tiles=configuration.rows,
            )  # fmt: skip
        scale_C, target_C1 = row_weight_N[span], target_N[span, None]
        x_target = x_CV.gather(1, target_C1)
        logsumexp = row_logsumexp(x_CV, temperature, softcap)
        loss = (logsumexp - squash(x_target, temperature, softcap)[:, 0]).masked_fill(scale_C == 0, 0.0)
        if not (want_hidden or want_weight):
            return loss, x_CV
        # dz is p, and p - 1 at the target
        dx = softmax_gradient(x_CV, logsumexp, scale_C[None], temperature, softcap, hidden_ND.dtype)
        dz_target = scale_C[:, None] * torch.expm1(-loss[:, None])
        return loss, dx.scatter_(
            1, target_C1, unsquash_gradient(dz_target, x_target, temperature, softcap).to(dx.dtype)
        )

    most = None if configuration is None else configuration.chunk_rows
    losses, d_hidden, d_weight = compute_losses_and_gradients(
        row_loss,
        hidden_ND,
        weight_VD,
        row_weight_N,
        rows=rows_per_chunk(len(hidden_ND), weight_VD.shape[0], hidden_ND.device, most=most),
        want_hidden=want_hidden,
        want_weight=want_weight,
        multiply=None if configuration is None else configuration.make_multiply(temperature, softcap),
    )
    losses = losses.masked_fill(~valid_N & (row_weight_N != 0), torch.nan)
    return (losses * row_weight_N).sum(), losses, d_hidden, d_weight


@_linear_cross_entropy.register_fake
def _(hidden_ND: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return make_fake_outputs(hidden_ND, weight_VD, *rest[-2:])


_linear_cross_entropy.register_autograd(scale_gradients, setup_context=save_gradients)
