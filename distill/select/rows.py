"""The lines of selections.jsonl, decisions.jsonl and responses.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from genssd.distill.data.problems import ProblemRow
from genssd.engine.generation import Completion
from genssd.engine.selection import CandidateRecord, Selection, Trajectory
from genssd.engine.text import Messages
from genssd.kernels.logprob import TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the lines of one run come from: its data, its criterion, its models with their fingerprints."""

    data: str
    criterion: str
    teacher: str
    student: str
    fingerprints: Mapping[str, str]
    tokenizer: str


def selection_row(selection: Selection, problem: ProblemRow, origin: Origin) -> dict[str, Any]:
    """A line of selections.jsonl. Loads with `datasets` and trains in TRL as it is; training here uses the ids."""
    best = selection.best
    return {
        **_conversation(problem, best.text),
        "status": best.status,
        "score": _number(best.score),
        "criterion": origin.criterion,
        "chunks": [
            {"tokens": c.tokens, "score": _number(c.score), "runner_up": _number(c.runner_up)} for c in best.chunks
        ],
        "prompt_ids": list(selection.prompt_ids),
        "student_prompt_ids": list(selection.student_prompt_ids),
        "completion_ids": list(best.token_ids),
        "others": [_other(trajectory) for trajectory in selection.trajectories[1:]],
        "tokens_sampled": selection.tokens_sampled,
        "index": selection.index,
        "source": {"file": origin.data, "line": problem.line},
        "seed": selection.seed,
        "occurrence": selection.occurrence,
        "tokenizer": origin.tokenizer,
        "teacher": {"name": origin.teacher, "fingerprint": origin.fingerprints["teacher"]},
        "student": {"name": origin.student, "fingerprint": origin.fingerprints["student"]},
    }


def response_row(
    index: int,
    problem: ProblemRow,
    prompt_ids: Sequence[int],
    student_prompt_ids: Sequence[int],
    completions: Sequence[Completion],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """A line of responses.jsonl: the first response as a selection's best one, the others beside it."""
    first, *others = completions
    return {
        **_conversation(problem, first.text),
        "status": first.status,
        "substituted": first.substituted,
        "prompt_ids": list(prompt_ids),
        "student_prompt_ids": list(student_prompt_ids),
        "completion_ids": list(first.token_ids),
        "others": [
            {
                "completion": c.text,
                "completion_ids": list(c.token_ids),
                "status": c.status,
                "substituted": c.substituted,
            }
            for c in others
        ],
        "index": index,
        **origin,
    }


def _conversation(problem: ProblemRow, text: str) -> dict[str, Any]:
    """Prompt and response in the forms that trainers read."""
    answer_turn = [{"role": "assistant", "content": text}]
    plain = isinstance(problem.prompt, str)
    asked: Messages = (
        [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else problem.prompt
    )
    return {
        "messages": [*asked, *answer_turn],
        "prompt": problem.prompt,
        "completion": text if plain else answer_turn,
        "answer": problem.answer,
    }


def decision_row(selection: Selection) -> dict[str, Any]:
    """A line of decisions.jsonl: enough to apply another criterion without generating again."""
    return {"index": selection.index, "candidates": [_candidate(record) for record in selection.tree]}


def _other(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "completion": trajectory.text,
        "completion_ids": list(trajectory.token_ids),
        "score": _number(trajectory.score),
        "status": trajectory.status,
    }


def _candidate(record: CandidateRecord) -> dict[str, Any]:
    return {
        "trace": list(record.trace),
        "verdict": record.verdict,
        "score": _number(record.score),
        "ended": record.ended,
        "token_ids": list(record.token_ids),
        "teacher_logprob": _floats(record.teacher_logprob),
        "student": _stats(record.stats),
    }


def _stats(stats: TokenStats) -> dict[str, list[float] | list[int]]:
    return {
        "logprob": _floats(stats.logprob),
        "entropy": _floats(stats.entropy),
        "sum_p2": _floats(stats.sum_p2),
        "logsumexp": _floats(stats.logsumexp),
        "rank": stats.rank.tolist(),
    }


def _floats(values: Tensor) -> list[float]:
    """The shortest decimals that read back as the same float32."""
    return [float(text) for text in np.asarray(values.cpu(), dtype=np.float32).astype(str)]


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not np.isfinite(value) else float(value)
