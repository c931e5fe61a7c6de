"""Criteria that divide a response into reasoning steps (see steps.py) and weigh their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions, check_types
from genssd.engine.criteria.candidate import Candidate, Window


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNaturalness(CheckedOptions):
    """Mean over steps of the step's mean log-probability given only the prompt and a few steps before it; higher is
    better (LALP, 2510.03988).

    Every window is a sequence of its own: positions continue those of the prompt as if nothing else had been written.
    """

    steps: int = 4
    """Number of preceding steps that a step is scored with."""
    share: float | None = None
    """Fraction of all preceding steps to score a step with instead, rounded up (the paper's second version)."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.steps < 0 or not (self.share is None or 0.0 <= self.share <= 1.0):
            raise InputError("lalp: steps must be at least 0, and share None or in [0, 1]")

    def score(self, candidate: Candidate) -> float:
        if candidate.local_logprob is None:
            raise InputError("lalp scores windows of its own, and this candidate came without a model to do it")
        windows = self.windows(candidate)
        ids = (*candidate.history_ids, *candidate.token_ids)
        if not windows:
            return -math.inf
        means = [float(part.double().mean()) for part in candidate.local_logprob(ids, windows)]
        return sum(means) / len(means)

    def windows(self, candidate: Candidate) -> list[Window]:
        """Return the window of every step of the chunk; of a step that begins before it, its part in the chunk."""
        begin = len(candidate.history_ids)
        spans = candidate.steps()
        windows = []
        for i, (start, end) in enumerate(spans):
            if end > begin:
                num_seen = self.steps if self.share is None else math.ceil(self.share * i - 1e-9)
                windows.append((spans[max(0, i - num_seen)][0], max(start, begin), end))
        return windows

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class AslecDrop(CheckedOptions):
    """Mean log-probability without the first tokens of every step; higher is better (ASLEC, 2604.06834).

    A step's first token is unlikely whatever the step contains, so a plain mean prefers long steps.
    """

    skip_tokens: int = 1
    """Number of tokens left out at the beginning of every step."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.skip_tokens < 0:
            raise InputError("aslec_drop: skip_tokens must be at least 0")

    def score(self, candidate: Candidate) -> float:
        rest, heads = _split_heads(candidate, self.skip_tokens)
        logprob = rest if len(rest) else heads  # steps so short that no token remains: not in the paper
        return float(logprob.mean()) if len(logprob) else -math.inf

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class AslecCasl(CheckedOptions):
    """Mean log-probability minus the part that the fraction of step heads explains; higher is better (ASLEC,
    2604.06834).

    Over the pool, M ~ b1 M_rest + b2 M_heads + gamma F + c by least squares, where F is the fraction of tokens that
    begin a step; the value is M - gamma F. The search can use the criterion only with gamma set.
    """

    gamma: float | None = None
    """Weight of the fraction of step heads; None fits it over all of the data."""

    @property
    def pool(self) -> Literal["prompt", "data"]:
        return "data" if self.gamma is None else "prompt"

    @property
    def num_features(self) -> int:
        return 4

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        rest, heads = _split_heads(candidate, 1)
        count = len(rest) + len(heads)
        if not count:
            return (-math.inf, 0.0, 0.0, 0.0)
        mean = float(torch.cat((rest, heads)).mean())
        return (
            mean,
            float(rest.mean()) if len(rest) else mean,
            float(heads.mean()) if len(heads) else mean,
            len(heads) / count,
        )

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        gamma = self.fit(features) if self.gamma is None else self.gamma
        return [mean - gamma * fraction for mean, _, _, fraction in features]

    def fit(self, features: Sequence[tuple[float, ...]]) -> float:
        """Return gamma of a pool: that of the least-norm solution where the pool is too small or too uniform."""
        table = np.array([row for row in features if math.isfinite(row[0])], dtype=np.float64)
        if not len(table):
            return 0.0
        design = np.column_stack((table[:, 1:], np.ones(len(table))))
        solution, *_ = np.linalg.lstsq(design, table[:, 0], rcond=None)
        return float(solution[2])

    def higher_is_better(self) -> bool:
        return True


def _split_heads(candidate: Candidate, count: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the chunk's tokens without the end of sequence: all others, the first of each step.

    count: number of tokens that are the first ones.
    """
    begin = len(candidate.history_ids)
    is_head = torch.zeros(begin + candidate.num_content, dtype=torch.bool)
    for start, end in candidate.steps():
        is_head[start : min(end, start + count)] = True
    is_head, logprob = is_head[begin:], candidate.logprob[: candidate.num_content]
    return logprob[~is_head], logprob[is_head]
