"""The judgement of one round: every candidate's criterion value, and which candidates may be kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import Verdict
from genssd.engine.criteria.criterion import AnyCriterion
from genssd.engine.criteria.criterion_calls import evaluate, evaluate_distinct, is_higher_better
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.decoding.branch import Branch
from genssd.engine.search.choice import draw_order, softmax
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.search.selection import CandidateRecord
from genssd.engine.texts.loops import LoopGuard


@dataclass(slots=True, eq=False)
class JudgedCandidate:
    """A candidate branch with its criterion value and, so far, its verdict."""

    branch: Branch
    score: float
    verdict: Verdict = "kept"
    probability: float | None = None
    """Probability of the candidate in the first draw; None where no draw chose, or it took no part."""

    def record(self, attempt: int) -> CandidateRecord:
        """Return what the search's outcome keeps of the candidate. attempt: how often its round was sampled before."""
        assert self.branch.ended is not None
        assert self.branch.reading is not None
        return CandidateRecord(
            trace=self.branch.trace,
            token_ids=tuple(self.branch.chunk),
            reading=self.branch.reading,
            stats=self.branch.stats,
            teacher_logprob=self.branch.writer_logprob,
            ended=self.branch.ended,
            stop_reason=self.branch.stop_reason,
            score=self.score,
            verdict=self.verdict,
            attempt=attempt,
            teacher=self.branch.writer,
            probability=self.probability,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """The rules by which a search judges candidates and responses."""

    options: SearchOptions
    criterion: AnyCriterion
    """Criterion of the options, as an object."""
    loop_guard: LoopGuard | None
    """Loop guard of the options with its limits; None for none."""

    @staticmethod
    def from_options(options: SearchOptions) -> Judge:
        """Make the judge of a search with these options."""
        guard = LoopGuard() if options.loop_guard is True else options.loop_guard
        return Judge(options=options, criterion=resolve(options.criterion), loop_guard=guard or None)

    def is_acceptable(self, score: float) -> bool:
        """Return whether a value is no worse than the threshold."""
        threshold = self.options.threshold
        if threshold is None:
            return True
        return score >= threshold if is_higher_better(self.criterion) else score <= threshold

    def sort_key(self, score: float) -> float:
        """Return a number that is smaller the better the value is: the value or its negative."""
        return -score if is_higher_better(self.criterion) else score

    def judge_round(self, candidates: Sequence[Branch], label: str) -> list[JudgedCandidate]:
        """Score all candidates of one prompt's round, which compete with each other; all are "kept" so far."""
        scores = evaluate_distinct(
            self.criterion, [branch.candidate().lengthened(self.options.chunk.shortest) for branch in candidates]
        )
        if any(math.isnan(score) for score in scores):
            raise InputError(f"the criterion {self.criterion!r} returned NaN for a candidate of {label}")
        return [JudgedCandidate(branch, score) for branch, score in zip(candidates, scores, strict=True)]

    def reject_unfit(self, siblings: Sequence[JudgedCandidate], *, by_text: bool = False) -> None:
        """Set the verdict of empty responses, duplicates, loops and values beyond the threshold among the candidates of
        one response.

        by_text: whether candidates are duplicates when the student reads the same, because their writers have different
        tokenizers; else when they have the same tokens.
        """
        seen: set[object] = set()
        for judged in siblings:
            tokens = _read_text(judged.branch) if by_text else tuple(judged.branch.chunk)
            if not judged.branch.token_ids:
                judged.verdict = "empty"
            elif tokens in seen:
                judged.verdict = "duplicate"
            elif self.loop_guard is not None and self.loop_guard.period(judged.branch.token_ids):
                judged.verdict = "loop"
            elif not self.is_acceptable(judged.score):
                judged.verdict = "threshold"
            seen.add(tokens)

    def choose(self, acceptable: Sequence[JudgedCandidate], places: int) -> list[JudgedCandidate]:
        """Return the candidates of a round that are kept: the best ones, or with a selection temperature those drawn.

        acceptable: candidates of the round that were not rejected. A draw sets their probabilities.
        """
        losses = [self.sort_key(one.score) for one in acceptable]
        temperature = self.options.selection_temperature
        if temperature == 0.0:
            order = sorted(range(len(losses)), key=losses.__getitem__)
        else:
            probabilities = softmax(losses, temperature)
            for one, probability in zip(acceptable, probabilities, strict=True):
                one.probability = probability
            order = draw_order(
                probabilities, losses, [(one.branch.stream, one.branch.num_written) for one in acceptable]
            )
        return [acceptable[i] for i in order[:places]]

    def score_responses(self, branches: Sequence[Branch], label: str) -> list[float]:
        """Return the criterion's values of whole committed responses to one prompt, which compete with each other."""
        scores = evaluate(self.criterion, [branch.response() for branch in branches])
        if any(math.isnan(score) for score in scores):
            raise InputError(f"the criterion {self.criterion!r} returned NaN for a response to {label}")
        return scores


def _read_text(candidate: Branch) -> object:
    """Return what the student reads of a candidate: its tokens, and the bytes that are held back."""
    assert candidate.reading is not None
    return candidate.reading.ids, candidate.reading.held
