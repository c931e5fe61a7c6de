r"""Line breaks in the values of flags: a shell hands on "\n" as a backslash and an n."""

from __future__ import annotations

import re
from collections.abc import Sequence

from genssd.engine.common.errors import InputError

FIELDS = ("stop", "until")
"""Last parts of the names of flags whose values are texts to be found in responses."""
ESCAPES = {"\\n": "\n", "\\r": "\r", "\\t": "\t"}
ESCAPE = re.compile(r"\\[nrt]")
IN_DOUBT = re.compile(r"\\[nrt][a-z]")
"""What may be a name of LaTeX as well, such as \\nabla or \\text."""


def read_escapes(words: Sequence[str]) -> list[str]:
    r"""Return typed words in which \n, \r and \t in the texts of FIELDS are the characters.

    Raises InputError on one that may be the beginning of a name of LaTeX.
    """
    read, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            read.append(f"{flag}={_read(flag, value)}" if equals else word)
        else:
            read.append(_read(flag, word))
    return read


def _read(flag: str, value: str) -> str:
    if flag.removeprefix("--").rpartition(".")[2] not in FIELDS:
        return value
    if (doubt := IN_DOUBT.search(value)) is not None:
        raise InputError(
            f"{flag} {value!r}: {doubt[0][:2]} may be a character or the beginning of a name of LaTeX: type "
            f"$'{value}' for the character, or give the text in a --config file"
        )
    return ESCAPE.sub(lambda found: ESCAPES[found[0]], value)
