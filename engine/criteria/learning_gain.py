"""A criterion that compares the candidates of one prompt by what the student would learn from each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions
from genssd.engine.criteria.candidate import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Lark(CheckedOptions):
    """The student's learning gain relative to the prompt's other candidates; higher is better (LARK, 2605.30651).

    With L the mean negative log-probability, B = mean of 1 - 2 p(y) + sum p^2 (Brier's score) and r = B / L, the gain
    is (L_k / sum L) (2 r_k - sum r_i L_i / sum L). Values of different prompts do not compare.
    """

    @property
    def pool(self) -> Literal["prompt", "data"]:
        return "prompt"

    @property
    def num_features(self) -> int:
        return 2

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        logprob = candidate.logprob
        loss = max(-float(logprob.mean()), 1e-12)
        brier = float((1.0 - 2.0 * logprob.exp() + candidate.stats.sum_p2.double()).mean())
        return loss, brier / loss

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        # a candidate that the student cannot write at all is not part of the pool
        possible = [(loss, ratio) for loss, ratio in features if loss < math.inf]
        total = sum(loss for loss, _ in possible)
        mean_ratio = sum(loss * ratio for loss, ratio in possible) / total if possible else 0.0
        return [loss / total * (2.0 * ratio - mean_ratio) if loss < math.inf else -math.inf for loss, ratio in features]

    @staticmethod
    def weights(scores: Sequence[float], budget: int) -> list[float]:
        """Return training weights of the best `budget` candidates of a pool, 0 for the others; they sum to 1.

        q_k = (g_k - g_next) / (budget (mean g - g_next)), g_next being the best score left out. Uniform when all are
        kept or all are equal, where there is no threshold. Raises InputError on a budget outside of the pool.
        """
        if not 1 <= budget <= len(scores):
            raise InputError(f"lark: the budget must be in 1..{len(scores)}, not {budget}")
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        kept = order[:budget]
        least = scores[order[budget]] if budget < len(scores) else math.nan
        spread = sum(scores[i] for i in kept) - budget * least
        weights = [0.0] * len(scores)
        for i in kept:
            weights[i] = (scores[i] - least) / spread if 0 < spread < math.inf else 1.0 / budget
        return weights

    def higher_is_better(self) -> bool:
        return True
