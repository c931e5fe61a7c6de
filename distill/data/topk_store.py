"""Storage of the teacher's K most likely tokens ("top k") along trajectories, in a binary file next to their rows.

FILE.bin    the code of each trajectory's top k (topk_coding.py), one after the other

The field `teacher_topk` of a row locates its own top k: {"file": name, "offset": bytes, "bytes": B, "tokens": T,
"k": K, "vocabulary": V}, where V is the number of ids that the teacher's head has. The file only ever grows, and the
bytes that a row refers to are on disk before the row is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genssd.distill.data.topk_coding import BYTES_PER_ENTRY, decode_topk, encode_topk
from genssd.distill.runs.writing import GrowingFile, truncate
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.kernels.logprob import TopK

INCOMPLETE = "teacher_topk must name file, offset, bytes, tokens, k and vocabulary"


@dataclass(frozen=True, slots=True)
class TopkLocation:
    """Location of one trajectory's top k in a file."""

    path: Path
    offset: int
    """Number of bytes in the file before the code."""
    num_bytes: int
    """Number of bytes of the code."""
    tokens: int
    """Number of tokens in the trajectory."""
    k: int
    vocabulary: int
    """Number of ids that the teacher's head has."""
    where: str
    """File and line of the trajectory's row, for messages."""

    def read(self) -> TopK:
        """Return ids, int64, and log-probabilities, float32, both [tokens, k].

        Raises InputError when the file cannot be read, holds no top k there, or an id that the teacher does not have.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                code = stream.read(self.num_bytes)
        except OSError as error:
            raise InputError(f"{self.where}: {self.path} cannot be read: {error.strerror}") from None
        topk = decode_topk(code, self.tokens, self.k)
        if topk is None:
            raise InputError(
                f"{self.where}: {self.path} holds no top k at byte {self.offset}: it is damaged, or not the file of "
                "this row; restore the file, or select again"
            )
        if topk.ids.numel() and int(topk.ids.max()) >= self.vocabulary:
            token = int(torch.nonzero((topk.ids >= self.vocabulary).any(1))[0])
            raise InputError(
                f"{self.where}: {self.path} is of another teacher: the top k of token {token} has the id "
                f"{int(topk.ids[token].max())}, which is outside of the teacher's vocabulary of {self.vocabulary}"
            )
        return topk


class TopkStore:
    """An open file that top k are appended to; a context manager."""

    def __init__(self, path: Path, end: int, *, vocabulary: int) -> None:
        """Open the file and cut it off at byte `end`, after the last top k that a row refers to.

        vocabulary: number of ids that the teacher's head has. Raises InputError when the file is shorter, or cannot be
        written.
        """
        if (path.stat().st_size if path.exists() else 0) < end:
            raise InputError(f"{path} is shorter than its rows say: restore it, or choose another output_dir")
        truncate(path, end)
        self._file = GrowingFile(path)
        self._vocabulary = vocabulary

    def append(self, topk: TopK) -> dict[str, Any]:
        """Write one trajectory's top k, wait until it is on disk, and return the field `teacher_topk` of its row.

        Raises InputError when the file cannot be written.
        """
        code, offset = encode_topk(topk), self._file.size
        self._file.append(code)
        tokens, k = topk.ids.shape
        place = {"file": self._file.path.name, "offset": offset, "bytes": len(code)}
        return {**place, "tokens": tokens, "k": k, "vocabulary": self._vocabulary}

    def __enter__(self) -> TopkStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)


def locate_topk(field: object, directory: Path, tokens: int, where: str) -> TopkLocation | None:
    """Return the location that a row's field `teacher_topk` gives; None without the field.

    directory: of the row's file. tokens: number of tokens in the row's completion. Raises InputError naming `where`.
    """
    if field is None:
        return None
    if not isinstance(field, Mapping) or not isinstance(field.get("file"), str):
        raise InputError(f"{where}: {INCOMPLETE}")
    values = [field.get(name) for name in ("offset", "bytes", "tokens", "k", "vocabulary")]
    numbers = [value for value in values if type(value) is int and value >= 0]
    if len(numbers) < len(values):
        raise InputError(f"{where}: {INCOMPLETE}")
    offset, num_bytes, count, k, vocabulary = numbers
    if not 1 <= k <= vocabulary:
        raise InputError(f"{where}: teacher_topk cannot have k={k} of a vocabulary of {vocabulary}")
    if count != tokens:
        raise InputError(f"{where}: teacher_topk has {format_count(count, 'token')}, the completion {tokens}")
    if num_bytes < BYTES_PER_ENTRY * count * k:
        raise InputError(
            f"{where}: teacher_topk cannot hold {count} x {k} entries in {format_count(num_bytes, 'byte')}"
        )
    place = TopkLocation(directory / field["file"], offset, num_bytes, count, k, vocabulary, where)
    try:
        size = place.path.stat().st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: teacher_topk: {field['file']!r} cannot be read: {error}") from None
    if offset + place.num_bytes > size:
        raise InputError(f"{where}: teacher_topk: {place.path} has {size} bytes, too few for byte {offset} and on")
    return place


def check_topk_file(path: Path, rows: Iterable[Mapping[str, Any]], journal: Path, decisions: Path) -> None:
    """Raise InputError where the file lacks the top k of a journal's row, with the remedy. rows: of the journal.

    decisions: the journal beside it, which is removed together with it.
    """
    size = path.stat().st_size if path.exists() else 0
    for number, row in enumerate(rows, start=1):
        if find_topk_end(row) > size:
            remedy = (
                f"remove {journal} and {decisions} to begin anew"
                if number == 1
                else f"remove line {number} and all later ones from {journal} and resume: their work is then done again"
            )
            raise InputError(f"{path} lacks the top k of {journal}, line {number}; restore it, or {remedy}")


def find_topk_end(row: Mapping[str, Any]) -> int:
    """Return the number of bytes in the file up to the end of a row's top k; 0 if the row has none."""
    field = row.get("teacher_topk")
    return 0 if field is None else int(field["offset"]) + int(field["bytes"])
