"""Criteria from the student's statistics of each token: how likely, or how highly ranked, it is.

Sources are named at each criterion. All read the student's log-probabilities
at temperature 1 on the raw logits, however the teacher samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import CheckedOptions, check_types
from genssd.engine.criteria.candidate import Candidate

Scope = Literal["chunk", "trajectory"]
"""Tokens that a criterion judges: the chunk alone, or the response so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(CheckedOptions):
    """Perplexity: exp of the student's mean negative log-probability; lower is better (Gen-SSD).

    The end of sequence counts. Over whole responses this picks what GRAPE picks (2502.04194).
    """

    scope: Literal["chunk", "trajectory", "window"] = "chunk"
    """Tokens that the mean is taken over: the chunk, the response so far, or its last `window` tokens. With beam > 1,
    where candidates of different branches compete, use "trajectory"."""
    window: int = 256
    """Maximum number of tokens under scope "window"."""
    norm: Literal["token", "byte", "sum"] = "token"
    """Divisor: the number of tokens, of bytes of text (comparable between tokenizers), or none, also without exp."""
    reduce: Literal["mean", "max", "drop_first"] = "mean"
    """Tokens that count: all, the least likely one alone, or all but the first, which is often the least likely."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.norm != "token" and self.reduce == "max":
            raise InputError(f"ppl: reduce='max' is one token's; it has no norm={self.norm!r}")
        if self.window < 1:
            raise InputError(f"ppl: window must be at least 1, not {self.window}")

    def score(self, candidate: Candidate) -> float:
        logprob = candidate.response_logprob()
        first = len(logprob) - self._num_counted(candidate)
        if self.reduce == "drop_first" and first < len(logprob) - 1:
            first += 1
        nll = -logprob[first:]
        if self.reduce == "max":
            return exp_or_infinity(float(nll.max()))
        if self.norm == "sum":
            return float(nll.sum())
        if self.norm == "byte":
            return exp_or_infinity(float(nll.sum()) / max(1, candidate.count_bytes(first)))
        return exp_or_infinity(float(nll.mean()))

    def higher_is_better(self) -> bool:
        return False

    def _num_counted(self, candidate: Candidate) -> int:
        """Return how many of the response's last tokens count."""
        num_tokens = len(candidate.history) + len(candidate.stats)
        if self.scope == "trajectory":
            return num_tokens
        return min(num_tokens, self.window) if self.scope == "window" else len(candidate.stats)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSurprisal(CheckedOptions):
    """Rank-surprisal ratio: sum of min(rank, r_max) / sum of -log p; lower is better (RSR, 2601.14249, App. B.4).

    Low where the student is surprised by tokens that it ranks high. The end of sequence does not count.
    """

    r_max: int = 100
    """Rank at which larger ones are clipped."""
    scope: Scope = "chunk"
    """Tokens that the sums are taken over: the chunk, or the response so far."""
    eps: float = 1e-12
    """Minimum of the sum of surprisals, in nats: it is next to 0 where the student knows every token by heart."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.r_max < 1 or self.eps <= 0.0:
            raise InputError(f"rsr: r_max must be at least 1 and eps positive, not {self.r_max} and {self.eps}")

    def score(self, candidate: Candidate) -> float:
        rank, surprisal, _ = self._sums(candidate)
        # a token that the student cannot write is no reason to choose it
        return rank / max(self.eps, surprisal) if rank and surprisal < math.inf else math.inf

    def ratio(self, candidate: Candidate) -> tuple[float, float]:
        """Return mean clipped rank and mean surprisal; RSR of a data set is the ratio of their sums over responses."""
        rank, surprisal, count = self._sums(candidate)
        return rank / max(1, count), surprisal / max(1, count)

    def _sums(self, candidate: Candidate) -> tuple[float, float, int]:
        """Return the sum of clipped ranks, the sum of surprisals, and the number of tokens. A rank is at least 1."""
        rank, logprob = candidate.stats.rank[: candidate.num_content], candidate.logprob[: candidate.num_content]
        if self.scope == "trajectory":
            rank = torch.cat((candidate.history.rank, rank))
            logprob = torch.cat((candidate.history.logprob.double(), logprob))
        return float(rank.clamp(max=self.r_max).sum()), -float(logprob.sum()), len(rank)

    def higher_is_better(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class RsdAccept(CheckedOptions):
    """Fraction of tokens that the student gives at least `probability` and ranks within its `top` likeliest; higher is
    better (RSD, 2509.22230)."""

    probability: float = 0.01
    """Minimum probability of an accepted token."""
    top: int = 20
    """Maximum rank of an accepted token."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 < self.probability <= 1.0 or self.top < 1:
            raise InputError("rsd_accept: probability must lie in (0, 1] and top be at least 1")

    def score(self, candidate: Candidate) -> float:
        likely = candidate.logprob >= math.log(self.probability)
        return float((likely & (candidate.stats.rank <= self.top)).double().mean())

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class SurprisalBand(CheckedOptions):
    """Fraction of tokens whose surprisal, in nats, lies in [low, high]; higher is better. Such tokens are neither known
    by heart nor out of reach. Not from a paper."""

    low: float = 0.5
    """Minimum surprisal in nats."""
    high: float = 4.0
    """Maximum surprisal in nats."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.low < self.high:
            raise InputError(f"surprisal_band: low must lie below high, not {self.low} and {self.high}")

    def score(self, candidate: Candidate) -> float:
        nll = -candidate.logprob
        return float(((nll >= self.low) & (nll <= self.high)).double().mean())

    def higher_is_better(self) -> bool:
        return True


def exp_or_infinity(nll: float) -> float:
    """Return exp(nll), infinity where it would be close to the largest float64."""
    return math.inf if nll >= 700.0 else math.exp(nll)
