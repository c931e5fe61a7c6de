"""Distillation between models with different tokenizers, over the spans of text that both cut out.

The tokens of both models cover the same bytes. A span ends where a token of the student and one of the teacher end at
the same byte, and begins where the span before it ends:

    student   | The | re | fore | ,|        spans   | Therefore | ,|
    teacher   | There | fore    | ,|

For a span s with the student's tokens i..j and the teacher's k..l:

    log p(s) = sum of the student's log-probabilities of i..j        log q(s) likewise

    span_kl             KL of the two outcomes "s" and "anything else": q log(q / p) + (1 - q) log((1 - q) / (1 - p))
    uld                 sum_v |p(i..j-1) p_(v) - q(k..l-1) q_(v)| over the sorted distributions of the last tokens, j
                        and l (kernels/sorted_distance.py; 2402.12030, merged as TRL's GOLD does it by "bayesian")
    sampled_reverse_kl  value log p(s) - log q(s), gradient (log p(s) - log q(s)) grad log p(s), on text that the
                        student wrote

A span has the mean weight of its student's tokens and counts once. With one tokenizer every token is a span, and the
sums are those of the usual losses over tokens.

Shapes:  M student's completion tokens   K teacher's completion tokens   G spans
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genssd.kernels.logprob import linear_logprob
from genssd.kernels.sorted_distance import linear_sorted_distance

SpanLoss = Literal["span_kl", "uld", "sampled_reverse_kl"]

SMALLEST_REST = 1e-6
"""Probability that is added to "anything else", so that a student that is certain has a finite loss."""


class SpanHead(NamedTuple):
    """One model's hidden states along its own tokens of the completions, its head, and the spans of its tokens."""

    hidden_ND: Tensor
    """States that predict the tokens, [N, D]: N is M for the student, K for the teacher."""
    weight_VD: Tensor
    softcap: float | None
    """Bound of the logits; None without."""
    target_N: Tensor
    """Token ids, int64 [N]."""
    span_N: Tensor
    """Index of each token's span, int64 [N], not falling; -1 for tokens after the last common end."""


def align_spans(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> tuple[list[int], list[int], int]:
    """Return the index of the span of every student's and every teacher's token, and the number of spans.

    The arguments give the byte after each token, not falling, from the same first byte. Tokens of no bytes (ends of
    sequence) on both sides are a span; one without a partner belongs to the next span. Tokens after the last common
    end have span -1.
    """
    spans: tuple[list[int], list[int]] = ([-1] * len(student_ends), [-1] * len(teacher_ends))
    i = k = first_i = first_k = count = 0
    while i < len(student_ends) and k < len(teacher_ends):
        if student_ends[i] < teacher_ends[k]:
            i += 1
        elif student_ends[i] > teacher_ends[k]:
            k += 1
        else:
            i, k = i + 1, k + 1
            spans[0][first_i:i] = [count] * (i - first_i)
            spans[1][first_k:k] = [count] * (k - first_k)
            first_i, first_k, count = i, k, count + 1
    return *spans, count


def sum_span_losses(
    kind: SpanLoss, student: SpanHead, teacher: SpanHead, weight_M: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return the weighted sum of the losses of all spans, a scalar that is differentiable in the student.

    weight_M: weight of each of the student's tokens, float [M]; a span of weight 0 adds nothing, whatever its values.
    """
    if not len(student.span_N) or int(student.span_N.max()) < 0:
        return 0.0 * student.hidden_ND.sum(dtype=torch.float32)  # keeps the graph, as every loss does
    count = int(student.span_N.max()) + 1
    weight_G = _mean_per_span(weight_M, student.span_N, count)
    if kind == "uld":
        return _sum_sorted_distance(student, teacher, weight_G, temperature)
    log_p_G = _sum_logprob(student, student.span_N, weight_G, temperature)
    with torch.no_grad():
        log_q_G = _sum_logprob(teacher, teacher.span_N, weight_G, temperature)
    if kind == "span_kl":
        return (weight_G * _binary_kl(log_q_G, log_p_G)).sum()
    advantage_G = (log_p_G - log_q_G).detach()
    surrogate = (weight_G * advantage_G * log_p_G).sum()
    return (weight_G * advantage_G).sum() + surrogate - surrogate.detach()


def _sum_logprob(head: SpanHead, span_N: Tensor, weight_G: Tensor, temperature: float) -> Tensor:
    """Return the sum of the log-probabilities of every span's tokens, [G]; 0 for spans of weight 0.

    span_N: spans of the tokens that are summed, -1 for the others.
    """
    # tokens of weight 0 may have no finite logits, so they are left out of the product
    used = ((span_N >= 0) & (weight_G[span_N.clamp_min(0)] != 0.0)).nonzero()[:, 0]
    logprob = linear_logprob(
        head.hidden_ND[used], head.weight_VD, head.target_N[used], temperature=temperature, softcap=head.softcap
    ).logprob
    return _sum_per_span(logprob, span_N[used], len(weight_G))


def _sum_per_span(value_N: Tensor, span_N: Tensor, count: int) -> Tensor:
    """Return the sum of the values of every span's tokens, [G]."""
    inside = span_N >= 0
    return value_N.new_zeros(count).index_add(0, span_N[inside], value_N[inside])


def _mean_per_span(weight_M: Tensor, span_M: Tensor, count: int) -> Tensor:
    """Return the mean weight of every span's tokens, [G]."""
    return _sum_per_span(weight_M, span_M, count) / _sum_per_span(torch.ones_like(weight_M), span_M, count)


def _binary_kl(log_q_G: Tensor, log_p_G: Tensor) -> Tensor:
    """Return KL of the outcomes "the span" and "anything else" of the teacher q and the student p."""
    q_G, rest_q_G, rest_p_G = log_q_G.exp(), -torch.expm1(log_q_G), -torch.expm1(log_p_G)
    rest = rest_q_G * (torch.log(rest_q_G + SMALLEST_REST) - torch.log(rest_p_G + SMALLEST_REST))
    return q_G * (log_q_G - log_p_G) + rest


def _sum_sorted_distance(student: SpanHead, teacher: SpanHead, weight_G: Tensor, temperature: float) -> Tensor:
    """Return the weighted sum of the distances between the sorted distributions of the spans' last tokens."""
    last_p, log_a_G = _split_last(student, weight_G, temperature)
    with torch.no_grad():
        last_q, log_b_G = _split_last(teacher, weight_G, temperature)
    return linear_sorted_distance(
        student.hidden_ND[last_p],
        student.weight_VD,
        teacher.hidden_ND[last_q],
        teacher.weight_VD,
        student_log_factor_N=log_a_G,
        teacher_log_factor_N=log_b_G,
        temperature=temperature,
        student_softcap=student.softcap,
        teacher_softcap=teacher.softcap,
        row_weight=weight_G,
    ).total


def _split_last(head: SpanHead, weight_G: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the row of every span's last token, int64 [G], and the log-probability of those before it, [G]."""
    span_N = head.span_N
    is_last = span_N >= 0
    is_last[:-1] &= span_N[:-1] != span_N[1:]
    log_factor_G = _sum_logprob(head, span_N.masked_fill(is_last, -1), weight_G, temperature)
    return is_last.nonzero()[:, 0], log_factor_G
