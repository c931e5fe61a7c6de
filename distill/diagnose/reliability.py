"""Uncertainty of alignments that are measured with finitely many completions: variance, reliability, intervals.

Success rates are means of R completions each, so the ideal gradient that is computed from them is g* plus noise, and a
cosine with it is nearer to 0 than the true one. Two halves of the completions give two estimates with independent
noise:

    r = mean of cos(g_1, g_2)                 reliability of half of the completions
    2 r / (1 + r)                             reliability of all of them (Spearman and Brown, 1910)
    mean alignment / sqrt(2 r / (1 + r))      estimate of the mean without noise (Spearman's attenuation, 1904)

Nodes of one question are not independent, so the bootstrap draws questions.

Shapes:  C candidates   Q questions   D draws   M measures
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from genssd.distill.diagnose.alignment import Floats, cosine, ideal_gradient, is_flat

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % percentile interval; all three are NaN where nothing is known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def gradient_variance(log_p_C: Floats, success_C: Floats, completions: int) -> Floats:
    """Return the unbiased variance of every component of the estimated ideal gradient, [C].

    completions: number of completions per candidate, at least 2.

    g_j = sum_k p_j (1{j = k} - p_k) Q_k is linear in the success rates, which are independent.
    """
    p_C = np.exp(log_p_C)
    jacobian_CC = p_C[:, None] * (np.eye(len(p_C)) - p_C)
    variance: Floats = jacobian_CC**2 @ (success_C * (1.0 - success_C) / (completions - 1))
    return variance


def half_agreement(log_p_C: Floats, first_C: Floats, second_C: Floats) -> float:
    """Return cos(g_1, g_2) of the gradients from each half's success rates; 0 where one of the gradients is 0."""
    if is_flat(first_C) or is_flat(second_C):
        return 0.0
    gradients = ideal_gradient(log_p_C, first_C), ideal_gradient(log_p_C, second_C)
    return cosine(*gradients) if all(gradient.any() for gradient in gradients) else 0.0


def full_reliability(half_reliability: Floats) -> Floats:
    """Return the reliability of all completions from that of half of them; NaN where the latter is at most 0."""
    positive = np.where(half_reliability > 0.0, half_reliability, np.nan)
    reliability: Floats = 2.0 * positive / (1.0 + positive)
    return reliability


def disattenuate(mean: Floats, half_reliability: Floats) -> Floats:
    """Return mean alignments corrected for the noise's attenuation; NaN where the half's reliability is at most 0."""
    corrected: Floats = mean / np.sqrt(full_reliability(half_reliability))
    return corrected


def draw_questions(questions: int, seed: int, draws: int = BOOTSTRAP_DRAWS) -> Floats:
    """Return how often each question is drawn in each of the bootstrap's draws, [D, Q]."""
    drawn = np.random.default_rng(seed).integers(0, questions, (draws, questions))
    counts = np.zeros((draws, questions))
    np.add.at(counts, (np.arange(draws)[:, None], drawn), 1.0)
    return counts


def pooled_mean(sums_QM: Floats, counts_QM: Floats) -> Floats:
    """Return the mean over all nodes from every question's sum and count, [M]; NaN where there is no node."""
    return _divide(sums_QM.sum(0), counts_QM.sum(0))


def resample_means(draws_DQ: Floats, sums_QM: Floats, counts_QM: Floats) -> Floats:
    """Return the mean over all nodes in every draw of the bootstrap, [D, M]; NaN where there is no node."""
    return _divide(draws_DQ @ sums_QM, draws_DQ @ counts_QM)


def make_interval(value: float, resampled_D: Floats) -> Interval:
    """Return the estimate with the percentiles of its bootstrap; draws without a finite value are left out."""
    known = resampled_D[np.isfinite(resampled_D)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
    return Interval(value=float(value), low=float(low), high=float(high))


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Return numerator / denominator; NaN where the denominator is not positive."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Floats = np.where(denominator > 0.0, numerator / denominator, np.nan)
    return ratio
