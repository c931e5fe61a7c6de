"""The candidate that selection criteria judge: a chunk of a search, or a whole response (criterion.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.readers.reading import ByteSpans
from genssd.engine.texts.steps import step_spans
from genssd.kernels.logprob import TokenStats

Window = tuple[int, int, int]
"""A part of a response, by token positions: start of the visible context, start and end of the scored tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationMeans:
    """Means of the outputs of the student's last up projection, each scaled to length 1, over two parts of a text."""

    prompt_F: Tensor
    """Mean over the prompt's tokens, float64 [feed-forward width]; special tokens count for nothing."""
    response_F: Tensor
    """Mean over the tokens of a part of the response, as `prompt_F`."""
    prompt_nll: float
    """Mean negative log-probability of the prompt's tokens after the first, in nats."""
    counted: tuple[bool, ...]
    """Whether each token of the part of the response counts."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Candidate:
    """A chunk that may be kept, or a whole response (its history is empty then). Spans are [start, end).

    Its tokens are the student's. Where the student has another tokenizer than the teacher (`spans`), those of a chunk
    begin with the text that was held back of the chunk before, and end where its own is held back.
    """

    token_ids: tuple[int, ...]
    """The student's token ids of the chunk, its end-of-sequence token included."""
    stats: TokenStats
    """The student's statistics of the chunk's tokens, in the host's memory."""
    history_ids: tuple[int, ...] = ()
    """The student's token ids of the response before the chunk."""
    history: TokenStats = field(default_factory=TokenStats.empty)
    """The student's statistics of the response before the chunk."""
    teacher_logprob: Tensor | None = None
    """Log-probabilities of the chunk's tokens under the model that wrote them, in the search the teacher: float32
    [tokens of the writer], at temperature 1 over the whole vocabulary. None where they were not recorded."""
    history_teacher_logprob: Tensor | None = None
    """Log-probabilities of the response before the chunk under the model that wrote it, float32; None if unknown."""
    final: bool
    """Whether the response ends with this chunk."""
    finished: bool
    """Whether the last token is the end of sequence."""
    stream: int = 0
    """Random stream of the candidate."""
    pieces_of: Callable[[Sequence[int]], list[str]] | None = None
    """Function that returns the text of each token; None without a tokenizer."""
    local_logprob: Callable[[Sequence[int], Sequence[Window]], list[Tensor]] | None = None
    """Function that returns the student's log-probabilities of windows of a response after the prompt; None without
    a model."""
    activations: Callable[[Sequence[int], int], ActivationMeans] | None = None
    """Function that reads a response after the prompt and returns the student's activations over the prompt and over
    the response from a position on; None without a model."""
    encode: Callable[[str], list[int]] | None = None
    """Function that returns the token ids of a text without special tokens; None without a tokenizer."""
    answer: str | None = None
    """Reference answer of the prompt, where it is known."""
    spans: ByteSpans | None = None
    """Number of bytes in every token of history and chunk, of the student and of the teacher; None where they have the
    same tokens, so that `teacher_logprob` belongs to `token_ids` one for one."""
    correct: bool | None = None
    """Whether the answer of a whole response is right; None where it is not known, as of every chunk."""

    def __repr__(self) -> str:
        ending = "finished" if self.finished else "final" if self.final else "not final"
        return f"<Candidate of {format_count(len(self.token_ids), 'token')} after {len(self.history_ids)}, {ending}>"

    @property
    def num_content(self) -> int:
        """Number of tokens in the chunk without the end of sequence."""
        return len(self.token_ids) - self.finished

    @property
    def logprob(self) -> Tensor:
        """The student's log-probabilities of the chunk's tokens, float64 [tokens]."""
        return self.stats.logprob.double()

    def lengthened(self, min_tokens: int) -> Candidate:
        """Return the candidate as the search judges it: a last chunk of fewer tokens includes the end of its history.

        One of which a stop string has left no token includes at least the last token of its history.

        Otherwise an ending of two tokens would nearly always win over chunks that continue, and under criteria that
        leave the end of sequence out a chunk of nothing else would always lose. The rule is not from a paper.
        """
        num_borrowed = min(len(self.history_ids), max(min_tokens, 1) - len(self.token_ids))
        if not self.final or num_borrowed < 1:
            return self
        cut = len(self.history_ids) - num_borrowed
        teacher, before = self.teacher_logprob, self.history_teacher_logprob
        if teacher is not None and before is not None:
            num_before = cut if self.spans is None else min(len(before), self.spans.count_teacher_tokens(cut))
            teacher, before = torch.cat((before[num_before:], teacher)), before[:num_before]
        else:
            teacher = before = None
        return replace(
            self,
            token_ids=(*self.history_ids[cut:], *self.token_ids),
            stats=TokenStats.concatenate([self.history[cut:], self.stats]),
            history_ids=self.history_ids[:cut],
            history=self.history[:cut],
            teacher_logprob=teacher,
            history_teacher_logprob=before,
        )

    def count_bytes(self, first: int) -> int:
        """Return the number of bytes of text in history and chunk from a token on; the end of sequence has none.

        Raises InputError without a tokenizer.
        """
        if self.spans is not None:
            return sum(self.spans.student[first:])
        return sum(len(piece.encode()) for piece in self.pieces()[first:])

    def pieces(self) -> list[str]:
        """Return the text of each token of history and chunk; the end of sequence has none.

        Raises InputError without a tokenizer.
        """
        if self.pieces_of is None:
            raise InputError("this criterion looks at the text, and the candidate came without a tokenizer")
        ids = (*self.history_ids, *self.token_ids)
        pieces = self.pieces_of(ids[: len(ids) - self.finished])
        return [*pieces, ""] if self.finished else pieces

    def steps(self) -> list[tuple[int, int]]:
        """Return the reasoning steps of history and chunk, as spans of their tokens, without the end of sequence."""
        pieces = self.pieces()
        return step_spans(pieces[: len(pieces) - self.finished])

    def response_logprob(self) -> Tensor:
        """Return the student's log-probabilities of history and chunk, float64 [tokens]."""
        return torch.cat((self.history.logprob.double(), self.logprob))
