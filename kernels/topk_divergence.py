"""Divergences from a teacher's log-probabilities of a few tokens, without a [tokens, vocabulary] tensor.

The teacher is known by the log-probabilities of K tokens at every row: its own most likely ones, as when it wrote the
response, or the student's (logprob_at.py). divergence.py compares with a teacher's head. The formulas are in
divergence_terms.py. torch sees one operator, genssd::topk_divergence.

Shapes:  N rows   C rows of a chunk   V student's vocabulary   D student's width   K top-k
         O outcomes: the K tokens and, unless they are renormalised, all others together
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from genssd.kernels.divergence_terms import DivergenceKind, check_choice, divergence_terms, resolve_mixture
from genssd.kernels.head import (
    ChunkLogits,
    HeadLoss,
    check_head,
    check_positive,
    choose_product_dtype,
    compute_losses_and_gradients,
    iter_slices,
    make_fake_outputs,
    resolve_row_weights,
    row_logsumexp,
    rows_per_chunk,
    save_gradients,
    scale_gradients,
    softmax_gradient,
    squash,
    unsquash_gradient,
)
from genssd.kernels.options import PARTIAL_SUMS, TailRule


def topk_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_ids_NK: Tensor,
    teacher_logprob_NK: Tensor,
    *,
    kind: DivergenceKind,
    tail: TailRule = "bucket",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    row_weight: Tensor | None = None,
) -> HeadLoss:
    """Return the divergence of every row and their weighted sum, differentiable in the student's hidden and weight.

    teacher_ids: int64 [N, K], distinct within a row; a negative id marks an unused place. teacher_logprob: float
    [N, K], the teacher's log-probabilities of these ids at the same temperature. An id that the student's head does not
    have is left out, and the teacher's other probabilities (and its tail) are rescaled to a sum of 1; a row without an
    id that the student has counts as nothing. tail "bucket": all other tokens are one outcome, in both distributions
    (the teacher's probability of it is 1 - sum, at least the machine epsilon of teacher_logprob's dtype);
    "renormalize": both distributions are renormalised over the K tokens. With K = V both equal the full divergence.

    For kind reverse_kl alone, over a set S of K tokens, with probabilities of the whole vocabulary (nothing is rescaled
    where an id is left out):

        drop             value sum_S p (log p - log q), and its gradient sum_S p (log p - log q + 1) grad log p. The 1
                         moves mass out of S whatever the teacher says; the value may be negative.
        policy_gradient  the same value with the gradient sum_S p (log p - log q) grad log p: p and the log-ratio are
                         constants, as a reward is. With p alone held constant in p (log p - log q) the gradient would
                         be sum_S p grad log p, in which no teacher appears.

    With K = V these too are the full reverse KL, with its gradient. kind: see divergence_terms.py. row_weight: float
    [N]; rows of weight 0 count as nothing. beta (of jsd) lies in (0, 1), alpha (of the skew kinds) in [0, 1);
    temperature divides the student's logits. Raises ValueError on shapes that do not agree and on an option out of
    range, and on the CPU on a row whose teacher probabilities sum to more than 1.001.
    """
    check_head("topk_divergence", student_hidden_ND, student_weight_VD, "student ")
    check_positive("topk_divergence", temperature=temperature, student_softcap=student_softcap)
    _check_topk(teacher_ids_NK, teacher_logprob_NK, len(student_hidden_ND))
    name, mix = resolve_mixture("topk_divergence", kind, beta, alpha)
    check_choice("topk_divergence", "tail", tail, get_args(TailRule))
    if tail in PARTIAL_SUMS and kind != "reverse_kl":
        raise ValueError(f"topk_divergence: tail {tail} is defined for the kind reverse_kl, not {kind}")
    row_weight_N = resolve_row_weights("topk_divergence", row_weight, student_hidden_ND)
    known = (teacher_ids_NK >= 0) & (teacher_ids_NK < student_weight_VD.shape[0])
    row_weight_N = torch.where(known.any(1), row_weight_N, 0.0)
    teacher_ids_NK = torch.where(row_weight_N[:, None] != 0.0, teacher_ids_NK, -1)
    grad = torch.is_grad_enabled()
    dtype = choose_product_dtype(student_hidden_ND)
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        total, rows, _, _ = _topk_divergence(
            student_hidden_ND.to(dtype),
            student_weight_VD,
            teacher_ids_NK,
            teacher_logprob_NK.detach(),
            row_weight_N,
            name,
            mix,
            tail,
            temperature,
            student_softcap,
            grad and student_hidden_ND.requires_grad,
            grad and student_weight_VD.requires_grad,
        )
    return HeadLoss(total, rows)


def _check_topk(ids_NK: Tensor, logprob_NK: Tensor, num_rows: int) -> None:
    shape = ids_NK.shape
    if len(shape) != 2 or shape[0] != num_rows or not shape[1] or ids_NK.dtype != torch.int64:
        raise ValueError(
            f"topk_divergence: teacher_ids must be int64 [{num_rows}, K] with K >= 1, not {ids_NK.dtype} {tuple(shape)}"
        )
    if logprob_NK.shape != shape:
        raise ValueError(
            f"topk_divergence: teacher_logprob {tuple(logprob_NK.shape)} and teacher_ids {tuple(shape)} differ"
        )


@torch.library.custom_op("genssd::topk_divergence", mutates_args=())
def _topk_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_ids_NK: Tensor,
    teacher_logprob_NK: Tensor,
    row_weight_N: Tensor,
    kind: str,
    mix: float,
    tail: str,
    temperature: float,
    student_softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the total, the losses [N], and the gradients of hidden and weight (unrounded; empty if not wanted)."""
    V = student_weight_VD.shape[0]
    used_NK = (teacher_ids_NK >= 0) & (teacher_ids_NK < V)
    rounding = torch.finfo(teacher_logprob_NK.dtype).eps
    # the tail's probability is known as 1 - sum only, so it is taken in the wider of the dtypes
    wide = torch.promote_types(teacher_logprob_NK.dtype, row_weight_N.dtype)
    log_q_NO = _teacher_outcomes(teacher_ids_NK, teacher_logprob_NK.to(wide), used_NK, V, tail, rounding)
    log_q_NO = log_q_NO.to(row_weight_N.dtype)

    def row_loss(logits: ChunkLogits, span: slice) -> tuple[Tensor, Tensor]:
        x_CV, row_weight_C1, used = logits.x, row_weight_N[span, None], used_NK[span]
        ids = teacher_ids_NK[span].clamp(0, V - 1)
        x_top = x_CV.gather(1, ids)
        z_top = squash(x_top, temperature, student_softcap).masked_fill(~used, -torch.inf)
        if tail == "renormalize":
            log_p = z_top.log_softmax(1)
        else:
            # the other tokens' probabilities are added up: 1 - sum would round a small one away
            z_CV = squash(x_CV, temperature, student_softcap)
            _scatter_used(z_CV, ids, used, torch.full_like(z_top, -torch.inf))
            rest_C = row_logsumexp(z_CV, 1.0, None)
            outcomes = torch.cat((z_top, rest_C[:, None]), 1)
            log_p = outcomes - outcomes.logsumexp(1, keepdim=True)
        term, g = divergence_terms(log_p, log_q_NO[span], kind, mix)
        if tail in PARTIAL_SUMS:
            term[:, -1] = 0.0
            # grad p = p grad log p; the other outcomes' share of it sums to minus this
            g = term + log_p.exp() if tail == "drop" else term
            g[:, -1] = 0.0
        dz = g - log_p.exp() * g.sum(1, keepdim=True)
        dz = torch.where(row_weight_C1 == 0, 0.0, dz * row_weight_C1)
        if tail == "renormalize":
            dx = torch.zeros(x_CV.shape, dtype=student_hidden_ND.dtype, device=x_CV.device)
        else:
            d_bucket_1C, dtype = dz[None, :, -1], student_hidden_ND.dtype
            dx = _bucket_gradient(x_CV, z_CV, rest_C, d_bucket_1C, temperature, student_softcap, dtype)
        dx_top = unsquash_gradient(dz[:, : ids.shape[1]], x_top, temperature, student_softcap)
        losses_C = term.sum(1).masked_fill(row_weight_C1[:, 0] == 0, 0.0)
        return losses_C, _scatter_used(dx, ids, used, dx_top.to(dx.dtype))

    losses, d_hidden, d_weight = compute_losses_and_gradients(
        row_loss,
        student_hidden_ND,
        student_weight_VD,
        row_weight_N,
        rows=rows_per_chunk(len(student_hidden_ND), 2 * V, student_hidden_ND.device),
        want_hidden=want_hidden,
        want_weight=want_weight,
    )
    return (losses * row_weight_N).sum(), losses, d_hidden, d_weight


