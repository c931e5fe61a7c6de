"""Scoring of complete candidates: the student reads each new token once, on its own pages, after what it has read.

The first token of a chunk is scored from the last hidden state of the branch, so no prefix is ever computed again.

A student with another tokenizer than the teacher's (`ByteReader`) needs other numbers of tokens than the candidates
have. The pages that an expansion has reserved are enough for ordinary text; where they are not, its candidates are
scored one after the other, and a kept one is computed again when it is expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from genssd.engine.cache.tree import Path
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.usage import Usage
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.models.pages import count_pages
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.state_rows import rows_of
from genssd.engine.models.token_runs import PendingStatistics, TokenRun, queue_statistics, response_place
from genssd.engine.readers.reading import Reader, Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentRoom:
    """Number of pages of the student's cache that the candidates of one expansion may take."""

    reserved: int
    """Pages that were reserved for them."""
    free: int
    """Pages beyond these that nobody has reserved, and that they may take for a moment."""


@dataclass(frozen=True, slots=True)
class PendingScores:
    """Scores that are being computed: the statistics of some candidates, each with its expansion."""

    usage: Usage
    scored: Sequence[tuple[Expansion, Branch]]
    pending: PendingStatistics | None
    """None where there is nothing to compute."""

    @property
    def have_arrived(self) -> bool:
        """Whether `finish` would not wait for the device."""
        return self.pending is None or self.pending.have_arrived

    def finish(self) -> None:
        """Wait for the statistics and give them to the candidates. Raises NumericsError as `take` does."""
        if self.pending is not None:
            for (_, child), stats in zip(self.scored, self.pending.take(), strict=True):
                child.stats = stats
                self.usage.scored_tokens += len(stats)


