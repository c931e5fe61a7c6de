"""Reading of a decision log: every candidate as the criterion of the run had it, for another criterion to judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genssd.distill.runs.journal import complete_rows
from genssd.engine.candidate import ActivationMeans, Candidate
from genssd.engine.errors import InputError
from genssd.engine.reading import ByteSpans
from genssd.engine.sampling import child_stream, prompt_stream
from genssd.engine.selection import KEPT, RoundRecord, Verdict
from genssd.engine.text import Tokenizer
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
            yield _parse_decisions(selection, row, tokenizer, local_logprob, activations)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{log}, line {number} is no decision of ours: {error!r}") from None
    if not number:
        raise InputError(f"{journal} holds no finished prompt")


def _parse_decisions(
    selection: Mapping[str, Any],
    row: Mapping[str, Any],
    tokenizer: Tokenizer,
    local_logprob: LocalLogprob | None,
    activations: Activations | None,
) -> Decisions:
    logged = {tuple(fields["trace"]): fields for fields in row["candidates"]}
    stats = {trace: _parse_stats(fields["student"]) for trace, fields in logged.items()}
    certain = {trace: fields for trace, fields in logged.items() if not fields.get("provisional")}
    root = prompt_stream(selection["seed"], selection["prompt_ids"], selection["occurrence"])
    records = [RoundRecord(**fields) for fields in row["rounds"]]
    rounds: dict[tuple[int, int], list[LoggedCandidate]] = {(r.round, r.attempt): [] for r in records}
    for trace, fields in logged.items():
        ancestors = [trace[:depth] for depth in range(1, len(trace))]
        read = [ancestor for ancestor in ancestors if ancestor in certain]
        history_ids = tuple(token for ancestor in read for token in logged[ancestor]["token_ids"])
        candidate = Candidate(
            token_ids=tuple(fields["token_ids"]),
            stats=stats[trace],
            history_ids=history_ids,
            history=TokenStats.concatenate([stats[a] for a in read]) if read else TokenStats.empty(),
            teacher_logprob=_join_teacher_logprob([fields]),
            history_teacher_logprob=_join_teacher_logprob([logged[ancestor] for ancestor in ancestors]),
            final=fields["ended"] != "chunk",
            finished=fields["ended"] == "finished",
            stream=_derive_stream(root, trace, logged),
            pieces_of=tokenizer.pieces,
            local_logprob=local_logprob and partial(local_logprob, selection["student_prompt_ids"]),
            activations=activations and partial(activations, selection["student_prompt_ids"]),
            encode=tokenizer.encode_plain,
            answer=selection["answer"],
            spans=_join_spans([logged[a] for a in read], [logged[a] for a in ancestors], fields),
        )
        rounds[len(trace) - 1, fields["attempt"]].append(
            LoggedCandidate(
                candidate=candidate,
                trace=trace,
                score=fields["score"],
                verdict=fields["verdict"],
                probability=fields["probability"],
            )
        )
    return Decisions(
        selection=selection,
        rounds=tuple(
            LoggedRound(record=record, candidates=tuple(candidates))
            for record, candidates in zip(records, rounds.values(), strict=True)
        ),
    )


def _parse_stats(fields: Mapping[str, Any]) -> TokenStats:
    return TokenStats.from_values(
        [torch.tensor(fields[name], dtype=torch.int32 if name == "rank" else torch.float32) for name in STATISTICS]
    )


def _join_spans(
    read: Sequence[Mapping[str, Any]], ancestors: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
) -> ByteSpans | None:
    """Return the bytes in every token of a candidate that was read by bytes; None where tokens are the teacher's.

    read: ancestors whose tokens of the student are part of the response.
    """
    if "bytes" not in fields:
        return None
    return ByteSpans(
        student=tuple(length for chunk in (*read, fields) for length in chunk["bytes"]),
        teacher=tuple(length for chunk in (*ancestors, fields) for length in chunk["teacher_bytes"]),
    )


def _join_teacher_logprob(chunks: Sequence[Mapping[str, Any]]) -> Tensor:
    return torch.tensor([value for fields in chunks for value in fields["teacher_logprob"]], dtype=torch.float32)


def _derive_stream(root: int, trace: Sequence[int], logged: Mapping[tuple[int, ...], Mapping[str, Any]]) -> int:
    """Return a candidate's random stream, which follows from the prompt's stream and the positions of its branches."""
    stream, position = root, 0
    for depth, index in enumerate(trace, start=1):
        stream = child_stream(stream, position, index)
        chunk = logged[tuple(trace[:depth])]
        position += len(chunk.get("teacher_ids", chunk["token_ids"]))
    return stream