def _bucket_gradient(
    x_CV: Tensor,
    z_CV: Tensor,
    rest_C: Tensor,
    d_bucket_1C: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return dx [C, V] of the bucket, whose gradient goes to its tokens in proportion to their probability.

    z_CV: the logits, -inf for the tokens outside the bucket; may be overwritten. rest_C: log-sum-exp of z. d_bucket_1C:
    gradient in the log-probability of the bucket.
    """
    rest_C = rest_C.masked_fill(rest_C == -torch.inf, 0.0)
    # this may overwrite z, which is x itself only where unsquash_gradient does not read x
    dx = softmax_gradient(z_CV, rest_C, d_bucket_1C, 1.0, None, dtype)
    for part in iter_slices(*dx.shape):
        dx[part] = unsquash_gradient(dx[part], x_CV[part], temperature, softcap)
    return dx


def _teacher_outcomes(
    ids_NK: Tensor, logprob_NK: Tensor, used_NK: Tensor, vocabulary: int, tail: str, rounding: float
) -> Tensor:
    """Return the teacher's log-probabilities of the outcomes, [N, O]: the used ids (-inf elsewhere), then any others.

    rounding: lower bound of the bucket's probability, because 1 - sum does not distinguish a smaller one from 0.
    """
    q_NK = logprob_NK.masked_fill(ids_NK < 0, -torch.inf).exp()
    sum_N = q_NK.sum(1)
    limit = 1.001 + 2.0 * rounding
    if q_NK.device.type == "cpu" and bool((sum_N > limit).any()):
        row = int((sum_N > limit).nonzero()[0])
        raise ValueError(
            f"topk_divergence: the teacher's probabilities in row {row} sum to {float(sum_N[row]):.4g}; "
            "teacher_logprob must hold log-probabilities of distinct tokens"
        )
    log_q_NK = logprob_NK.masked_fill(~used_NK, -torch.inf)
    if tail in PARTIAL_SUMS:
        return torch.cat((log_q_NK, torch.zeros_like(log_q_NK[:, :1])), 1)  # the last outcome counts as nothing
    if tail == "renormalize":
        return log_q_NK.log_softmax(1)
    bucket_is_empty_N = used_NK.sum(1) == vocabulary
    rest_N = (1.0 - sum_N).clamp_min(rounding).masked_fill(bucket_is_empty_N, 0.0)
    total_N = q_NK.masked_fill(~used_NK, 0.0).sum(1) + rest_N
    return torch.cat((log_q_NK, rest_N.log()[:, None]), 1) - total_N.log()[:, None]


def _scatter_used(out_CV: Tensor, ids_CK: Tensor, used_CK: Tensor, values_CK: Tensor) -> Tensor:
    """Write the used values at their ids into out, in place, and return out.

    An unused place repeats the row's first used one. A row without a used place is written at id 0; its weight is 0.
    """
    place = torch.arange(ids_CK.shape[1], device=ids_CK.device)
    place_CK = torch.where(used_CK, place, used_CK.int().argmax(1, keepdim=True))
    return out_CV.scatter_(1, ids_CK.gather(1, place_CK), values_CK.gather(1, place_CK))


@_topk_divergence.register_fake
def _(student_hidden_ND: Tensor, student_weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return make_fake_outputs(student_hidden_ND, student_weight_VD, *rest[-2:])


_topk_divergence.register_autograd(scale_gradients, setup_context=save_gradients)
