"""Selection criteria: the protocols that they follow, and what they declare about themselves.

A criterion is an object; anything with the methods of one of the two protocols can be passed as `criterion=`. The same
objects score online, in the search, and afterwards, over finished traces. Options of commands name criteria, so this
file does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from genssd.engine.criteria.candidate import Candidate


@runtime_checkable
class Criterion(Protocol):
    """A rule that turns a candidate into a number."""

    def score(self, candidate: Candidate) -> float:
        """Return the candidate's value; never NaN."""
        ...

    def higher_is_better(self) -> bool:
        """Return whether a larger value suits the student better."""
        ...


@runtime_checkable
class PoolCriterion(Protocol):
    """A rule that judges candidates against each other: from some numbers of each it makes the values of all."""

    @property
    def pool(self) -> Literal["prompt", "data"]:
        """Candidates that compete: those of one prompt (in the search: of one round), or all of the data."""
        ...

    @property
    def num_features(self) -> int:
        """Number of numbers that `features` returns."""
        ...

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        """Return the numbers of one candidate that the values are made of."""
        ...

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        """Return the values of the candidates of one pool, in order; never NaN."""
        ...

    def higher_is_better(self) -> bool:
        """Return whether a larger value suits the student better."""
        ...


@runtime_checkable
class RatioCriterion(Protocol):
    """A criterion whose value over many responses is a ratio of sums, not the mean of the responses' values."""

    def ratio(self, candidate: Candidate) -> tuple[float, float]:
        """Return what a response adds to the numerator and to the denominator."""
        ...


AnyCriterion = Criterion | PoolCriterion


def needs_answer(criterion: AnyCriterion) -> bool:
    """Return whether a criterion declares, by an attribute of this name, that it reads `Candidate.answer`."""
    return bool(getattr(criterion, "needs_answer", False))


def needs_teacher(criterion: AnyCriterion) -> bool:
    """Return whether a criterion declares, by an attribute of this name, that it reads `Candidate.teacher_logprob`."""
    return bool(getattr(criterion, "needs_teacher", False))


def needs_verdict(criterion: AnyCriterion) -> bool:
    """Return whether a criterion declares, by an attribute of this name, that it reads `Candidate.correct`."""
    return bool(getattr(criterion, "needs_verdict", False))


def not_in_search(criterion: AnyCriterion) -> str | None:
    """Return why a criterion cannot judge the chunks of a search; None where it can.

    A criterion declares the reason by an attribute of this name; one that is fitted over all of the data has its own.
    """
    if isinstance(criterion, PoolCriterion) and criterion.pool == "data":
        return (
            "it is fitted over all of the data, which the search does not have yet; fix what it fits "
            "(aslec_casl(gamma=...))"
        )
    reason: str | None = getattr(criterion, "not_in_search", None)
    return reason
