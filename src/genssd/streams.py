"""Standard output and error of the command line, where they are closed, full, or read by nobody."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import IO


def open_standard_streams() -> None:
    """Open what is closed of standard input, output and error on the null device, and let them take any character.

    Otherwise the first files that the command opens would take their descriptors, and what libraries print with them.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
        with suppress(AttributeError):  # what the stream cannot encode is escaped
            getattr(sys, name).reconfigure(errors="backslashreplace")


def print_error(message: str) -> None:
    """Print one line on standard error, if anybody can still read it."""
    with suppress(OSError, ValueError):
        print(f"genssd: {message}", file=sys.stderr, flush=True)


def discard(stream: IO[str]) -> None:
    """Send what is still in the buffer of a stream nowhere: writing it again when the process ends would fail again."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
