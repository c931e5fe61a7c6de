"""A criterion that ranks by the verdict on a whole response first."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions, check_types
from genssd.engine.criteria.candidate import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class CorrectThenAligned(CheckedOptions):
    """2 for a correct response, plus the fraction of its tokens that are among the student's `top` likeliest; higher is
    better: correctness first, alignment second (BRTS, 2605.09725).

    A response that could not be judged ranks with the wrong ones. The authors' code looks the teacher's tokens up among
    the likeliest after the student's own response, position by position; here it is those after the teacher's own
    tokens, because positions of different texts have nothing to do with each other.
    """

    top: int = 16
    """Maximum rank of a token that counts as aligned."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.top < 1:
            raise InputError(f"brts: top must be at least 1, not {self.top}")

    @property
    def needs_verdict(self) -> bool:
        """Whether the criterion reads `Candidate.correct`."""
        return True

    @property
    def not_in_search(self) -> str:
        """Why the search cannot use the criterion."""
        return "a chunk is neither right nor wrong"

    def score(self, candidate: Candidate) -> float:
        aligned = float((candidate.stats.rank <= self.top).double().mean()) if len(candidate.stats) else 0.0
        return 2.0 * (candidate.correct is True) + aligned

    def higher_is_better(self) -> bool:
        return True
