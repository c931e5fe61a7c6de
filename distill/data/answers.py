"""The one judge of answers: whether a response gives the reference answer, compared as mathematics by math-verify."""

from __future__ import annotations

import logging
import threading

from math_verify import parse, verify

TIME_LIMIT = 5
"""Seconds that math-verify may take to read one text, and again to compare two."""


def is_correct(response: str, answer: str | None) -> bool:
    """Return whether math-verify finds the reference answer in the response; False where there is no answer."""
    if answer is None:
        return False
    # math-verify logs a warning for every text that holds no formula
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # its time limit is a signal, which only the main thread can take
    limit = TIME_LIMIT if threading.current_thread() is threading.main_thread() else None
    reference = parse(answer if "\\" in answer or "$" in answer else f"${answer}$", parsing_timeout=limit)
    prediction = parse(response, parsing_timeout=limit)
    return bool(reference) and bool(verify(reference, prediction, timeout_seconds=limit))
