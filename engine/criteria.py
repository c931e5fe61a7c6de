"""The registered selection criteria: how well a candidate suits the student.

Sources are named at each; defaults marked as ours are not a paper's. All read the student's log-probabilities at
temperature 1 on the raw logits, however the teacher samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genssd.engine.candidate import Candidate, Window
from genssd.engine.criterion_options import Checked, check_options
from genssd.engine.errors import InputError
from genssd.engine.sampling import uniform
from genssd.engine.text import common_prefix

Scope = Literal["chunk", "trajectory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity(Checked):
    """exp of the student's mean negative log-probability, end of sequence included; lower is better (Gen-SSD).

    Over whole responses this picks what GRAPE picks (2502.04194).
    """

    scope: Literal["chunk", "trajectory", "window"] = "chunk"
    """What the mean runs over: the chunk, the response so far, or its last `window` tokens. With beam > 1, where
    candidates of different branches compete, use "trajectory"."""
    window: int = 256
    norm: Literal["token", "byte", "sum"] = "token"
    """Mean over tokens, mean over bytes of text (comparable between tokenizers), or the sum itself, without exp."""
    reduce: Literal["mean", "max", "drop_first"] = "mean"
    """All tokens, the least likely one alone, or all but the first: a first token is often the least likely."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.norm != "token" and self.reduce == "max":
            raise InputError(f"ppl: reduce='max' is one token's; it has no norm={self.norm!r}")
        if self.window < 1:
            raise InputError(f"ppl: window must be at least 1, not {self.window}")

    def score(self, candidate: Candidate) -> float:
        logprob = candidate.whole_logprob()
        first = len(logprob) - self._tokens(candidate)
        if self.reduce == "drop_first" and first < len(logprob) - 1:
            first += 1
        nll = -logprob[first:]
        if self.reduce == "max":
            return _exp(float(nll.max()))
        if self.norm == "sum":
            return float(nll.sum())
        if self.norm == "byte":
            num_bytes = sum(len(piece.encode()) for piece in candidate.pieces()[first:])
            return _exp(float(nll.sum()) / max(1, num_bytes))
        return _exp(float(nll.mean()))

    def higher_is_better(self) -> bool:
        return False

    def _tokens(self, candidate: Candidate) -> int:
        """How many of the last tokens count."""
        everything = len(candidate.history) + len(candidate.stats)
        if self.scope == "trajectory":
            return everything
        return min(everything, self.window) if self.scope == "window" else len(candidate.stats)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSurprisal(Checked):
    """sum of min(rank, r_max) / sum of negative log-probabilities; lower is better (RSR, 2601.14249, App. B.4).

    Low where the student is surprised by tokens that it ranks high. The end of sequence does not count.
    """

    r_max: int = 100
    scope: Scope = "chunk"
    eps: float = 1e-12
    """Least sum of surprisals: what the student knows by heart has next to none."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.r_max < 1 or self.eps <= 0.0:
            raise InputError(f"rsr: r_max must be at least 1 and eps positive, not {self.r_max} and {self.eps}")

    def score(self, candidate: Candidate) -> float:
        rank, surprisal, _ = self._sums(candidate)
        # a token that the student cannot write is no reason to choose it
        return rank / max(self.eps, surprisal) if rank and surprisal < math.inf else math.inf

    def ratio(self, candidate: Candidate) -> tuple[float, float]:
        """Mean clipped rank and mean surprisal: of a data set, RSR is the ratio of their sums over responses."""
        rank, surprisal, count = self._sums(candidate)
        return rank / max(1, count), surprisal / max(1, count)

    def _sums(self, candidate: Candidate) -> tuple[float, float, int]:
        """Of ranks, of surprisals, and the number of tokens. A rank is at least 1."""
        rank, logprob = candidate.stats.rank[: candidate.num_content].cpu(), candidate.logprob[: candidate.num_content]
        if self.scope == "trajectory":
            rank = torch.cat((candidate.history.rank.cpu(), rank))
            logprob = torch.cat((candidate.history.logprob.double().cpu(), logprob))
        return float(rank.clamp(max=self.r_max).sum()), -float(logprob.sum()), len(rank)

    def higher_is_better(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNaturalness(Checked):
    """Mean over steps of the step's mean log-probability given the prompt and a few steps before it alone; higher is
    better (LALP, 2510.03988).

    Every window is a sequence of its own: positions go on from the prompt's as if nothing else had been written.
    """

    steps: int = 4
    """Preceding steps in view."""
    share: float | None = None
    """The same as a share of the steps that precede, rounded up (the paper's second version)."""

    def __post_init__(self) -> None:
        check_options(self)
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
        """What is scored: every step of the chunk, or the part of it that lies there."""
        begin = len(candidate.history_ids)
        spans = candidate.steps()
        windows = []
        for i, (start, end) in enumerate(spans):
            if end > begin:
                seen = self.steps if self.share is None else math.ceil(self.share * i - 1e-9)
                windows.append((spans[max(0, i - seen)][0], max(start, begin), end))
        return windows

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class AslecDrop(Checked):
    """Mean log-probability without the first tokens of every step; higher is better (ASLEC, 2604.06834).

    A step's first token is unlikely whatever the step says, so a plain mean prefers long steps.
    """

    skip_tokens: int = 1

    def __post_init__(self) -> None:
        check_options(self)
        if self.skip_tokens < 0:
            raise InputError("aslec_drop: skip_tokens must be at least 0")

    def score(self, candidate: Candidate) -> float:
        kept, first = _heads(candidate, self.skip_tokens)
        logprob = kept if len(kept) else first  # steps so short that nothing is left; ours
        return float(logprob.mean()) if len(logprob) else -math.inf

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class AslecCasl(Checked):
    """Mean log-probability less what the share of step heads explains of it; higher is better (ASLEC, 2604.06834).

    Over the pool, M ~ b1 M_rest + b2 M_heads + gamma F + c by least squares, where F is the share of tokens that head a
    step; the value is M - gamma F. With gamma given nothing is fitted, and the search can use it.
    """

    gamma: float | None = None

    @property
    def pool(self) -> Literal["prompt", "data"]:
        return "data" if self.gamma is None else "prompt"

    @property
    def num_features(self) -> int:
        return 4

    def features(self, candidate: Candidate) -> tuple[float, ...]:
        rest, heads = _heads(candidate, 1)
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
        return [mean - gamma * share for mean, _, _, share in features]

    def fit(self, features: Sequence[tuple[float, ...]]) -> float:
        """gamma of a pool; of a pool too small or too uniform to tell, the least-norm solution's."""
        table = np.array([row for row in features if math.isfinite(row[0])], dtype=np.float64)
        if not len(table):
            return 0.0
        design = np.column_stack((table[:, 1:], np.ones(len(table))))
        solution, *_ = np.linalg.lstsq(design, table[:, 0], rcond=None)
        return float(solution[2])

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Lark(Checked):
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
        brier = float((1.0 - 2.0 * logprob.exp() + candidate.stats.sum_p2.double().cpu()).mean())
        return loss, brier / loss

    def score_pool(self, features: Sequence[tuple[float, ...]]) -> list[float]:
        # what the student cannot write at all is no part of the pool
        possible = [(loss, ratio) for loss, ratio in features if loss < math.inf]
        total = sum(loss for loss, _ in possible)
        mean_ratio = sum(loss * ratio for loss, ratio in possible) / total if possible else 0.0
        return [loss / total * (2.0 * ratio - mean_ratio) if loss < math.inf else -math.inf for loss, ratio in features]

    @staticmethod
    def weights(scores: Sequence[float], budget: int) -> list[float]:
        """Training weights of the best `budget` candidates of a pool, 0 for the others; they sum to 1.

        q_k = (g_k - g_next) / (budget (mean g - g_next)), g_next being the best score left out. Uniform when all are
        kept or all are equal (there is no threshold then).
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence(Checked):
    """Mean of log p(teacher) - log p(student); higher is better: the teacher is sure, the student is not (DASD,
    2601.09088)."""

    def score(self, candidate: Candidate) -> float:
        return float((_teacher_logprob(candidate, "divergence") - candidate.logprob).mean())

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RsdAccept(Checked):
    """Share of tokens that the student gives at least `probability` and ranks within its `top` (RSD, 2509.22230);
    higher is better."""

    probability: float = 0.01
    top: int = 20

    def __post_init__(self) -> None:
        check_options(self)
        if not 0.0 < self.probability <= 1.0 or self.top < 1:
            raise InputError("rsd_accept: probability must lie in (0, 1] and top be at least 1")

    def score(self, candidate: Candidate) -> float:
        likely = candidate.logprob >= math.log(self.probability)
        return float((likely & (candidate.stats.rank.cpu() <= self.top)).double().mean())

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RationaleDifficulty(Checked):
    """PPL(answer | prompt, reasoning) / PPL(answer | prompt); lower is better: the reasoning makes the answer easier
    (MoRSD, 2509.23574; the paper's formula is not public, this reading is ours).

    The reference answer is put behind `before_answer`, once after the reasoning and once after the prompt alone.
    """

    before_answer: str = "\nThe answer is"
    last_steps: int = 1
    """Steps at the end of a response that ends with them and are left out, for they state the answer."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.last_steps < 0:
            raise InputError(f"rationale_difficulty: last_steps must be at least 0, not {self.last_steps}")

    @property
    def needs_answer(self) -> bool:
        return True

    def score(self, candidate: Candidate) -> float:
        if candidate.answer is None:
            raise InputError("rationale_difficulty needs the reference answer, and this prompt came without one")
        if candidate.local_logprob is None or candidate.encode is None:
            raise InputError("rationale_difficulty runs the student, and this candidate came without a model to do it")
        reasoning = self.reasoning(candidate)
        ending = candidate.encode(f"{self.before_answer} {candidate.answer}")
        # what the text before the answer and the whole have in common: a tokenizer may join across the border
        border = common_prefix(candidate.encode(self.before_answer), ending)
        if border == len(ending):
            raise InputError(f"rationale_difficulty: the answer {candidate.answer!r} has no token of its own")
        start, end = len(reasoning) + border, len(reasoning) + len(ending)
        windows = [(0, start, end), (len(reasoning), start, end)]
        led, alone = (float(p.double().mean()) for p in candidate.local_logprob((*reasoning, *ending), windows))
        return _exp(alone - led) if led > -math.inf else math.inf

    def reasoning(self, candidate: Candidate) -> tuple[int, ...]:
        """The response so far, without its end of sequence and the steps that state the answer."""
        ids = (*candidate.history_ids, *candidate.token_ids)
        if not candidate.final or not self.last_steps:
            return ids[: len(ids) - candidate.finished]
        starts = [start for start, _ in candidate.steps()]
        return ids[: starts[-self.last_steps]] if len(starts) > self.last_steps else ()

    def higher_is_better(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class SurprisalBand(Checked):
    """Share of tokens whose surprisal, in nats, lies in [low, high]; higher is better. Ours: neither known by heart nor
    out of reach."""

    low: float = 0.5
    high: float = 4.0

    def __post_init__(self) -> None:
        check_options(self)
        if not self.low < self.high:
            raise InputError(f"surprisal_band: low must lie below high, not {self.low} and {self.high}")

    def score(self, candidate: Candidate) -> float:
        nll = -candidate.logprob
        return float(((nll >= self.low) & (nll <= self.high)).double().mean())

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Length(Checked):
    """Number of tokens. A control: many criteria come down to it."""

    scope: Scope = "chunk"
    longest: bool = False

    def score(self, candidate: Candidate) -> float:
        return float(len(candidate.token_ids) + (len(candidate.history_ids) if self.scope == "trajectory" else 0))

    def higher_is_better(self) -> bool:
        return self.longest


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogprob(Checked):
    """The teacher's own mean log-probability; higher is better. A control that does not ask the student."""

    def score(self, candidate: Candidate) -> float:
        return float(_teacher_logprob(candidate, "teacher_logprob").mean())

    def higher_is_better(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Random(Checked):
    """A number from the candidate's own random stream: the control that any criterion has to beat."""

    def score(self, candidate: Candidate) -> float:
        # where it ends: the first child has its parent's stream, and a short ending borrows from its history
        return uniform(candidate.stream, len(candidate.history_ids) + len(candidate.token_ids))

    def higher_is_better(self) -> bool:
        return True


def _exp(nll: float) -> float:
    return math.inf if nll >= 700.0 else math.exp(nll)


def _teacher_logprob(candidate: Candidate, name: str) -> Tensor:
    if candidate.teacher_logprob is None:
        raise InputError(f"{name} needs the teacher's log-probabilities, and these responses came without them")
    return candidate.teacher_logprob.double().cpu()


def _heads(candidate: Candidate, count: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the chunk's tokens (without the end of sequence): all others, and the first of each step."""
    begin = len(candidate.history_ids)
    head = torch.zeros(begin + candidate.num_content, dtype=torch.bool)
    for start, end in candidate.steps():
        head[start : min(end, start + count)] = True
    head, logprob = head[begin:], candidate.logprob[: candidate.num_content]
    return logprob[~head], logprob[head]
