"""The results of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor

from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import SPECIAL, Decision, Ending, Status, Verdict
from genssd.engine.common.quoting import quote
from genssd.engine.readers.reading import Reading
from genssd.engine.search.budget import BudgetName
from genssd.kernels.logprob import TokenStats, TopK


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class CandidateRecord:
    """One sampled candidate and what became of it."""

    trace: tuple[int, ...]
    """Index of the candidate in each round; its parent is trace[:-1]."""
    token_ids: tuple[int, ...]
    """The teacher's token ids of the chunk."""
    reading: Reading
    """What the student read of the chunk; its tokens are those of `stats`."""
    stats: TokenStats
    """The student's statistics of the tokens by which the chunk was judged."""
    teacher_logprob: Tensor
    """The teacher's log-probabilities of its tokens, float32 [tokens], at temperature 1."""
    ended: Ending
    """Why the candidate ended: its chunk is complete, end of sequence, a stop string, or no more tokens allowed."""
    score: float
    """Criterion value of the candidate."""
    verdict: Verdict
    """What became of the candidate."""
    stop_reason: str | None = None
    """Stop string that ended the response; None where none did."""
    attempt: int = 0
    """Number of times that the round was sampled again before this candidate."""
    teacher: int = 0
    """Index of the teacher that wrote the candidate."""
    probability: float | None = None
    """Probability of the candidate in the first draw of its round; None where no draw chose, or it took no part."""

    def __repr__(self) -> str:
        attempt = f", attempt {self.attempt}" if self.attempt else ""
        drawn = "" if self.probability is None else f", probability {self.probability:.3g}"
        length = format_count(len(self.token_ids), "token")
        return f"<CandidateRecord {self.trace}: {length}, score {self.score:.4g}{attempt}{drawn}, {self.verdict}>"

    @property
    def round(self) -> int:
        """Index of the round in which the candidate was sampled."""
        return len(self.trace) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRecord:
    """One attempt at a round, and what the search did after it."""

    round: int
    """Index of the round."""
    attempt: int
    """Number of times that the round was sampled again before."""
    chunk_tokens: int
    """Number of tokens after which its chunks ended with the next delimiter."""
    chunk_limit: int
    """Maximum number of tokens in its chunks."""
    decision: Decision
    """What the search did after it."""
    teachers: tuple[int, ...] | None = None
    """Indices of the teachers that wrote its candidates; None where the engine has one teacher."""


