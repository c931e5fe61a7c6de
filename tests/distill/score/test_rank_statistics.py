"""Rank statistics against brute force from their definitions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genssd.distill.score import rank_statistics
from genssd.distill.score.rank_statistics import (
    Floats,
    RankMoments,
    count_wins,
    explained_by_label,
    list_pairs,
    rank_over_pool,
    rank_within,
    resample_sums,
)


def make_pool(seed: int, prompts: int = 14) -> tuple[Floats, list[list[int]]]:
    """Return three variables of responses, with ties and an infinity, and the responses of every prompt."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(2, 6, size=prompts)
    ends = np.cumsum(sizes)
    order = generator.permutation(ends[-1])  # the responses of a prompt need not be next to each other
    groups = [sorted(order[end - size : end].tolist()) for size, end in zip(sizes, ends, strict=True)]
    values = generator.integers(0, 6, size=(3, ends[-1])).astype(np.float64)
    values[1] += 0.8 * values[0]
    values[2] += values[0]
    values[0, 0] = math.inf
    return values, groups


def rank_by_hand(values: list[float]) -> list[float]:
    """Return centred mean ranks over the number of the others."""
    ranks = [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]
    return [rank / (len(values) - 1) - 0.5 for rank in ranks]


def pearson(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    cov = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return cov / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


@pytest.mark.parametrize("seed", range(3))
def test_correlations_within_prompts_are_those_of_ranks_made_by_hand(seed: int) -> None:
    values, groups = make_pool(seed)
    ranks: list[list[float]] = [[], [], []]
    for members in groups:
        for row, value in zip(ranks, values, strict=True):
            row += rank_by_hand([float(value[i]) for i in members])
    moments = RankMoments(rank_within(values, groups), groups)
    for a, b in itertools.combinations(range(3), 2):
        ours = moments.correlate(a, b)
        assert ours is not None
        assert ours.value == pytest.approx(pearson(ranks[a], ranks[b]), abs=1e-12)
        assert ours.number == len(groups)
    # the partial correlation by its other definition: what is left of both after a straight line in the third
    z = np.column_stack((ranks[2], np.ones(len(ranks[2]))))
    left = [np.array(ranks[k]) - z @ np.linalg.lstsq(z, np.array(ranks[k]), rcond=None)[0] for k in (0, 1)]
    partial = moments.correlate_given(0, 1, 2)
    assert partial is not None
    assert partial.value == pytest.approx(pearson(left[0].tolist(), left[1].tolist()), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_correlation_over_the_pool_is_spearmans(seed: int) -> None:
    values, groups = make_pool(seed)
    moments = RankMoments(rank_over_pool(values), groups)
    ours = moments.correlate(0, 1)
    assert ours is not None
    x, y = (rank_by_hand(row.tolist()) for row in values[:2])
    assert ours.value == pytest.approx(pearson(x, y), abs=1e-12)


def test_an_interval_is_that_of_correlations_over_resampled_prompts() -> None:
    values, groups = make_pool(5)
    ours = RankMoments(rank_within(values, groups), groups).correlate(0, 1)
    assert ours is not None
    ranks = [
        {i: r for i, r in zip(m, rank_by_hand([float(v[i]) for i in m]), strict=True)} for v in values for m in groups
    ]
    by_prompt = [(ranks[p], ranks[len(groups) + p]) for p in range(len(groups))]
    generator = np.random.default_rng(99)
    drawn = []
    for _ in range(4000):
        chosen = [by_prompt[p] for p in generator.integers(0, len(groups), size=len(groups))]
        x = [value for first, _ in chosen for value in first.values()]
        y = [value for _, second in chosen for value in second.values()]
        drawn.append(pearson(x, y))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (ours.low, ours.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert ours.low < ours.value < ours.high


def test_independent_variables_are_covered_as_often_as_an_interval_says() -> None:
    """95 % intervals of 40 prompts without any relation hold 0 in about 95 % of 60 trials."""
    generator, held = np.random.default_rng(3), 0
    groups = [list(range(4 * p, 4 * p + 4)) for p in range(40)]
    for _ in range(60):
        estimate = RankMoments(rank_within(generator.normal(size=(2, 160)), groups), groups).correlate(0, 1)
        assert estimate is not None
        held += not estimate.excludes(0.0)
    assert 52 <= held <= 60


def test_what_is_not_defined_is_none() -> None:
    values, groups = make_pool(1)
    values[1] = 4.0
    moments = RankMoments(rank_within(values, groups), groups)
    assert moments.correlate(0, 1) is None, "constant"
    assert moments.correlate_given(0, 1, 2) is None
    assert moments.correlate_given(0, 2, 2) is None, "determined by the third"
    few = groups[: rank_statistics.MIN_PROMPTS - 1]
    assert RankMoments(rank_within(values, few), few).correlate(0, 2) is None
    assert RankMoments(rank_within(np.zeros((2, 0)), []), []).correlate(0, 1) is None


def test_eta_squared_is_between_over_total() -> None:
    """Ten prompts with two responses of each of three teachers: sums of squares by hand."""
    generator = np.random.default_rng(2)
    groups = [list(range(6 * p, 6 * p + 6)) for p in range(10)]
    labels = ["A", "B", "C"] * 20
    values = generator.normal(size=60) + np.array([0.0, 0.7, 1.0] * 20)
    (ranks,) = rank_within(values[None], groups)
    between = sum(20 * np.mean([ranks[i] for i in range(60) if labels[i] == name]) ** 2 for name in "ABC")
    ours, constant = explained_by_label(np.stack((ranks, np.zeros(60))), labels, groups)
    assert ours == pytest.approx(between / float((ranks**2).sum()), abs=1e-12)
    assert constant is None
    assert explained_by_label(ranks[None], ["A"] * 60, groups) == [None], "one teacher"


def test_eta_squared_by_chance_is_what_the_table_says() -> None:
    generator = np.random.default_rng(8)
    groups = [list(range(4 * p, 4 * p + 4)) for p in range(30)]
    found = []
    for _ in range(100):
        labels = ["A", "A", "B", "C"] * 30
        (explained,) = explained_by_label(rank_within(generator.normal(size=(1, 120)), groups), labels, groups)
        assert explained is not None
        found.append(explained)
    assert np.mean(found) == pytest.approx(2 / 90, rel=0.2)


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=9, max_size=18), st.data())
@settings(max_examples=60, deadline=None)
def test_wins_are_counted_pair_by_pair(shape: list[list[int]], data: st.DataObject) -> None:
    values = np.array([float(v) for members in shape for v in members])
    right = np.array(data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(values), max_size=len(values))))
    lengths = np.array(data.draw(st.lists(st.integers(0, 30), min_size=len(values), max_size=len(values))), dtype=float)
    starts = np.cumsum([0, *map(len, shape)])
    groups = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    wins, equal_wins = [], []
    for members in groups:
        for i in members:
            for j in members:
                if right[i] > right[j]:
                    win = 1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0
                    wins.append(win)
                    if abs(lengths[i] - lengths[j]) <= 0.2 * max(lengths[i], lengths[j]):
                        equal_wins.append(win)
    pairs = list_pairs(groups).with_larger_first(right)
    assert len(pairs) == len(wins)
    equal = pairs.where(pairs.length_differences(lengths) <= 0.2)
    for chosen, expected in ((pairs, wins), (equal, equal_wins)):
        ours, opposite = count_wins(np.stack((values, -values)), chosen)
        if len(expected) < rank_statistics.MIN_PAIRS or len(set(chosen.prompt)) < rank_statistics.MIN_PROMPTS:
            assert ours is None
        else:
            assert ours is not None
            assert (ours.value, ours.number) == (pytest.approx(sum(expected) / len(expected)), len(expected))
            assert ours.low <= ours.value <= ours.high
            assert opposite is not None
            assert opposite.value == pytest.approx(1.0 - ours.value)


def test_sums_are_resampled_over_prompts() -> None:
    table = np.random.default_rng(0).normal(size=(25, 2, 3))
    sums = resample_sums(table, seed=0)
    assert sums.shape == (rank_statistics.DRAWS, 2, 3)
    assert sums.mean(0) == pytest.approx(table.sum(0), abs=0.6)
    assert sums.std(0) == pytest.approx(np.sqrt(25) * table.std(0), rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 70])
def test_ranks_of_any_number_of_responses(size: int) -> None:
    """Small prompts are ranked together, large ones one by one."""
    generator = np.random.default_rng(size)
    values = generator.integers(0, 9, size=(2, 3 * size)).astype(np.float64)
    values[0, 0], values[1, -1] = -math.inf, math.inf
    groups = [list(range(k, 3 * size, 3)) for k in range(3)]
    ranks = rank_within(values, groups)
    for row, of_row in zip(values, ranks, strict=True):
        for members in groups:
            expected = rank_by_hand([float(row[i]) for i in members]) if size > 1 else [0.0]
            assert of_row[members].tolist() == pytest.approx(expected, abs=1e-12)
