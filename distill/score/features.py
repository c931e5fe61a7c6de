"""Features of finished traces: what every criterion is computed from, one row per trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, ClassVar

from torch import Tensor

from genssd.distill.answers.forms import Verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.traces import Trace, describe_source
from genssd.distill.score.teacher import NO_LOGPROBS, TeacherReader, has_recorded, read_recorded
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.candidate import Candidate
from genssd.engine.criteria.criterion import (
    AnyCriterion,
    PoolCriterion,
    RatioCriterion,
    needs_answer,
    needs_teacher,
    needs_verdict,
)
from genssd.engine.criteria.criterion_calls import call_features, call_ratio, call_score
from genssd.engine.criteria.criterion_names import resolve
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget
from genssd.engine.setup.model_facts import ModelFacts
from genssd.engine.setup.resources import ANSWER_ROOM
from genssd.engine.texts.loops import LoopGuard
from genssd.engine.texts.steps import step_spans
from genssd.kernels.logprob import TokenStats

BATCH_TOKENS = 16384
"""Number of tokens of prompts and responses that are given to the engine at once."""
FED_TOKENS = 4096
"""Number of tokens that are given to one of several engines at once, which divide the traces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """The criteria, and the models that they read."""

    criteria: Mapping[str, AnyCriterion]
    models: ModelFacts
    teacher: TeacherReader | None
    """Teacher among the models; None takes the log-probabilities that the rows record."""
    verify: bool
    """Whether answers are judged where the row has no verdict."""

    def find_fault(self, trace: Trace) -> str | None:
        """Return why the criteria cannot judge a trace; None if they can."""
        longest = self.models.max_sequence_length("student")
        reading = next((name for name, criterion in self.criteria.items() if needs_answer(criterion)), None)
        if reading is not None:
            if trace.answer is None:
                return f"no reference answer, which {reading} reads"
            num_answer = len(self.models.tokenizer("student").encode_plain(trace.answer))
            if trace.num_tokens + num_answer > longest - ANSWER_ROOM:
                return (
                    f"with its reference answer longer than the {format_count(longest, 'token')} that the student takes"
                )
        judging = next((name for name, criterion in self.criteria.items() if needs_verdict(criterion)), None)
        if judging is not None and trace.correct is None and (trace.answer is None or not self.verify):
            return f"no verdict, which {judging} reads, and no reference answer to judge it by"
        if self.teacher is not None:
            return self.teacher.find_fault(trace)
        asking = next((name for name, criterion in self.criteria.items() if needs_teacher(criterion)), None)
        if asking is None or has_recorded(trace):
            return None
        return NO_LOGPROBS.format(criterion=asking)

    def iter_features(self, engine: Engine, traces: Sequence[Trace]) -> Iterator[dict[str, Any]]:
        """Yield the line of features.jsonl of every trace of a batch. engine: one over the models."""
        logprobs: Sequence[Tensor | None] = [None] * len(traces)
        if any(map(needs_teacher, self.criteria.values())):
            logprobs = [read_recorded(t) for t in traces] if self.teacher is None else self.teacher.read(engine, traces)
        stats = engine.score([trace.prompt_ids for trace in traces], [trace.response_ids for trace in traces])
        judge = AnswerJudge(engine.tokenizer("student"))
        for trace, of_trace, teacher_logprob in zip(traces, stats, logprobs, strict=True):
            verdict: Verdict | None = None
            if trace.correct is None and self.verify and trace.answer is not None:
                verdict = judge.judge(trace.prompt_ids, trace.response_ids, trace.answer)
            correct = trace.correct if verdict is None else verdict.is_correct
            candidate = make_candidate(trace, engine, of_trace, teacher_logprob, correct=correct)
            if self.teacher is None and trace.writer is not None:  # the recorded log-probabilities, of its own tokens
                candidate = replace(candidate, spans=trace.writer.spans)
            yield self._describe(trace, candidate, verdict)

    def _describe(self, trace: Trace, candidate: Candidate, verdict: Verdict | None) -> dict[str, Any]:
        """Return a line of features.jsonl. Raises InputError when a criterion gives NaN."""
        features = {
            name: list(call_features(criterion, candidate))
            if isinstance(criterion, PoolCriterion)
            else [call_score(criterion, candidate)]
            for name, criterion in self.criteria.items()
        }
        for name, values in features.items():
            if any(math.isnan(value) for value in values):
                raise InputError(f"the criterion {name} gave NaN for {trace.where}")
        content = trace.response_ids[: len(trace.response_ids) - trace.finished]
        return {
            "source": describe_source(trace),
            "prompt": trace.prompt_key,
            "teacher": trace.teacher,
            "tokens": len(trace.response_ids),
            "steps": len(step_spans(self.models.tokenizer("student").pieces(content))),
            "finished": trace.finished,
            "loop": bool(LoopGuard().period(trace.response_ids)),
            "correct": candidate.correct,
            "undecided": None if verdict is None else verdict.undecided,
            "ratios": {
                name: [make_jsonable(part) for part in call_ratio(criterion, candidate)]
                for name, criterion in self.criteria.items()
                if isinstance(criterion, RatioCriterion)
            },
            "features": {name: [make_jsonable(value) for value in values] for name, values in features.items()},
        }


