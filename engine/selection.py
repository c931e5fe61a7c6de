"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from genssd.engine.branch import Ending
from genssd.engine.errors import InputError
from genssd.kernels.logprob import TokenStats, TopK

Verdict = Literal["kept", "beaten", "threshold", "duplicate", "loop"]
"""Of a candidate: expanded further or final | ranked below the beam | worse than the threshold | same tokens as an
earlier sibling | ends in a repetition."""

Status = Literal["finished", "length", "pruned"]
"""Of a trajectory: end of sequence | cut at max_tokens | no continuation was acceptable."""

STATUSES: tuple[Status, ...] = ("finished", "length", "pruned")


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRecord:
    """One sampled candidate and what became of it."""

    trace: tuple[int, ...]
    """The candidate's index in each round; its parent is trace[:-1]."""
    token_ids: tuple[int, ...]
    stats: TokenStats
    teacher_logprob: Tensor
    ended: Ending
    score: float
    verdict: Verdict

    @property
    def round(self) -> int:
        return len(self.trace) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScore:
    """How one chunk of a trajectory was chosen."""

    tokens: int
    score: float
    runner_up: float | None
    """The best value among the distinct other candidates of its round; None if there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A response: token ids as they were sampled, end of sequence included."""

    token_ids: tuple[int, ...]
    text: str
    score: float
    """The criterion's value of the whole response; NaN for an empty one."""
    status: Status
    trace: tuple[int, ...]
    chunks: tuple[ChunkScore, ...]
    stats: TokenStats
    teacher_topk: TopK | None = None
    """The teacher's most likely tokens at every position, where they were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The outcome of one prompt."""

    index: int
    """Of the prompt among those given."""
    prompt_ids: tuple[int, ...]
    """As the teacher reads the prompt."""
    student_prompt_ids: tuple[int, ...]
    trajectories: tuple[Trajectory, ...]
    """Best first: finished before cut before pruned, then by score. Empty when the prompt failed."""
    tree: tuple[CandidateRecord, ...]
    seed: int
    occurrence: int
    """How many equal prompts came before: enters the random stream."""
    error: str | None = field(default=None)
    """Why the prompt failed: it did not fit into the cache."""

    @property
    def best(self) -> Trajectory:
        if not self.trajectories:
            raise InputError(f"prompt {self.index} has no trajectory: {self.error}")
        return self.trajectories[0]

    @property
    def tokens_sampled(self) -> int:
        """By the teacher, pruned candidates included."""
        return sum(len(record.token_ids) for record in self.tree)
