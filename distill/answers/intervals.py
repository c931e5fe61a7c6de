"""95 % intervals of fractions: of right answers, of right samples of several problems, of a difference of two models.

All of them stay honest where nothing, or everything, was right: a bootstrap of equal values has the interval [x, x].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.96
"""Number of standard deviations of a normal distribution on each side that hold 95 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A fraction or a mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(outcomes: Sequence[bool]) -> Estimate:
    """Return the fraction of successes with Wilson's score interval (1927)."""
    return _wilson(sum(outcomes) / len(outcomes), len(outcomes))


def wilson_of_groups(groups: Sequence[Sequence[bool]]) -> Estimate:
    """Return the mean fraction of successes of several groups, such as the samples of problems, with its interval.

    This is Wilson's interval with the effective number of outcomes in place of their number, which studies of clustered
    proportions recommend (Franco, Little, Louis and Slud, J. Surv. Stat. Methodol. 7, 2019): with k outcomes in each
    of n groups it is n k / (1 + (k - 1) rho). rho, the correlation of two outcomes of one group, comes from the
    analysis of variance. Two imagined groups, one of successes and one of failures, take part in it: without them rho
    is undefined where all outcomes are equal. There it is 1, so that only the groups count. The two are our choice.
    """
    fractions = np.array([sum(group) / len(group) for group in groups], dtype=float)
    size = sum(map(len, groups)) / len(groups)
    value = float(fractions.mean())
    if size <= 1.0:
        return _wilson(value, len(groups))
    augmented = np.concatenate([fractions, [0.0, 1.0]])
    between = size * float(((augmented - augmented.mean()) ** 2).sum()) / (len(augmented) - 1)
    within = size * float((augmented * (1.0 - augmented)).sum()) / (len(augmented) * (size - 1.0))
    rho = min(1.0, max(0.0, (between - within) / (between + (size - 1.0) * within)))
    return _wilson(value, len(groups) * size / (1.0 + (size - 1.0) * rho))


def paired_difference(left: Sequence[bool], right: Sequence[bool]) -> Estimate:
    """Return the fraction of successes of left minus that of right, over the same problems.

    The interval is that of Bonett and Price (J. Educ. Behav. Stat. 37, 2012): Wald's, after one imagined problem that
    left alone solves and one that right alone does.
    """
    n = len(left)
    only_left = sum(a and not b for a, b in zip(left, right, strict=True))
    only_right = sum(b and not a for a, b in zip(left, right, strict=True))
    p, q = (only_left + 1) / (n + 2), (only_right + 1) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Estimate(value=(only_left - only_right) / n, low=max(-1.0, p - q - half), high=min(1.0, p - q + half))


def _wilson(p: float, n: float) -> Estimate:
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)))
