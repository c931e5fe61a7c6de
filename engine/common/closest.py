"""The word that is closest to one that is not known, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the known word that is closest to it; empty without one."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def suggest_or_list(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the known word that is closest to it, or all of them."""
    names = list(known)
    return suggest(word, names) or f"; known: {', '.join(names)}"
