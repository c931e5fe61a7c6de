"""Counts of verdicts, and the interval that belongs to them."""

from __future__ import annotations

from typing import Any

import pytest

from genssd.distill.answers.accuracy import describe_verdict, measure_accuracy
from genssd.distill.answers.forms import CORRECT, WRONG, undecidable
from genssd.distill.answers.intervals import wilson

RIGHT, BAD, UNCLEAR, UNKNOWN = map(describe_verdict, (CORRECT, WRONG, undecidable("too long"), None))


def test_a_row_says_what_is_known() -> None:
    assert RIGHT == {"correct": True, "undecided": None}
    assert BAD == {"correct": False, "undecided": None}
    assert UNCLEAR == {"correct": None, "undecided": "too long"}
    assert UNKNOWN == {"correct": None, "undecided": None}


def test_undecided_responses_are_not_correct_and_unknown_ones_do_not_count() -> None:
    accuracy = measure_accuracy([[RIGHT], [BAD], [UNCLEAR], [UNKNOWN]])
    assert (accuracy.correct, accuracy.wrong, accuracy.undecided, accuracy.judged) == (1, 1, 1, 3)
    assert accuracy.estimate == wilson([True, False, False])
    nothing = measure_accuracy([[UNKNOWN, UNKNOWN], []])
    assert (nothing.estimate, nothing.judged) == (None, 0)
    assert nothing.as_json() == {"accuracy": None, "correct": 0, "wrong": 0, "undecided": 0}


def test_several_responses_to_a_prompt_are_averaged_over_prompts() -> None:
    groups: list[list[dict[str, Any]]] = [[RIGHT, RIGHT, BAD, BAD], [RIGHT], [BAD, UNCLEAR]]
    accuracy = measure_accuracy(groups)
    assert (accuracy.correct, accuracy.wrong, accuracy.undecided) == (3, 3, 1)
    assert accuracy.estimate is not None
    assert accuracy.estimate.value == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert accuracy.estimate.low < 0.5 < accuracy.estimate.high
