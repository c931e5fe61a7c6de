"""A branch: one response under construction, held by teacher and student at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from genssd.engine.cache.tree import Path
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.options_check import check_count
from genssd.engine.common.outcomes import Ending
from genssd.engine.criteria.candidate import ActivationMeans, Candidate, Window
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.model_state import ModelState
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.sampling import child_stream
from genssd.engine.models.state_rows import StateRow
from genssd.engine.readers.prompt_ids import PromptIds
from genssd.engine.readers.reading import ByteSpans, Reading
from genssd.engine.texts.stops import StopStrings
from genssd.kernels.logprob import TokenStats, TopK


class BranchSession(Protocol):
    """The operations of the engine that a branch needs."""

    stops: StopStrings

    def expand(self, branches: Sequence[Branch], n: int, chunk: Chunk) -> list[list[Branch]]: ...

    def finish_reading(self, branch: Branch) -> None: ...

    def bound_reading(self, branch: Branch, num_tokens: int) -> int: ...

    def free_pages(self, branch: Branch) -> None: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def chunk_topk(self, branch: Branch) -> TopK | None: ...

    def pieces(self, token_ids: Sequence[int]) -> list[str]: ...

    def uses(self, runner: ModelRunner) -> bool: ...

    def local_logprob(self, prompt: PromptIds, ids: Sequence[int], windows: Sequence[Window]) -> list[Tensor]: ...

    def activations(self, prompt: PromptIds, ids: Sequence[int], start: int) -> ActivationMeans: ...


@dataclass(slots=True, eq=False, kw_only=True, repr=False)
class Branch:
    """A prompt, the committed response (`history`) and the candidate chunk that continues it (`chunk`).

    Made by `Engine.branch` and `expand`. Its cache pages are held until `drop`, the end of a `with` block over it, or
    until nothing refers to it any more.
    """

    session: BranchSession
    """Engine call that the branch belongs to."""
    prompt: PromptIds
    """Token ids of the prompt as each model reads it."""
    stream: int
    """Random stream of the branch, 64 bits."""
    teacher: ModelState
    """What the teacher has computed of the branch."""
    student: ModelState
    """What the student has computed of the branch."""
    max_tokens: int | None = None
    """Maximum number of tokens in the whole response; None: as many as the models have positions for."""
    trace: tuple[int, ...] = ()
    """Index of the candidate in each round: its place in the tree."""
    writer: int = 0
    """Index of the teacher that writes the branch; the others have branches of their own of one response (views.py)."""
    history: list[int] = field(default_factory=list)
    """Token ids of the committed response, as the branch's teacher reads those of others."""
    history_lengths: tuple[int, ...] = ()
    """Number of these in each committed chunk."""
    history_stats: tuple[TokenStats, ...] = ()
    """The student's statistics of each committed chunk."""
    history_readings: tuple[Reading, ...] = ()
    """What the student read of each committed chunk; empty where no student reads."""
    history_writer_logprob: tuple[Tensor, ...] = ()
    """The writing model's log-probabilities of each committed chunk's tokens, float32, at temperature 1."""
    history_topk: tuple[TopK, ...] = ()
    """The writing model's most likely tokens along each committed chunk, where they are recorded."""

    chunk: list[int] = field(default_factory=list)
    """Token ids of the candidate chunk; empty once the branch is committed."""
    stats: TokenStats = field(default_factory=TokenStats.empty)
    """The student's statistics of the tokens by which the chunk is judged."""
    reading: Reading | None = None
    """What the student read of the chunk; None before it is complete, and where no student reads."""
    chunk_writer_logprob: list[float] = field(default_factory=list)
    """The writing model's log-probabilities of the chunk's tokens, at temperature 1."""
    chunk_states: list[StateRow] = field(default_factory=list, repr=False)
    """Hidden states of the writing model that predict the chunk's tokens, where its most likely tokens are kept."""
    chunk_topk: list[tuple[list[int], list[float]]] = field(default_factory=list, repr=False)
    """Ids and log-probabilities of a server's most likely tokens at each token of the chunk, where they are kept."""
    substituted: list[int] = field(default_factory=list)
    """Places in the chunk of tokens that the student wrote in the teacher's place (see `ReverseSpeculation`)."""
    is_drifted: bool = False
    """Whether the student's tokens of the whole response are others than those that it read chunk by chunk."""
    ended: Ending | None = None
    """Why the chunk ended; None while the branch can be written on."""
    stop_reason: str | None = None
    """Stop string that ended the response; None where none did."""
    num_children: int = 0
    """Number of candidates that were sampled from this response, those that other teachers wrote before included."""
    dropped: bool = False
    """Whether `drop` was called: the branch has no cache pages and cannot be expanded."""

    def __repr__(self) -> str:
        state = "dropped" if self.dropped else f"ended: {self.ended}" if self.ended else "open"
        return (
            f"<Branch of {format_count(len(self.prompt.teacher or self.prompt.student), 'prompt token')}: round "
            f"{len(self.trace)}, "
            f"{format_count(len(self.history), 'token')} committed, {len(self.chunk)} in the chunk, {state}>"
        )

    def __enter__(self) -> Branch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.drop()

    @staticmethod
    def root(session: BranchSession, prompt: PromptIds, stream: int, max_tokens: int | None = None) -> Branch:
        """Make the branch of a prompt without a response; its tokens are not computed yet."""
        teacher, student = ModelState(pending=list(prompt.teacher)), ModelState(pending=list(prompt.student))
        return Branch(
            session=session, prompt=prompt, stream=stream, teacher=teacher, student=student, max_tokens=max_tokens
        )

    @staticmethod
    def from_prefix(
        session: BranchSession, prompt: PromptIds, stream: int, *, role: Role, path: Path, history: list[int]
    ) -> Branch:
        """Make a committed branch of a response whose tokens but the last are in one model's cache, at `path`."""
        branch = Branch.root(session, prompt, stream)
        branch.history = history
        state = branch.state(role)
        state.pending, state.path = history[-1:], path
        return branch

    def child(self) -> Branch:
        """Make the next candidate of this committed branch: its response, an empty chunk, and no cache pages yet.

        The first child inherits the random stream, the others get streams of their own.
        """
        index = self.num_children
        self.num_children += 1
        return Branch(
            session=self.session,
            prompt=self.prompt,
            stream=child_stream(self.stream, self.num_written, index),
            teacher=ModelState(pending=[]),
            student=ModelState(pending=[]),
            max_tokens=self.max_tokens,
            trace=(*self.trace, index),
            writer=self.writer,
            history=self.history,
            history_lengths=self.history_lengths,
            history_stats=self.history_stats,
            history_readings=self.history_readings,
            history_writer_logprob=self.history_writer_logprob,
            history_topk=self.history_topk,
        )

    def state(self, role: Role) -> ModelState:
        """Return what the teacher or the student has computed."""
        return self.teacher if role == "teacher" else self.student

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the whole response, chunk included."""
        return self.history + self.chunk

    @property
    def student_ids(self) -> tuple[int, ...]:
        """The student's token ids of the committed response, as far as they are certain."""
        return tuple(chain.from_iterable(reading.ids for reading in self.history_readings))

    @property
    def length(self) -> int:
        """Number of tokens in the response so far, chunk included."""
        return len(self.history) + len(self.chunk)

    @property
    def num_written(self) -> int:
        """Number of tokens in the committed response as those who wrote its chunks count them."""
        return len(self.history) + sum(map(len, self.history_writer_logprob)) - sum(self.history_lengths)

    @property
    def text(self) -> str:
        """Text of the whole response, chunk included, without special tokens."""
        return self.session.decode(self.token_ids)

    @property
    def writer_logprob(self) -> Tensor:
        """The writing model's log-probabilities of the chunk's tokens, float32 [tokens], at temperature 1."""
        return torch.tensor(self.chunk_writer_logprob)

    def candidate(self) -> Candidate:
        """Return what criteria see of the chunk: the student's tokens of it, where a student reads."""
        reading = self.reading
        return Candidate(
            token_ids=tuple(self.chunk) if reading is None else reading.judged_ids,
            stats=self.stats,
            history_ids=tuple(self.history) if reading is None else self.student_ids,
            history=self._committed_stats(),
            teacher_logprob=self.writer_logprob,
            history_teacher_logprob=self._committed_writer_logprob(),
            final=self.ended != "chunk",
            finished=self.ended == "finished",
            stream=self.stream,
            pieces_of=self.session.pieces,
            local_logprob=partial(self.session.local_logprob, self.prompt),
            activations=partial(self.session.activations, self.prompt),
            encode=self.session.encode,
            answer=self.prompt.answer,
            spans=self._spans(),
        )

    def response(self) -> Candidate:
        """Return what criteria see of the whole committed response."""
        return replace(
            self.candidate(),
            token_ids=self.student_ids if self.history_readings else tuple(self.history),
            stats=self._committed_stats(),
            history_ids=(),
            history=TokenStats.empty(),
            teacher_logprob=self._committed_writer_logprob(),
            history_teacher_logprob=torch.empty(0),
            final=True,
        )

    def expand(self, n: int, chunk: Chunk | int = Chunk()) -> list[Branch]:
        """Sample n candidate chunks, have the student score them, and return them. The branch itself does not change.

        chunk: rule by which a candidate ends; a number stands for Chunk(tokens=number). Expanding again gives further
        candidates, not the same ones. Raises InputError on a candidate that was not committed or has ended,
        CapacityError when the candidates do not fit into the cache.
        """
        (children,) = expand_together([self], n, chunk)
        return children

    def commit(self) -> None:
        """Make the candidate chunk part of the response. Its siblings are not touched."""
        self.history = self.history + self.chunk
        self.history_lengths = (*self.history_lengths, len(self.chunk))
        if self.reading is not None:
            self.history_readings = (*self.history_readings, self.reading)
        is_judged_ahead = self.reading is not None and self.reading.is_provisional
        self.history_stats = (*self.history_stats, TokenStats.empty() if is_judged_ahead else self.stats)
        self.history_writer_logprob = (*self.history_writer_logprob, self.writer_logprob)
        if (topk := self.session.chunk_topk(self)) is not None:
            self.history_topk = (*self.history_topk, topk)
        self.chunk, self.stats, self.chunk_writer_logprob = [], TokenStats.empty(), []
        self.chunk_states, self.chunk_topk, self.reading = [], [], None
        if self.ended == "chunk":
            self.ended = None

    def drop(self) -> None:
        """Free the branch's cache pages. Its tokens and numbers stay readable; it cannot be expanded any more."""
        self.dropped = True
        self.chunk_states = []
        self.session.free_pages(self)

    def take_back(self, children: Sequence[Branch]) -> None:
        """Drop the candidates that were made last, as if they had never been sampled."""
        for child in children:
            child.drop()
        self.num_children -= len(children)

    def suspend(self) -> None:
        """Free the cache pages of a committed branch; it is computed again when it is expanded next."""
        assert not self.chunk, "only committed branches are suspended"
        self.session.free_pages(self)
        self.teacher = ModelState(pending=[*self.prompt.teacher, *self.history])
        self.student = ModelState(pending=[*self.prompt.student, *self.student_ids])

    def finish_reading(self) -> None:
        """Have the student read what was held back of an ended response, and check its tokens against the whole text.

        Where they are others, the whole response is scored again. Raises CapacityError without room for that.
        """
        self.session.finish_reading(self)

    def _spans(self) -> ByteSpans | None:
        """Return the bytes in every token of history and chunk; None where the tokens correspond one to one."""
        readings = [*self.history_readings, *([] if self.reading is None else [self.reading])]
        if not readings or readings[0].lengths is None:
            return None
        student = [length for reading in self.history_readings for length in reading.lengths or ()]
        return ByteSpans(
            student=(*student, *((self.reading and self.reading.judged_lengths) or ())),
            teacher=tuple(length for reading in readings for length in reading.writer_lengths or ()),
        )

    def _committed_stats(self) -> TokenStats:
        return TokenStats.concatenate(self.history_stats) if self.history_stats else TokenStats.empty()

    def _committed_writer_logprob(self) -> Tensor:
        return torch.cat(self.history_writer_logprob) if self.history else torch.empty(0)


