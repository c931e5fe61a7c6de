"""Comparison of a response with the reference answer."""

from __future__ import annotations

import threading

import pytest

from genssd.distill.data.answers import is_correct


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("so \\boxed{42}", "42", True),
        ("so \\boxed{41}", "42", False),
        ("The answer is 72.", "72", True),
        ("\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True),
        ("\\boxed{0.5}", "1/2", True),
        ("", "1", False),
        ("\\boxed{1,000}", "1000", True),
        ("\\boxed{7}", None, False),
    ],
)
def test_answers_are_compared_as_mathematics(response: str, answer: str | None, expected: bool) -> None:
    assert is_correct(response, answer) is expected


def test_a_thread_that_takes_no_signal_judges_the_same() -> None:
    verdicts: list[bool] = []
    thread = threading.Thread(target=lambda: verdicts.extend(is_correct(f"so {x}", "1/2") for x in ("0.5", "0.4")))
    thread.start()
    thread.join()
    assert verdicts == [True, False]
