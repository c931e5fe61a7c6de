"""Values and foreign errors as parts of a one-line message."""

from __future__ import annotations

import re
import reprlib

MAX_ERROR = 400
"""Maximum number of characters of another library's error in a message."""

LISTED = re.compile(r"\n(?=  )")
"""Beginning of a line that lists something, such as a row that cannot be used."""
MAX_LINE = 1500
"""Maximum number of characters in a line of a message."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlong = 40
_short.maxlevel = 3


def quote(value: object) -> str:
    """Return the repr of a value, shortened in the middle where it is long or deep."""
    return _short.repr(value)


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line, cut where it is long; the name of its class where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."


def make_printable(message: str) -> str:
    """Return a message without control characters, which have their escapes; long lines are cut in the middle.

    Only lines that are indented, those of a list, stay lines of their own: the name of a file may hold a newline.
    """
    lines = []
    for line in LISTED.split(message):
        text = line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
        half = MAX_LINE // 2
        lines.append(text if len(text) <= MAX_LINE else f"{text[:half]}...{text[-half:]}")
    return "\n".join(lines)