class CandidateScorer:
    """The student's side of a session: it sets the readings and the statistics of complete candidates.

    runner: the model that scores. reader: how it reads the writer's tokens. usage: counts of the engine, which every
    call raises.
    """

    def __init__(self, runner: ModelRunner, reader: Reader, usage: Usage) -> None:
        self.runner = runner
        self._reader = reader
        self._usage = usage

    def begin(
        self, complete: Sequence[Expansion], room: Callable[[Expansion], StudentRoom] | None = None
    ) -> PendingScores:
        """Queue the scoring of all candidates of these expansions, in one forward pass where they fit.

        An expansion that the student cannot read is marked `unreadable` instead. The candidates' parents must be in the
        student's cache. room: returns what the candidates of an expansion may take; None where there is room for all.
        On a side stream of the student (`Runner.side`) the host waits for the scores only where it takes them.
        """
        for expansion in complete:
            self._read(expansion)
        readable = [expansion for expansion in complete if expansion.unreadable is None]
        large: list[Expansion] = []
        if self._reader.reads_bytes and room is not None:
            large = [e for e in readable if sum(self._count_pages(e, c) for c in e.children) > room(e).reserved]
        fitting = [
            (expansion, child) for expansion in readable if expansion not in large for child in expansion.children
        ]
        with self.runner.apart():
            pending = self._score(fitting)
            for expansion in large:
                assert room is not None
                self._score_apart(expansion, room(expansion))
        return pending

    def score(self, complete: Sequence[Expansion], room: Callable[[Expansion], StudentRoom] | None = None) -> None:
        """Set the statistics of all candidates of these expansions, as `begin` computes them."""
        self.begin(complete, room).finish()

    def _read(self, expansion: Expansion) -> None:
        """Set what the student reads of every candidate, or why it cannot."""
        tokens = [token for child in expansion.children for token in child.chunk]
        missing = expansion.missing_token = self._reader.find_missing(tokens)
        if missing is not None:
            expansion.unreadable = f"the {self._reader.writer} wrote {self._reader.describe_missing(missing)}"
            return
        parent = expansion.parent
        begins = not parent.history_readings
        held = b"" if begins else parent.history_readings[-1].held
        try:
            for child in expansion.children:
                child.reading = self._reader.read(child.chunk, held=held, begins=begins, ends=child.ended != "chunk")
        except InputError as error:
            expansion.unreadable = str(error)
            return
        positions = self.runner.decoder.config.max_position_embeddings
        num_read = len(parent.prompt.student) + len(parent.student_ids)
        longest = num_read + max(len(_reading(child).judged_ids) for child in expansion.children)
        if longest > positions:
            expansion.unreadable = describe_too_long(longest, positions)

    def _score(self, candidates: Sequence[tuple[Expansion, Branch]]) -> PendingScores:
        """Extend the student over the new tokens of every candidate and queue their statistics.

        A candidate of which a stop string has left no token keeps no statistics.
        """
        runner = self.runner
        scored = [(expansion, child) for expansion, child in candidates if _reading(child).judged_ids]
        if not scored:
            return PendingScores(self._usage, [], None)
        paths = [fork_path(runner, expansion.parent, child) for expansion, child in scored]
        # what may change is read on a path of its own, which nothing continues
        ahead = [
            runner.tree.fork(path) if _reading(c).is_provisional else None
            for path, (_, c) in zip(paths, scored, strict=True)
        ]
        try:
            chunks = [_reading(child).judged_ids for _, child in scored]
            states = runner.extend([a or path for a, path in zip(ahead, paths, strict=True)], chunks)
        finally:
            for path in ahead:
                if path is not None:
                    runner.tree.drop(path)
        # rows of the whole batch would keep it alive
        last = rows_of(runner.share(torch.stack([states_ND[-1] for states_ND in states])))
        runs = []
        for (expansion, child), chunk, states_ND, last_row in zip(scored, chunks, states, last, strict=True):
            before = expansion.parent.state(runner.role).hidden
            before_D = None if before is None else runner.share(before.tensor())
            runs.append(TokenRun(tokens=chunk, before_D=before_D, states_ND=states_ND[:-1]))
            child.state(runner.role).hidden = before if _reading(child).is_provisional else last_row

        def place(index: int, offset: int) -> str:
            expansion, child = scored[index]
            return response_place(expansion.label, len(child.student_ids) + offset)

        return PendingScores(self._usage, scored, queue_statistics(runner, runs, place))

    def _score_apart(self, expansion: Expansion, room: StudentRoom) -> None:
        """Score the candidates of an expansion one by one and give their pages back; their tokens are pending then."""
        for child in expansion.children:
            if (num_pages := self._count_pages(expansion, child)) > room.reserved + room.free:
                pool = self.runner.tree.pool
                expansion.unreadable = (
                    f"the student reads a candidate as {format_count(len(_reading(child).judged_ids), 'token')}, which "
                    f"take {format_count(num_pages, 'page')}, with {room.reserved + room.free} free of the "
                    f"{pool.describe()} of its cache; raise memory_bytes or memory_utilization, or ask for shorter "
                    "chunks"
                )
                return
            self._score([(expansion, child)]).finish()
            state = child.state(self.runner.role)
            if state.path is not None and not _reading(child).is_provisional:
                self.runner.tree.drop(state.path)
                fork_path(self.runner, expansion.parent, child)
                state.pending, state.hidden = list(_reading(child).ids), None

    def _count_pages(self, expansion: Expansion, child: Branch) -> int:
        """Return the most pages that the student's tokens of a candidate take."""
        path = expansion.parent.state(self.runner.role).path
        assert path is not None
        return count_pages(path.length, path.length + len(_reading(child).judged_ids), self.runner.tree.pool.page_size)


def describe_too_long(num_tokens: int, positions: int) -> str:
    """Return why the student cannot read a response, and the remedy. num_tokens: of prompt and response together."""
    return (
        f"the student reads the response as {format_count(num_tokens, 'token')} with the prompt, and it has "
        f"{format_count(positions, 'position')}; lower max_tokens"
    )


def fork_path(runner: ModelRunner, parent: Branch, child: Branch) -> Path:
    """Give a candidate the path of its parent under one model, and return it."""
    path = parent.state(runner.role).path
    assert path is not None
    forked = child.state(runner.role).path = runner.tree.fork(path)
    return forked


def _reading(child: Branch) -> Reading:
    """Return what the student read of a complete candidate."""
    assert child.reading is not None
    return child.reading