def expand_together(
    branches: Sequence[Branch], n: int, chunk: Chunk | int, sessions: Sequence[BranchSession] | None = None
) -> list[list[Branch]]:
    """Sample n candidates of each branch, those of one session in one batch; return the candidates of each.

    sessions: what samples the candidates of each branch; None for the branches' own. Raises InputError naming a branch
    that cannot be expanded by its index, CapacityError, changing nothing, when the candidates of all do not fit into
    the cache together.
    """
    n, chunk = check_count("n", n), Chunk.of(chunk)
    for i, branch in enumerate(branches):
        name = "the branch" if len(branches) == 1 else f"branch {i}"
        if branch.dropped:
            raise InputError(f"{name} was dropped: its cache is gone")
        if branch.chunk:
            raise InputError(f"{name} is a candidate: only a committed branch can be expanded; call commit() first")
        if branch.ended is not None:
            raise InputError(f"{name} has ended ({branch.ended}) and cannot be expanded")
        if any(branch is other for other in branches[:i]):
            raise InputError(f"{name} is given twice: ask for more candidates of it instead")
    sessions = sessions or [branch.session for branch in branches]
    groups: dict[int, list[int]] = {}
    for i, session in enumerate(sessions):
        groups.setdefault(id(session), []).append(i)
    children: dict[int, list[Branch]] = {}
    try:
        for indices in groups.values():
            group = [branches[i] for i in indices]
            children.update(zip(indices, sessions[indices[0]].expand(group, n, chunk), strict=True))
    except BaseException:
        for i, made in children.items():
            branches[i].take_back(made)
        raise
    return [children[i] for i in range(len(branches))]
