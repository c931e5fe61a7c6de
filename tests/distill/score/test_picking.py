"""Choice of responses: thresholds, best fractions, near-duplicates, mixtures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genssd.distill.score.pick_options import PickOptions
from genssd.distill.score.picking import pick_responses
from genssd.engine.criteria.learning_gain import Lark


def row(prompt: str, **fields: Any) -> dict[str, Any]:
    usual = {"teacher": "A", "tokens": 10, "steps": 2, "finished": True, "loop": False, "correct": None}
    return {"prompt": prompt, **usual, **fields}


@given(
    values=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=20),
    threshold=st.integers(-1, 9),
    higher=st.booleans(),
    keep=st.integers(1, 3),
)
def test_a_threshold_and_the_best_of_every_prompt(
    values: list[tuple[str, int]], threshold: int, higher: bool, keep: int
) -> None:
    rows, column = [row(prompt) for prompt, _ in values], [float(value) for _, value in values]
    chosen = pick_responses(rows, column, higher, PickOptions(keep=keep, threshold=threshold))
    expected = []
    for prompt in dict.fromkeys(prompt for prompt, _ in values):
        mine = [i for i, (p, v) in enumerate(values) if p == prompt and (v >= threshold if higher else v <= threshold)]
        expected += sorted(mine, key=lambda i: (-column[i] if higher else column[i], i))[:keep]
    assert chosen == expected


@given(column=st.lists(st.integers(0, 5), min_size=1, max_size=20), fraction=st.floats(0.01, 1.0))
def test_the_best_fraction_over_all_prompts(column: list[int], fraction: float) -> None:
    rows, values = [row(str(i)) for i in range(len(column))], list(map(float, column))
    chosen = pick_responses(rows, values, False, PickOptions(best_share=fraction))
    assert len(chosen) >= fraction * len(column) - 1e-6
    assert len(chosen) - 1 < fraction * len(column)
    rejected = [values[i] for i in range(len(column)) if i not in chosen]
    assert max(values[i] for i in chosen) <= min(rejected, default=9.0)
    assert chosen == sorted(chosen)


def test_near_duplicates_of_a_better_response_are_passed_over() -> None:
    texts = ["we add two and three to get five", "We add two and three to get FIVE", "count up from two", "a b", "a b"]
    rows, column = [row("p") for _ in texts], [2.0, 1.0, 3.0, 4.0, 5.0]
    assert pick_responses(rows, column, False, PickOptions(keep=4, similarity=0.9), texts.__getitem__) == [1, 2, 3]
    assert pick_responses(rows, column, False, PickOptions(keep=4)) == [1, 0, 2, 3]
    almost = ["one two three four five", "one two three four six"]  # triples: 2 of 4 in common
    assert pick_responses(
        [row("p")] * 2, [1.0, 2.0], False, PickOptions(keep=2, similarity=0.5), almost.__getitem__
    ) == [0, 1]
    assert pick_responses(
        [row("p")] * 2, [1.0, 2.0], False, PickOptions(keep=2, similarity=0.49), almost.__getitem__
    ) == [0]


@pytest.mark.parametrize("prompts", [1, 5, 50, 503])
def test_a_mixture_keeps_its_proportions(prompts: int) -> None:
    rows = [row(str(p), tokens=t) for p in range(prompts) for t in (30, 10, 20)]
    chosen = pick_responses(rows, [0.0] * len(rows), True, PickOptions(mix=("long=1", "short=4")))
    assert [rows[i]["prompt"] for i in chosen] == [str(p) for p in range(prompts)]
    tokens = [rows[i]["tokens"] for i in chosen]
    assert set(tokens) <= {30, 10}
    assert abs(tokens.count(30) - prompts / 5) <= 1


def test_a_mixture_of_teachers_takes_the_best_of_each_and_copes_with_gaps() -> None:
    rows = [row(str(p), teacher=t) for p in range(40) for t in ("big", "big", "small") if p < 30 or t == "small"]
    column = [float(i % 7) for i in range(len(rows))]
    chosen = pick_responses(rows, column, True, PickOptions(mix=("big=1", "small=1")))
    assert len(chosen) == 40
    teachers = [rows[i]["teacher"] for i in chosen]
    assert teachers.count("big") == 20  # those who answered everything make up for the gaps
    for i in chosen:
        same = [j for j, r in enumerate(rows) if (r["prompt"], r["teacher"]) == (rows[i]["prompt"], rows[i]["teacher"])]
        assert column[i] == max(column[j] for j in same)


def test_prompts_without_any_of_the_kinds_do_not_upset_a_mixture() -> None:
    rows = [row(str(p), teacher="third") for p in range(900)]
    rows += [row(f"x{p}", teacher=t) for p in range(100) for t in ("big", "small")]
    chosen = pick_responses(rows, [0.0] * len(rows), True, PickOptions(mix=("big=1", "small=4")))
    teachers = [rows[i]["teacher"] for i in chosen]
    assert (teachers.count("big"), teachers.count("small")) == (20, 80)


def test_of_equally_long_responses_the_better_is_the_long_one() -> None:
    rows = [row("p", tokens=9), row("p", tokens=9), row("p", tokens=3), row("p", tokens=3)]
    assert pick_responses(rows, [1.0, 2.0, 3.0, 4.0], True, PickOptions(mix=("long=1",))) == [1]
    assert pick_responses(rows, [1.0, 2.0, 3.0, 4.0], True, PickOptions(mix=("short=1",))) == [3]


def test_a_mixture_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = [row(str(p), tokens=t) for p in range(30) for t in (30, 10)]
    options = PickOptions(mix=("long=1", "short=1"))
    chosen = {(rows[i]["prompt"], rows[i]["tokens"]) for i in pick_responses(rows, [0.0] * 60, True, options)}
    turned = rows[::-1]
    assert {
        (turned[i]["prompt"], turned[i]["tokens"]) for i in pick_responses(turned, [0.0] * 60, True, options)
    } == chosen


def test_larks_weights_are_untouched_by_what_is_not_eligible() -> None:
    from genssd.distill.score.picking import compute_lark_weights

    rows = [row("p"), row("p", finished=False), row("p"), row("q")]
    weights = compute_lark_weights(rows, [1.0, 9.0, 3.0, 2.0], PickOptions(keep=1))
    assert weights == {0: 0.0, 2: 1.0, 3: 1.0}
    assert Lark.weights([1.0, 3.0], 1) == [0.0, 1.0]
    assert Lark.weights([1.0, -math.inf], 1) == [1.0, 0.0]
