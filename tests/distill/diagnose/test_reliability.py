"""Variance, split halves, attenuation and the bootstrap, against simulation and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from support.exact_tree import ExactTree

from genssd.distill.diagnose.alignment import cosine, ideal_gradient, renormalise
from genssd.distill.diagnose.reliability import (
    Interval,
    disattenuate,
    draw_questions,
    full_reliability,
    gradient_variance,
    half_agreement,
    make_interval,
    pooled_mean,
    resample_means,
)

LOG_P = renormalise(np.array([0.3, 0.0, -0.5, -1.0]))
SUCCESS = np.array([0.8, 0.3, 0.5, 0.1])


def test_the_estimated_gradient_is_unbiased_and_its_variance_is_the_formulas() -> None:
    """Over many draws of R = 6 completions; the variance estimate is unbiased, too, though no draw knows Q."""
    random, completions, draws = np.random.default_rng(0), 6, 40_000
    rates = random.binomial(completions, SUCCESS, (draws, 4)) / completions
    gradients = np.array([ideal_gradient(LOG_P, rate) for rate in rates])
    exact = ideal_gradient(LOG_P, SUCCESS)
    error = gradients.std(0) / np.sqrt(draws)
    assert (np.abs(gradients.mean(0) - exact) < 4 * error).all()
    estimates = np.mean([gradient_variance(LOG_P, rate, completions) for rate in rates], axis=0)
    np.testing.assert_allclose(estimates, gradients.var(0), rtol=0.03)


def test_the_cosine_tends_to_1_as_rollouts_grow() -> None:
    """Q, V and g* of a tree of vocabulary 3 and depth 4, from draws of its own success rates."""
    random, tree = np.random.default_rng(1), ExactTree.random(3, 4, seed=3)
    nodes = [prefix for prefix in tree.nodes() if np.ptp(tree.success_after(prefix)) > 0.1]
    assert len(nodes) > 10
    means = []
    for completions in (4, 64, 4096):
        cosines = []
        for prefix in nodes:
            success = np.clip(tree.success_after(prefix), 0.0, 1.0)
            rate = random.binomial(completions, success) / completions
            estimate, exact = ideal_gradient(tree.log_p(prefix), rate), ideal_gradient(tree.log_p(prefix), success)
            cosines.append(cosine(estimate, exact) if estimate.any() else 0.0)
        means.append(np.mean(cosines))
    assert means[0] < means[1] < means[2]
    assert means[2] > 0.995


def test_halves_tell_how_much_the_noise_takes_away() -> None:
    """Split-half, Spearman and Brown: the corrected mean of cosines is near the one without noise."""
    random, completions = np.random.default_rng(2), 8
    plain, agreements, exact = [], [], []
    for _ in range(6000):
        log_p = renormalise(random.normal(size=8))
        success = random.random(8)
        ideal = ideal_gradient(log_p, success)
        direction = ideal / np.linalg.norm(ideal) + 0.35 * random.normal(size=8)
        first, second = random.binomial(completions // 2, success, (2, 8)) / (completions // 2)
        plain.append(cosine(ideal_gradient(log_p, (first + second) / 2), direction))
        agreements.append(half_agreement(log_p, first, second))
        exact.append(cosine(ideal, direction))
    corrected = disattenuate(np.array([np.mean(plain)]), np.array([np.mean(agreements)]))[0]
    assert np.mean(plain) < np.mean(exact) - 0.03, "the noise is felt"
    assert corrected == pytest.approx(np.mean(exact), abs=0.02)


def test_halves_that_see_nothing_agree_on_nothing() -> None:
    flat, other = np.full(4, 0.5), np.array([1.0, 0.0, 0.5, 0.5])
    assert half_agreement(LOG_P, flat, other) == 0.0 == half_agreement(LOG_P, other, flat)
    assert half_agreement(LOG_P, other, other) == pytest.approx(1.0)
    assert half_agreement(LOG_P, other, 1.0 - other) == pytest.approx(-1.0)
    np.testing.assert_allclose(full_reliability(np.array([0.5, 1.0])), [2 / 3, 1.0])
    assert np.isnan(full_reliability(np.array([0.0, -0.2, -1.0]))).all()
    assert np.isnan(disattenuate(np.array([0.3]), np.array([-0.1]))).all()
    np.testing.assert_allclose(disattenuate(np.array([0.3]), np.array([1.0])), [0.3])


def test_the_bootstrap_draws_questions_not_nodes() -> None:
    """With two questions of many equal nodes the interval is as wide as two values make it, not a hundred."""
    sums, counts = np.array([[99.0], [0.0]]), np.array([[99.0], [99.0]])
    draws = draw_questions(2, seed=0)
    assert draws.shape == (2000, 2)
    assert (draws.sum(1) == 2).all()
    estimate = make_interval(pooled_mean(sums, counts)[0], resample_means(draws, sums, counts)[:, 0])
    assert estimate == Interval(value=0.5, low=0.0, high=1.0)
    np.testing.assert_array_equal(draw_questions(2, seed=0), draws)
    assert str(Interval(value=0.123, low=-0.5, high=0.5)) == "+0.12 [-0.50, +0.50]"


def test_intervals_cover_the_true_mean_95_percent_of_the_time() -> None:
    """The questions have different effects, so their nodes are not independent."""
    random, covered = np.random.default_rng(4), 0
    draws = draw_questions(40, seed=1, draws=400)
    for _ in range(300):
        counts = random.integers(1, 9, (40, 1)).astype(float)
        sums = counts * random.normal(0.2, 1.0, (40, 1)) + np.sqrt(counts) * random.normal(0.0, 0.3, (40, 1))
        estimate = make_interval(0.0, resample_means(draws, sums, counts)[:, 0])
        covered += estimate.low <= 0.2 <= estimate.high
    assert 0.89 < covered / 300 < 0.985


def test_questions_without_nodes_are_no_zeros() -> None:
    sums, counts = np.array([[3.0], [0.0]]), np.array([[4.0], [0.0]])
    resampled = resample_means(np.array([[1.0, 1.0], [0.0, 2.0]]), sums, counts)[:, 0]
    assert resampled[0] == 0.75
    assert np.isnan(resampled[1])
    assert make_interval(0.75, resampled) == Interval(value=0.75, low=0.75, high=0.75)
    assert np.isnan(make_interval(np.nan, np.array([np.nan])).low)
