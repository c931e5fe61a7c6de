"""How a criterion decides the rounds of a finished search, given the recorded text before each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from genssd.distill.select.decisions import Decisions, LoggedCandidate, LoggedRound
from genssd.engine.criteria.criterion import AnyCriterion
from genssd.engine.criteria.criterion_calls import evaluate_distinct, is_higher_better

FIXED_VERDICTS = ("duplicate", "loop", "empty")
"""Verdicts that no criterion changes."""

Trace = tuple[int, ...]
"""Index of a candidate and of its ancestors in each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRound:
    """One recorded round, and what a criterion chooses in it, given the recorded text before it."""

    logged: LoggedRound
    scores: Mapping[Trace, float | None]
    """Value of every candidate; None where it is infinite."""
    chosen: frozenset[Trace]
    """Candidates that the criterion keeps."""
    rejected: frozenset[Trace]
    """Candidates that the criterion ranks below these."""
    is_exact: bool
    """Whether a search by the criterion would have had this round; else its choice is conditional on the text before
    it."""

    @property
    def decided(self) -> tuple[LoggedCandidate, ...]:
        """All candidates of the round."""
        return self.logged.candidates

    @classmethod
    def as_logged(
        cls, logged: LoggedRound, scores: Sequence[float], *, higher_is_better: bool, is_exact: bool
    ) -> JudgedRound:
        """Return a round as the run's own criterion decided it, with the values in the log.

        Where the run drew its choice (selection_temperature), the criterion chooses the best of the candidates that
        took part. scores: values of now, by which infinite ones are ranked. is_exact: as in `by_criterion`.
        """
        decided = logged.candidates
        ranked = rank_eligible(decided, scores, higher_is_better=higher_is_better)
        chosen = [d.trace for d in ranked if d.is_kept or d.verdict == "beaten"]
        places = sum(d.is_kept for d in decided)
        return cls(
            logged=logged,
            scores={d.trace: d.score for d in decided},
            chosen=frozenset(chosen[:places]),
            rejected=frozenset(chosen[places:]),
            is_exact=is_exact,
        )

    @classmethod
    def by_criterion(
        cls, logged: LoggedRound, scores: Sequence[float], *, higher_is_better: bool, is_exact: bool
    ) -> JudgedRound:
        """Return a round as another criterion decides it, which keeps as many candidates as the run did.

        The run's threshold is a value of its own criterion and rejects nothing here; how many candidates the search
        would have kept without it is not known, nor whether it would have sampled the round again, so that a round with
        such a candidate is not exact, and neither is one that follows. is_exact: whether all earlier rounds of the
        prompt are exact and come out as in the run.
        """
        decided = logged.candidates
        ranked = [d.trace for d in rank_eligible(decided, scores, higher_is_better=higher_is_better)]
        places = sum(d.is_kept for d in decided)
        return cls(
            logged=logged,
            scores={d.trace: s if math.isfinite(s) else None for d, s in zip(decided, scores, strict=True)},
            chosen=frozenset(ranked[:places]),
            rejected=frozenset(ranked[places:]),
            is_exact=is_exact and not any(d.verdict in ("threshold", "forced") for d in decided),
        )


def rank_eligible(
    decided: Sequence[LoggedCandidate], scores: Sequence[float], *, higher_is_better: bool
) -> list[LoggedCandidate]:
    """Return the candidates of a round that may be kept, best first. scores: of all candidates of the round."""
    sign = -1.0 if higher_is_better else 1.0
    eligible = [i for i, d in enumerate(decided) if d.verdict not in FIXED_VERDICTS]
    return [decided[i] for i in sorted(eligible, key=lambda i: sign * scores[i])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One recorded round as a criterion decides it, beside what the run kept."""

    judged: JudgedRound
    values: tuple[float, ...]
    """The criterion's value of every candidate of the round, in order; it may be infinite."""
    kept: tuple[Trace, ...]
    """Candidates that the run kept."""
    preferred: tuple[Trace, ...]
    """Candidates that the criterion ranks first, best first: as many as the run kept."""
    is_contested: bool
    """Whether the round has more acceptable candidates than places."""

    @property
    def agrees(self) -> bool:
        """Whether the criterion keeps what the run kept."""
        return set(self.kept) == set(self.preferred)


def judge_rounds(decisions: Decisions, criterion: AnyCriterion, *, shortest: int, is_own: bool) -> Iterator[Judgement]:
    """Yield the rounds of one prompt as a criterion decides them, in order.

    shortest: number of tokens of the shortest chunk that is judged by itself (`Chunk.shortest`). is_own: whether the
    criterion is that of the run. Raises InputError where the criterion cannot judge a candidate.
    """
    higher_is_better = is_higher_better(criterion)
    is_exact = True
    for logged in decisions.rounds:
        decided = logged.candidates
        values = evaluate_distinct(criterion, [d.candidate.lengthened(shortest) for d in decided])
        judge = JudgedRound.as_logged if is_own else JudgedRound.by_criterion
        judged = judge(logged, values, higher_is_better=higher_is_better, is_exact=is_exact)
        kept = tuple(d.trace for d in decided if d.is_kept)
        ranked = rank_eligible(decided, values, higher_is_better=higher_is_better)
        judgement = Judgement(
            judged=judged,
            values=tuple(values),
            kept=kept,
            preferred=tuple(d.trace for d in ranked[: len(kept)]),
            is_contested=len(ranked) > len(kept),
        )
        # the run's own choice, unless it was drawn, is the criterion's even where two values changed in a last bit
        is_exact = judged.is_exact and (judgement.agrees or (is_own and not logged.is_drawn))
        yield judgement
