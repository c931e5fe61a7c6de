r"""Alignment of a distillation loss with the gradient of the student's success ("Unmasking On-Policy Distillation",
2605.10889).

A node is a prompt with the first tokens of a response. There p is the student's next-token distribution, q the
teacher's, and Q_j the probability that the student succeeds when token j comes next and it writes the rest by itself.

    V = sum_j p_j Q_j                           the student's success at the node
    g*_j = p_j (Q_j - V)                        the ideal gradient: d success / d z_j, up to the node's probability
    dL/dz_j = p_j (f_j - sum_i p_i f_i)         the gradient of a loss L in the student's logits
    alignment = cos(g*, -dL/dz)                 g* is an ascent, dL/dz is what training descends

    loss             f_j
    forward_kl       -q_j / p_j                            KL(q | p)
    reverse_kl       log(p_j / q_j)                        KL(p | q)
    jsd              (1 - beta) log(p_j / m_j)             beta KL(q | m) + (1 - beta) KL(p | m),
                                                           m = beta q + (1 - beta) p
    skew_forward_kl  -(1 - alpha) q_j / m_j                KL(q | m), m = alpha q + (1 - alpha) p
    skew_reverse_kl  log(p_j / m_j) - alpha p_j / m_j      KL(p | m), m = (1 - alpha) q + alpha p
    sampled          log(p_y / q_y) 1{j = y} / p_y         one token y, drawn from p

With two candidates both gradients lie on one line, and the cosine is 1 or -1.

`sampled` is on-policy distillation by the drawn token alone: its mean over y is the gradient of reverse_kl. All vectors
run over the candidates of one node, float64 [C], and both distributions are renormalised over these. Logarithms are
natural. The code computes p f and not f, because p f stays finite where p underflows.

Shapes:  C candidates
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LossName = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "sampled"]
LOSSES: tuple[LossName, ...] = get_args(LossName)

EQUAL_DISTRIBUTIONS = 1e-6
"""Total variation below which two distributions count as equal: float32 log-probabilities cannot resolve it."""
EQUAL_RATES = 1e-12
"""Difference below which two success rates count as equal; they are ratios of small integers."""

UndefinedReason = Literal["forced", "flat", "same", "infinite"]
"""Reason why a node has no alignment.

forced: it has one candidate only. flat: no candidate succeeds more often than another. same: teacher and student have
the same distribution. infinite: the teacher gives a candidate probability 0, and the loss has no finite gradient.
"""


def renormalise(log_C: Floats) -> Floats:
    """Return log-probabilities of some tokens scaled so that the probabilities sum to 1.

    Raises ValueError when one is NaN or none is finite.
    """
    if np.isnan(log_C).any() or not np.isfinite(log_C).any():
        raise ValueError(f"log-probabilities must be numbers, at least one of them finite, not {log_C}")
    shifted = log_C - log_C.max()
    normal: Floats = shifted - np.log(np.exp(shifted).sum())
    return normal


def ideal_gradient(log_p_C: Floats, success_C: Floats) -> Floats:
    """Return g*_j = p_j (Q_j - V), which sums to 0; it is unbiased if success_C is."""
    p_C = np.exp(log_p_C)
    gradient: Floats = p_C * (success_C - p_C @ success_C)
    return gradient


def weighted_terms(
    loss: LossName, log_p_C: Floats, log_q_C: Floats, *, sampled_index: int, beta: float = 0.5, alpha: float = 0.1
) -> Floats:
    """Return p_j f_j of the table at the top of this file.

    sampled_index: index of the drawn token among the candidates. beta lies in (0, 1), alpha in [0, 1). Raises
    ValueError on a loss that is not in the table.
    """
    p_C, q_C = np.exp(log_p_C), np.exp(log_q_C)
    if loss == "forward_kl":
        return -q_C
    if loss == "reverse_kl":
        return _relative_entropy_terms(p_C, log_p_C, log_q_C)
    if loss == "jsd":
        mixture_C = np.logaddexp(log_q_C + math.log(beta), log_p_C + math.log1p(-beta))
        return (1.0 - beta) * _relative_entropy_terms(p_C, log_p_C, mixture_C)
    if loss == "skew_forward_kl":
        mixture_C = np.logaddexp(log_q_C + _log(alpha), log_p_C + math.log1p(-alpha))
        return -(1.0 - alpha) * np.exp(log_p_C + log_q_C - mixture_C)
    if loss == "skew_reverse_kl":
        mixture_C = np.logaddexp(log_q_C + math.log1p(-alpha), log_p_C + _log(alpha))
        return _relative_entropy_terms(p_C, log_p_C, mixture_C) - alpha * np.exp(2.0 * log_p_C - mixture_C)
    if loss == "sampled":
        terms_C = np.zeros_like(p_C)
        terms_C[sampled_index] = log_p_C[sampled_index] - log_q_C[sampled_index]
        return terms_C
    raise ValueError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")


def descent_direction(log_p_C: Floats, weighted_C: Floats) -> Floats:
    """Return -dL/dz from p f, the direction in which training moves the student's logits; it sums to 0."""
    direction: Floats = np.exp(log_p_C) * weighted_C.sum() - weighted_C
    return direction


