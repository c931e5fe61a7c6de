"""Intervals and p-values of comparisons, beside numerical integration, explicit resampling and known examples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genssd.distill.reproduce import statistics
from genssd.distill.reproduce.statistics import compare_paired, correct_holm, find_p_values, student_p


def integrate_tails(t: float, freedom: int) -> float:
    """The two-sided p-value by the midpoint rule over x = tan(angle), where the density's tails are short."""
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    angles = np.linspace(math.atan(abs(t)), math.pi / 2, 200_001)
    middle = (angles[1:] + angles[:-1]) / 2
    density = constant * (1 + np.tan(middle) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(middle) ** 2
    return float(2 * density.sum() * (angles[1] - angles[0]))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10])
@pytest.mark.parametrize("t", [0.0, 0.3, -1.7, 2.776, 12.0])
def test_student_p_is_the_area_of_both_tails(t: float, freedom: int) -> None:
    assert student_p(t, freedom) == pytest.approx(integrate_tails(t, freedom), abs=1e-7)


def test_holm_gives_the_textbook_example() -> None:
    corrected = correct_holm([0.01, None, 0.04, 0.03, 0.005])
    assert corrected[1] is None
    assert [p for p in corrected if p is not None] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert correct_holm([0.6, 0.9]) == [1.0, 1.0]


def draw(rng: np.random.Generator, accuracies: list[float], problems: int) -> list[list[bool]]:
    return [list(rng.random(problems) < accuracy) for accuracy in accuracies]


def test_the_bootstrap_is_that_of_explicit_draws() -> None:
    rng = np.random.default_rng(1)
    left, right = draw(rng, [0.5, 0.7, 0.6], 40), draw(rng, [0.4, 0.4, 0.5], 40)
    pairs = [np.array(a, dtype=int) - np.array(b, dtype=int) for a, b in zip(left, right, strict=True)]
    drawn = [
        np.mean([rng.choice(pairs[seed], size=40).mean() for seed in rng.integers(3, size=3)]) for _ in range(4000)
    ]
    difference = compare_paired(left, right)
    assert difference.value == pytest.approx(np.mean([pair.mean() for pair in pairs]))
    assert [difference.low, difference.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.03)


def test_one_seed_has_an_interval_over_problems_and_no_p() -> None:
    left, right = [[True] * 30 + [False] * 70], [[False] * 100]
    difference = compare_paired(left, right)
    assert (difference.seeds, difference.value) == (1, 0.3)
    assert find_p_values([difference]) == [None]
    assert [difference.low, difference.high] == pytest.approx([0.3 - 1.96 * 0.0458, 0.3 + 1.96 * 0.0458], abs=0.015)


@pytest.mark.parametrize(("spread", "least", "most"), [(0.0, 2, 25), (0.05, 6, 40)])
def test_without_an_effect_about_five_percent_are_significant(
    spread: float, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds may differ among themselves by more than their problems explain; 20 arms share a control."""
    monkeypatch.setattr(statistics, "DRAWS", 10)  # the p-value needs none
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(20):
        arms = [draw(rng, list(0.2 + spread * rng.standard_normal(5)), 100) for _ in range(21)]
        values = find_p_values([compare_paired(arm, arms[0]) for arm in arms[1:]])
        hits += sum(p is not None and p < 0.05 for p in values)
    assert least <= hits <= most  # of 400; five percent are 20


def test_an_effect_of_eight_points_is_seen_with_five_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 10)
    rng = np.random.default_rng(0)
    arms = [draw(rng, [0.12 if number == 1 else 0.04] * 5, 200) for number in range(21)]
    corrected = correct_holm(find_p_values([compare_paired(arm, arms[0]) for arm in arms[1:]]))
    assert corrected[0] is not None
    assert corrected[0] < 0.001
    assert all(p is not None and p > 0.05 for p in corrected[1:])


def test_seeds_of_one_comparison_that_vary_more_count() -> None:
    """Two of three seeds win and one loses by as much: not certain, whatever the other comparisons say."""
    steady = [compare_paired([[True] * 9 + [False]] * 3, [[True] * 8 + [False] * 2] * 3)] * 9
    wild = compare_paired([[True] * 10] * 2 + [[False] * 10], [[True, False] * 5] * 3)
    values = find_p_values([*steady, wild])
    assert values[-1] is not None
    assert values[-1] > 0.5


def test_equal_answers_are_no_difference_and_a_constant_one_is_certain() -> None:
    same = [[True, False]] * 3
    assert find_p_values([compare_paired(same, same)]) == [1.0]
    assert find_p_values([compare_paired([[True, True]] * 3, [[False, False]] * 3)]) == [0.0]
    with pytest.raises(ValueError, match="zip"):
        compare_paired(same, same[:2])
