"""Continuous batching of expansions: candidates are decoded together, whatever branch and prompt they belong to.

An expansion asks for n candidates of one branch. Its candidates decode one token per step beside those of all others;
when the last of them is complete the student scores them, on its own pages, each new token once. The first token of a
chunk is scored from the last hidden state of the branch, so no prefix is ever computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from genssd.engine.branch import Branch, ModelState
from genssd.engine.chunk import Chunk, ChunkEnd
from genssd.engine.errors import NumericsError
from genssd.engine.runner import ModelRunner
from genssd.engine.sampling import Sampling, child_stream, noise_key
from genssd.engine.text import TextStream, Tokenizer
from genssd.kernels.logprob import NonFiniteLogits, TopK, linear_logprob
from genssd.kernels.sampling import linear_sample, sample


@dataclass(slots=True)
class Usage:
    """What the engine has spent so far."""

    teacher_tokens: int = 0
    """Tokens sampled, pruned ones included."""
    student_tokens: int = 0
    """Candidate tokens scored."""
    prefill_tokens: int = 0
    """Prompt tokens computed, over both models; computed again after a preemption counts again. Given responses that
    nodes are looked at in (see nodes.py) count as well."""
    forced_tokens: int = 0
    """Tokens put in place of sampled ones, each computed once (see nodes.py)."""
    window_tokens: int = 0
    """Computed by the student for criteria that read responses in windows of their own, prompts included."""


@dataclass(slots=True, eq=False)
class Expansion:
    """A request: `n` candidates of `parent`, each a `chunk` of at most `max_new` tokens."""

    parent: Branch
    n: int
    chunk: Chunk
    max_new: int
    label: str
    """Names the prompt in messages."""
    kids: list[Branch] = field(default_factory=list)
    open_kids: int = 0

    @property
    def longest(self) -> int:
        return min(self.chunk.longest, self.max_new)


@dataclass(slots=True, eq=False)
class Lane:
    """A row of the decoding batch: an expansion that has not branched yet (kid None), or one candidate."""

    expansion: Expansion
    kid: Branch | None = None
    end: ChunkEnd | None = None
    text: TextStream | None = None

    @property
    def branch(self) -> Branch:
        return self.expansion.parent if self.kid is None else self.kid

    @property
    def rows(self) -> int:
        return self.expansion.n if self.kid is None else 1


class Drawn(NamedTuple):
    """One token for each of some candidates, and their log-probabilities at temperature 1."""

    tokens: list[int]
    logprob: list[float]
    hidden: Tensor | None = None
    """The writer's states after the tokens, [candidates, D], where it went on at once."""


@dataclass(frozen=True, slots=True)
class _Promise:
    """Pages that an expansion in flight may take of one model's pool."""

    runner: ModelRunner
    prefix: int
    """For what the parent has pending; taken before the first candidate exists."""
    candidates: int


Promises = dict[Expansion, list[_Promise]]
"""Of all expansions in flight on one engine, whichever call they belong to."""


