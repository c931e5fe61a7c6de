"""Divergences between a teacher's and a student's next-token distributions, without a [tokens, vocabulary] tensor.

With q the teacher's and p the student's probabilities, each the softmax of its logits (see head.py):

    forward_kl        KL(q | p)
    reverse_kl        KL(p | q)
    jsd               beta KL(q | m) + (1 - beta) KL(p | m),  m = beta q + (1 - beta) p        (GKD, 2306.13649)
    skew_forward_kl   KL(q | m),  m = alpha q + (1 - alpha) p                                   (DistiLLM, 2402.03898)
    skew_reverse_kl   KL(p | m),  m = (1 - alpha) q + alpha p

Every one of them has the gradient p_j (f_j - sum_i p_i f_i) in the student's logit j; `_terms` gives p f. The teacher
is either a head of its own (`linear_divergence`) or the top k it said when it wrote the token (`topk_divergence`).
Nothing is multiplied by temperature squared.

Shapes:  N rows   C rows of a chunk   V student's vocabulary   U teacher's   D, E their widths   K top-k
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from genssd.kernels.head import (
    HeadLoss,
    check_head,
    check_positive,
    choose_product_dtype,
    compute_losses_and_gradients,
    iter_slices,
    make_fake_outputs,
    multiply_into,
    resolve_row_weights,
    row_logsumexp,
    rows_per_chunk,
    save_gradients,
    scale_gradients,
    softmax_gradient,
    squash,
    unsquash_gradient,
)

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
VocabularyRule = Literal["restrict", "drop"]
TailRule = Literal["bucket", "renormalize"]


def linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    *,
    kind: DivergenceKind,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    row_weight: Tensor | None = None,
    vocabulary: VocabularyRule = "restrict",
) -> HeadLoss:
    """The divergence of every row and their weighted sum, differentiable in the student's hidden states and weight.

    row_weight: float [N]; rows of weight 0 count nothing, whatever they hold. beta (jsd) lies in (0, 1), alpha (skew)
    in [0, 1); temperature divides both models' logits. Heads that are padded to different widths share their first
    min(V, U) ids: with "restrict" both softmaxes are taken over these alone; with "drop" each is taken over its own
    head, and the terms of the ids that only one has are left out of the sum (which may then be negative).
    Raises ValueError on shapes that do not agree and on an option out of range.
    """
    check_head("linear_divergence", student_hidden_ND, student_weight_VD, "student ")
    check_head("linear_divergence", teacher_hidden_NE, teacher_weight_UE, "teacher ")
    if student_hidden_ND.shape[0] != teacher_hidden_NE.shape[0]:
        raise ValueError(
            f"linear_divergence: {student_hidden_ND.shape[0]} rows of the student, {teacher_hidden_NE.shape[0]} of the "
            "teacher"
        )
    check_positive(
        "linear_divergence",
        temperature=temperature,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
    )
    name, mix = _mixture("linear_divergence", kind, beta, alpha)
    _check_choice("linear_divergence", "vocabulary", vocabulary, get_args(VocabularyRule))
    row_weight_N = resolve_row_weights("linear_divergence", row_weight, student_hidden_ND)
    if vocabulary == "restrict":
        shared = min(student_weight_VD.shape[0], teacher_weight_UE.shape[0])
        student_weight_VD, teacher_weight_UE = student_weight_VD[:shared], teacher_weight_UE[:shared]
    grad = torch.is_grad_enabled()
    student_dtype, teacher_dtype = choose_product_dtype(student_hidden_ND), choose_product_dtype(teacher_hidden_NE)
    with torch.autocast(student_hidden_ND.device.type, enabled=False):
        total, rows, _, _ = _linear_divergence(
            student_hidden_ND.to(student_dtype),
            student_weight_VD,
            teacher_hidden_NE.detach().to(teacher_dtype),
            teacher_weight_UE.detach(),
            row_weight_N,
            name,
            mix,
            temperature,
            student_softcap,
            teacher_softcap,
            grad and student_hidden_ND.requires_grad,
            grad and student_weight_VD.requires_grad,
        )
    return HeadLoss(total, rows)


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
    """As `linear_divergence`, against the log-probabilities of the teacher's most likely tokens.

    teacher_ids: int64, distinct in a row, a negative id marks an unused place; teacher_logprob: as the teacher said
    them, at the same temperature. An id that the student's head does not have is left out, and the teacher's other
    probabilities (and its tail) grow to a sum of 1; a row with no id that it has counts nothing. tail "bucket": all
    other tokens are one outcome, in both distributions (the teacher's share is 1 - sum, and where that is less than
    teacher_logprob's dtype can tell from 0, what it can tell); "renormalize": both are renormalised over the K tokens.
    With K = V both equal the full divergence.
    Raises ValueError on shapes that do not agree and on an option out of range, and on CPU on a row of
    log-probabilities whose probabilities sum to more than 1.001.
    """
    check_head("topk_divergence", student_hidden_ND, student_weight_VD, "student ")
    check_positive("topk_divergence", temperature=temperature, student_softcap=student_softcap)
    shape = teacher_ids_NK.shape
    if len(shape) != 2 or shape[0] != len(student_hidden_ND) or not shape[1] or teacher_ids_NK.dtype != torch.int64:
        raise ValueError(
            f"topk_divergence: teacher_ids must be int64 [{student_hidden_ND.shape[0]}, K] with K >= 1, not "
            f"{teacher_ids_NK.dtype} {tuple(shape)}"
        )
    if teacher_logprob_NK.shape != shape:
        raise ValueError(
            f"topk_divergence: teacher_logprob {tuple(teacher_logprob_NK.shape)} and teacher_ids {tuple(shape)} differ"
        )
    name, mix = _mixture("topk_divergence", kind, beta, alpha)
    _check_choice("topk_divergence", "tail", tail, get_args(TailRule))
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


def _mixture(function: str, kind: str, beta: float, alpha: float) -> tuple[str, float]:
    """The kind without its limiting cases, and the teacher's share of the mixture (0 where there is none)."""
    _check_choice(function, "kind", kind, get_args(DivergenceKind))
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"{function}: beta must lie in (0, 1), not {beta}; its limits are the kinds forward_kl and reverse_kl"
        )
    if kind.startswith("skew") and not 0.0 <= alpha < 1.0:
        raise ValueError(f"{function}: alpha must lie in [0, 1), not {alpha}")
    if 1.0 - alpha == 1.0:
        kind = kind.removeprefix("skew_")
    return kind, {"jsd": beta, "skew_forward_kl": alpha, "skew_reverse_kl": 1.0 - alpha}.get(kind, 0.0)


