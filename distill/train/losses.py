"""The loss of a training over the completion tokens of a batch; no [tokens, vocabulary] tensor is ever built.

    (1 - kd_ratio) * cross-entropy of the data's tokens + kd_ratio * divergence from the teacher's distributions

The teacher's distributions come from a teacher in memory (its hidden states and head), or from the top k that
`genssd select` stored with the data. Divergences, with q the teacher and p the student: forward_kl KL(q|p), reverse_kl
KL(p|q), jsd beta KL(q|m) + (1 - beta) KL(p|m) with m = beta q + (1 - beta) p, skew_forward_kl KL(q | alpha q +
(1 - alpha) p), skew_reverse_kl KL(p | (1 - alpha) q + alpha p). `temperature` divides both models' logits; the loss is
not multiplied by its square.

With `kd_topk` the divergence is taken over k tokens, and `kd_tail` says what becomes of the others: the teacher's most
likely ones, or, for reverse_kl, the student's (`kd_topk_of`), S. Over these kd_tail drop is sum_S p (log p - log q),
which others train as "reverse KL top-k" (verl, NeMo-RL), policy_gradient its form without the gradient of the mass of
S; bucket and renormalize are divergences, and so have a minimum at p = q (kernels/topk_divergence.py). docs/log.md
measures their bias against the whole vocabulary.

With `kd_standardize` forward KL is taken between standardised logits and multiplied by the square of `temperature`
(2403.01427).

distillm2 is for pairs (rows with `chosen` and `rejected`): (2 - beta) skew_forward_kl on the chosen completions, beta
skew_reverse_kl on the rejected ones (DistiLLM-2; `adaptive_alpha`: adaptive_alpha.py). Other rows count as chosen.
The cross-entropy runs over the chosen completions; like every term it is divided by the weight of all tokens, including
those of the rejected completions.

On completions that the student wrote itself (on-policy) the loss is the divergence alone. There reverse KL can also be
estimated from the sampled tokens: sampled_reverse_kl has the value log p - log q and the gradient (log p - log q) grad
log p, whose mean over samples is that of KL(p|q) (on-policy distillation).

span_kl, uld and sampled_reverse_kl are also defined where the teacher has another tokenizer (span_losses.py).

Shapes:  M completion tokens   D hidden size   V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genssd.distill.train.adaptive_alpha import adapt_alpha
from genssd.distill.train.loss_options import SPAN_LOSSES, LossOptions
from genssd.distill.train.span_losses import SpanHead, sum_span_losses
from genssd.distill.train.token_weights import compute_entropy, weigh_tokens
from genssd.kernels.cross_entropy import linear_cross_entropy
from genssd.kernels.divergence import linear_divergence
from genssd.kernels.logprob import TopK, linear_logprob
from genssd.kernels.logprob_at import linear_logprob_at
from genssd.kernels.standardized import linear_standardized_kl
from genssd.kernels.topk_divergence import topk_divergence


class Head(NamedTuple):
    """Hidden states that predict the completion tokens, and the head's weight that turns them into logits."""

    hidden_MD: Tensor
    weight_VD: Tensor
    softcap: float | None = None
    """Bound of the logits; None without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionTokens:
    """Completion tokens of a forward pass and how each of them counts in the loss."""

    target_M: Tensor
    """Token ids, int64 [M]."""
    weight_M: Tensor
    """Weight of each token in the loss, float [M]."""
    rejected_M: Tensor | None = None
    """Whether a token belongs to a rejected completion, bool [M]; such a token has no cross-entropy. None: no token
    does."""
    lengths: Sequence[int] = ()
    """Number of completion tokens of each example, in order; for token_weights and adaptive_alpha alone."""
    on_policy: bool = False
    """Whether the student under training wrote the completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanTargets:
    """What a teacher says of the completions in its own tokens, and the student's part in the spans."""

    teacher: SpanHead
    student_span_M: Tensor
    """Index of the span of each of the student's completion tokens, int64 [M]; see span_losses.py."""


Targets = Head | TopK | SpanTargets
"""The teacher's distributions: its states and head, or its top k, for the student's tokens; or in tokens of its own."""


class LossSums(NamedTuple):
    """Sums of the losses of a forward pass."""

    total: Tensor
    """Weighted sum of the loss over the tokens, differentiable."""
    cross_entropy: Tensor | None
    """Weighted sum of the cross-entropy, not multiplied by 1 - kd_ratio; None where it is not computed."""
    divergence: Tensor | None
    """Weighted sum of the divergence, not multiplied by kd_ratio; None where it is not computed."""
    attention: Tensor | None = None
    """Sum over the examples of the loss on attention to key words, differentiable, not multiplied by its weight and not
    a part of `total`; None where it is not computed."""


