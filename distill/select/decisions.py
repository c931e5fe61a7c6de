"""Reading of a decision log: every candidate as the criterion of the run had it, for another criterion to judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.distill.runs.journal import complete_rows
from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import KEPT, Ending, Verdict
from genssd.engine.criteria.candidate import ActivationMeans, Candidate
from genssd.engine.models.sampling import child_stream, prompt_stream
from genssd.engine.readers.reading import ByteSpans
from genssd.engine.search.selection import RoundRecord
from genssd.engine.texts.text import Tokenizer
from genssd.kernels.logprob import STATISTICS, TokenStats

LocalLogprob = Callable[..., list[Tensor]]
"""Function like `Engine.local_logprob`, whose arguments are prompt ids, response ids and windows."""

Activations = Callable[..., ActivationMeans]
"""Function like `Engine.mean_activations`, whose arguments are prompt ids, response ids and a position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCandidate:
    """One candidate of a decision log."""

    candidate: Candidate
    trace: tuple[int, ...]
    """Index of the candidate's ancestor in each round, its own last."""
    score: float | None
    """Value under the criterion of the run; None where it was infinite."""
    verdict: Verdict
    probability: float | None
    """Probability in the first draw of the round; None where no draw chose, or the candidate took no part."""
    is_provisional: bool = False
    """Whether a student with another tokenizer held all of the chunk back: its tokens are part of the next chunk."""

    teacher: int = 0
    """Index of the teacher that wrote the candidate."""
    ended: Ending = "chunk"
    """Why the candidate ended."""

    @property
    def is_kept(self) -> bool:
        """Whether the candidate became part of a response."""
        return self.verdict in KEPT


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRound:
    """One attempt at a round, as the run decided it."""

    record: RoundRecord
    """Number of the round and of the attempt, and what the search did after it."""
    candidates: tuple[LoggedCandidate, ...]

    @property
    def is_drawn(self) -> bool:
        """Whether the run drew what it kept (selection_temperature)."""
        return any(d.probability is not None for d in self.candidates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Decision log of one prompt."""

    selection: Mapping[str, Any]
    """The prompt's line of selections.jsonl."""
    rounds: tuple[LoggedRound, ...]
    """All attempts at rounds, in order."""


def read_decisions(
    run: Path,
    tokenizer: Tokenizer,
    local_logprob: LocalLogprob | None = None,
    activations: Activations | None = None,
) -> Iterator[Decisions]:
    """Yield the logs of the prompts of a finished or interrupted `genssd select` run, in the order of its journal.

    local_logprob, activations: run the student for the criteria that need it. Raises InputError naming the file and
    line where journal, log and tokenizer do not belong together, and on a journal without a finished prompt.
    """
    journal, log = run / "selections.jsonl", run / "decisions.jsonl"
    logged = complete_rows(log)
    number = 0
    for number, (selection, _) in enumerate(complete_rows(journal), start=1):
        row = next((row for row, _ in logged if row.get("index") == selection.get("index")), None)
        if row is None:
            raise InputError(
                f"{log} does not hold the decisions of {journal}, line {number}, in the order of that file; resume the "
                "run (genssd select --resume with its settings), which puts them in order or makes them again"
            )
        if selection.get("tokenizer") != tokenizer.fingerprint:
            raise InputError(f"{journal}, line {number} was written with another tokenizer than {tokenizer.directory}")
        try:
            yield parse_decisions(selection, row, tokenizer, local_logprob, activations)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{log}, line {number} is no decision of ours: {error!r}") from None
    if not number:
        raise InputError(f"{journal} holds no finished prompt")


def parse_decisions(
    selection: Mapping[str, Any],
    row: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    local_logprob: LocalLogprob | None = None,
    activations: Activations | None = None,
) -> Decisions:
    """Return the log of one prompt from its lines of selections.jsonl and decisions.jsonl.

    tokenizer: the run's; without one, criteria that read the text raise InputError. local_logprob, activations: as for
    `read_decisions`. Raises KeyError, TypeError or ValueError on lines of another form.
    """
    logged = {tuple(fields["trace"]): fields for fields in row["candidates"]}
    pasts = {(): _Past.begin(prompt_stream(selection["seed"], selection["prompt_ids"], selection["occurrence"]))}
    records = [_parse_round(fields) for fields in row["rounds"]]
    rounds: dict[tuple[int, int], list[LoggedCandidate]] = {(r.round, r.attempt): [] for r in records}
    parsed: dict[tuple[int, ...], Candidate] = {}
    for trace, fields in logged.items():
        parent = trace[:-1]
        if parent not in pasts:
            pasts[parent] = pasts[parent[:-1]].extended(parsed[parent], logged[parent])
        past = pasts[parent]
        candidate = parsed[trace] = Candidate(
            token_ids=tuple(fields["token_ids"]),
            stats=_parse_stats(fields["student"]),
            history_ids=past.token_ids,
            history=past.stats,
            teacher_logprob=torch.tensor(fields["teacher_logprob"], dtype=torch.float32),
            history_teacher_logprob=past.teacher_logprob,
            final=fields["ended"] != "chunk",
            finished=fields["ended"] == "finished",
            stream=child_stream(past.stream, len(past.teacher_logprob), trace[-1]),
            pieces_of=None if tokenizer is None else tokenizer.pieces,
            local_logprob=local_logprob and partial(local_logprob, selection["student_prompt_ids"]),
            activations=activations and partial(activations, selection["student_prompt_ids"]),
            encode=None if tokenizer is None else tokenizer.encode_plain,
            answer=selection["answer"],
            spans=past.join_spans(fields),
        )
        rounds[len(trace) - 1, fields["attempt"]].append(
            LoggedCandidate(
                candidate=candidate,
                trace=trace,
                score=fields["score"],
                verdict=fields["verdict"],
                probability=fields["probability"],
                is_provisional=bool(fields.get("provisional")),
                teacher=int(fields.get("teacher", 0)),
                ended=fields["ended"],
            )
        )
    return Decisions(
        selection=selection,
        rounds=tuple(
            LoggedRound(record=record, candidates=tuple(candidates))
            for record, candidates in zip(records, rounds.values(), strict=True)
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Past:
    """The response before some candidates of a log."""

    token_ids: tuple[int, ...]
    """The student's tokens, those left out that were held back."""
    stats: TokenStats
    teacher_logprob: Tensor
    """The teacher's log-probabilities of its tokens, float32 [tokens]."""
    stream: int
    """Random stream of its branch, which follows from the prompt's stream and the places of its chunks."""
    student_bytes: tuple[int, ...] = ()
    """Number of bytes in each of the student's tokens, where it read by bytes."""
    teacher_bytes: tuple[int, ...] = ()
    """Number of bytes in each of the teacher's tokens, where the student read by bytes."""

    @classmethod
    def begin(cls, stream: int) -> _Past:
        """Return the past of the first candidates. stream: that of the prompt."""
        return cls(token_ids=(), stats=TokenStats.empty(), teacher_logprob=torch.empty(0), stream=stream)

    def extended(self, chunk: Candidate, fields: Mapping[str, Any]) -> _Past:
        """Return the past of the candidates after a chunk of this one. fields: the chunk in the log."""
        assert chunk.teacher_logprob is not None
        past = _Past(
            token_ids=self.token_ids,
            stats=self.stats,
            teacher_logprob=torch.cat((self.teacher_logprob, chunk.teacher_logprob)),
            stream=chunk.stream,
            student_bytes=self.student_bytes,
            teacher_bytes=(*self.teacher_bytes, *fields.get("teacher_bytes", ())),
        )
        if fields.get("provisional"):  # its tokens are read again with those of the next chunk
            return past
        return replace(
            past,
            token_ids=self.token_ids + chunk.token_ids,
            stats=TokenStats.concatenate([self.stats, chunk.stats]) if self.token_ids else chunk.stats,
            student_bytes=(*self.student_bytes, *fields.get("bytes", ())),
        )

    def join_spans(self, fields: Mapping[str, Any]) -> ByteSpans | None:
        """Return the bytes in every token up to the end of a candidate; None where tokens are the teacher's."""
        if "bytes" not in fields:
            return None
        return ByteSpans(
            student=(*self.student_bytes, *fields["bytes"]), teacher=(*self.teacher_bytes, *fields["teacher_bytes"])
        )


def _parse_round(fields: Mapping[str, Any]) -> RoundRecord:
    teachers = fields.get("teachers")
    return RoundRecord(**{**fields, "teachers": None if teachers is None else tuple(teachers)})


def _parse_stats(fields: Mapping[str, Any]) -> TokenStats:
    return TokenStats.from_values(
        [torch.tensor(fields[name], dtype=torch.int32 if name == "rank" else torch.float32) for name in STATISTICS]
    )
