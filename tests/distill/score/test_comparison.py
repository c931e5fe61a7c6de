"""Comparison of criteria, against Spearman's definition by hand, and its page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genssd.distill.score.comparison import compare, describe, rank_correlation
from genssd.distill.score.controls import compute_controls
from genssd.distill.score.page import render_page
from genssd.distill.score.rank_statistics import mean_ranks


def row(prompt: str, tokens: int, teacher: str = "A", correct: bool | None = None, steps: int = 2) -> dict[str, Any]:
    return {
        "prompt": prompt, "tokens": tokens, "steps": steps, "teacher": teacher, "correct": correct, "finished": True,
    }  # fmt: skip


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_equal_values_have_the_mean_of_their_ranks(values: list[int]) -> None:
    ordered = sorted(values)
    expected = [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]
    assert mean_ranks(np.array(values, dtype=np.float64)).tolist() == expected


def test_rank_correlation_is_spearmans() -> None:
    a, b = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([5.0, 6.0, 7.0, 8.0, 7.0])
    matrix = rank_correlation(np.array([a, b, -a, np.ones(5)]))
    assert matrix[0, 1] == pytest.approx(0.8207826816681233)  # textbook example
    assert matrix[0, 2] == pytest.approx(-1.0)
    assert np.isnan(matrix[0, 3])


def test_a_set_is_described() -> None:
    picked = describe("x", [row("p", 10, "A", True), row("q", 20, "B", False), row("r", 30, "B")])
    assert (picked.responses, picked.tokens, picked.steps, picked.tokens_per_step) == (3, 20.0, 2.0, 10.0)
    assert picked.correct == 0.5
    assert picked.teachers == {"A": pytest.approx(1 / 3), "B": pytest.approx(2 / 3)}
    assert describe("none", []).correct is None


@pytest.mark.plots
def test_criteria_are_compared_and_drawn() -> None:
    rows = [row("p", 5), row("p", 9, "B"), row("p", 7), row("q", 3), row("q", 4, "<b>"), row("r", 8)]
    columns = {"short": [5.0, 9.0, 7.0, 3.0, 4.0, 8.0], "long": [5.0, 9.0, 7.0, 3.0, 4.0, 8.0]}
    picks = {"short": [0, 3, 5], "long": [1, 4, 5]}
    comparison = compare(rows, columns, {"short": False, "long": True}, picks, ["p", "q"], picks["short"])
    assert comparison.correlation[0, 1] == pytest.approx(-1.0)
    assert comparison.correlation_within_prompts[0, 1] == pytest.approx(-1.0)
    assert comparison.agreement.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert [p.tokens for p in comparison.picked] == [pytest.approx(16 / 3), pytest.approx(7.0)]
    page = render_page(
        comparison,
        compute_controls(rows, columns, {"short": False, "long": True}, equal_length=0.1),
        rows,
        picks,
        {},
        "student",
    )
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


@pytest.mark.plots
def test_no_choice_at_all_is_drawn_too() -> None:
    rows = [row("p", 5)]
    comparison = compare(rows, {"ppl": [1.0]}, {"ppl": False}, {"ppl": []}, [], [])
    assert np.isnan(comparison.agreement).all()
    assert "ppl" in render_page(
        comparison, compute_controls(rows, {"ppl": [1.0]}, {"ppl": False}, equal_length=0.1), rows, {"ppl": []}, {}, "s"
    )
