"""Nodes in exponential windows, under a budget."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from genssd.distill.diagnose.placement import (
    count_affordable,
    find_window,
    interleave_rollouts,
    place_nodes,
    split_windows,
)


def test_windows_double() -> None:
    assert split_windows(0) == []
    assert [list(window) for window in split_windows(9)] == [[0], [1, 2], [3, 4, 5, 6], [7, 8]]
    assert [find_window(t) for t in range(9)] == [0, 1, 1, 2, 2, 2, 2, 3, 3]


@given(st.integers(0, 400), st.integers(1, 5), st.integers(0, 9))
def test_every_window_gets_the_same_number_of_nodes(length: int, per_window: int, seed: int) -> None:
    placed = place_nodes(length, per_window, np.random.default_rng(seed))
    assert len(set(placed)) == len(placed)
    assert all(0 <= t < length for t in placed)
    assert Counter(map(find_window, placed)) == Counter(
        {w: min(per_window, len(window)) for w, window in enumerate(split_windows(length)) if len(window)}
    )
    # the first node of every window comes before the second one of any
    turns = [Counter(map(find_window, placed[: i + 1]))[find_window(t)] for i, t in enumerate(placed)]
    assert turns == sorted(turns)
    assert placed == place_nodes(length, per_window, np.random.default_rng(seed))


def test_places_are_uniform_within_a_window() -> None:
    counts = Counter(
        t for seed in range(4000) for t in place_nodes(8, 1, np.random.default_rng(seed)) if find_window(t) == 2
    )
    assert sorted(counts) == [3, 4, 5, 6]
    assert all(abs(count - 1000) < 4.5 * np.sqrt(750) for count in counts.values())
    first = Counter(find_window(place_nodes(255, 1, np.random.default_rng(seed))[0]) for seed in range(4000))
    assert all(abs(first[w] - 500) < 4.5 * np.sqrt(437.5) for w in range(8)), "no depth comes before the others"


@given(st.lists(st.integers(0, 50)), st.integers(1, 200))
def test_the_budget_is_never_exceeded(costs: list[int], budget: int) -> None:
    count = count_affordable(costs, budget)
    assert sum(costs[:count]) <= budget
    assert count == len(costs) or sum(costs[: count + 1]) > budget


def test_rollouts_take_turns() -> None:
    assert interleave_rollouts([[5, 1], [], [0, 2, 7]]) == [(0, 5), (2, 0), (0, 1), (2, 2), (2, 7)]
