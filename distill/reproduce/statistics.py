"""Comparison of arms over several seeds: a bootstrap's interval, a p-value, Holm's correction.

Every seed has its own training problems, draws of the teacher, order of training, and test problems, so that seeds are
independent; within a seed two arms answer the same test problems. With d_s the difference of the accuracies of seed s:

    difference  mean of d_s
    interval    percentiles of a bootstrap that draws seeds with replacement, and in each drawn seed its problems
    p           two-sided, of t = difference / e

e^2 is the variance of the mean that the test problems alone give, times an overdispersion: the factor by which seeds
vary more than their problems explain, at least 1. A handful of seeds cannot tell it for one comparison, so it is the
mean over all comparisons of the family (a quasi-binomial model). Where a comparison's own seeds vary more, their
variance counts. The degrees of freedom are half of those of all comparisons together, because comparisons share their
control, and at least those of the comparison's own seeds.

The interval covers what varies between seeds, and nothing else: not another cold start, teacher or task, which all
seeds share. With one seed it covers the test problems alone, and there is no p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
"""Number of draws of the bootstrap."""
LEVEL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Accuracy of one arm minus that of another over the seeds that both have."""

    seeds: int
    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    between: float
    """Variance of the mean that the differences of the seeds show; 0 with one seed."""
    within: float
    """Variance of the mean that the test problems alone give."""

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def compare_paired(left: Sequence[Sequence[bool]], right: Sequence[Sequence[bool]], seed: int = 0) -> Difference:
    """Return the difference of two arms. left, right: whether each problem was solved, by seed; seeds in one order.

    seed: of the bootstrap. Raises ValueError where the two have other numbers of seeds or problems.
    """
    pairs = [
        np.array([int(a) - int(b) for a, b in zip(one, other, strict=True)])
        for one, other in zip(left, right, strict=True)
    ]
    means = np.array([pair.mean() for pair in pairs])
    drawn = _bootstrap(pairs, np.random.default_rng(seed))
    low, high = np.percentile(drawn, [2.5, 97.5])
    count = len(pairs)
    return Difference(
        seeds=count,
        value=float(means.mean()),
        low=float(low),
        high=float(high),
        between=float(means.var(ddof=1)) / count if count > 1 else 0.0,
        within=sum(float(pair.var()) / len(pair) for pair in pairs) / count**2,
    )


def _bootstrap(pairs: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Return the means of the draws, float64 [DRAWS].

    The mean of a resampled seed depends on how many of its problems only one arm solves, which are two binomials.
    """
    sizes = np.array([len(pair) for pair in pairs])
    gained = np.array([(pair > 0).mean() for pair in pairs])
    lost = np.array([(pair < 0).mean() for pair in pairs])
    seeds = rng.integers(len(pairs), size=(DRAWS, len(pairs)))
    up = rng.binomial(sizes[seeds], gained[seeds])
    fraction = lost[seeds] / np.maximum(1.0 - gained[seeds], 1e-12)
    down = rng.binomial(sizes[seeds] - up, np.minimum(fraction, 1.0))
    means: np.ndarray = ((up - down) / sizes[seeds]).mean(axis=1)
    return means


def find_p_values(family: Sequence[Difference]) -> list[float | None]:
    """Return the p-value of every comparison of a family, not corrected; None for those with one seed."""
    several = [one for one in family if one.seeds > 1 and one.within > 0.0]
    freedom = sum(one.seeds - 1 for one in several)
    overdispersion = 1.0
    if several:
        ratios = sum((one.seeds - 1) * one.between / one.within for one in several)
        overdispersion = max(1.0, ratios / freedom)
    return [_find_p(one, overdispersion, freedom // 2) if one.seeds > 1 else None for one in family]


def _find_p(one: Difference, overdispersion: float, freedom: int) -> float:
    error = math.sqrt(max(overdispersion * one.within, one.between))
    if error == 0.0:
        return 0.0 if one.value else 1.0
    return student_p(one.value / error, max(freedom, one.seeds - 1))


def student_p(t: float, freedom: int) -> float:
    """Return the two-sided p-value of Student's t with a whole number of degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = 0.0
    for k in range(3 if freedom % 2 else 2, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    if freedom % 2:
        inside = 2.0 / math.pi * (angle + sine * total)
    else:
        inside = sine * total
    return max(0.0, 1.0 - inside)


def correct_holm(values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's corrected p-values (Scand. J. Stat. 6, 1979) over those that are there; None stays None."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * value))
        corrected[place] = largest
    return corrected
