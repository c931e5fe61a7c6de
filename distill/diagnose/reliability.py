"""What can be known about alignments from finitely many rollouts: variance, reliability, intervals.

Success rates are means of R completions each, so the ideal gradient that is computed from them is g* plus noise, and a
cosine with it is nearer to 0 than the true one. Two halves of the completions give two estimates with independent
noise:

    r = mean of cos(g_1, g_2)                 reliability of half of the completions
    2 r / (1 + r)                             of all of them (Spearman and Brown, 1910)
    mean alignment / sqrt(2 r / (1 + r))      what the mean would be without the noise (Spearman's attenuation, 1904)

Nodes of one question are not independent; the bootstrap draws questions.

Shapes:  C candidates   Q questions   D draws   M measures
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genssd.distill.diagnose.alignment import Floats, cosine, ideal_gradient, is_flat

DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % percentile interval. NaN where nothing is known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def gradient_variance(log_p_C: Floats, success_C: Floats, completions: int) -> Floats:
    """The variance of every component of the estimated ideal gradient, unbiased; completions of each candidate, >= 2.

    g_j = sum_k p_j (1{j = k} - p_k) Q_k is linear in the success rates, which are independent.
    """
    p_C = np.exp(log_p_C)
    jacobian_CC = p_C[:, None] * (np.eye(len(p_C)) - p_C)
    variance: Floats = jacobian_CC**2 @ (success_C * (1.0 - success_C) / (completions - 1))
    return variance


def half_agreement(log_p_C: Floats, first_C: Floats, second_C: Floats) -> float:
    """cos(g_1, g_2) of the gradients from each half's success rates; 0 where one half sees no difference."""
    if is_flat(first_C) or is_flat(second_C):
        return 0.0
    gradients = ideal_gradient(log_p_C, first_C), ideal_gradient(log_p_C, second_C)
    return cosine(*gradients) if all(gradient.any() for gradient in gradients) else 0.0


def full_reliability(half: Floats) -> Floats:
    """Of all completions, from that of half of them; NaN where the halves do not agree at all (half <= 0)."""
    agreeing = np.where(half > 0.0, half, np.nan)
    reliable: Floats = 2.0 * agreeing / (1.0 + agreeing)
    return reliable


def disattenuated(mean: Floats, half: Floats) -> Floats:
    """A mean alignment without the noise's share; NaN where the halves do not agree at all."""
    corrected: Floats = mean / np.sqrt(full_reliability(half))
    return corrected


def question_draws(questions: int, seed: int, draws: int = DRAWS) -> Floats:
    """How often each question is drawn in each of the bootstrap's samples, [D, Q]."""
    picked = np.random.default_rng(seed).integers(0, questions, (draws, questions))
    counts = np.zeros((draws, questions))
    np.add.at(counts, (np.arange(draws)[:, None], picked), 1.0)
    return counts


def pooled_mean(sums_QM: Floats, counts_QM: Floats) -> Floats:
    """The mean over all nodes from every question's sum and count, [M]; NaN where there are none."""
    return _ratio(sums_QM.sum(0), counts_QM.sum(0))


def resampled_means(draws_DQ: Floats, sums_QM: Floats, counts_QM: Floats) -> Floats:
    """The same in every sample of the bootstrap, [D, M]."""
    return _ratio(draws_DQ @ sums_QM, draws_DQ @ counts_QM)


def interval(value: float, resampled_D: Floats) -> Interval:
    """The estimate with the percentiles of its bootstrap; samples without a value are left out."""
    known = resampled_D[np.isfinite(resampled_D)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return Interval(value=float(value), low=float(low), high=float(high))


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Floats = np.where(denominator > 0.0, numerator / denominator, np.nan)
    return ratio
