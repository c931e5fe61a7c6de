"""Formulas of the divergences between a teacher's and a student's next-token distributions.

With q the teacher's and p the student's probabilities, each the softmax of its logits (see head.py):

    forward_kl        KL(q | p)
    reverse_kl        KL(p | q)
    jsd               beta KL(q | m) + (1 - beta) KL(p | m),  m = beta q + (1 - beta) p        (GKD, 2306.13649)
    skew_forward_kl   KL(q | m),  m = alpha q + (1 - alpha) p                                   (DistiLLM, 2402.03898)
    skew_reverse_kl   KL(p | m),  m = (1 - alpha) q + alpha p

Every one of them has the gradient p_j (f_j - sum_i p_i f_i) in the student's logit j, and none of them is multiplied by
temperature squared.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

DivergenceKind = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
"""Divergence between a teacher and a student: forward or reverse KL, generalized JSD, or a skewed KL."""


def resolve_mixture(function: str, kind: str, beta: float, alpha: float) -> tuple[str, float]:
    """Return the kind and the teacher's weight in the mixture m (0 where the kind has no mixture).

    A skew divergence whose alpha rounds away is returned as the plain divergence that is its limit. Raises ValueError,
    naming the function, on an unknown kind and on a beta or alpha out of range.
    """
    check_choice(function, "kind", kind, get_args(DivergenceKind))
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"{function}: beta must lie in (0, 1), not {beta}; its limits are the kinds forward_kl and reverse_kl"
        )
    if kind.startswith("skew") and not 0.0 <= alpha < 1.0:
        raise ValueError(f"{function}: alpha must lie in [0, 1), not {alpha}")
    if 1.0 - alpha == 1.0:
        kind = kind.removeprefix("skew_")
    return kind, {"jsd": beta, "skew_forward_kl": alpha, "skew_reverse_kl": 1.0 - alpha}.get(kind, 0.0)


def check_choice(function: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the function and the option, unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}, not {value!r}")


def divergence_terms(log_p: Tensor, log_q: Tensor, kind: str, mix: float) -> tuple[Tensor, Tensor]:
    """Return every outcome's term of the divergence, and p f, where f is known up to a constant.

    The gradient in the student's logit j is p_j (f_j - sum_i p_i f_i). log_p, log_q: log-probabilities of the student
    and the teacher over the same outcomes. mix: the teacher's weight in the mixture m, which is formed from logarithms,
    because probabilities may underflow.
    """
    p, q = log_p.exp(), log_q.exp()

    def times(weight: Tensor, log_ratio: Tensor) -> Tensor:
        return torch.where(weight > 0, weight * log_ratio, 0.0)  # 0 log 0 is 0

    if kind == "forward_kl":
        return times(q, log_q - log_p), -q
    if kind == "reverse_kl":
        term = times(p, log_p - log_q)
        return term, term
    log_m = torch.logaddexp(log_q + math.log(mix), log_p + math.log1p(-mix))
    if kind == "jsd":
        student = (1.0 - mix) * times(p, log_p - log_m)
        return mix * times(q, log_q - log_m) + student, student
    if kind == "skew_forward_kl":
        return times(q, log_q - log_m), -(1.0 - mix) * torch.where(q > 0, q * (log_p - log_m).exp(), 0.0)
    term = times(p, log_p - log_m)
    return term, term - (1.0 - mix) * torch.where(p > 0, p * (log_p - log_m).exp(), 0.0)
