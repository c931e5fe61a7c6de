"""The verdict that a training row carries on its own response, and which rows it leaves out.

`genssd select`, `generate`, `score` and `prefix` write it:

    {"correct": true | false | null, "undecided": reason | null}

`correct` is null where the problem has no reference answer. A response that could not be judged has a reason in
`undecided`, and is not correct.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from genssd.engine.common.errors import InputError

RowVerdict = Literal["correct", "wrong", "undecided", "no reference answer"]


def read_verdict(fields: Mapping[str, Any], text: bytes, where: str) -> RowVerdict | None:
    """Return the verdict of a row; None where it has none.

    fields: of the row, without those that are null. text: the row as JSON, in which they are. Raises InputError naming
    `where` on a value that is no verdict.
    """
    correct = fields.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise InputError(f"{where}: correct must be true, false or null, not {correct!r}")
    if fields.get("undecided"):
        return "undecided"
    if correct is None:
        return "no reference answer" if b'"correct"' in text and "correct" in json.loads(text) else None
    return "correct" if correct else "wrong"


def require_verdict(verdict: RowVerdict | None, where: str) -> RowVerdict:
    """Return the verdict. Raises InputError naming `where` and the remedy where the row has none."""
    if verdict is None:
        raise InputError(
            f"{where}: no field `correct`, which --require-correct reads: rows of `genssd select`, `generate`, `score` "
            "and `prefix` over problems with answers have it; judge these by `genssd score`, or leave the option out"
        )
    return verdict
