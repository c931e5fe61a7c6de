"""Chat templates whose single steps are too large for a time limit to stop them: powers, and huge numbers."""

from __future__ import annotations

from collections.abc import Mapping

from jinja2 import Environment, TemplateError

LARGEST_NUMBER = 1_000_000
"""Largest number that may stand in a template."""


def find_huge_step(template: str | Mapping[str, str] | None) -> str | None:
    """Return the part of a chat template that one step of it could compute for ever; None where it has none.

    template: the text, or texts by name. Only its words are read, so that tags of extensions do not matter; one that
    cannot be read has no such part, and rendering it names the error.
    """
    texts = template.values() if isinstance(template, Mapping) else (template or "",)
    for text in texts:
        try:
            words = list(Environment().lex(str(text)))
        except TemplateError:
            continue
        for line, kind, word in words:
            if kind == "operator" and word == "**":
                return f"a power in line {line}"
            if kind in ("integer", "float") and _parse_number(word) > LARGEST_NUMBER:
                return f"a number above {LARGEST_NUMBER} in line {line}"
    return None


def _parse_number(word: str) -> float:
    """Return the value of a number in a template; infinity where Python has none for it."""
    try:
        return float(int(word, 0)) if word[:1] == "0" and len(word) > 1 else float(word)
    except (ValueError, OverflowError):
        return float("inf") if len(word) > 7 else 0.0
