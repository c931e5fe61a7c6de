"""Fractions of correct responses and their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A fraction or a mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def wilson(outcomes: Sequence[bool], z: float = 1.96) -> Estimate:
    """Return the fraction of successes with Wilson's score interval (1927)."""
    n, p = len(outcomes), sum(outcomes) / len(outcomes)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(value=p, low=max(0.0, centre - half), high=min(1.0, centre + half))


def bootstrap(values: Sequence[float], seed: int) -> Estimate:
    """Return the mean with its percentile bootstrap interval over the given values."""
    sample = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(sample), (BOOTSTRAP_DRAWS, len(sample)))
    low, high = np.percentile(sample[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(value=float(sample.mean()), low=float(low), high=float(high))
