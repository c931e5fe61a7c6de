"""Standard input and pipes as data files: read once to a temporary file, which every later reading opens again."""

from __future__ import annotations

import os
import re
import stat
import tempfile
import time
from functools import cache
from typing import IO, BinaryIO

from genssd.distill.files.lines import LINE_TOO_LONG, MAX_LINE_BYTES
from genssd.engine.common.errors import InputError

STANDARD_INPUT = "-"
WRITER_SECONDS = 5.0
"""How long a named pipe that no process has opened for writing is waited for."""
MAX_BYTES = 1 << 34
"""Maximum size of what a pipe may hold."""
COPY_BYTES = 1 << 20

OWN_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")
"""Names of descriptors that this process has open, such as that of the process substitution <(...)."""


def open_pipe(name: str) -> BinaryIO:
    """Return the content of standard input (`-`) or of a pipe, seekable.

    The first call of a process reads the pipe to its end. Raises InputError on a terminal, on a pipe that no process
    writes to, on one with more than 16 GiB, and in a process of several, of which each would read a part.
    """
    try:
        return open(_spool(name).name, "rb")
    except OSError as error:
        raise InputError(
            f"{describe(name)} cannot be read into a temporary file (in TMPDIR): {error.strerror}"
        ) from None


def describe(name: str) -> str:
    """Return the name of a data file as messages show it."""
    return "standard input" if name == STANDARD_INPUT else name


@cache
def _spool(name: str) -> IO[bytes]:
    """Copy a pipe to a temporary file, which is removed when the process ends."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"{describe(name)} can be read by one process only; under torchrun, name a file")
    descriptor, piece = _open_descriptor(name)
    copy = tempfile.NamedTemporaryFile(prefix="genssd-pipe-")  # noqa: SIM115 - open until the end
    with open(descriptor, "rb", buffering=0) as stream:
        size = line_size = 0
        while piece := piece or stream.read(COPY_BYTES):
            size += len(piece)
            newline = piece.rfind(b"\n")
            line_size = line_size + len(piece) if newline < 0 else len(piece) - newline - 1
            if line_size > MAX_LINE_BYTES:  # /dev/zero; in a compressed file so many bytes hold a newline
                raise InputError(f"{describe(name)}: {LINE_TOO_LONG}")
            if size > MAX_BYTES:
                raise InputError(f"{describe(name)} holds more than {MAX_BYTES >> 30} GiB; save its content to a file")
            copy.write(piece)
            piece = b""
    copy.flush()
    return copy


def _open_descriptor(name: str) -> tuple[int, bytes]:
    """Return a descriptor of a pipe from which reads block, and the bytes that were read from it already."""
    match = OWN_DESCRIPTOR.fullmatch(name)
    if match is None and name not in (STANDARD_INPUT, "/dev/stdin"):
        return _open_named_pipe(name)
    descriptor = os.dup(int(match[1]) if match else 0)
    mode = os.fstat(descriptor).st_mode
    if os.isatty(descriptor) or stat.S_ISDIR(mode):
        os.close(descriptor)
        kind = "directory" if stat.S_ISDIR(mode) else "terminal"
        raise InputError(f"{describe(name)} is a {kind}: pipe rows into the command, or name a file")
    return descriptor, b""


def _open_named_pipe(name: str) -> tuple[int, bytes]:
    """Open a named pipe at once; then wait until a process writes to it, or until WRITER_SECONDS are over."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK)
    deadline = time.monotonic() + WRITER_SECONDS
    first = b""
    try:
        while not first:
            try:
                first = os.read(descriptor, COPY_BYTES)
            except BlockingIOError:  # a process has it open, and has written nothing yet
                break
            if not first and time.monotonic() > deadline:
                raise InputError(f"{name} is a pipe that no process writes to: none did for {WRITER_SECONDS:g} s")
            if not first:
                time.sleep(0.02)
    except BaseException:
        os.close(descriptor)
        raise
    os.set_blocking(descriptor, True)
    return descriptor, first