class Expander:
    """Runs expansions with one way of sampling. writer: the model that generates; scorer: the one that scores."""

    def __init__(
        self,
        writer: ModelRunner,
        scorer: ModelRunner | None,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: frozenset[int],
        vocabulary: int,
        sampling: Sampling,
        max_batch: int,
        usage: Usage,
        promises: Promises,
        topk: int = 0,
    ) -> None:
        self._writer = writer
        self._scorer = scorer
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocabulary = vocabulary
        self._sampling = sampling
        self._max_batch = max_batch
        self._usage = usage
        self._lanes: list[Lane] = []
        self._promises = promises
        self._topk = topk

    @property
    def num_rows(self) -> int:
        """Candidates in flight."""
        return sum(lane.rows for lane in self._lanes)

    @property
    def has_room(self) -> bool:
        """Whether another expansion would find room in the decoding batch."""
        return self.num_rows < self._max_batch

    def fits(self, expansions: list[Expansion]) -> bool:
        """Whether the cache can take these expansions, at their longest, beside all that is in flight."""
        return all(
            runner.tree.pool.num_free - self._outstanding(runner)
            >= sum(promise.prefix + promise.candidates for promise in (self._promise(runner, e) for e in expansions))
            for runner in self._runners
        )

    def missing_pages(self, expansion: Expansion) -> int:
        """How many pages an otherwise empty cache would lack for this expansion; 0 if it fits."""
        promises = [self._promise(runner, expansion) for runner in self._runners]
        return max(0, *(p.prefix + p.candidates - p.runner.tree.pool.num_pages for p in promises))

    def submit(self, expansion: Expansion) -> None:
        """Add an expansion that fits."""
        for runner in self._runners:
            state = self._state(runner, expansion.parent)
            if state.path is None:
                state.path = runner.tree.root()
        self._promises[expansion] = [self._promise(runner, expansion) for runner in self._runners]
        self._lanes.append(Lane(expansion))

    def cancel(self, expansion: Expansion) -> None:
        """Stop an expansion and drop its candidates; its parent is as if it had not been asked for."""
        self._lanes = [lane for lane in self._lanes if lane.expansion is not expansion]
        self._promises.pop(expansion, None)
        for kid in expansion.kids:
            kid.drop()
        expansion.parent.num_children -= len(expansion.kids)
        expansion.kids = []

    @torch.inference_mode()
    def step(self) -> list[Expansion]:
        """Decode one token of every candidate in the batch; return the expansions that are complete and scored."""
        batch, waiting = self._take_batch()
        for runner in self._runners:
            self._advance(runner, [lane.branch for lane in batch])
        # a lane that branches off now is sampled once for each of its candidates
        kids = [self._open_kid(lane) for lane in batch for _ in range(lane.rows)]
        source = torch.tensor([i for i, lane in enumerate(batch) for _ in range(lane.rows)])
        running: list[Lane] = []
        complete: list[Expansion] = []
        drawn = self._sample(batch, source, kids)
        # where the writer is at the drawn tokens already, the host reads them meanwhile
        for i, lane in enumerate(kids):
            self._take_token(lane, drawn.tokens[i], drawn.logprob[i], None if drawn.hidden is None else drawn.hidden[i])
            if lane.branch.ended is None:
                running.append(lane)
            elif lane.expansion.open_kids == 0:
                complete.append(lane.expansion)
        self._lanes = running + waiting
        if self._scorer is not None and complete:
            self._score(self._scorer, complete)
        for expansion in complete:
            del self._promises[expansion]
        return complete

    def _take_batch(self) -> tuple[list[Lane], list[Lane]]:
        """The lanes of this step, first come first served, and those that wait. At least one lane runs."""
        rows = 0
        for i, lane in enumerate(self._lanes):
            rows += lane.rows
            if rows > self._max_batch and i > 0:
                return self._lanes[:i], self._lanes[i:]
        return self._lanes, []

    def _advance(self, runner: ModelRunner, branches: list[Branch]) -> None:
        """Compute what the branches have pending."""
        states = [state for branch in branches if (state := self._state(runner, branch)).pending]
        paths = [state.path for state in states if state.path is not None]
        self._usage.prefill_tokens += sum(len(state.pending) for state in states if len(state.pending) > 1)
        pending = [state.pending for state in states]
        for state, hidden in zip(states, runner.extend(paths, pending, last=[1] * len(paths)), strict=True):
            state.hidden = hidden[-1]
            state.pending = []

    def _open_kid(self, lane: Lane) -> Lane:
        if lane.kid is not None:
            return lane
        expansion, parent = lane.expansion, lane.expansion.parent
        kid = Branch(
            parent._owner, parent.prompt, child_stream(parent.stream, len(parent.history), parent.num_children)
        )
        kid.trace = (*parent.trace, parent.num_children)
        kid.history = parent.history
        kid.history_stats = parent.history_stats
        kid.history_teacher_logprob = parent.history_teacher_logprob
        kid.history_topk = parent.history_topk
        parent.num_children += 1
        path = self._state(self._writer, parent).path
        assert path is not None
        kid.teacher, kid.student = ModelState(pending=[]), ModelState(pending=[])
        self._state(self._writer, kid).path = self._writer.tree.fork(path)
        expansion.kids.append(kid)
        expansion.open_kids += 1
        return Lane(expansion, kid, ChunkEnd(expansion.chunk), TextStream(self._tokenizer))

    def _sample(self, batch: list[Lane], source: Tensor, kids: list[Lane]) -> Drawn:
        """One token for each of the kids.

        Where the device works by itself, the next step is laid out before the tokens of this one are known, and begins
        as soon as they are, also for candidates that turn out to be complete: their last token is what they would have
        pending.
        """
        writer = self._writer
        tokens, logprob = self._draw(batch, source, kids)
        following = None
        if writer.runs_ahead:
            paths = [path for lane in kids if (path := self._state(writer, lane.branch).path) is not None]
            following = writer.prepare(paths, [1] * len(paths))
        found, logprobs = tokens.tolist(), logprob.tolist()
        for lane, token in zip(kids, found, strict=True):
            if token < 0:
                raise nonfinite(writer, lane.expansion.label, lane.branch.length)
        return Drawn(found, logprobs, None if following is None else writer.run(following, found))

    def _draw(self, batch: list[Lane], source: Tensor, kids: list[Lane]) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities at temperature 1, on the device; -1 where the logits are not finite."""
        hidden = torch.stack([self._hidden(self._writer, lane) for lane in batch])
        if self._topk:
            for lane, row in zip(kids, source.tolist(), strict=True):
                lane.branch.chunk_states.append((hidden, row))
        keys = torch.tensor([noise_key(lane.branch.stream, lane.branch.length) for lane in kids]).to(hidden.device)
        source = source.to(hidden.device)
        options = self._sampling
        if not options.filters:
            return linear_sample(
                hidden.index_select(0, source),
                self._writer.decoder.head,
                keys,
                temperature=options.temperature,
                vocabulary=self._vocabulary,
                checked=False,
            )
        logits = self._writer.logits(hidden).index_select(0, source)
        tokens = sample(
            logits[:, : self._vocabulary],
            keys,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            checked=False,
        )
        return tokens, logits.gather(1, tokens.clamp_min(0)[:, None])[:, 0] - logits.logsumexp(1)

    def _take_token(self, lane: Lane, token: int, logprob: float, hidden: Tensor | None) -> None:
        """hidden: the writer's state after the token, where it is there already."""
        kid = lane.branch
        assert lane.end is not None
        assert lane.text is not None
        kid.chunk.append(token)
        kid.chunk_teacher_logprob.append(logprob)
        state = self._state(self._writer, kid)
        if hidden is None:
            state.pending = [token]
        else:
            state.hidden = hidden
        self._usage.teacher_tokens += 1
        chunk_ends = lane.end.reached(lane.text.push(token))
        if token in self._eos_token_ids:
            kid.ended = "finished"
        elif len(kid.chunk) >= lane.expansion.max_new:
            kid.ended = "length"
        elif chunk_ends:
            kid.ended = "chunk"
        if kid.ended is not None:
            lane.expansion.open_kids -= 1

    def _score(self, scorer: ModelRunner, complete: list[Expansion]) -> None:
        """Extend the student over the new tokens of every candidate and take their statistics."""
        kids = [(expansion, kid) for expansion in complete for kid in expansion.kids]
        for expansion, kid in kids:
            path = self._state(scorer, expansion.parent).path
            assert path is not None
            self._state(scorer, kid).path = scorer.tree.fork(path)
        paths = [path for _, kid in kids if (path := self._state(scorer, kid).path) is not None]
        hidden = scorer.extend(paths, [kid.chunk for _, kid in kids])
        predicting = []
        for (expansion, kid), states in zip(kids, hidden, strict=True):
            before = self._state(scorer, expansion.parent).hidden
            assert before is not None
            predicting += [before[None], states[:-1]]
            self._state(scorer, kid).hidden = states[-1].clone()  # not a view: it would keep the whole batch alive
        targets = torch.tensor([token for _, kid in kids for token in kid.chunk])
        # the label and the response position of every row, should one have to be named
        rows = [(expansion.label, len(kid.history) + i) for expansion, kid in kids for i in range(len(kid.chunk))]
        try:
            stats = linear_logprob(torch.cat(predicting), scorer.decoder.head, targets.to(scorer.decoder.device))
        except NonFiniteLogits as error:
            raise nonfinite(scorer, *rows[error.row]) from None
        self._usage.student_tokens += len(targets)
        start = 0
        for _, kid in kids:
            kid.stats = stats[start : start + len(kid.chunk)]
            start += len(kid.chunk)

    @torch.inference_mode()
    def teacher_topk(self, branch: Branch) -> TopK | None:
        """The writer's most likely tokens at every position of a branch's chunk; None where they are not wanted."""
        if not self._topk or not branch.chunk:
            return None
        hidden = torch.stack([states[row] for states, row in branch.chunk_states])
        decoder = self._writer.decoder
        targets = torch.tensor(branch.chunk, device=decoder.device)
        return linear_logprob(hidden, decoder.head, targets, topk=self._topk).topk

    def _hidden(self, runner: ModelRunner, lane: Lane) -> Tensor:
        hidden = self._state(runner, lane.branch).hidden
        assert hidden is not None
        return hidden

    @property
    def _runners(self) -> list[ModelRunner]:
        return [self._writer] if self._scorer is None else [self._writer, self._scorer]

    @staticmethod
    def _state(runner: ModelRunner, branch: Branch) -> ModelState:
        return branch.teacher if runner.role == "teacher" else branch.student

    def _promise(self, runner: ModelRunner, expansion: Expansion) -> _Promise:
        """What an expansion takes at most."""
        size = runner.tree.pool.page_size
        pending = len(self._state(runner, expansion.parent).pending)
        # one page more each: a half-filled page is copied on the first write
        return _Promise(
            runner=runner,
            prefix=-(-pending // size) + 1,
            candidates=expansion.n * (-(-expansion.longest // size) + 1),
        )

    def _outstanding(self, runner: ModelRunner) -> int:
        """Pages promised to the expansions in flight and not taken yet."""
        open_promises = 0
        for expansion, promises in self._promises.items():
            paths = [self._state(runner, kid).path for kid in expansion.kids]
            taken = sum(len(path.leaf.pages) for path in paths if path is not None)
            for promise in promises:
                if promise.runner is runner:
                    open_promises += promise.candidates - taken + (0 if expansion.kids else promise.prefix)
        return open_promises


def nonfinite(runner: ModelRunner, label: str, position: int) -> NumericsError:
    """The error that names the model, the prompt and the position."""
    return NumericsError(
        f"the {runner.role} {runner.directory} produced NaN or infinite logits for {label}, response position "
        f"{position}; check the weights, or run it in float32"
    )
