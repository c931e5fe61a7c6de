"""Reverse speculation: the student may refuse every single token (Reverse Speculative Decoding, 2509.22230).

The teacher draws a token; the student accepts it when it ranks among its likeliest and is likely enough. After a few
refused tries the student writes the token itself. Both models read every token, so they decode in lockstep.

Shapes:  C candidates   R refused ones   D model width   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from genssd.engine.decoding.drawing import Drawn, draw_filtered, hidden_of, logprob_of
from genssd.engine.decoding.expansion import Lane
from genssd.engine.decoding.speculation_rules import ReverseSpeculation
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import Sampling, attempt_key
from genssd.engine.models.token_runs import nonfinite_logits, response_place
from genssd.kernels.logprob import NonFiniteLogits


class ReverseSpeculativeDrawing:
    """Drawing in which the teacher proposes every token, and the student accepts it or, in the end, draws its own."""

    def __init__(
        self,
        rules: ReverseSpeculation,
        teacher: ModelRunner,
        student: ModelRunner,
        sampling: Sampling,
        *,
        vocabulary: int,
    ) -> None:
        self.writer = teacher
        self.readers = (teacher, student)
        self._rules = rules
        self._student = student
        self._sampling = sampling
        self._vocabulary = vocabulary

    def draw(self, lanes: Sequence[Lane], source_C: Tensor, candidates: Sequence[Lane]) -> Drawn:
        """Draw a token for every candidate; `Branch.substituted` gets the places of those that the student writes."""
        device = self.writer.decoder.device
        source_C = source_C.to(device)
        teacher_logits_CV = self.writer.logits(hidden_of(self.writer, lanes))[source_C]
        student_hidden_CD = hidden_of(self._student, lanes)[source_C]
        tokens_C = torch.empty(len(candidates), dtype=torch.int64, device=device)
        refused_R = torch.arange(len(candidates), device=device)
        for attempt in range(self._rules.tries):
            rows = [candidates[row] for row in refused_R.tolist()]
            proposed_R = self._draw(self.writer, teacher_logits_CV[refused_R], rows, attempt, self._sampling)
            tokens_C[refused_R] = proposed_R
            refused_R = refused_R[~self._are_accepted(student_hidden_CD[refused_R], proposed_R, rows)]
            if not len(refused_R):
                break
        else:
            rows = [candidates[row] for row in refused_R.tolist()]
            logits_RV = self._student.logits(student_hidden_CD[refused_R])
            tokens_C[refused_R] = self._draw(self._student, logits_RV, rows, self._rules.tries, self._rules.student)
            for lane in rows:
                lane.branch.substituted.append(len(lane.branch.chunk))
        return Drawn(tokens_C.tolist(), logprob_of(teacher_logits_CV, tokens_C).tolist())

    def _draw(
        self, runner: ModelRunner, logits_RV: Tensor, rows: Sequence[Lane], attempt: int, sampling: Sampling
    ) -> Tensor:
        """Draw one token per row under a model, int64 [R]. attempt: number of draws before at the same positions."""
        keys = [attempt_key(lane.branch.stream, lane.branch.length, attempt) for lane in rows]
        try:
            return draw_filtered(
                logits_RV[:, : self._vocabulary], torch.tensor(keys, device=logits_RV.device), sampling, checked=True
            )
        except NonFiniteLogits as error:
            raise nonfinite_logits(runner, _place(rows[error.row])) from None

    def _are_accepted(self, hidden_RD: Tensor, tokens_R: Tensor, rows: Sequence[Lane]) -> Tensor:
        """Return which tokens the student accepts, bool [R]."""
        try:
            stats = self._student.decoder.head.score(hidden_RD, tokens_R)
        except NonFiniteLogits as error:
            raise nonfinite_logits(self._student, _place(rows[error.row])) from None
        least = math.log(self._rules.probability) if self._rules.probability else -math.inf
        return (stats.logprob >= least) & (stats.rank <= self._rules.top)


def _place(lane: Lane) -> str:
    return response_place(lane.expansion.label, lane.branch.length)
