"""Policies: what a search does after a round none of whose candidates is acceptable.

A policy gets the round and returns the step that follows it. Another policy, such as one that asks another teacher, is
another class with these two methods and a line in POLICIES; what it asks of the search goes into `Step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from genssd.engine.chunk import Chunk
from genssd.engine.judging import Judge, JudgedCandidate
from genssd.engine.outcomes import Decision, Verdict
from genssd.engine.search_options import SearchOptions, Unlearnable


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlearnableRound:
    """A decoded and judged round of one prompt none of whose candidates is acceptable."""

    attempt: int
    """Number of times that the round was sampled again before."""
    chunk: Chunk
    """Rule by which its candidates ended."""
    judged: Sequence[JudgedCandidate]
    """All candidates of the last attempt, with the verdicts that reject them."""
    judge: Judge
    """Rules by which they were judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What follows a judged round."""

    decision: Decision
    """Name of the step in the log."""
    again: Chunk | None = None
    """Rule by which further candidates of the same branches end, with noise of their own; None samples none."""
    accepted: Sequence[JudgedCandidate] = ()
    """Candidates that are committed, best first. Branches without one end as pruned, unless they are sampled again."""
    verdict: Verdict = "kept"
    """Verdict of the accepted candidates."""


PRUNE = Step(decision="pruned")


class Policy(Protocol):
    """A rule for rounds without an acceptable candidate."""

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return what follows the round. It depends on the round alone, so that a search can be repeated."""
        ...

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the largest number of tokens that the search samples for one candidate of one branch in all rounds.

        max_tokens: maximum number of tokens in a response.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stop:
    """Prune the branches of the round."""

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return the end of the branches."""
        return PRUNE

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the length of a response."""
        return max_tokens


@dataclass(frozen=True, slots=True)
class Resample:
    """Sample further candidates of the same branches, up to `max_resamples` times."""

    max_resamples: int

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return another attempt, or the end of the branches after the last one."""
        if round_.attempt >= self.max_resamples:
            return PRUNE
        return Step(decision="resampled", again=round_.chunk)

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the length of a response times the number of attempts."""
        return max_tokens * (1 + self.max_resamples)


@dataclass(frozen=True, slots=True)
class Shorten:
    """Sample candidates of half the length, again and again, down to `min_chunk_tokens`."""

    min_chunk_tokens: int

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return an attempt with a shorter chunk, or the end of the branches after the shortest one."""
        shorter = round_.chunk.halved(self.min_chunk_tokens)
        return PRUNE if shorter is None else Step(decision="shortened", again=shorter)

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the tokens of all lengths of a chunk, for each of the shortest chunks in a response."""
        chunk: Chunk | None = options.chunk
        per_round = 0
        while chunk is not None:
            per_round += min(chunk.longest, max_tokens)
            chunk = chunk.halved(self.min_chunk_tokens)
        return per_round * math.ceil(max_tokens / min(self.min_chunk_tokens, options.chunk.tokens))


@dataclass(frozen=True, slots=True)
class AcceptBest:
    """Commit the best candidate although it is worse than the threshold; duplicates and loops stay rejected."""

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return the best candidate of the round, or the end of its branches where all are duplicates or loops."""
        missing = [one for one in round_.judged if one.verdict == "threshold"]
        if not missing:
            return PRUNE
        best = min(missing, key=lambda one: round_.judge.sort_key(one.score))
        return Step(decision="forced", accepted=(best,), verdict="forced")

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the length of a response."""
        return max_tokens


POLICIES: Mapping[Unlearnable, Callable[[SearchOptions], Policy]] = {
    "stop": lambda options: Stop(),
    "resample": lambda options: Resample(options.max_resamples),
    "shorten": lambda options: Shorten(options.min_chunk_tokens),
    "accept_best": lambda options: AcceptBest(),
}
"""Policies by the values of the option `on_unlearnable`."""


def make_policy(options: SearchOptions) -> Policy:
    """Return the policy that the options name."""
    return POLICIES[options.on_unlearnable](options)