def compute_loss(
    options: LossOptions,
    student: Head,
    tokens: CompletionTokens,
    teacher: Targets | None = None,
    *,
    special_ids: Sequence[int] = (),
) -> LossSums:
    """Compute the loss of M completion tokens.

    teacher: what it says of the same tokens, or of the same text. special_ids: see `mask_special_tokens`.
    """
    if options.token_weights.is_used:
        tokens = _weigh_tokens(options, student, tokens, teacher)
    total = student.hidden_MD.new_zeros((), dtype=torch.float32)
    cross_entropy = divergence = None
    kd_ratio = 1.0 if tokens.on_policy else options.kd_ratio
    if kd_ratio < 1.0:
        weight_M = tokens.weight_M
        if tokens.rejected_M is not None:
            weight_M = weight_M.masked_fill(tokens.rejected_M, 0.0)
        sums = linear_cross_entropy(
            student.hidden_MD, student.weight_VD, tokens.target_M, row_weight=weight_M, softcap=student.softcap
        )
        total = total + (1.0 - kd_ratio) * sums.total
        cross_entropy = sums.total.detach()
    if kd_ratio > 0.0:
        assert teacher is not None
        if options.mask_special_tokens and special_ids:
            special = torch.isin(tokens.target_M, torch.tensor(list(special_ids), device=tokens.target_M.device))
            tokens = replace(tokens, weight_M=tokens.weight_M.masked_fill(special, 0.0))
        weighted_sum = _sum_divergence(options, student, tokens, teacher)
        total = total + kd_ratio * weighted_sum
        divergence = weighted_sum.detach()
    return LossSums(total, cross_entropy, divergence)


def _weigh_tokens(
    options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Targets | None
) -> CompletionTokens:
    """Return the tokens with the weights that token_weights gives them."""
    judge = {"none": None, "student": student, "teacher": teacher}[options.token_weights.entropy_of]
    assert judge is None or isinstance(judge, Head)
    entropy_M = None if judge is None else compute_entropy(*judge)
    return replace(tokens, weight_M=weigh_tokens(options.token_weights, tokens.weight_M, tokens.lengths, entropy_M))


def _sum_divergence(options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Targets) -> Tensor:
    """Return the weighted sum of the divergence over the tokens."""
    kind = options.kd_loss
    if isinstance(teacher, SpanTargets) or kind in SPAN_LOSSES:
        assert not isinstance(teacher, TopK)
        return _sum_over_spans(options, student, tokens, teacher)
    if isinstance(teacher, Head) and options.kd_standardize:
        temperature, weight_M = options.temperature, tokens.weight_M
        return linear_standardized_kl(*student[:2], *teacher[:2], temperature=temperature, row_weight=weight_M).total
    if kind == "distillm2":
        assert isinstance(teacher, Head)
        return _sum_pair_divergence(options, student, tokens, teacher)
    if kind == "sampled_reverse_kl":
        if tokens.on_policy:
            assert isinstance(teacher, Head)
            return _sum_sampled_reverse_kl(student, tokens, teacher, options.temperature)
        kind = "reverse_kl"  # held-out completions are not samples of the student: use the divergence itself
    arguments: dict[str, Any] = {
        "kind": kind,
        "student_softcap": student.softcap,
        "beta": options.beta,
        "alpha": options.alpha,
        "temperature": options.temperature,
        "row_weight": tokens.weight_M,
    }
    if options.adaptive_alpha:
        assert isinstance(teacher, Head)
        arguments["alpha"] = _adapt_alpha(options, student, tokens, teacher, tokens.weight_M, kind == "skew_reverse_kl")
    if isinstance(teacher, Head) and options.kd_topk_of == "student":
        return _sum_over_student_topk(options, student, tokens, teacher)
    if isinstance(teacher, Head) and options.kd_topk:
        # only the top k is used, so any valid target ids will do
        unused = torch.zeros_like(tokens.target_M)
        with torch.no_grad():
            k = min(options.kd_topk, len(teacher.weight_VD))
            top = linear_logprob(
                *teacher[:2], unused, temperature=options.temperature, softcap=teacher.softcap, topk=k
            ).topk
        assert top is not None
        return topk_divergence(*student[:2], top.ids, top.logprob, tail=options.kd_tail, **arguments).total
    if isinstance(teacher, TopK):
        top = _apply_temperature(teacher, options)
        return topk_divergence(*student[:2], top.ids, top.logprob, tail=options.kd_tail, **arguments).total
    return linear_divergence(
        *student[:2], *teacher[:2], vocabulary=options.kd_vocabulary, teacher_softcap=teacher.softcap, **arguments
    ).total


