"""A criterion that tests can compute from tokens alone, and that prefers no model's text."""

from __future__ import annotations

from collections.abc import Sequence

from genssd.engine.criteria.candidate import Candidate


def token_sum(token_ids: Sequence[int]) -> float:
    """The sum of the ids modulo a prime."""
    return float(sum(token_ids) % 97)


class TokenSum:
    """`token_sum` of a candidate; higher is better."""

    def score(self, candidate: Candidate) -> float:
        return token_sum(candidate.token_ids)

    def higher_is_better(self) -> bool:
        return True
