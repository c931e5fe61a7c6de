"""Lines of selections.jsonl, decisions.jsonl and responses.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from genssd.distill.data.problems import ProblemRow
from genssd.distill.data.written_rows import TextPrompt, add_opening, make_conversation
from genssd.distill.select.notes import ResponseNotes
from genssd.distill.select.turns import TwoWriterCompletion
from genssd.engine.calls.generation import Completion
from genssd.engine.readers.pair_prompts import PairPrompt
from genssd.engine.search.selection import CandidateRecord, RoundRecord, Selection, TeacherUse, Trajectory
from genssd.kernels.logprob import TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A model as rows name it."""

    name: str
    """Hub id, directory or URL."""
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Origin of all lines of one run: its data, its criterion, and its models."""

    data: str
    """Name of the data file."""
    criterion: str
    teachers: Sequence[ModelRecord]
    """The teachers, in their order."""
    student: ModelRecord
    tokenizer: str
    """Fingerprint of the student's tokenizer, whose token ids the rows have."""
    teacher_tokenizer: str | None
    """Fingerprint of the teacher's tokenizer, where the student read by bytes; else None, and where several teachers
    have different tokenizers."""

    @property
    def teacher(self) -> ModelRecord:
        """The teacher; several are joined by + in name and fingerprint."""
        return ModelRecord(
            name=" + ".join(one.name for one in self.teachers),
            fingerprint="+".join(one.fingerprint for one in self.teachers),
        )


def make_selection_row(
    selection: Selection, problem: ProblemRow, origin: Origin, notes: Sequence[ResponseNotes], opening: str
) -> dict[str, Any]:
    """Return a line of selections.jsonl. notes: on every trajectory, in order. opening: see `add_opening`.

    `datasets` loads it and TRL trains on it unchanged; genssd trains on its token ids, which are the student's. Where
    the student read by bytes, the row has the teacher's ids as well, and the number of bytes in every token of both.
    """
    best = selection.best
    text = add_opening(problem.prompt, opening, best.text)
    return {
        **make_conversation(TextPrompt(text=problem.prompt), text, problem.answer),
        "status": best.status,
        "stop_reason": best.stop_reason,
        **notes[0].as_json(),
        "score": _to_json(best.score),
        "criterion": origin.criterion,
        "chunks": [
            {
                "tokens": len(reading.ids),
                "score": _to_json(c.score),
                "runner_up": _to_json(c.runner_up),
                "forced": c.is_forced,
                **({"teacher": origin.teachers[c.teacher].name} if selection.teachers else {}),
            }
            for c, reading in zip(best.chunks, best.readings, strict=True)
        ],
        "prompt_ids": list(selection.prompt_ids),
        "student_prompt_ids": list(selection.student_prompt_ids),
        "lead_tokens": selection.num_lead,
        "completion_ids": list(best.student_ids),
        **_describe_bytes(best),
        **({} if origin.teacher_tokenizer is None else {"teacher_tokenizer": origin.teacher_tokenizer}),
        "others": [
            {
                "completion": add_opening(problem.prompt, opening, trajectory.text),
                **_describe_trajectory(trajectory),
                **note.as_json(),
            }
            for trajectory, note in zip(selection.trajectories[1:], notes[1:], strict=True)
        ],
        "tokens_sampled": selection.tokens_sampled,
        "rounds": dict(Counter(record.decision for record in selection.rounds)),
        "ended_by": selection.ended_by,
        "index": problem.index,
        "source": {"file": origin.data, "line": problem.line},
        "seed": selection.seed,
        "occurrence": selection.occurrence,
        "tokenizer": origin.tokenizer,
        "teacher": asdict(origin.teacher),
        **_describe_teachers(selection, origin),
        "student": asdict(origin.student),
    }


def _describe_teachers(selection: Selection, origin: Origin) -> dict[str, Any]:
    """Return the field of what each of several teachers did; none for one teacher."""
    if not selection.teachers:
        return {}
    pairs = zip(origin.teachers, selection.teachers, strict=True)
    return {"teachers": [{**asdict(record), **_describe_use(use)} for record, use in pairs]}


def _describe_use(use: TeacherUse) -> dict[str, Any]:
    """Return what a teacher did, with its time in whole microseconds."""
    return {**asdict(use), "seconds": round(use.seconds, 6)}


