"""Whether a response is finished, as the fields of its row state it.

    {"status": "finished" | "length" | "budget" | "pruned"}     rows of genssd
    {"finish_reason" | "stop_reason": "stop" | "length" | ...}  replies of inference servers
    {"is_reasoning_complete" | "finished": true | false}        data sets; {"truncated": ...} is the opposite

Rows with several responses have lists: "finish_reasons": ["stop", null], "is_reasoning_complete": [true, false].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError

REASON_FIELDS = ("finish_reason", "finish_reasons")
STOP_FIELDS = ("stop_reason", "stop_reasons")
"""Like REASON_FIELDS; but vLLM writes the stop string or the stop token here, which state nothing."""
COMPLETE_FIELDS = ("is_reasoning_complete", "is_complete", "is_finished", "finished")
CUT_FIELDS = ("truncated", "is_truncated")
ENDING_FIELDS = (*REASON_FIELDS, *STOP_FIELDS, *COMPLETE_FIELDS, *CUT_FIELDS)

FINISHED_REASONS = frozenset(
    [
        "stop",
        "eos",
        "eos_token",
        "end_turn",
        "stop_sequence",
        "tool_calls",
        "tool_use",
        "function_call",
        "finished",
        "complete",
        "completed",
    ]
)
CUT_REASONS = frozenset(
    [
        "length",
        "max_tokens",
        "max_length",
        "max_new_tokens",
        "model_length",
        "abort",
        "aborted",
        "cancelled",
        "error",
        "timeout",
        "content_filter",
        "safety",
        "incomplete",
        "budget",
        "pruned",
        "repetition",
    ]
)


def is_finished(fields: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a row states that its response is finished; None where no field states it.

    A response is cut off if any field states it. Raises InputError naming `where` and the field on an unknown value.
    """
    if isinstance(fields.get("status"), str):
        return bool(fields["status"] == "finished")
    statements = [_read_statement(name, fields[name], where) for name in ENDING_FIELDS if fields.get(name) is not None]
    known = [finished for finished in statements if finished is not None]
    return all(known) if known else None


def select_endings(fields: Mapping[str, Any], index: int, count: int, where: str) -> dict[str, Any]:
    """Return the ending fields of response `index` of a row that has `count` responses.

    Raises InputError naming `where` and the field on a list of another length.
    """
    selected = {}
    for name in ENDING_FIELDS:
        value = fields.get(name)
        if isinstance(value, list):
            if len(value) != count:
                raise InputError(
                    f"{where}: {format_count(count, 'response')} but {format_count(len(value), 'value')} of {name}"
                )
            value = value[index]
        if value is not None:
            selected[name] = value
    return selected


def _read_statement(name: str, value: object, where: str) -> bool | None:
    if isinstance(value, list):
        if len(value) != 1:
            raise InputError(f"{where}: {name} must have one value for the row's one response, not {len(value)}")
        (value,) = value
    if value is None:
        return None
    if name in COMPLETE_FIELDS or name in CUT_FIELDS:
        if not isinstance(value, bool):
            raise InputError(f"{where}: {name} must be true or false, not {value!r}")
        return value is (name in COMPLETE_FIELDS)
    reason = value.lower() if isinstance(value, str) else None
    if reason in FINISHED_REASONS or reason in CUT_REASONS:
        return reason in FINISHED_REASONS
    if name in STOP_FIELDS:
        return None
    raise InputError(
        f"{where}: {name} {value!r} is unknown; known are {', '.join(sorted(FINISHED_REASONS | CUT_REASONS))}"
    )