def cosine(left_C: Floats, right_C: Floats) -> float:
    """Return the cosine of the angle between two vectors that are finite and not 0."""
    # scaled first, because the squares of small components would underflow
    left_C, right_C = left_C / np.abs(left_C).max(), right_C / np.abs(right_C).max()
    return float(left_C @ right_C / math.sqrt(float(left_C @ left_C) * float(right_C @ right_C)))


def measure_alignment(
    loss: LossName,
    log_p_C: Floats,
    log_q_C: Floats,
    success_C: Floats,
    *,
    sampled_index: int,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> float | UndefinedReason:
    """Return the alignment of a loss at one node, in [-1, 1], or the reason why it has none."""
    if len(log_p_C) == 1:
        return "forced"
    if is_flat(success_C):
        return "flat"
    if total_variation(log_p_C, log_q_C) < EQUAL_DISTRIBUTIONS:
        return "same"
    ideal_C = ideal_gradient(log_p_C, success_C)
    weighted_C = weighted_terms(loss, log_p_C, log_q_C, sampled_index=sampled_index, beta=beta, alpha=alpha)
    if not ideal_C.any():
        return "flat"  # the candidates whose success differs have probability 0
    if not np.isfinite(weighted_C).all():
        return "infinite"
    direction_C = descent_direction(log_p_C, weighted_C)
    return cosine(ideal_C, direction_C) if direction_C.any() else "same"


def is_flat(success_C: Floats) -> bool:
    """Return whether no candidate succeeds more often than another."""
    return float(np.ptp(success_C)) < EQUAL_RATES


def total_variation(log_p_C: Floats, log_q_C: Floats) -> float:
    """Return half of the sum of |p - q|, which lies in [0, 1]."""
    return 0.5 * float(np.abs(np.exp(log_p_C) - np.exp(log_q_C)).sum())


def teacher_advantage(log_p_C: Floats, log_q_C: Floats, success_C: Floats) -> float:
    """Return sum_j (q_j - p_j) Q_j: how much success grows when the teacher draws this one token."""
    return float((np.exp(log_q_C) - np.exp(log_p_C)) @ success_C)


def _relative_entropy_terms(p_C: Floats, log_p_C: Floats, log_other_C: Floats) -> Floats:
    """Return p log(p / other) of every candidate, 0 where p is 0."""
    possible_C = p_C > 0.0
    terms_C = np.zeros_like(p_C)
    terms_C[possible_C] = p_C[possible_C] * (log_p_C - log_other_C)[possible_C]
    return terms_C


def _log(value: float) -> float:
    """Return the natural logarithm of a number that is at least 0; -inf of 0."""
    return math.log(value) if value else -math.inf
