"""Crash-safe JSONL: one line per finished piece of work, on disk as soon as it is finished.

A line counts when it ends in a newline and parses. A crash leaves at most one torn line, at the end of the file; it is
cut off when the run is resumed, and its work is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from genssd.engine.errors import InputError


class Journal:
    """An append-only JSONL file. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._stream = path.open("ab")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line and wait until it is on disk. Raises InputError when the disk refuses it."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        try:
            self._stream.write(line)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}; what it holds is kept") from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def complete_rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of a journal, each with the byte offset at which its line ends, without a torn last line.

    Raises InputError naming a damaged line that is not the last, which no crash leaves.
    """
    if not path.exists():
        return
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    end = 0
    with stream:
        for number, line in enumerate(stream, start=1):
            row = _parse(line)
            if row is None:
                if stream.readline():
                    raise InputError(f"{path}, line {number} is damaged; restore it or remove it before resuming")
                return
            end += len(line)
            yield row, end


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the row of a complete line, or None."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def truncate(path: Path, size: int) -> None:
    """Cut a file to its first `size` bytes, and wait until that is on disk."""
    if not path.exists() or path.stat().st_size == size:
        return
    with path.open("r+b") as stream:
        stream.truncate(size)
        os.fsync(stream.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a small JSON file atomically: readers see the old one or the new one. Raises InputError if it cannot."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSONL file atomically. Raises InputError if it cannot."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a whole text file atomically, as UTF-8. Raises InputError if it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError naming the file when it holds none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object")
    return value
