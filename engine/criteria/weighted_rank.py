"""The criterion that combines others: a weighted sum of the ranks that they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion import (
    AnyCriterion,
    PoolCriterion,
    needs_answer,
    needs_teacher,
    needs_verdict,
    not_in_search,
)
from genssd.engine.criteria.criterion_calls import call_features, call_score, call_score_pool, is_higher_better

if TYPE_CHECKING:
    from genssd.engine.criteria.candidate import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedRank:
    """Weighted sum of the candidates' ranks under several criteria; lower is better.

    0 is the rank of a prompt's best candidate; equal candidates have the mean of their ranks.
    """

    parts: tuple[tuple[float, AnyCriterion], ...]
    """Weight and criterion of each summand."""

    def __post_init__(self) -> None:
        if any(isinstance(part, PoolCriterion) and part.pool == "data" for _, part in self.parts):
            raise InputError("a criterion that is fitted over all of the data cannot be ranked within a prompt")

    @property
    def pool(self) -> Literal["prompt", "data"]:
        return "prompt"

    @property
    def needs_answer(self) -> bool:
        """Whether the prompts need reference answers."""
        return any(needs_answer(part) for _, part in self.parts)

    @property
    def needs_teacher(self) -> bool:
        """Whether the criterion reads the log-probabilities of the writing model."""
        return any(needs_teacher(part) for _, part in self.parts)

    @property
    def needs_verdict(self) -> bool:
        """Whether the criterion reads whether a response is correct."""
        return any(needs_verdict(part) for _, part in self.parts)

    @property
    def not_in_search(self) -> str | None:
        """Why the search cannot use the criterion; None where it can."""
        return next(filter(None, (not_in_search(part) for _, part in self.parts)), None)

    @property
    def num_features(self) -> int:
        return sum(_width(part) for _, part in self.parts)

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        values: list[float] = []
        for _, part in self.parts:
            values += (
                call_features(part, candidate) if isinstance(part, PoolCriterion) else (call_score(part, candidate),)
            )
        return tuple(values)

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        totals = [0.0] * len(features)
        unread = list(features)
        for weight, part in self.parts:
            columns, unread = [row[: _width(part)] for row in unread], [row[_width(part) :] for row in unread]
            values = call_score_pool(part, columns) if isinstance(part, PoolCriterion) else [row[0] for row in columns]
            sign = -1.0 if is_higher_better(part) else 1.0
            for i, rank in enumerate(_mean_ranks([sign * value for value in values])):
                totals[i] += weight * rank if values[i] == values[i] else math.nan  # NaN is the caller's to report
        return totals

    def higher_is_better(self) -> bool:
        return False


def _width(part: AnyCriterion) -> int:
    return part.num_features if isinstance(part, PoolCriterion) else 1


def _mean_ranks(keys: Sequence[float]) -> list[float]:
    """Return the rank of each key, 0 for the smallest; equal keys have the mean of their ranks."""
    return [sum(k < key for k in keys) + (sum(k == key for k in keys) - 1) / 2 for key in keys]
