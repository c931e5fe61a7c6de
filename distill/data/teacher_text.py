"""A row's completion in the tokens of a teacher whose tokenizer is another one than the student's.

Both tokenizers divide the same bytes. Rows of a search in which the student read the teacher's bytes have the tokens of
both (`completion_bytes`, `teacher_ids`, `teacher_bytes`); of any other completion the teacher divides the bytes anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from genssd.distill.data.written_rows import read_spans
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.readers.reading import Reader
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherText:
    """The tokens of a completion for the teacher, and where the tokens of both models end."""

    ids: tuple[int, ...]
    """The teacher's token ids."""
    ends: tuple[int, ...]
    """Number of the completion's bytes up to the end of each of them."""
    student_ends: tuple[int, ...]
    """Number of the completion's bytes up to the end of each of the student's tokens."""


def divide_anew(completion_ids: Sequence[int], reader: Reader, where: str) -> TeacherText:
    """Return a completion of the student's tokens as the teacher divides it. reader: how the teacher reads the student.

    Raises InputError naming `where` on a token that the teacher cannot read.
    """
    missing = reader.find_missing(completion_ids)
    if missing is not None:
        raise InputError(f"{where}: the completion has {reader.describe_missing(missing)}")
    try:
        reading = reader.read(completion_ids, held=b"", begins=True, ends=True)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    assert reading.lengths is not None, "the reader reads ids, not bytes"
    assert reading.writer_lengths is not None
    return _make_text(reading.ids, reading.lengths, reading.writer_lengths)


def read_stored(
    fields: Mapping[str, Any], completion_ids: Sequence[int], teacher: Tokenizer, where: str
) -> TeacherText | None:
    """Return the teacher's tokens that a row of a search has; None where it has none of this teacher's tokenizer.

    completion_ids: the row's own, which are used. Raises InputError naming `where` on fields that are damaged.
    """
    if "teacher_ids" not in fields or fields.get("teacher_tokenizer") != teacher.fingerprint:
        return None
    ids = fields["teacher_ids"]
    spans = read_spans(fields, len(completion_ids), where)
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i <= teacher.largest_id for i in ids):
        raise InputError(f"{where}: teacher_ids must be a list of token ids of the teacher's tokenizer")
    if spans is None or len(spans.teacher) != len(ids):
        raise InputError(f"{where}: teacher_bytes must have {format_count(len(ids), 'number')}, one for each token")
    return _make_text(ids, spans.teacher, spans.student)


def _make_text(ids: Sequence[int], lengths: Sequence[int], student_lengths: Sequence[int]) -> TeacherText:
    return TeacherText(ids=tuple(ids), ends=tuple(accumulate(lengths)), student_ends=tuple(accumulate(student_lengths)))