def _sum_over_student_topk(options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Head) -> Tensor:
    """Return the weighted sum of reverse KL over the student's most likely tokens, among those that both heads have."""
    shared = min(len(student.weight_VD), len(teacher.weight_VD))
    student, teacher = (head._replace(weight_VD=head.weight_VD[:shared]) for head in (student, teacher))
    temperature = options.temperature
    with torch.no_grad():
        top = linear_logprob(
            *student[:2],
            torch.zeros_like(tokens.target_M),  # only the top k is used, so any valid target ids will do
            temperature=temperature,
            softcap=student.softcap,
            topk=min(options.kd_topk, shared),
            checked=False,  # logits that are not finite give such a loss, which stops the training with its batch
        ).topk
    assert top is not None
    log_q_MK = linear_logprob_at(*teacher[:2], top.ids, temperature=temperature, softcap=teacher.softcap)
    return topk_divergence(
        *student[:2],
        top.ids,
        log_q_MK,
        kind="reverse_kl",
        tail=options.kd_tail,
        temperature=temperature,
        student_softcap=student.softcap,
        row_weight=tokens.weight_M,
    ).total


def _sum_over_spans(
    options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Head | SpanTargets
) -> Tensor:
    """Return the weighted sum of a loss over spans of text; with one tokenizer every token is a span."""
    if isinstance(teacher, Head):
        span_M = torch.arange(len(tokens.target_M), device=tokens.target_M.device)
        teacher = SpanTargets(teacher=SpanHead(*teacher, tokens.target_M, span_M), student_span_M=span_M)
    kind = options.kd_loss
    if kind == "sampled_reverse_kl" and not tokens.on_policy:
        kind = "span_kl"  # held-out completions are not samples of the student: take a divergence
    assert kind == "span_kl" or kind == "uld" or kind == "sampled_reverse_kl"
    side = SpanHead(*student, tokens.target_M, teacher.student_span_M)
    return sum_span_losses(kind, side, teacher.teacher, tokens.weight_M, temperature=options.temperature)


def _sum_pair_divergence(options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Head) -> Tensor:
    """Return the sum of the skewed forward KL of chosen tokens and the skewed reverse KL of rejected tokens."""
    weight_M, rejected_M = tokens.weight_M, tokens.rejected_M
    rejected = torch.zeros_like(weight_M, dtype=torch.bool) if rejected_M is None else rejected_M
    total = weight_M.new_zeros(())
    for kind, factor, included in (
        ("skew_forward_kl", 2.0 - options.beta, ~rejected),
        ("skew_reverse_kl", options.beta, rejected),
    ):
        if bool(included.any()) and factor:
            part_M = (factor * weight_M).masked_fill(~included, 0.0)
            alpha: float | list[tuple[int, float]] = options.alpha
            if options.adaptive_alpha:
                alpha = _adapt_alpha(options, student, tokens, teacher, part_M, kind == "skew_reverse_kl")
            total = (
                total
                + linear_divergence(
                    *student[:2],
                    *teacher[:2],
                    student_softcap=student.softcap,
                    teacher_softcap=teacher.softcap,
                    kind=kind,  # type: ignore[arg-type]
                    alpha=alpha,
                    temperature=options.temperature,
                    row_weight=part_M,
                    vocabulary=options.kd_vocabulary,
                ).total
            )
    return total


@torch.no_grad()
def _adapt_alpha(
    options: LossOptions, student: Head, tokens: CompletionTokens, teacher: Head, weight_M: Tensor, reverse: bool
) -> list[tuple[int, float]]:
    """Return the alpha of every completion; those without a weight are not compared."""
    log_p_M, log_q_M = (
        linear_logprob(head.hidden_MD, head.weight_VD, tokens.target_M, softcap=head.softcap, checked=False).logprob
        for head in (student, teacher)
    )
    return adapt_alpha(options.alpha, log_p_M, log_q_M, weight_M > 0.0, tokens.lengths, reverse=reverse)


def _sum_sampled_reverse_kl(student: Head, tokens: CompletionTokens, teacher: Head, temperature: float) -> Tensor:
    """Return the sum over the tokens of w (log p - log q), with the gradient of w stop(log p - log q) log p."""
    log_p = linear_logprob(*student[:2], tokens.target_M, temperature=temperature, softcap=student.softcap).logprob
    with torch.no_grad():
        advantage = (
            log_p
            - linear_logprob(*teacher[:2], tokens.target_M, temperature=temperature, softcap=teacher.softcap).logprob
        )
    # a token of weight 0 adds nothing, even if its value is not finite
    counted = tokens.weight_M != 0.0
    surrogate = torch.where(counted, tokens.weight_M * advantage * log_p, 0.0).sum()
    value = torch.where(counted, tokens.weight_M * advantage, 0.0).sum()
    return value + surrogate - surrogate.detach()


def _apply_temperature(top: TopK, options: LossOptions) -> TopK:
    """Return the top k renormalised at the temperature of the divergence."""
    if options.temperature == 1.0:
        return top
    return TopK(top.ids, (top.logprob / options.temperature).log_softmax(1))
