"""What a selection criterion is, and what it may look at.

A criterion is an object; anything with the methods of one of the two protocols can be passed as `criterion=`. The same
objects score online, in the search, and afterwards, over finished traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from genssd.engine.errors import InputError
from genssd.engine.steps import step_spans
from genssd.kernels.logprob import TokenStats

Window = tuple[int, int, int]
"""Of a response: where the visible context starts, where the scored tokens start, and where they end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A chunk that may be kept, or a whole response (its history is empty then). Spans are [start, end)."""

    token_ids: tuple[int, ...]
    """Of the chunk, its end-of-sequence token included."""
    stats: TokenStats
    """The student's statistics of the chunk's tokens."""
    history_ids: tuple[int, ...] = ()
    """Of the response before the chunk."""
    history: TokenStats = field(default_factory=TokenStats.empty)
    """The student's statistics of the response before the chunk."""
    teacher_logprob: Tensor | None = None
    """float32 [tokens], at temperature 1 over the whole vocabulary; None where nobody recorded it."""
    history_teacher_logprob: Tensor | None = None
    """The same of the response before the chunk."""
    final: bool
    """Whether the response ends with this chunk."""
    finished: bool
    """Whether the last token is the end of sequence."""
    stream: int = 0
    """The candidate's random stream."""
    pieces_of: Callable[[Sequence[int]], list[str]] | None = None
    """The text of each of some tokens."""
    local_logprob: Callable[[Sequence[int], Sequence[Window]], list[Tensor]] | None = None
    """The student's log-probabilities of parts of a response that sees the prompt and a window of itself alone."""
    encode: Callable[[str], list[int]] | None = None
    """Token ids of a text, nothing added."""
    answer: str | None = None
    """The prompt's reference answer, where it is known."""

    @property
    def num_content(self) -> int:
        """Tokens of the chunk without the end of sequence."""
        return len(self.token_ids) - self.finished

    @property
    def logprob(self) -> Tensor:
        """The student's, of the chunk, float64 [tokens]."""
        return self.stats.logprob.double().cpu()

    def lengthened(self, min_tokens: int) -> Candidate:
        """The candidate as the search judges it: a last chunk of fewer tokens takes the end of its history along.

        Otherwise an ending of two tokens would nearly always win over chunks that go on, and under criteria that leave
        the end of sequence out a lone one would always lose. Ours.
        """
        borrowed = min(len(self.history_ids), min_tokens - len(self.token_ids))
        if not self.final or borrowed < 1:
            return self
        cut = len(self.history_ids) - borrowed
        teacher, before = self.teacher_logprob, self.history_teacher_logprob
        if teacher is not None and before is not None:
            teacher, before = torch.cat((before[cut:], teacher)), before[:cut]
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

    def pieces(self) -> list[str]:
        """The text of each token of history and chunk; the end of sequence has none."""
        if self.pieces_of is None:
            raise InputError("this criterion looks at the text, and the candidate came without a tokenizer")
        ids = (*self.history_ids, *self.token_ids)
        pieces = self.pieces_of(ids[: len(ids) - self.finished])
        return [*pieces, ""] if self.finished else pieces

    def steps(self) -> list[tuple[int, int]]:
        """The reasoning steps of history and chunk, as spans of their tokens, without the end of sequence."""
        pieces = self.pieces()
        return step_spans(pieces[: len(pieces) - self.finished])

    def whole_logprob(self) -> Tensor:
        """The student's, of history and chunk, float64."""
        return torch.cat((self.history.logprob.double().cpu(), self.logprob))


@runtime_checkable
class Criterion(Protocol):
    """Turns a candidate into a number and says which direction is better."""

    def score(self, candidate: Candidate) -> float:
        """The candidate's value; never NaN."""
        ...

    def higher_is_better(self) -> bool:
        """Whether a larger value suits the student better."""
        ...


@runtime_checkable
class PoolCriterion(Protocol):
    """Judges candidates against each other: first some numbers of each alone, then the values of all."""

    @property
    def pool(self) -> Literal["prompt", "data"]:
        """Who competes: the candidates of one prompt (in the search: of one round), or all that there are."""
        ...

    @property
    def num_features(self) -> int:
        """How many numbers `features` gives."""
        ...

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        """What the values are made of."""
        ...

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        """The values of the candidates of one pool, in order; never NaN."""
        ...

    def higher_is_better(self) -> bool:
        """Whether a larger value suits the student better."""
        ...


@runtime_checkable
class RatioCriterion(Protocol):
    """A criterion whose value over many responses is a ratio of sums, not the mean of theirs."""

    def ratio(self, candidate: Candidate) -> tuple[float, float]:
        """A response's share of the numerator and of the denominator."""
        ...


AnyCriterion = Criterion | PoolCriterion


def needs_answer(criterion: AnyCriterion) -> bool:
    """Whether a criterion says, by an attribute of this name, that it reads `Candidate.answer`."""
    return bool(getattr(criterion, "needs_answer", False))


def evaluate(criterion: AnyCriterion, candidates: Sequence[Candidate]) -> list[float]:
    """The values of candidates that compete with each other."""
    if isinstance(criterion, PoolCriterion):
        return criterion.score_pool([criterion.features(candidate) for candidate in candidates])
    return [criterion.score(candidate) for candidate in candidates]


def evaluate_distinct(criterion: AnyCriterion, candidates: Sequence[Candidate]) -> list[float]:
    """The same for candidates of one prompt's round, of which some may be equal: in a pool these count once."""
    if not isinstance(criterion, PoolCriterion):
        return evaluate(criterion, candidates)
    distinct = {(candidate.history_ids, candidate.token_ids): candidate for candidate in reversed(candidates)}
    value_of = dict(zip(distinct, evaluate(criterion, list(distinct.values())), strict=True))
    return [value_of[candidate.history_ids, candidate.token_ids] for candidate in candidates]
