"""Controls: criteria that do not ask the student, which any other criterion has to beat."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.common.options_check import CheckedOptions
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.likelihood import Scope
from genssd.engine.models.sampling import uniform


@dataclass(frozen=True, slots=True, kw_only=True)
class Length(CheckedOptions):
    """Number of tokens. A control: many criteria come down to it."""

    scope: Scope = "chunk"
    """Tokens that are counted: the chunk's, or those of the response so far."""
    longest: bool = False
    """Whether more tokens are better."""

    def score(self, candidate: Candidate) -> float:
        return float(len(candidate.token_ids) + (len(candidate.history_ids) if self.scope == "trajectory" else 0))

    def higher_is_better(self) -> bool:
        return self.longest


@dataclass(frozen=True, slots=True, kw_only=True)
class Random(CheckedOptions):
    """A number from the candidate's own random stream: the control that any criterion has to beat."""

    def score(self, candidate: Candidate) -> float:
        # the position of the chunk's end: the first child has its parent's stream, and a short last chunk is judged
        # with a part of its history
        return uniform(candidate.stream, len(candidate.history_ids) + len(candidate.token_ids))

    def higher_is_better(self) -> bool:
        return True
