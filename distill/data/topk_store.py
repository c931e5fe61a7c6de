"""Storage of the teacher's K most likely tokens ("top k") along trajectories, in a binary file next to their rows.

FILE.bin    per trajectory: ids, int32 [T, K], then log-probabilities, float32 [T, K], in the machine's byte order

The field `teacher_topk` of a row locates its own top k: {"file": name, "offset": bytes, "tokens": T, "k": K,
"vocabulary": V}, where V is the number of ids that the teacher's head has. The file only ever grows, and the bytes that
a row refers to are on disk before the row is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from genssd.distill.runs.writing import GrowingFile, truncate
from genssd.engine.amounts import format_count
from genssd.engine.errors import InputError
from genssd.kernels.logprob import TopK

INCOMPLETE = "teacher_topk must name file, offset, tokens, k and vocabulary"
BYTES_PER_ENTRY = 8
"""Bytes of one id together with its log-probability."""


@dataclass(frozen=True, slots=True)
class TopkLocation:
    """Location of one trajectory's top k in a file."""

    path: Path
    offset: int
    """Number of bytes in the file before the first id."""
    tokens: int
    """Number of tokens in the trajectory."""
    k: int
    vocabulary: int
    """Number of ids that the teacher's head has."""
    where: str
    """File and line of the trajectory's row, for messages."""

    @property
    def num_bytes(self) -> int:
        return BYTES_PER_ENTRY * self.tokens * self.k

    def read(self) -> TopK:
        """Return ids, int64, and log-probabilities, float32, both [tokens, k].

        Raises InputError when the file cannot be read, holds no top k there, or an id that the teacher does not have.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                raw = stream.read(self.num_bytes)
        except OSError as error:
            raise InputError(f"{self.where}: {self.path} cannot be read: {error.strerror}") from None
        half = self.num_bytes // 2
        ids = np.frombuffer(raw[:half], dtype=np.int32)
        logprob = np.frombuffer(raw[half:], dtype=np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            shape = (self.tokens, self.k)
            is_valid = ids.size == logprob.size == self.tokens * self.k and bool(
                (ids >= 0).all() and (logprob <= 1e-3).all()
            )
            if not is_valid or float(np.exp(logprob.astype(np.float64)).reshape(shape).sum(1).max(initial=0.0)) > 1.001:
                raise InputError(
                    f"{self.where}: {self.path} holds no top k at byte {self.offset}: it is not the file of this row"
                )
        self._check_ids(ids.reshape(shape))
        return TopK(
            torch.from_numpy(ids.astype(np.int64).reshape(shape)), torch.from_numpy(logprob.copy().reshape(shape))
        )

    def _check_ids(self, ids_TK: npt.NDArray[np.int32]) -> None:
        """Check that every id is one of the teacher's, and none is in a row twice. Raises InputError naming the id."""
        sorted_TK = np.sort(ids_TK, axis=1)
        twice_TK = np.zeros(ids_TK.shape, dtype=np.bool_)
        twice_TK[:, 1:] = sorted_TK[:, 1:] == sorted_TK[:, :-1]
        for values_TK, is_wrong_TK, fault in (
            (ids_TK, ids_TK >= self.vocabulary, f"which is outside of the teacher's vocabulary of {self.vocabulary}"),
            (sorted_TK, twice_TK, "twice"),
        ):
            if is_wrong_TK.any():
                token, place = (int(i) for i in np.argwhere(is_wrong_TK)[0])
                raise InputError(
                    f"{self.where}: {self.path} is damaged: the top k of token {token} (byte "
                    f"{self.offset + 4 * token * self.k}) has the id {values_TK[token, place]}, {fault}; restore the "
                    "file, or select again"
                )


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
        ids, logprob = topk.ids.cpu().numpy().astype(np.int32), topk.logprob.float().cpu().numpy()
        offset = self._file.size
        self._file.append(ids.tobytes() + logprob.tobytes())
        shape = {"tokens": len(ids), "k": ids.shape[1], "vocabulary": self._vocabulary}
        return {"file": self._file.path.name, "offset": offset, **shape}

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
    values = [field.get(name) for name in ("offset", "tokens", "k", "vocabulary")]
    numbers = [value for value in values if type(value) is int and value >= 0]
    if len(numbers) < len(values):
        raise InputError(f"{where}: {INCOMPLETE}")
    offset, count, k, vocabulary = numbers
    if not 1 <= k <= vocabulary:
        raise InputError(f"{where}: teacher_topk cannot have k={k} of a vocabulary of {vocabulary}")
    if count != tokens:
        raise InputError(f"{where}: teacher_topk has {format_count(count, 'token')}, the completion {tokens}")
    place = TopkLocation(directory / field["file"], offset, count, k, vocabulary, where)
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
    return 0 if field is None else int(field["offset"]) + BYTES_PER_ENTRY * int(field["tokens"]) * int(field["k"])
