"""Intervals of fractions: formulas, borders, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genssd.distill.answers.intervals import Estimate, paired_difference, wilson, wilson_of_groups


def test_wilson_against_its_formula() -> None:
    # solving (p - x)^2 = z^2 x (1 - x) / n for x gives both ends
    n, k, z = 50, 9, 1.96
    estimate = wilson([True] * k + [False] * (n - k))
    p = k / n
    roots = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])
    assert (estimate.low, estimate.high) == pytest.approx(tuple(sorted(roots)))
    assert wilson([False] * 10).low == 0.0
    assert wilson([True] * 10).high == 1.0


def test_one_outcome_in_each_group_is_wilson() -> None:
    outcomes = [True] * 9 + [False] * 41
    assert wilson_of_groups([[outcome] for outcome in outcomes]) == wilson(outcomes)


@pytest.mark.parametrize("k", [2, 8, 64])
def test_equal_outcomes_have_the_interval_of_as_many_groups(k: int) -> None:
    """All samples wrong: they may be wrong together, so that only the problems count. 3.84 / (n + 3.84) is Wilson's."""
    nothing, everything = wilson_of_groups([[False] * k] * 100), wilson_of_groups([[True] * k] * 100)
    assert (nothing.value, nothing.low) == (everything.value - 1.0, 0.0)
    assert nothing.high == pytest.approx(1.96**2 / (100 + 1.96**2)) == pytest.approx(0.037, abs=1e-4)
    assert everything.low == pytest.approx(1.0 - nothing.high)
    assert everything.high == 1.0
    # one right sample more changes the interval a little, not by a factor of k
    almost = wilson_of_groups([[True] + [False] * (k - 1)] + [[False] * k] * 99)
    assert nothing.high < almost.high + 0.005 < nothing.high + 0.05


def test_samples_that_agree_count_once_and_independent_ones_as_many() -> None:
    agreeing = wilson_of_groups([[True] * 8] * 50 + [[False] * 8] * 50)
    assert agreeing == wilson([True] * 50 + [False] * 50)
    mixed = wilson_of_groups([[True] * 4 + [False] * 4] * 100)
    assert mixed.value == 0.5
    independent = wilson([True] * 400 + [False] * 400)
    assert mixed.high - mixed.low < 1.15 * (independent.high - independent.low)


@pytest.mark.parametrize(("p", "rho"), [(0.01, 0.6), (0.1, 0.1), (0.1, 0.8), (0.5, 0.4)])
def test_the_interval_holds_the_truth_about_95_times_in_100(p: float, rho: float) -> None:
    """Beta-binomial samples. A bootstrap over problems holds 1 % of successes in about half of the cases."""
    rng = np.random.default_rng(0)
    scale = (1 - rho) / rho
    held = 0
    for _ in range(400):
        rates = rng.beta(p * scale, (1 - p) * scale, 60)
        estimate = wilson_of_groups([list(rng.random(4) < rate) for rate in rates])
        held += estimate.low <= p <= estimate.high
    assert held >= 0.925 * 400


def test_paired_differences() -> None:
    estimate = paired_difference([True] * 30 + [False] * 10, [False] * 40)
    assert estimate.value == 0.75
    assert 0.55 < estimate.low < 0.75 < estimate.high < 0.9
    # two equal models: zero, with an interval. (b + 1) / (n + 2) = (c + 1) / (n + 2) = 1 / 42
    same = paired_difference([True] * 20 + [False] * 20, [True] * 20 + [False] * 20)
    half = 1.96 * math.sqrt(2 / 42 / 42)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, -half, half))
    assert paired_difference([True], [False]).high == 1.0


def test_an_estimate_prints_percent() -> None:
    assert str(Estimate(value=0.5, low=0.25, high=0.755)) == "50.0 % [25.0, 75.5]"
