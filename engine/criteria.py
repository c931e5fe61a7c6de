"""Selection criteria: how well a candidate suits the student.

A criterion is an object with two methods; anything with them can be passed as `criterion=`. The same objects score
online, in the search, and afterwards, over finished traces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from genssd.engine.errors import InputError
from genssd.engine.sampling import uniform
from genssd.kernels.logprob import TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a criterion may look at. Tokens are those of the chunk, its end-of-sequence token included."""

    token_ids: tuple[int, ...]
    stats: TokenStats
    """The student's statistics of the chunk's tokens."""
    history: TokenStats
    """The student's statistics of the response before the chunk."""
    teacher_logprob: Tensor
    """float32 [tokens], at temperature 1 over the whole vocabulary."""
    final: bool
    """Whether the response ends with this chunk."""
    stream: int
    """The candidate's random stream."""


@runtime_checkable
class Criterion(Protocol):
    """Turns a candidate into a number and says which direction is better."""

    def score(self, candidate: Candidate) -> float:
        """The candidate's value; never NaN."""
        ...

    def higher_is_better(self) -> bool:
        """Whether a larger value suits the student better."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp of the student's mean negative log-probability, end of sequence included; lower is better (Gen-SSD).

    Always at temperature 1 on the raw logits, however the teacher samples.
    """

    scope: Literal["chunk", "trajectory"] = "chunk"
    """What the mean runs over. Use "trajectory" with beam > 1, where candidates of different branches compete."""
    min_tokens: int = 8
    """A last chunk shorter than this is scored together with the end of its history: otherwise a two-token ending
    always wins over chunks that go on. Ours."""

    def score(self, candidate: Candidate) -> float:
        history = candidate.history.logprob
        if self.scope == "chunk":
            missing = self.min_tokens - len(candidate.stats) if candidate.final else 0
            borrowed = min(len(history), max(0, missing))
            history = history[len(history) - borrowed :]
        logprob = torch.cat((history, candidate.stats.logprob)).double()
        nll = -float(logprob.mean())
        return math.exp(nll) if nll < 700.0 else math.inf

    def higher_is_better(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Random:
    """A number from the candidate's own random stream: the control that any criterion has to beat."""

    def score(self, candidate: Candidate) -> float:
        return uniform(candidate.stream, len(candidate.history))

    def higher_is_better(self) -> bool:
        return True


_MAKERS: dict[str, Callable[[], Criterion]] = {"ppl": Perplexity, "random": Random}


def register_criterion(name: str, maker: Callable[[], Criterion]) -> None:
    """Make a criterion available by name. Raises InputError when the name is taken."""
    if name in _MAKERS:
        raise InputError(f"a criterion named {name!r} is already registered")
    _MAKERS[name] = maker


def resolve(criterion: str | Criterion) -> Criterion:
    """A criterion from its registered name, or the object itself."""
    if isinstance(criterion, str):
        maker = _MAKERS.get(criterion)
        if maker is None:
            raise InputError(f"unknown criterion {criterion!r}; registered: {', '.join(sorted(_MAKERS))}")
        return maker()
    if isinstance(criterion, type) or not isinstance(criterion, Criterion):
        raise InputError(f"{criterion!r} is no criterion: it needs score(candidate) and higher_is_better()")
    return criterion
