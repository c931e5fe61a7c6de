"""A branch: one response under construction, held by teacher and student at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from genssd.engine.candidate import Candidate, Window
from genssd.engine.chunk import Chunk
from genssd.engine.errors import InputError
from genssd.engine.tree import Path
from genssd.kernels.logprob import TokenStats, TopK

Ending = Literal["chunk", "finished", "length"]
"""Why a candidate ends: its chunk is complete | end of sequence | no more tokens allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptIds:
    """One prompt as each model reads it. The student's is empty where no student scores."""

    teacher: tuple[int, ...]
    student: tuple[int, ...] = ()
    answer: str | None = None
    """The reference answer, for criteria that read it."""


class Brancher(Protocol):
    """What a branch needs of the engine."""

    def expand(self, branch: Branch, n: int, chunk: Chunk) -> list[Branch]: ...

    def drop_paths(self, branch: Branch) -> None: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def teacher_topk(self, branch: Branch) -> TopK | None: ...

    def pieces(self, token_ids: Sequence[int]) -> list[str]: ...

    def local_logprob(self, prompt: PromptIds, ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]: ...


class Branch:
    """A prompt, the committed response (`history`) and the candidate chunk that continues it (`chunk`).

    Made by `Engine.branch` and `expand`; its cache pages are held until `drop`.
    """

    def __init__(self, owner: Brancher, prompt: PromptIds, stream: int) -> None:
        self._owner = owner
        self.prompt = prompt
        self.stream = stream
        self.trace: tuple[int, ...] = ()
        """The candidate's index in each round: its place in the tree."""
        self.history: list[int] = []
        self.history_stats: tuple[TokenStats, ...] = ()
        self.history_teacher_logprob: tuple[Tensor, ...] = ()
        self.chunk: list[int] = []
        self.stats = TokenStats.empty()
        """The student's statistics of the chunk."""
        self.chunk_teacher_logprob: list[float] = []
        self.chunk_states: list[tuple[Tensor, int]] = []
        """The teacher's hidden states that the chunk's tokens were drawn from, as tensor and row; only where the
        teacher's most likely tokens are wanted."""
        self.history_topk: tuple[TopK, ...] = ()
        self.substituted = 0
        """Tokens of the chunk that the student wrote in the teacher's place (see `ReverseSpeculation`)."""
        self.ended: Ending | None = None
        self.num_children = 0
        self.dropped = False
        self.teacher = ModelState(pending=list(prompt.teacher))
        self.student = ModelState(pending=list(prompt.student))

    @property
    def token_ids(self) -> list[int]:
        """The whole response, chunk included."""
        return self.history + self.chunk

    @property
    def length(self) -> int:
        """Tokens of the response so far, chunk included."""
        return len(self.history) + len(self.chunk)

    @property
    def text(self) -> str:
        return self._owner.decode(self.token_ids)

    @property
    def teacher_logprob(self) -> Tensor:
        """Of the chunk's tokens, float32 [tokens], at temperature 1."""
        return torch.tensor(self.chunk_teacher_logprob)

    def candidate(self) -> Candidate:
        """What criteria see of the chunk."""
        return Candidate(
            token_ids=tuple(self.chunk),
            stats=self.stats,
            history_ids=tuple(self.history),
            history=self._committed_stats(),
            teacher_logprob=self.teacher_logprob,
            history_teacher_logprob=self._committed_teacher_logprob(),
            final=self.ended != "chunk",
            finished=self.ended == "finished",
            stream=self.stream,
            pieces_of=self._owner.pieces,
            local_logprob=partial(self._owner.local_logprob, self.prompt),
            encode=self._owner.encode,
            answer=self.prompt.answer,
        )

    def response(self) -> Candidate:
        """What criteria see of the committed response as a whole."""
        return replace(
            self.candidate(),
            token_ids=tuple(self.history),
            stats=self._committed_stats(),
            history_ids=(),
            history=TokenStats.empty(),
            teacher_logprob=self._committed_teacher_logprob(),
            history_teacher_logprob=torch.empty(0),
            final=True,
        )

    def _committed_stats(self) -> TokenStats:
        return TokenStats.concatenate(self.history_stats) if self.history_stats else TokenStats.empty()

    def _committed_teacher_logprob(self) -> Tensor:
        return torch.cat(self.history_teacher_logprob) if self.history else torch.empty(0)

    def expand(self, n: int, chunk: Chunk) -> list[Branch]:
        """Sample n candidate chunks and have the student score them. The branch itself stays as it is.

        Expanding again gives further candidates, not the same ones. Raises InputError on a candidate that was not
        committed or has ended, CapacityError when the candidates do not fit into the cache.
        """
        if n < 1:
            raise InputError(f"n must be at least 1, not {n}")
        if self.dropped:
            raise InputError("the branch was dropped: its cache is gone")
        if self.chunk:
            raise InputError("only a committed branch can be expanded; call commit() first")
        if self.ended is not None:
            raise InputError(f"the branch has ended ({self.ended}) and cannot be expanded")
        return self._owner.expand(self, n, chunk)

    def commit(self) -> None:
        """Make the candidate chunk part of the response. Its siblings are not touched."""
        self.history = self.history + self.chunk
        self.history_stats = (*self.history_stats, self.stats)
        self.history_teacher_logprob = (*self.history_teacher_logprob, self.teacher_logprob)
        topk = self._owner.teacher_topk(self)
        if topk is not None:
            self.history_topk = (*self.history_topk, topk)
        self.chunk, self.stats, self.chunk_teacher_logprob, self.chunk_states = [], TokenStats.empty(), [], []
        if self.ended == "chunk":
            self.ended = None

    def drop(self) -> None:
        """Return the branch's cache pages. What it generated stays readable; it cannot be expanded any more."""
        self.dropped = True
        self.chunk_states = []
        self._owner.drop_paths(self)

    def suspend(self) -> None:
        """Return the cache pages of a committed branch; it is computed again when it is expanded next."""
        assert not self.chunk, "only committed branches are suspended"
        self._owner.drop_paths(self)
        self.teacher = ModelState(pending=[*self.prompt.teacher, *self.history])
        self.student = ModelState(pending=[*self.prompt.student, *self.history])


@dataclass(slots=True)
class ModelState:
    """What one model has computed of a branch."""

    pending: list[int]
    """Tokens that are not in the cache yet."""
    path: Path | None = None
    """None before the first token is computed, and after a drop."""
    hidden: Tensor | None = None
    """The last hidden state of what is in the cache, [D]: it predicts the next token."""
