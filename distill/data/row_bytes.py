"""Bytes that belong to rows, in a binary file next to them: the place that a row names, and the file as it grows.

A field of a row locates its bytes: {"file": name, "offset": bytes, "bytes": B, ...}. The file only ever grows, and the
bytes that a row refers to are on disk before the row is. What the bytes mean is said by topk_store.py and
state_store.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.runs.writing import GrowingFile, truncate
from genssd.engine.common.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """Place of one row's bytes in a file."""

    path: Path
    offset: int
    """Number of bytes in the file before them."""
    num_bytes: int
    where: str
    """File and line of the row, for messages."""

    def read(self) -> bytes:
        """Return the bytes; fewer where the file ends before. Raises InputError when the file cannot be read."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                return stream.read(self.num_bytes)
        except OSError as error:
            raise InputError(f"{self.where}: {self.path} cannot be read: {error.strerror}") from None

    def make_damaged_error(self, content: str) -> InputError:
        """Return the error of bytes that are not what the row says. content: what they should be, such as "top k"."""
        return InputError(
            f"{self.where}: {self.path} holds no {content} at byte {self.offset}: it is damaged, or not the file of "
            "this row; restore the file, or make the rows again"
        )


class RowBytesFile:
    """An open file that the bytes of rows are appended to; a context manager."""

    def __init__(self, path: Path, end: int) -> None:
        """Open the file and cut it off at byte `end`, after the last bytes that a row refers to.

        Raises InputError when the file is shorter, or cannot be written.
        """
        if (path.stat().st_size if path.exists() else 0) < end:
            raise InputError(f"{path} is shorter than its rows say: restore it, or choose another output_dir")
        truncate(path, end)
        self._file = GrowingFile(path)

    def append(self, content: bytes) -> dict[str, Any]:
        """Write the bytes of a row, wait until they are on disk, and return the part of its field that locates them.

        Raises InputError when the file cannot be written.
        """
        offset = self._file.size
        self._file.append(content)
        return {"file": self._file.path.name, "offset": offset, "bytes": len(content)}

    def __enter__(self) -> RowBytesFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def read_numbers(field: object, name: str, keys: Sequence[str], where: str) -> tuple[Mapping[str, Any], list[int]]:
    """Return a field that locates bytes, and its offset, its number of bytes and further numbers of at least 0.

    name: of the field. keys: of the further numbers. Raises InputError naming `where` where one is missing.
    """
    expected = ("offset", "bytes", *keys)
    if isinstance(field, Mapping) and isinstance(field.get("file"), str):
        numbers = [value for key in expected if type(value := field.get(key)) is int and value >= 0]
        if len(numbers) == len(expected):
            return field, numbers
    listed = ", ".join(("file", *expected[:-1]))
    raise InputError(f"{where}: {name} must name {listed} and {expected[-1]}")


def locate_bytes(field: Mapping[str, Any], directory: Path, name: str, where: str) -> RowBytes:
    """Return the place of a row's bytes. field, name: as `read_numbers` returns and takes them. directory: of the rows.

    Raises InputError naming `where` when there is no such file, or it ends before the last byte.
    """
    path, offset, num_bytes = directory / field["file"], int(field["offset"]), int(field["bytes"])
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {name}: {field['file']!r} cannot be read: {error}") from None
    if offset + num_bytes > size:
        raise InputError(f"{where}: {name}: {path} has {size} bytes, too few for byte {offset} and on")
    return RowBytes(path=path, offset=offset, num_bytes=num_bytes, where=where)


def find_end(row: Mapping[str, Any], name: str) -> int:
    """Return the number of bytes in the file up to the end of those of a row; 0 without the field `name`."""
    field = row.get(name)
    return 0 if field is None else int(field["offset"]) + int(field["bytes"])


def check_bytes_file(
    path: Path,
    name: str,
    content: str,
    rows: Iterable[Mapping[str, Any]],
    journal: Path,
    decisions: Path | None = None,
) -> None:
    """Raise InputError where a file lacks what a journal's row refers to, with the remedy.

    name: of the field. content: what it locates, such as "top k". rows: of the journal. decisions: the journal beside
    it, which is removed together with it.
    """
    size = path.stat().st_size if path.exists() else 0
    for number, row in enumerate(rows, start=1):
        if find_end(row, name) > size:
            removed = f"{journal} and {decisions}" if decisions is not None else f"{journal}"
            remedy = (
                f"remove {removed} to begin anew"
                if number == 1
                else f"remove line {number} and all later ones from {journal} and resume: their work is then done again"
            )
            raise InputError(f"{path} lacks the {content} of {journal}, line {number}; restore it, or {remedy}")
