"""Which rows state that their response is finished."""

from __future__ import annotations

from typing import Any

import pytest

from genssd.distill.data.endings import is_finished, select_endings
from genssd.engine.common.errors import InputError


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"finish_reason": "stop"}, True),
        ({"finish_reason": "length"}, False),
        ({"finish_reasons": ["max_tokens"]}, False),
        ({"finish_reason": None}, None),
        ({"finish_reasons": [None]}, None),
        ({"stop_reason": "end_turn"}, True),
        ({"finish_reason": "stop", "stop_reason": 151645}, True),
        ({"is_reasoning_complete": False}, False),
        ({"is_reasoning_complete": True, "finish_reason": "length"}, False),
        ({"truncated": True}, False),
        ({"truncated": False}, True),
        ({"status": "finished"}, True),
        ({"status": "length"}, False),
    ],
)
def test_statements(fields: dict[str, Any], expected: bool | None) -> None:
    assert is_finished(fields, "row") is expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"finish_reason": "sdfg"}, "row: finish_reason 'sdfg' is unknown"),
        ({"finish_reason": 3}, "row: finish_reason 3 is unknown"),
        ({"is_reasoning_complete": "yes"}, "row: is_reasoning_complete must be true or false"),
        ({"finish_reasons": ["stop", "stop"]}, "row: finish_reasons must have one value"),
    ],
)
def test_statements_that_cannot_be_read(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        is_finished(fields, "row")


def test_each_response_has_its_own_statement() -> None:
    row = {"finish_reasons": ["stop", None], "is_reasoning_complete": [True, False], "truncated": False}
    assert select_endings(row, 0, 2, "row") == {
        "finish_reasons": "stop",
        "is_reasoning_complete": True,
        "truncated": False,
    }
    assert is_finished(select_endings(row, 1, 2, "row"), "row") is False
    with pytest.raises(InputError, match="row: 3 responses but 2 values of finish_reasons"):
        select_endings(row, 0, 3, "row")
