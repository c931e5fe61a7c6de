"""How a student reads what another model writes: by ids, one for one (`TokenMap`), or by bytes (`ByteReader`)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a student reads of one chunk: tokens of its own, which no later text changes.

    Of a chunk that ends inside a token of the student, or where a token may still join the text after it, the end is
    held back: the next chunk has it.
    """

    ids: tuple[int, ...]
    """The student's token ids. They begin with what was held back of the chunk before."""
    lengths: tuple[int, ...] | None = None
    """Number of bytes of text in each of them; None where every token of the student is one of the writer's."""
    writer_lengths: tuple[int, ...] | None = None
    """Number of bytes of text in each of the writer's tokens of the chunk; None as above."""
    held: bytes = b""
    """Bytes at the end of the chunk that are held back."""
    held_ids: tuple[int, ...] = ()
    """The tokens of these bytes if no text followed."""
    held_lengths: tuple[int, ...] = ()
    """Number of bytes in each of these."""

    @property
    def is_provisional(self) -> bool:
        """Whether all of the chunk is held back, so that it is judged by tokens that later text may change."""
        return not self.ids and bool(self.held_ids)

    @property
    def judged_ids(self) -> tuple[int, ...]:
        """Tokens by which the chunk is judged."""
        return self.held_ids if self.is_provisional else self.ids

    @property
    def judged_lengths(self) -> tuple[int, ...] | None:
        """Number of bytes in each of these; None where tokens correspond one to one."""
        return self.held_lengths if self.is_provisional else self.lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteSpans:
    """A text as two tokenizers divide it: the number of bytes in every token of a response, from its beginning."""

    student: tuple[int, ...]
    """Number of bytes in each of the student's tokens."""
    teacher: tuple[int, ...]
    """Number of bytes in each of the teacher's tokens."""

    def count_teacher_tokens(self, num_student: int) -> int:
        """Return how many of the teacher's tokens lie in the text of the student's first tokens."""
        return bisect_right(tuple(accumulate(self.teacher)), sum(self.student[:num_student]))

    def align(self, first: int, *, finished: bool) -> list[tuple[int, int, int, int]]:
        """Return the shortest spans of text that begin and end at a border of tokens in both tokenizers.

        Each is a span of the student's tokens and one of the teacher's: start, end, start, end. first: student token at
        or after which the spans begin. finished: whether the last token of both is the end of sequence, which is a span
        of its own; other tokens without text belong to the span before them.
        """
        num_student, num_teacher = len(self.student) - finished, len(self.teacher) - finished
        student = [0, *accumulate(self.student[:num_student])]
        teacher = [0, *accumulate(self.teacher[:num_teacher])]
        borders = [end for end in sorted(set(student) & set(teacher)) if end >= student[min(first, num_student)]]
        spans = [
            (
                bisect_right(student, start) - 1,
                bisect_right(student, end) - 1,
                bisect_right(teacher, start) - 1,
                bisect_right(teacher, end) - 1,
            )
            for start, end in pairwise(borders)
        ]
        return [*spans, (num_student, num_student + 1, num_teacher, num_teacher + 1)] if finished else spans


class Reader(Protocol):
    """The way in which a student reads the tokens of another model."""

    @property
    def writer(self) -> str:
        """Role and name of the model that writes, for messages."""
        ...

    @property
    def reads_bytes(self) -> bool:
        """Whether the student divides the text into tokens of its own."""
        ...

    @property
    def is_identity(self) -> bool:
        """Whether every id of the writer means the same to the student."""
        ...

    def find_missing(self, token_ids: Sequence[int]) -> int | None:
        """Return the first of the writer's tokens that the student cannot read; None where it reads them all."""
        ...

    def describe_missing(self, token_id: int) -> str:
        """Return which token the student cannot read, and the remedy, as the end of a sentence."""
        ...

    def name_token(self, token_id: int) -> str:
        """Return the string and the id of a token that the student cannot read."""
        ...

    def describe(self) -> str:
        """Return one line that says how the student reads."""
        ...

    def read(self, token_ids: Sequence[int], *, held: bytes, begins: bool, ends: bool) -> Reading:
        """Return what the student reads of a chunk. held: bytes that were held back before it.

        begins, ends: whether the response begins or ends with the chunk. Raises InputError on what it cannot read.
        """
        ...
