"""Storage of the teacher's K most likely tokens ("top k") along trajectories, in a binary file next to their rows.

FILE.bin    the code of each trajectory's top k (topk_coding.py), one after the other

The field `teacher_topk` of a row locates its own top k (row_bytes.py): {"file": name, "offset": bytes, "bytes": B,
"tokens": T, "k": K, "vocabulary": V}, where V is the number of ids that the teacher's head has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genssd.distill.data.row_bytes import RowBytes, RowBytesFile, locate_bytes, read_numbers
from genssd.distill.data.topk_coding import BYTES_PER_ENTRY, decode_topk, encode_topk
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.kernels.logprob import TopK

FIELD = "teacher_topk"
"""Field of a row that locates its top k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopkLocation:
    """Location of one trajectory's top k in a file."""

    place: RowBytes
    tokens: int
    """Number of tokens in the trajectory."""
    k: int
    vocabulary: int
    """Number of ids that the teacher's head has."""

    def read(self) -> TopK:
        """Return ids, int64, and log-probabilities, float32, both [tokens, k].

        Raises InputError when the file cannot be read, holds no top k there, or an id that the teacher does not have.
        """
        place = self.place
        topk = decode_topk(place.read(), self.tokens, self.k)
        if topk is None:
            raise place.make_damaged_error("top k")
        if topk.ids.numel() and int(topk.ids.max()) >= self.vocabulary:
            token = int(torch.nonzero((topk.ids >= self.vocabulary).any(1))[0])
            raise InputError(
                f"{place.where}: {place.path} is of another teacher: the top k of token {token} has the id "
                f"{int(topk.ids[token].max())}, which is outside of the teacher's vocabulary of {self.vocabulary}"
            )
        return topk


class TopkStore:
    """An open file that top k are appended to; a context manager."""

    def __init__(self, path: Path, end: int, *, vocabulary: int) -> None:
        """Open the file as `RowBytesFile` does. vocabulary: number of ids that the teacher's head has."""
        self._file = RowBytesFile(path, end)
        self._vocabulary = vocabulary

    def append(self, topk: TopK) -> dict[str, Any]:
        """Write one trajectory's top k, wait until it is on disk, and return the field `teacher_topk` of its row.

        Raises InputError when the file cannot be written.
        """
        tokens, k = topk.ids.shape
        return {**self._file.append(encode_topk(topk)), "tokens": tokens, "k": k, "vocabulary": self._vocabulary}

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
    located, numbers = read_numbers(field, FIELD, ("tokens", "k", "vocabulary"), where)
    _, num_bytes, count, k, vocabulary = numbers
    if not 1 <= k <= vocabulary:
        raise InputError(f"{where}: teacher_topk cannot have k={k} of a vocabulary of {vocabulary}")
    if count != tokens:
        raise InputError(f"{where}: teacher_topk has {format_count(count, 'token')}, the completion {tokens}")
    if num_bytes < BYTES_PER_ENTRY * count * k:
        raise InputError(
            f"{where}: teacher_topk cannot hold {count} x {k} entries in {format_count(num_bytes, 'byte')}"
        )
    place = locate_bytes(located, directory, FIELD, where)
    return TopkLocation(place=place, tokens=count, k=k, vocabulary=vocabulary)