def make_response_row(
    problem: ProblemRow,
    prompt: PairPrompt,
    completions: Sequence[Completion],
    notes: Sequence[ResponseNotes],
    opening: str,
    run_fields: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a line of responses.jsonl, in the form of a selection whose best trajectory is the first response.

    notes: on every completion, in order. opening: see `add_opening`. run_fields: fields that describe the run, added to
    the line.
    """
    texts = [add_opening(problem.prompt, opening, completion.text) for completion in completions]
    first, *others = (
        {
            "status": completion.status,
            "stop_reason": completion.stop_reason,
            **note.as_json(),
            "substituted": completion.substituted,
            "completion_ids": list(completion.token_ids),
            **_describe_turns(completion),
        }
        for completion, note in zip(completions, notes, strict=True)
    )
    return {
        **make_conversation(TextPrompt(text=problem.prompt), texts[0], problem.answer),
        **first,
        "prompt_ids": list(prompt.teacher),
        "student_prompt_ids": list(prompt.student),
        "lead_tokens": prompt.num_lead,
        "others": [{"completion": text, **other} for text, other in zip(texts[1:], others, strict=True)],
        "index": problem.index,
        **run_fields,
    }


def _describe_turns(completion: Completion) -> dict[str, Any]:
    """Return the fields that say who wrote each chunk of a response; none where one model wrote it."""
    if not isinstance(completion, TwoWriterCompletion):
        return {}
    chunks = [
        {
            "tokens": chunk.tokens,
            "characters": chunk.characters,
            "writer": chunk.writer,
            "score": _to_json(chunk.score),
            "runner_up": _to_json(chunk.runner_up),
        }
        for chunk in completion.chunks
    ]
    return {"chunks": chunks, "tokens_sampled": completion.sampled_tokens}


def make_decision_row(selection: Selection, index: int) -> dict[str, Any]:
    """Return a line of decisions.jsonl: all that another criterion needs to judge without generating again.

    index: that of the problem's row in the data.
    """
    return {
        "index": index,
        "rounds": [_describe_round(record) for record in selection.rounds],
        "ended_by": selection.ended_by,
        "candidates": [
            {**_describe_candidate(record), **({"teacher": record.teacher} if selection.teachers else {})}
            for record in selection.tree
        ],
        **({"teachers": [_describe_use(use) for use in selection.teachers]} if selection.teachers else {}),
    }


def _describe_round(record: RoundRecord) -> dict[str, Any]:
    """Return the fields of a round; those of several teachers only where there are several."""
    return {name: value for name, value in asdict(record).items() if name != "teachers" or value is not None}


def _describe_trajectory(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "completion_ids": list(trajectory.student_ids),
        **_describe_bytes(trajectory),
        "score": _to_json(trajectory.score),
        "status": trajectory.status,
        "stop_reason": trajectory.stop_reason,
    }


def _describe_bytes(trajectory: Trajectory) -> dict[str, Any]:
    """Return the fields of a response that the student read by bytes; none where the tokens are the teacher's."""
    if not trajectory.readings or trajectory.readings[0].lengths is None:
        return {}
    return {
        "completion_bytes": [length for reading in trajectory.readings for length in reading.lengths or ()],
        "teacher_ids": list(trajectory.token_ids),
        "teacher_bytes": [length for reading in trajectory.readings for length in reading.writer_lengths or ()],
        "drifted": trajectory.is_drifted,
    }


def _describe_candidate(record: CandidateRecord) -> dict[str, Any]:
    reading = record.reading
    by_bytes = {
        "bytes": list(reading.judged_lengths or ()),
        "provisional": reading.is_provisional,
        "teacher_ids": list(record.token_ids),
        "teacher_bytes": list(reading.writer_lengths or ()),
    }
    return {
        "trace": list(record.trace),
        "attempt": record.attempt,
        "verdict": record.verdict,
        "score": _to_json(record.score),
        "probability": record.probability,
        "ended": record.ended,
        "stop_reason": record.stop_reason,
        "token_ids": list(reading.judged_ids),
        **({} if reading.lengths is None else by_bytes),
        "teacher_logprob": _to_decimals(record.teacher_logprob),
        "student": _describe_stats(record.stats),
    }


def _describe_stats(stats: TokenStats) -> dict[str, list[float] | list[int]]:
    return {
        "logprob": _to_decimals(stats.logprob),
        "entropy": _to_decimals(stats.entropy),
        "sum_p2": _to_decimals(stats.sum_p2),
        "logsumexp": _to_decimals(stats.logsumexp),
        "rank": stats.rank.tolist(),
    }


def _to_decimals(values: Tensor) -> list[float]:
    """Return the shortest decimals that read back as the same float32."""
    return [float(text) for text in np.asarray(values.cpu(), dtype=np.float32).astype(str)]


def _to_json(value: float | None) -> float | None:
    """Return the value, or None where it is NaN or infinite, which JSON has no number for."""
    return None if value is None or not np.isfinite(value) else float(value)
