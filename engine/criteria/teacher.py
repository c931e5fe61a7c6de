"""Criteria that read the teacher's log-probabilities of its own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions
from genssd.engine.criteria.candidate import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherStudentGap(CheckedOptions):
    """Mean of log p(teacher) - log p(student) over the chunk; higher is better: the teacher is sure where the student
    is not (DASD, 2601.09088).

    Of two tokenizers the mean is taken over the shortest spans of text that are whole tokens in both (not in the
    paper); a token that reaches into the next chunk is left out, and 0 stands for a chunk without such a span.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether the criterion reads the log-probabilities of the writing model."""
        return True

    def score(self, candidate: Candidate) -> float:
        teacher = _teacher_logprob(candidate, "divergence")
        if candidate.spans is None:
            return float((teacher - candidate.logprob).mean())
        student = candidate.response_logprob()
        if (before := candidate.history_teacher_logprob) is not None:
            teacher = torch.cat((before.double(), teacher))
        gaps = [
            float(teacher[of_teacher:teacher_end].sum() - student[of_student:student_end].sum())
            for of_student, student_end, of_teacher, teacher_end in candidate.spans.align(
                len(candidate.history_ids), finished=candidate.finished
            )
        ]
        return sum(gaps) / len(gaps) if gaps else 0.0

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogprob(CheckedOptions):
    """The teacher's mean log-probability of the chunk; higher is better. A control that does not ask the student."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the criterion reads the log-probabilities of the writing model."""
        return True

    def score(self, candidate: Candidate) -> float:
        return float(_teacher_logprob(candidate, "teacher_logprob").mean())

    def higher_is_better(self) -> bool:
        return True


def _teacher_logprob(candidate: Candidate, name: str) -> Tensor:
    """Return the teacher's log-probabilities of the chunk, float64. name: the criterion's, for the message."""
    if candidate.teacher_logprob is None:
        raise InputError(f"{name} needs the teacher's log-probabilities, and these responses came without them")
    return candidate.teacher_logprob.double()