Watch = Callable[[int, Sequence[CandidateRecord], RoundRecord], None]
"""A function that is told of every attempt at a round as it is decided: the index of the prompt in the call, all
candidates with their verdicts, and what the search did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScore:
    """How one chunk of a trajectory was chosen."""

    tokens: int
    """Number of the teacher's tokens in the chunk."""
    score: float
    """Criterion value of the chunk."""
    runner_up: float | None
    """Best value among the distinct other candidates of its round; None if it was the only one."""
    teacher: int = 0
    """Index of the teacher that wrote the chunk."""
    is_forced: bool = False
    """Whether the chunk is worse than the threshold, and was kept because no candidate of its round was acceptable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherUse:
    """What one of several teachers did in the search for one prompt."""

    decisions: int
    """Number of rounds, further attempts included, that it wrote candidates for."""
    wins: int
    """Number of these after which a candidate of it was kept."""
    tokens_sampled: int
    """Number of tokens in its candidates, as it counts them."""
    tokens_kept: int
    """Number of these in the best trajectory."""
    seconds: float
    """Time of its decoding steps, the scoring of its candidates included, as far as it fell to this prompt: a step's
    time is divided equally between the candidates of all prompts that are in flight."""
    dropped_after: int | None = None
    """Number of decisions after which it was asked no more for this prompt (`drop_teacher_after`); None where it was
    not dropped."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Trajectory:
    """One response of the search."""

    token_ids: tuple[int, ...]
    """The teacher's token ids as they were sampled, end of sequence included, and without a stop string that cut the
    last ones; where several teachers wrote, those of each chunk are of the teacher that wrote it."""
    readings: tuple[Reading, ...]
    """What the student read of each chunk; its tokens are those of `stats`."""
    text: str
    """Text of the response, without special tokens."""
    score: float
    """Criterion value of the whole response; NaN for an empty one."""
    status: Status
    """How the response ended."""
    stop_reason: str | None = None
    """Stop string that ended the response; None where none did."""
    trace: tuple[int, ...]
    """Index of the kept candidate in each round."""
    chunks: tuple[ChunkScore, ...]
    """Scores of the response's chunks, in order."""
    stats: TokenStats
    """The student's statistics of all its tokens."""
    is_drifted: bool = False
    """Whether a student with another tokenizer read other tokens chunk by chunk than the whole text has, so that the
    whole response was scored again."""
    teacher_topk: TopK | None = None
    """The teacher's most likely tokens at every position, where the option `teacher_topk` keeps them."""

    @property
    def student_ids(self) -> tuple[int, ...]:
        """The student's token ids of the response, end of sequence included."""
        return tuple(chain.from_iterable(reading.ids for reading in self.readings))

    def __repr__(self) -> str:
        length = format_count(len(self.token_ids), "token")
        return f"<Trajectory of {length}, {self.status}, score {self.score:.4g}: {quote(self.text)}>"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Selection:
    """The outcome of one prompt."""

    index: int
    """Index of the prompt in the call."""
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt as the teacher reads it; of several teachers, the first one."""
    student_prompt_ids: tuple[int, ...]
    """Token ids of the prompt as the student reads it."""
    num_lead: int = 0
    """Number of the last of these that open or close the thought in the place of the student's chat template, and that
    are trained as the beginning of the response."""
    trajectories: tuple[Trajectory, ...]
    """Responses, best first: by status in the order of STATUSES, then by score. Empty when the prompt failed."""
    tree: tuple[CandidateRecord, ...]
    """All candidates, round by round."""
    rounds: tuple[RoundRecord, ...] = ()
    """All attempts at rounds, in order."""
    teachers: tuple[TeacherUse, ...] = ()
    """What each teacher did, in their order; empty where the engine has one teacher."""
    ended_by: BudgetName | None = None
    """Budget that ended the search of the prompt; None where no budget did."""
    seed: int
    """Seed of the search's random draws."""
    occurrence: int
    """Number of equal prompts before this one; it enters the random stream."""
    error: str | None = field(default=None)
    """Why the prompt failed: it is longer than a model's positions, did not fit into the cache, or the teacher wrote a
    token that the student does not have."""
    missing_token: int | None = field(default=None)
    """Id of the teacher's token that the student does not have, where that is why the prompt failed."""
    missing_teacher: int = field(default=0)
    """Index of the teacher whose token it is."""

    def __repr__(self) -> str:
        if self.error is not None:
            return f"<Selection {self.index}: failed, {quote(self.error)}>"
        best = self.best
        counts = {name: self.count_rounds(name) for name in SPECIAL}
        special = "".join(f", {format_count(count, 'round')} {name}" for name, count in counts.items() if count)
        special += "" if self.ended_by is None else f", ended by {self.ended_by}"
        return (
            f"<Selection {self.index}: {format_count(len(self.trajectories), 'trajectory')} of "
            f"{format_count(self.tokens_sampled, 'token')} sampled, best {best.status} with "
            f"{format_count(len(best.token_ids), 'token')} and score {best.score:.4g}{special}>"
        )

    def count_rounds(self, decision: Decision) -> int:
        """Return the number of attempts at rounds after which the search did this."""
        return sum(record.decision == decision for record in self.rounds)

    @property
    def best(self) -> Trajectory:
        """The best trajectory. Raises InputError when the prompt failed."""
        if not self.trajectories:
            raise InputError(f"prompt {self.index} has no trajectory: {self.error}")
        return self.trajectories[0]

    @property
    def tokens_sampled(self) -> int:
        """Number of tokens that the teachers have sampled, those of pruned candidates included."""
        return sum(len(record.token_ids) for record in self.tree)
