"""What a check of the doctor finds: a level, one line, details, and a fix. How it is shown is in console.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "error"]
"""ok: nothing stands in the way. warning: it runs, and the result may not be what is wanted. error: it cannot run."""
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")
"""The levels in the order of their exit codes: 0, 1 and 2."""
Mark = Literal["text", "control", "trained", "untrained"]
"""What a piece of a detail is: a sentence or plain text | a control token | tokens whose loss counts | tokens whose
loss does not."""
MAX_LISTED = 10
"""Maximum number of rows or tokens that a detail lists."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of a detail, and what it is."""

    text: str
    mark: Mark = "text"
    is_control: bool = False
    """Whether the text is the name of a control token, in a piece whose mark says something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    """Name of the check, such as "memory of the caches"."""
    level: Level
    line: str
    """What was found, in one line."""
    detail: tuple[Piece, ...] = ()
    """Values and examples that support the line; line breaks are part of the text."""
    fix: str | None = None
    """What to change; None where nothing has to be."""

    def as_json(self) -> dict[str, Any]:
        """Return the finding as an object of JSON; the detail is one text, and its pieces."""
        return {
            "name": self.name,
            "level": self.level,
            "line": self.line,
            "detail": join_pieces(self.detail),
            "pieces": [dataclasses.asdict(piece) for piece in self.detail],
            "fix": self.fix,
        }


def join_pieces(pieces: Sequence[Piece]) -> str:
    """Return the text of a detail without marks."""
    return "".join(piece.text for piece in pieces)


def list_lines(lines: Sequence[str], limit: int = MAX_LISTED) -> tuple[Piece, ...]:
    """Return a detail with a line for each text, and the number of those beyond the limit."""
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return (Piece("\n".join([*lines[:limit], *more])),) if lines else ()


def find_worst(findings: Sequence[Finding]) -> Level:
    """Return the worst level of some findings, ok where there are none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def count_levels(findings: Sequence[Finding]) -> dict[Level, int]:
    """Return how many findings have each level."""
    return {level: sum(finding.level == level for finding in findings) for level in LEVELS}
