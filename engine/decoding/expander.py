"""Continuous batching of expansions: candidates are decoded together, whatever branch and prompt they belong to.

An expansion is a request for n candidates of one branch. Its candidates decode one token per step, in one batch with
those of all others; when the last of them is complete the student scores them (candidate_scoring.py), on a CUDA stream
of its own beside the decoding where it has one (side_stream.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from genssd.engine.common.usage import Usage
from genssd.engine.decoding.candidate_scoring import CandidateScorer, PendingScores, fork_path
from genssd.engine.decoding.drawing import Drawing
from genssd.engine.decoding.expansion import Expansion, Lane
from genssd.engine.decoding.page_budget import PageBudget, Reservations
from genssd.engine.decoding.restoring import read_pending
from genssd.engine.decoding.student_writing import StudentChunkReader
from genssd.engine.host.threads import computes
from genssd.engine.models.runner import ModelRunner
from genssd.engine.models.state_rows import StateRow
from genssd.engine.texts.text import Tokenizer


class Expander:
    """The decoding batch of one session: it runs expansions with one way of drawing tokens.

    scorer: what scores complete candidates; None where nothing does, or where the student judges them token by token as
    a reader of the drawing. end_token_ids: tokens that end a response. max_num_seqs: maximum number of candidates
    decoded at once. usage: counts of the engine, which every step raises.
    """

    def __init__(
        self,
        drawing: Drawing,
        scorer: CandidateScorer | StudentChunkReader | None,
        tokenizer: Tokenizer,
        *,
        end_token_ids: frozenset[int],
        max_num_seqs: int,
        usage: Usage,
        reservations: Reservations,
    ) -> None:
        self._drawing = drawing
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._end_token_ids = end_token_ids
        self._max_num_seqs = max_num_seqs
        self.usage = usage
        others = [reader for reader in drawing.readers if reader is not drawing.writer]
        self.runners: Sequence[ModelRunner] = (
            [drawing.writer, *others] if scorer is None else [drawing.writer, scorer.runner]
        )
        self.pages = PageBudget(self.runners, reservations)
        self._lanes: list[Lane] = []
        self._scoring: deque[tuple[list[Expansion], PendingScores]] = deque()
        """Complete expansions that the student scores on its side stream, oldest first."""

    @property
    def threads(self) -> int | None:
        """Number of threads that compute; None for the default."""
        return self.runners[0].threads

    @property
    def has_room(self) -> bool:
        """Whether the decoding batch has a row for another expansion."""
        return sum(lane.num_rows for lane in self._lanes) < self._max_num_seqs

    @property
    def is_idle(self) -> bool:
        """Whether there is no candidate to decode or to score."""
        return not self._lanes and not self._scoring

    @computes
    def submit(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions that fit and start together."""
        self.usage.prefill_tokens += self.pages.open(expansions)
        self.start(expansions)

    def start(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions for which the pages are reserved already."""
        self._lanes += [Lane(expansion) for expansion in expansions]

    def cancel(self, expansion: Expansion) -> None:
        """Stop an expansion and drop its candidates, as if it had not been submitted."""
        self._lanes = [lane for lane in self._lanes if lane.expansion is not expansion]
        for scored, _ in self._scoring:
            scored[:] = [other for other in scored if other is not expansion]
        self.pages.release(expansion)
        expansion.reset()

    @computes
    def step(self, *, waits: bool = True) -> list[Expansion]:
        """Decode one token of every candidate in the batch; return the expansions that are complete and scored.

        Those that are `unreadable` are complete and not scored. waits: see `AnyExpander.step`; there is always
        something to do here. Where the student scores on a stream of its own, an expansion is returned by the step that
        finds its scores there, and by a step without candidates, which waits for them.
        """
        complete = self._decode() if self._lanes else []
        if isinstance(self._scorer, CandidateScorer):
            if complete:
                self._scoring.append(
                    (complete, self._scorer.begin(complete, partial(self.pages.room, self._scorer.runner)))
                )
            complete = self._take_scored()
        elif self._scorer is not None and complete:
            self._scorer.score(complete)
        for expansion in complete:
            self.pages.release(expansion)
        return complete

    def _take_scored(self) -> list[Expansion]:
        """Return the expansions whose scores have arrived; where nothing else is to do, wait for the oldest ones."""
        taken: list[Expansion] = []
        while self._scoring and (self._must_wait(taken) or self._scoring[0][1].have_arrived):
            scored, pending = self._scoring.popleft()
            pending.finish()
            taken += scored
        return taken

    def _must_wait(self, taken: Sequence[Expansion]) -> bool:
        """Return whether the host waits for the oldest scores. taken: expansions whose scores were taken just now."""
        assert self._scorer is not None
        return self._scorer.runner.side is None or not (self._lanes or taken)

    def _decode(self) -> list[Expansion]:
        """Decode one token of every candidate in the batch; return the expansions that are complete."""
        batch, waiting = self._split_lanes()
        for runner in self.runners:
            with self._stream_of(runner):
                self.usage.prefill_tokens += read_pending(runner, [lane.branch for lane in batch])
        # a parent's lane is sampled once for each of its candidates, which have lanes of their own from then on
        candidates = [self._open_candidate(lane) for lane in batch for _ in range(lane.num_rows)]
        source = torch.tensor([i for i, lane in enumerate(batch) for _ in range(lane.num_rows)])
        drawn = self._drawing.draw(batch, source, candidates)
        # where the writer reads the drawn tokens already, the host takes them in meanwhile
        running: list[Lane] = []
        complete: list[Expansion] = []
        for i, lane in enumerate(candidates):
            hidden = None if drawn.hidden_CD is None else StateRow(drawn.hidden_CD, i)
            self._take_token(lane, drawn.tokens[i], drawn.logprob[i], hidden)
            if lane.branch.ended is None:
                running.append(lane)
            elif lane.expansion.num_unfinished == 0:
                complete.append(lane.expansion)
        self._lanes = running + waiting
        return complete

    def _stream_of(self, runner: ModelRunner) -> AbstractContextManager[None]:
        """Return the context in which a model reads what branches have pending: with whatever scores from it."""
        scores = isinstance(self._scorer, CandidateScorer) and runner is self._scorer.runner
        return runner.apart() if scores else nullcontext()

    def _split_lanes(self) -> tuple[list[Lane], list[Lane]]:
        """Return the lanes of this step, first come first served, and those that wait. At least one lane runs."""
        num_rows = 0
        for i, lane in enumerate(self._lanes):
            num_rows += lane.num_rows
            if num_rows > self._max_num_seqs and i > 0:
                return self._lanes[:i], self._lanes[i:]
        return self._lanes, []

    def _open_candidate(self, lane: Lane) -> Lane:
        """Return the lane of one candidate; a new one forks its parent's path of every model that reads the tokens."""
        opened = lane.candidate_lane(self._tokenizer)
        if opened is not lane:
            for runner in self._drawing.readers:
                fork_path(runner, lane.expansion.parent, opened.branch)
        return opened

    def _take_token(self, lane: Lane, token: int, logprob: float, hidden: StateRow | None) -> None:
        """Append a drawn token to a candidate. hidden: the writer's state after it, where it was computed already."""
        assert lane.writing is not None
        for reader in self._drawing.readers:
            state = lane.branch.state(reader.role)
            if hidden is None or reader is not self._drawing.writer:
                state.pending = [token]
            else:
                state.hidden = hidden
        self.usage.sampled_tokens += 1
        lane.writing.append(token, logprob, self._end_token_ids)
        if hidden is not None and lane.branch.ended is not None:
            # it may wait for its siblings, each of them with the batch of another step
            lane.branch.state(self._drawing.writer.role).hidden = hidden.alone()
