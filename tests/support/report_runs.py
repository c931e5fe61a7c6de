"""Small runs that the tests of `genssd report` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HOSTILE = "</script><img src=x onerror=alert(1)> \"' \u202e abc \u2066 & &amp; \U0001f600"
QUESTIONS = [
    {"question": "1+1?", "answer": "2"},
    {"question": HOSTILE, "answer": "</script>\u202e"},
    {"question": "3+3?", "answer": "6"},
]


@dataclass(frozen=True, slots=True)
class Runs:
    """Directories of finished runs."""

    select: Path
    """A search with a threshold, over QUESTIONS."""
    beam: Path
    """A search with a beam of 2 that draws what it keeps, over QUESTIONS."""
    generate: Path
    distill: Path
    """Rounds with a search, a training and evaluations."""
