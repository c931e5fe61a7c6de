"""Policies: what a search does after a round none of whose candidates is acceptable.

A policy gets the round and returns the step that follows it, and says which teachers write in which attempt. Another
policy is another class with these methods and a line in POLICIES; what it asks of the search goes into `Step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import Decision, Verdict
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.search.judging import Judge, JudgedCandidate
from genssd.engine.search.search_options import SearchOptions, Unlearnable


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
    teachers: Collection[int] = (0,)
    """Indices of the teachers that can go on with a response of the round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What follows a judged round."""

    decision: Decision
    """Name of the step in the log."""
    again: Chunk | None = None
    """Rule by which further candidates of the same branches end, with noise of their own; None samples none. Who writes
    them is said by `Policy.asks`."""
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

    def asks(self, teacher: int, attempt: int) -> bool:
        """Return whether a teacher, by its index, writes candidates in an attempt at a round."""
        ...

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the largest number of tokens that the search samples for one candidate of one branch in all rounds.

        max_tokens: maximum number of tokens in a response.
        """
        ...


class _EveryTeacher:
    """Base of policies in whose attempts all teachers write."""

    __slots__ = ()

    def asks(self, teacher: int, attempt: int) -> bool:
        """Return that every teacher writes in every attempt."""
        return True


@dataclass(frozen=True, slots=True)
class Stop(_EveryTeacher):
    """Prune the branches of the round."""

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return the end of the branches."""
        return PRUNE

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the length of a response."""
        return max_tokens


@dataclass(frozen=True, slots=True)
class Resample(_EveryTeacher):
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
class Shorten(_EveryTeacher):
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
        return per_round * math.ceil(max_tokens / min(self.min_chunk_tokens, options.chunk.least))


@dataclass(frozen=True, slots=True)
class AcceptBest(_EveryTeacher):
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


@dataclass(frozen=True, slots=True)
class AskTeacher:
    """Let the first teacher write, and only where none of its candidates is acceptable the next one, and so on."""

    num_teachers: int

    def asks(self, teacher: int, attempt: int) -> bool:
        """Return whether it is the teacher's turn."""
        return teacher == attempt

    def next_step(self, round_: UnlearnableRound) -> Step:
        """Return an attempt of the next teacher, or the end of the branches after the last one."""
        if not any(teacher > round_.attempt for teacher in round_.teachers):
            return PRUNE
        return Step(decision="asked", again=round_.chunk)

    def most_tokens(self, options: SearchOptions, max_tokens: int) -> int:
        """Return the length of a response for every teacher."""
        return max_tokens * self.num_teachers


POLICIES: Mapping[Unlearnable, Callable[[SearchOptions, int], Policy]] = {
    "stop": lambda options, teachers: Stop(),
    "resample": lambda options, teachers: Resample(options.max_resamples),
    "shorten": lambda options, teachers: Shorten(options.min_chunk_tokens),
    "accept_best": lambda options, teachers: AcceptBest(),
    "ask_teacher": lambda options, teachers: AskTeacher(teachers),
}
"""Functions that make a policy from options and number of teachers, by the values of the option `on_unlearnable`."""


def make_policy(options: SearchOptions, num_teachers: int) -> Policy:
    """Return the policy that the options name for so many teachers.

    Raises InputError where the options need several teachers and there is one, or a budget is too small for all.
    """
    for name, is_set in (
        ("on_unlearnable=ask_teacher", options.on_unlearnable == "ask_teacher"),
        (f"drop_teacher_after={options.drop_teacher_after}", options.drop_teacher_after is not None),
    ):
        if is_set and num_teachers == 1:
            raise InputError(f"{name} needs several teachers, and this engine has one: give teacher= a list of them")
    policy = POLICIES[options.on_unlearnable](options, num_teachers)
    num_writing = sum(policy.asks(teacher, 0) for teacher in range(num_teachers))
    most = num_writing * options.candidates * options.longest_candidate
    if options.prompt_budget.tokens is not None and options.prompt_budget.tokens < most:
        raise InputError(
            f"prompt_budget tokens {options.prompt_budget.tokens} must be at least {most}, which the candidates of "
            f"{num_writing} teachers may take in a first round"
        )
    return policy
