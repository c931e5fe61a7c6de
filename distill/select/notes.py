"""What the rows of `select` and `generate` say of a response besides its tokens and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from genssd.distill.answers.accuracy import describe_verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.data.response_limits import CutBy, ResponseLimits
from genssd.engine.calls.generation import Completion
from genssd.engine.common.model_choices import Role
from genssd.engine.search.selection import Selection
from genssd.engine.texts.text import Tokenizer

LOGPROB_DIGITS = 6
"""Significant decimal digits of the teacher's log-probabilities in the rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseNotes:
    """What a row says of one response besides its tokens and text."""

    correct: bool | None
    """Whether it gives the reference answer; None where there is none, or where it could not be judged."""
    undecided: str | None
    """Why it could not be judged; None where it was, or where there is no reference answer."""
    cut_by: CutBy | None
    """What cut it off; None where nothing did."""
    teacher_logprobs: tuple[float, ...] | None
    """The teacher's log-probability of each token, at temperature 1 over the whole vocabulary; None where one of them
    is infinite."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields of a row."""
        logprobs = None if self.teacher_logprobs is None else list(self.teacher_logprobs)
        return {
            "correct": self.correct,
            "undecided": self.undecided,
            "cut_by": self.cut_by,
            "teacher_logprobs": logprobs,
        }


class NoteMaker:
    """Judges responses, and finds what cut them off.

    tokenizer: the one whose token ids of a response are judged, the teacher's. by_student: whether it is the student's,
    because several teachers with different tokenizers wrote.
    """

    def __init__(self, tokenizer: Tokenizer, limits: ResponseLimits, *, by_student: bool = False) -> None:
        self._judge = AnswerJudge(tokenizer)
        self._limits = limits
        self._by_student = by_student

    def of_selection(self, selection: Selection, answer: str | None) -> list[ResponseNotes]:
        """Return the notes on every trajectory of a selection, in order."""
        logprob_of = {record.trace: record.teacher_logprob for record in selection.tree}
        num_prompt: dict[Role, int] = {
            "teacher": len(selection.prompt_ids), "student": len(selection.student_prompt_ids)
        }  # fmt: skip
        notes = []
        for trajectory in selection.trajectories:
            trace = trajectory.trace
            parts = [logprob_of[trace[:depth]] for depth in range(1, len(trace) + 1)]
            logprobs = torch.cat(parts).tolist() if parts else []
            ids, status = trajectory.token_ids, trajectory.status
            note = self._note(selection.prompt_ids, num_prompt, ids, status, logprobs, answer)
            if self._by_student and answer is not None:
                verdict = self._judge.judge(selection.student_prompt_ids, trajectory.student_ids, answer)
                note = replace(note, **describe_verdict(verdict))
            notes.append(note)
        return notes

    def of_completions(
        self,
        prompt_ids: Sequence[int],
        num_prompt: Mapping[Role, int],
        completions: Sequence[Completion],
        answer: str | None,
    ) -> list[ResponseNotes]:
        """Return the notes on the responses to one prompt. num_prompt: its number of tokens as each model reads it."""
        return [self._note(prompt_ids, num_prompt, c.token_ids, c.status, c.logprob, answer) for c in completions]

    def _note(
        self,
        prompt_ids: Sequence[int],
        num_prompt: Mapping[Role, int],
        token_ids: Sequence[int],
        status: str,
        logprobs: Sequence[float],
        answer: str | None,
    ) -> ResponseNotes:
        is_judged = answer is not None and not self._by_student
        verdict = self._judge.judge(prompt_ids, token_ids, answer) if is_judged and answer is not None else None
        finite = bool(np.isfinite(logprobs).all())
        return ResponseNotes(
            **describe_verdict(verdict),
            cut_by=self._limits.find_cut(status, len(token_ids), num_prompt),
            teacher_logprobs=tuple(float(f"{value:.{LOGPROB_DIGITS}g}") for value in logprobs) if finite else None,
        )


def list_responses(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the responses of a row of `select` or `generate`, the best or first one before the others."""
    return [row, *row["others"]]
