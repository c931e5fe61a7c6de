"""Every write of a command to its output directory: whole files, replaced in one step, and files that grow.

What a function of this file has written is on disk when it returns, together with the entry of the file in its
directory: it survives a loss of power. A write that the disk refuses raises InputError in one line, and leaves what was
there before: a file that is replaced keeps its old content, a file that grows ends after the last complete append.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from genssd.engine.common.errors import InputError

TEMPORARY = ".tmp"
"""Ending of the name under which a file is written before it replaces the one with its own name."""
WRITTEN = (".json", ".jsonl", ".txt", ".html", ".md", ".bin")
"""Endings of the names of files that commands write as a whole."""
BUFFER_BYTES = 1 << 20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of file systems that cannot sync a directory."""


@contextmanager
def name_failure(path: Path, kept: str = "") -> Iterator[None]:
    """Turn an OSError of the block into an InputError that names the path. kept: what is still there, if anything."""
    try:
        yield
    except OSError as error:
        room = "; make room on the disk and run again" if error.errno in NO_ROOM else ""
        raise InputError(f"{path} cannot be written: {error.strerror or error}{kept}{room}") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be written: {error}") from None  # a name with a null character


class GrowingFile:
    """A file that bytes are appended to; a context manager. It is made if it does not exist."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises InputError when it cannot be written."""
        self.path = path
        with name_failure(path):
            is_new = not path.exists()
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self.size = os.fstat(self._descriptor).st_size
                if is_new:
                    sync_directory(path.parent)
            except OSError:
                os.close(self._descriptor)
                raise

    def append(self, content: bytes) -> None:
        """Write bytes at the end and wait until they are on disk.

        Raises InputError when the disk refuses them; the file then ends where it did before, as far as it can be cut.
        """
        with name_failure(self.path, kept="; what it holds is kept"):
            try:
                _write_all(self._descriptor, content)
                os.fsync(self._descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self.size)
                raise
        self.size += len(content)

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(self, *error: Any) -> None:
        with suppress(OSError):  # every append has been synced: nothing is left that closing could lose
            os.close(self._descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically, as UTF-8. Raises InputError if it cannot."""
    write_bytes(path, (text.encode(),))


def write_bytes(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a whole file atomically: readers see the old one or the new one. Raises InputError if it cannot.

    The directory of the file is made where it is missing.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with name_failure(path):
        make_directory(path.parent)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                _write_buffered(descriptor, pieces)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(path.parent)


def replace_directory(temporary: Path, final: Path) -> None:
    """Give a directory its final name when everything in it is on disk. Raises InputError if that fails."""
    with name_failure(final):
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            sync_directory(Path(folder))
        os.replace(temporary, final)
        sync_directory(final.parent)


def sync_files(directory: Path) -> None:
    """Wait until the files of a directory, and its entries, are on disk. Raises InputError if that fails."""
    with name_failure(directory):
        for entry in sorted(directory.iterdir()):
            if entry.is_file():
                _sync(entry)
        sync_directory(directory)


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first `size` bytes, and wait until that is on disk. Raises InputError if it cannot."""
    if not path.exists() or path.stat().st_size == size:
        return
    with name_failure(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_spans(path: Path, spans: Iterable[tuple[int, int]]) -> None:
    """Keep only some spans of a file, from byte to byte, in the given order. Raises InputError if it cannot.

    Where they are the beginning of the file it is cut after them; otherwise it is replaced by a copy.
    """
    spans = list(spans)
    ends = [0, *(end for _, end in spans)]
    if all(start == end for (start, _), end in zip(spans, ends, strict=False)):
        truncate(path, ends[-1])
        return
    with path.open("rb") as stream:
        write_bytes(path, (_read_span(stream.fileno(), start, end) for start, end in spans))


def make_directory(path: Path) -> list[Path]:
    """Make a directory and its parents where they are missing; return those that were made, the deepest first.

    Raises OSError, also where something that is no directory stands there.
    """
    missing = list(takewhile(lambda folder: not folder.exists(), (path, *path.parents)))
    for folder in reversed(missing):
        if folder.is_symlink():
            raise OSError(errno.ENOENT, "it is a link to a place that does not exist")
        with suppress(FileExistsError):  # another process has made it in the meantime
            os.mkdir(folder)
            sync_directory(folder.parent)
    if not path.is_dir():
        raise OSError(errno.ENOTDIR, "it is a file, not a directory")
    return missing


def remove_directory(path: Path) -> None:
    """Remove a directory with everything in it, where it exists. Raises InputError if it cannot."""
    if path.exists():
        with name_failure(path):
            shutil.rmtree(path)


def remove_file(path: Path) -> None:
    """Remove a file, where it exists. Raises InputError if it cannot."""
    with name_failure(path):
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote a whole file of a run."""
    for path in directory.glob(f"*{TEMPORARY}"):
        if path.is_file() and path.with_suffix("").suffix in WRITTEN:
            with suppress(OSError):
                os.unlink(path)


def sync_directory(path: Path) -> None:
    """Wait until the entries of a directory are on disk. Raises OSError."""
    try:
        _sync(path)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_buffered(descriptor: int, pieces: Iterable[bytes]) -> None:
    buffer = bytearray()
    for piece in pieces:
        buffer += piece
        if len(buffer) >= BUFFER_BYTES:
            _write_all(descriptor, buffer)
            buffer.clear()
    _write_all(descriptor, buffer)


def _write_all(descriptor: int, content: bytes | bytearray) -> None:
    """Write all bytes: one call may write only some of them, as when the disk becomes full."""
    written = 0
    while written < len(content):
        written += os.write(descriptor, bytes(content[written:]) if written else content)


def _read_span(descriptor: int, start: int, end: int) -> bytes:
    return os.pread(descriptor, end - start, start)
