"""Lines of a text stream, each bounded in size before anything else looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from genssd.engine.common.errors import InputError

MAX_LINE_BYTES = 32 << 20
"""Maximum size of a line, and of a row of a table as JSON."""
LINE_TOO_LONG = f"a line of more than {MAX_LINE_BYTES >> 20} MiB, the limit; shorten it, or leave it out"

BOM = b"\xef\xbb\xbf"


def iter_lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield every line with its number, from 1, and with its end of line; the first one without a byte order mark.

    Raises InputError naming file and line on a line of more than MAX_LINE_BYTES, of which it reads no more than that.
    """
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{name}, line {number}: {LINE_TOO_LONG}")
        yield number, line.removeprefix(BOM) if number == 1 else line