def make_candidate(
    trace: Trace, engine: Engine, stats: TokenStats, teacher_logprob: Tensor | None, *, correct: bool | None
) -> Candidate:
    """Return a trace as criteria see it: a whole response. correct: None where it is not known."""
    return Candidate(
        token_ids=trace.response_ids,
        stats=stats,
        teacher_logprob=teacher_logprob,
        final=True,
        finished=trace.finished,
        stream=int.from_bytes(blake2b(trace.where.encode(), digest_size=8).digest(), "little"),
        pieces_of=engine.tokenizer("student").pieces,
        local_logprob=partial(engine.local_logprob, trace.prompt_ids),
        activations=partial(engine.mean_activations, trace.prompt_ids),
        encode=engine.tokenizer("student").encode_plain,
        answer=trace.answer,
        correct=correct,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreWork:
    """The features of finished traces; a `Work`, whose items are places of traces."""

    traces: Mapping[int, Trace]
    """Traces to score by their places, the longest ones first."""
    criteria: Sequence[str]
    has_teacher: bool
    """Whether the teacher is among the models."""
    verify: bool

    most_tokens: ClassVar[int] = 0

    @property
    def items(self) -> Sequence[int]:
        """The places of all traces."""
        return list(self.traces)

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the line of features.jsonl of every trace; see `Work`."""
        scorer = Scorer(
            criteria={name: resolve(name) for name in self.criteria},
            models=engine,
            teacher=TeacherReader(engine) if self.has_teacher else None,
            verify=self.verify,
        )
        for places in _iter_batches(self.traces, feed):
            rows = scorer.iter_features(engine, [self.traces[place] for place in places])
            yield from zip(places, rows, strict=True)


def _iter_batches(traces: Mapping[int, Trace], feed: Feed | None) -> Iterator[Sequence[int]]:
    """Yield the places of traces in batches of at most BATCH_TOKENS tokens, or of one trace.

    Those that a feed hands out come in batches of FED_TOKENS, so that other workers have some as well.
    """
    limit = BATCH_TOKENS if feed is None else FED_TOKENS
    waiting = iter(traces)
    batch: list[int] = []
    tokens = 0
    while True:
        place = next(waiting, None) if feed is None else feed.take(wait=not batch)
        size = 0 if place is None else traces[place].num_tokens
        if batch and (place is None or tokens + size > limit):
            yield batch
            batch, tokens = [], 0
        elif place is None:
            return
        if place is not None:
            batch.append(place)
            tokens += size


def make_jsonable(value: float) -> float | str:
    """Return the value, or its text where it is infinite, for which JSON has no number."""
    return value if math.isfinite(value) else str(value)