def _check_choice(function: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}, not {value!r}")


def _terms(log_p: Tensor, log_q: Tensor, kind: str, mix: float) -> tuple[Tensor, Tensor]:
    """Every outcome's share of the divergence, and p f, but for a constant in f. mix: the teacher's share of m.

    The mixture is formed from logarithms: probabilities may underflow.
    """
    p, q = log_p.exp(), log_q.exp()

    def times(weight: Tensor, log_ratio: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * log_ratio, 0.0)  # 0 log 0 is 0

    if kind == "forward_kl":
        return times(q, log_q - log_p), -q
    if kind == "reverse_kl":
        share = times(p, log_p - log_q)
        return share, share
    log_m = torch.logaddexp(log_q + math.log(mix), log_p + math.log1p(-mix))
    if kind == "jsd":
        student = (1.0 - mix) * times(p, log_p - log_m)
        return mix * times(q, log_q - log_m) + student, student
    if kind == "skew_forward_kl":
        return times(q, log_q - log_m), -(1.0 - mix) * torch.where(q > 0, q * (log_p - log_m).exp(), 0.0)
    share = times(p, log_p - log_m)
    return share, share - (1.0 - mix) * torch.where(p > 0, p * (log_p - log_m).exp(), 0.0)


def divergence_rows(
    student_x_CV: Tensor,
    teacher_x_CU: Tensor,
    row_weight_C: Tensor,
    kind: str,
    mix: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Losses [C] and the weighted gradient in student_x, of the given dtype. student_x may be overwritten."""
    V, U = student_x_CV.shape[1], teacher_x_CU.shape[1]
    shared = min(V, U)
    losses_C = row_weight_C.new_empty(len(row_weight_C))
    for part in iter_slices(len(student_x_CV), V + U):
        x = student_x_CV[part]
        log_p = squash(x, temperature, student_softcap).log_softmax(1)
        log_q = squash(teacher_x_CU[part], temperature, teacher_softcap).log_softmax(1)[:, :shared]
        share, g = _terms(log_p[:, :shared], log_q, kind, mix)
        p = log_p.exp_()
        if shared < V and kind in ("reverse_kl", "skew_reverse_kl"):
            # the constant in f, which matters where the sum does not run over all of the student's softmax
            g = g + p[:, :shared]
        # the teacher's probabilities are all there and sum to 1; saying so makes the gradient p - q
        mean = -torch.ones_like(row_weight_C[part]) if kind == "forward_kl" and shared == U else g.sum(1)
        dz = p.mul_(-mean[:, None])
        dz[:, :shared] += g
        x.copy_(unsquash_gradient(dz.mul_(row_weight_C[part, None]), x, temperature, student_softcap))
        losses_C[part] = share.sum(1)
    return losses_C, student_x_CV.to(dtype)


@torch.library.custom_op("genssd::linear_divergence", mutates_args=())
def _linear_divergence(
    student_hidden_ND: Tensor,
    student_weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_UE: Tensor,
    row_weight_N: Tensor,
    kind: str,
    mix: float,
    temperature: float,
    student_softcap: float | None,
    teacher_softcap: float | None,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total, losses [N], and the gradients of the student's hidden states and weight (empty when not wanted)."""
    teacher_weight_UE = teacher_weight_UE.to(teacher_hidden_NE.dtype)
    rows = rows_per_chunk(student_weight_VD.shape[0] + teacher_weight_UE.shape[0], student_hidden_ND.device)
    buffer_CU = torch.empty(
        min(rows, len(teacher_hidden_NE)),
        len(teacher_weight_UE),
        dtype=torch.promote_types(teacher_hidden_NE.dtype, torch.float32),
        device=teacher_hidden_NE.device,
    )

    def row_loss(student_x_CV: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        row_weight_C = row_weight_N[span]
        teacher_h = teacher_hidden_NE[span].masked_fill(row_weight_C[:, None] == 0, 0)
        teacher_x_CU = multiply_into(teacher_h, teacher_weight_UE, out=buffer_CU[: len(teacher_h)])
        loss_rows = divergence_rows
        if student_x_CV.is_cuda and student_x_CV.dtype == teacher_x_CU.dtype == torch.float32:
            from genssd.kernels.divergence_triton import divergence_rows as loss_rows
        loss, dx = loss_rows(
            student_x_CV,
            teacher_x_CU,
            row_weight_C,
            kind,
            mix,
            temperature,
            student_softcap,
            teacher_softcap,
            student_hidden_ND.dtype,
        )
        return loss.masked_fill(row_weight_C == 0, 0.0), dx

    losses, d_hidden, d_weight = compute_losses_and_gradients(
        row_loss,
        student_hidden_ND,
        student_weight_VD,
        row_weight_N,
        rows=rows,
        want_hidden=want_hidden,
        want_weight=want_weight,
    )
    return (losses * row_weight_N).sum(), losses, d_hidden, d_weight


@_linear_divergence.register_fake
def _(student_hidden_ND: Tensor, student_weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return make_fake_outputs(student_hidden_ND, student_weight_VD, *rest[-2:])


_linear_divergence.register_autograd(scale_gradients, setup_context=save_gradients)


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
    """total, losses [N], and the gradients of the student's hidden states and weight (empty when not wanted)."""
    V = student_weight_VD.shape[0]
    used_NK = (teacher_ids_NK >= 0) & (teacher_ids_NK < V)
    rounding = torch.finfo(teacher_logprob_NK.dtype).eps
    # 1 - sum in the wider of the dtypes: it is all that is known of the tail
    wide = torch.promote_types(teacher_logprob_NK.dtype, row_weight_N.dtype)
    log_q_NO = _teacher_outcomes(teacher_ids_NK, teacher_logprob_NK.to(wide), used_NK, V, tail, rounding)
    log_q_NO = log_q_NO.to(row_weight_N.dtype)

    def row_loss(x_CV: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        row_weight_C1, used = row_weight_N[span, None], used_NK[span]
        ids = teacher_ids_NK[span].clamp(0, V - 1)
        x_top = x_CV.gather(1, ids)
        z_top = squash(x_top, temperature, student_softcap).masked_fill(~used, -torch.inf)
        if tail == "renormalize":
            log_p = z_top.log_softmax(1)
        else:
            # the mass of all other tokens is summed up, not inferred: 1 - sum would lose what little there may be
            z_CV = squash(x_CV, temperature, student_softcap)
            _put(z_CV, ids, used, torch.full_like(z_top, -torch.inf))
            rest_C = row_logsumexp(z_CV, 1.0, None)
            outcomes = torch.cat((z_top, rest_C[:, None]), 1)
            log_p = outcomes - outcomes.logsumexp(1, keepdim=True)
        share, g = _terms(log_p, log_q_NO[span], kind, mix)
        dz = g - log_p.exp() * g.sum(1, keepdim=True)
        dz = torch.where(row_weight_C1 == 0, 0.0, dz * row_weight_C1)
        if tail == "renormalize":
            dx = torch.zeros(x_CV.shape, dtype=student_hidden_ND.dtype, device=x_CV.device)
        else:
            # the bucket's gradient goes to its tokens in proportion to their probability
            rest_C = rest_C.masked_fill(rest_C == -torch.inf, 0.0)
            # z is another tensor than x wherever unsquash_gradient looks at x
            dx = softmax_gradient(z_CV, rest_C, dz[None, :, -1], 1.0, None, student_hidden_ND.dtype)
            for part in iter_slices(*dx.shape):
                dx[part] = unsquash_gradient(dx[part], x_CV[part], temperature, student_softcap)
        dx_top = unsquash_gradient(dz[:, : ids.shape[1]], x_top, temperature, student_softcap)
        return share.sum(1).masked_fill(row_weight_C1[:, 0] == 0, 0.0), _put(dx, ids, used, dx_top.to(dx.dtype))

    losses, d_hidden, d_weight = compute_losses_and_gradients(
        row_loss,
        student_hidden_ND,
        student_weight_VD,
        row_weight_N,
        rows=rows_per_chunk(2 * V, student_hidden_ND.device),
        want_hidden=want_hidden,
        want_weight=want_weight,
    )
    return (losses * row_weight_N).sum(), losses, d_hidden, d_weight


def _teacher_outcomes(
    ids_NK: Tensor, logprob_NK: Tensor, used_NK: Tensor, vocabulary: int, tail: str, rounding: float
) -> Tensor:
    """The teacher's log-probabilities over the outcomes: the used ids (-inf elsewhere) and, as a bucket, the rest.

    rounding: what the rest holds at least, since 1 - sum does not tell less from nothing.
    """
    q_NK = logprob_NK.masked_fill(ids_NK < 0, -torch.inf).exp()
    sum_N = q_NK.sum(1)
    most = 1.001 + 2.0 * rounding
    if q_NK.device.type == "cpu" and bool((sum_N > most).any()):
        row = int((sum_N > most).nonzero()[0])
        raise ValueError(
            f"topk_divergence: the teacher's probabilities in row {row} sum to {float(sum_N[row]):.4g}; "
            "teacher_logprob must hold log-probabilities of distinct tokens"
        )
    log_q_NK = logprob_NK.masked_fill(~used_NK, -torch.inf)
    if tail == "renormalize":
        return log_q_NK.log_softmax(1)
    none_left = used_NK.sum(1) == vocabulary
    rest_N = (1.0 - sum_N).clamp_min(rounding).masked_fill(none_left, 0.0)
    shared_N = q_NK.masked_fill(~used_NK, 0.0).sum(1) + rest_N
    return torch.cat((log_q_NK, rest_N.log()[:, None]), 1) - shared_N.log()[:, None]


def _put(out_CV: Tensor, ids_CK: Tensor, used_CK: Tensor, values_CK: Tensor) -> Tensor:
    """Write the used values at their ids, in place. An unused place repeats the row's first used one.

    A row that uses none is written to at id 0; its weight is 0.
    """
    place = torch.arange(ids_CK.shape[1], device=ids_CK.device)
    place_CK = torch.where(used_CK, place, used_CK.int().argmax(1, keepdim=True))
    at = ids_CK.gather(1, place_CK)
    return out_CV.scatter_(1, at, values_CK.gather(1, place_CK))


@_topk_divergence.register_fake
def _(student_hidden_ND: Tensor, student_weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return make_fake_outputs(student_hidden_ND, student_weight_VD, *rest[-2:])


_topk_divergence.register_autograd(scale_gradients, setup_context=save_gradients)
