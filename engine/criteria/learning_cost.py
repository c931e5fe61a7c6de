"""A criterion that estimates from one forward pass how large the student's gradient on a response is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions, check_types
from genssd.engine.criteria.candidate import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCost(CheckedOptions):
    """The student's learning cost; lower is better (SCAS, 2605.26872, by its authors' code).

    With d the mean negative log-probability of the chunk (A) and of the prompt (Q), and u the outputs of the last
    layer's up projection, each scaled to length 1, it is (1 - w) d_A^2 mean cos(u_A, u_A) + w d_A d_Q mean cos(u_A,
    u_Q), the means over all pairs of tokens. Special tokens count for nothing. The paper selects among correct answers,
    and again as the student changes: pick.correct, and further rounds. Every value is another pass of the student over
    prompt and response.
    """

    prompt_weight: float = 0.5
    """Weight w of the part that the prompt has in the cost."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 <= self.prompt_weight <= 1.0:
            raise InputError(f"scas: prompt_weight must lie in [0, 1], not {self.prompt_weight}")

    def score(self, candidate: Candidate) -> float:
        if candidate.activations is None:
            raise InputError("scas runs the student, and this candidate came without a model to do it")
        ids = (*candidate.history_ids, *candidate.token_ids)
        means = candidate.activations(ids, len(candidate.history_ids))
        logprob = candidate.logprob[torch.tensor(means.counted, dtype=torch.bool)]
        cost = -float(logprob.mean()) if len(logprob) else math.inf
        if math.inf in (cost, means.prompt_nll):  # nothing that counts, or a token that the student cannot write
            return math.inf
        own = float(means.response_F @ means.response_F)  # the mean of all pairs' cosines
        shared = float(means.response_F @ means.prompt_F)
        return (1.0 - self.prompt_weight) * cost**2 * own + self.prompt_weight * cost * means.prompt_nll * shared

    def higher_is_better(self) -> bool:
        return False
