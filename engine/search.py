"""The search: the teacher proposes chunks, the student's scores decide which are expanded.

Every prompt moves through its rounds on its own:

    EXPAND   candidates of all its live branches, in one decoding batch with everybody else's
    SELECT   drop duplicates, loops and what is worse than the threshold; keep the best `beam` of the rest
    COMMIT   the kept candidates become the branches of the next round; the pages of all others are free at once

A prompt whose next round does not fit into the cache waits. When nothing moves any more, the youngest prompt gives its
pages back and is computed again later, to the same tokens, because sampling is counter-based.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from genssd.engine.branch import Branch
from genssd.engine.candidate import AnyCriterion, PoolCriterion, evaluate, evaluate_distinct
from genssd.engine.chunk import Chunk
from genssd.engine.errors import CapacityError, InputError
from genssd.engine.expander import Expander, Expansion
from genssd.engine.loops import LoopGuard
from genssd.engine.selection import STATUSES, CandidateRecord, ChunkScore, Selection, Status, Trajectory, Verdict
from genssd.kernels.logprob import TopK

NO_ROOM = (
    "the prompt's next round does not fit into the key-value cache beside the branches that others hold; "
    "raise memory_bytes or memory_utilization, or lower candidates, beam or the chunk limit"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """The knobs of `Engine.select_expand`; documented there."""

    candidates: int
    chunk: Chunk
    beam: int
    criterion: AnyCriterion
    threshold: float | None
    max_tokens: int
    loop_guard: LoopGuard | None
    seed: int

    def __post_init__(self) -> None:
        for name in ("candidates", "beam", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise InputError("threshold must be a number or None, not NaN")
        if isinstance(self.criterion, PoolCriterion) and self.criterion.pool == "data":
            raise InputError(
                f"{self.criterion!r} is fitted over all of the data, which the search does not have yet; fix what it "
                "fits (aslec_casl(gamma=...)), or use it on finished traces with `genssd score`"
            )

    def acceptable(self, score: float) -> bool:
        """Whether a value is no worse than the threshold."""
        if self.threshold is None:
            return True
        return score >= self.threshold if self.criterion.higher_is_better() else score <= self.threshold

    def rank(self, score: float) -> float:
        """A sort key: smaller is better."""
        return -score if self.criterion.higher_is_better() else score


@dataclass(slots=True, eq=False)
class PromptSearch:
    """One prompt's rounds. max_tokens: what its response may have, given the models' positions."""

    index: int
    label: str
    occurrence: int
    root: Branch
    max_tokens: int
    live: list[Branch] = field(default_factory=list)
    in_flight: list[Expansion] = field(default_factory=list)
    unfinished: int = 0
    records: list[CandidateRecord] = field(default_factory=list)
    chunk_scores: dict[tuple[int, ...], tuple[ChunkScore, ...]] = field(default_factory=dict)
    final: list[tuple[Branch, Status]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.live = [self.root]

    def next_round(self, options: SearchOptions) -> list[Expansion]:
        """What the next round asks for."""
        return [
            Expansion(branch, options.candidates, options.chunk, self.max_tokens - branch.length, self.label)
            for branch in self.live
        ]

    def select(self, options: SearchOptions) -> None:
        """Judge the candidates of the finished round; commit the kept, drop the others."""
        parents = [expansion.parent for expansion in self.in_flight]
        scored = _judge([kid for expansion in self.in_flight for kid in expansion.kids], options, self.label)
        for expansion in self.in_flight:
            _reject(expansion, scored, options)
        slots = options.beam - sum(status != "pruned" for _, status in self.final)
        ranked = sorted((s for s in scored if s.verdict == "kept"), key=lambda s: options.rank(s.score))
        for loser in ranked[slots:]:
            loser.verdict = "beaten"
        self.records += [s.record() for s in scored]
        self._close_pruned(parents, scored)
        self.live = []
        for winner in ranked[:slots]:
            self._keep(winner, scored, options)
        for s in scored:
            if s.verdict != "kept":
                s.kid.drop()
        for parent in parents:
            parent.drop()
        self.in_flight = []

    def judge(self, options: SearchOptions) -> Selection | None:
        """Judge the finished round; the outcome, if it was the last. Raises CapacityError, changing nothing, when the
        criterion needs room that is not there."""
        if self.in_flight:
            self.select(options)
        return None if self.live else self.result(options)

    def result(self, options: SearchOptions, error: str | None = None) -> Selection:
        """The prompt's outcome."""
        written = [branch for branch, _ in self.final if branch.history and error is None]
        scores = dict(zip(written, evaluate(options.criterion, [b.response() for b in written]), strict=True))
        if any(math.isnan(score) for score in scores.values()):
            raise InputError(f"the criterion {options.criterion!r} returned NaN for a response to {self.label}")
        trajectories = [self._trajectory(b, status, scores.get(b, math.nan)) for b, status in self.final]
        trajectories.sort(key=lambda t: (STATUSES.index(t.status), options.rank(t.score)))
        return Selection(
            index=self.index,
            prompt_ids=self.root.prompt.teacher,
            student_prompt_ids=self.root.prompt.student,
            trajectories=tuple(trajectories),
            tree=tuple(self.records),
            seed=options.seed,
            occurrence=self.occurrence,
            error=error,
        )

    def _close_pruned(self, parents: Sequence[Branch], scored: Sequence[_Scored]) -> None:
        """A branch none of whose candidates was acceptable ends here, for the record."""
        accepted = {s.kid.trace[:-1] for s in scored if s.verdict in ("kept", "beaten")}
        self.final += [(parent, "pruned") for parent in parents if parent.trace not in accepted]

    def _keep(self, winner: _Scored, scored: Sequence[_Scored], options: SearchOptions) -> None:
        kid, tokens = winner.kid, len(winner.kid.chunk)
        others = [options.rank(s.score) for s in scored if s is not winner and s.verdict != "duplicate"]
        runner_up = None if not others else abs_rank(min(others), options)
        chosen = ChunkScore(tokens=tokens, score=winner.score, runner_up=runner_up)
        self.chunk_scores[kid.trace] = (*self.chunk_scores.get(kid.trace[:-1], ()), chosen)
        kid.commit()
        if kid.ended is None:
            self.live.append(kid)
            return
        self.final.append((kid, "finished" if kid.ended == "finished" else "length"))
        kid.drop()

    def _trajectory(self, branch: Branch, status: Status, score: float) -> Trajectory:
        return Trajectory(
            token_ids=tuple(branch.history),
            text=branch.text,
            score=score,
            status=status,
            trace=branch.trace,
            chunks=self.chunk_scores.get(branch.trace, ()),
            stats=branch.response().stats,
            teacher_topk=TopK.concatenate(branch.history_topk) if branch.history_topk else None,
        )


@dataclass(slots=True, eq=False)
class _Scored:
    """A candidate under judgement."""

    kid: Branch
    score: float
    verdict: Verdict = "kept"

    def record(self) -> CandidateRecord:
        assert self.kid.ended is not None
        return CandidateRecord(
            trace=self.kid.trace,
            token_ids=tuple(self.kid.chunk),
            stats=self.kid.stats,
            teacher_logprob=self.kid.teacher_logprob,
            ended=self.kid.ended,
            score=self.score,
            verdict=self.verdict,
        )


def abs_rank(rank: float, options: SearchOptions) -> float:
    """The criterion's value behind a rank."""
    return -rank if options.criterion.higher_is_better() else rank


def _judge(kids: Sequence[Branch], options: SearchOptions, label: str) -> list[_Scored]:
    """Every candidate of a round with its value: they compete with each other."""
    candidates = [kid.candidate().lengthened(options.chunk.shortest) for kid in kids]
    scores = evaluate_distinct(options.criterion, candidates)
    if any(math.isnan(score) for score in scores):
        raise InputError(f"the criterion {options.criterion!r} returned NaN for a candidate of {label}")
    return [_Scored(kid, score) for kid, score in zip(kids, scores, strict=True)]


def _reject(expansion: Expansion, scored: Sequence[_Scored], options: SearchOptions) -> None:
    """Mark the candidates of one branch that may not compete."""
    seen: set[tuple[int, ...]] = set()
    kids = set(expansion.kids)
    for s in scored:
        if s.kid not in kids:
            continue
        tokens = tuple(s.kid.chunk)
        if tokens in seen:
            s.verdict = "duplicate"
        elif options.loop_guard is not None and options.loop_guard.period(s.kid.token_ids):
            s.verdict = "loop"
        elif not options.acceptable(s.score):
            s.verdict = "threshold"
        seen.add(tokens)


def search(prompts: Sequence[PromptSearch], expander: Expander, options: SearchOptions) -> Iterator[Selection]:
    """Run the prompts and yield each as it ends. Closing the iterator early returns all pages."""
    waiting = deque(prompts)  # not started, or suspended, oldest first
    active: list[PromptSearch] = []  # hold pages
    judging: list[PromptSearch] = []  # of these, those whose round is decoded
    owner: dict[Expansion, PromptSearch] = {}
    try:
        while waiting or active:
            if not judging:  # a new round would take the room that the criterion waits for
                _start_rounds(active, waiting, expander, options, owner)
            if owner:
                for expansion in expander.step():
                    prompt = owner.pop(expansion)
                    prompt.unfinished -= 1
                    if prompt.unfinished == 0:
                        judging.append(prompt)
            else:
                stuck = _make_room(active, judging, waiting, expander)
                if stuck is not None:
                    yield stuck.result(options, error=NO_ROOM)
            for prompt in list(judging):
                try:
                    selection = prompt.judge(options)
                except CapacityError:  # the criterion runs the student on windows of its own, and they do not fit now
                    continue
                judging.remove(prompt)
                if selection is not None:
                    active.remove(prompt)
                    yield selection
    finally:
        for prompt in active:
            _release(prompt, expander)


def _start_rounds(
    active: list[PromptSearch],
    waiting: deque[PromptSearch],
    expander: Expander,
    options: SearchOptions,
    owner: dict[Expansion, PromptSearch],
) -> None:
    """Start the next round of every prompt that can, older prompts first; then admit new ones while rows are free."""
    ready = [prompt for prompt in active if not prompt.in_flight]
    while ready or (waiting and expander.has_room):
        prompt = ready.pop(0) if ready else waiting[0]
        expansions = prompt.next_round(options)
        if not expander.fits(expansions):
            return  # younger prompts must not overtake, or the oldest could starve
        if prompt not in active:
            active.append(waiting.popleft())
        for expansion in expansions:
            expander.submit(expansion)
            owner[expansion] = prompt
        prompt.in_flight, prompt.unfinished = expansions, len(expansions)


def _make_room(
    active: list[PromptSearch], judging: list[PromptSearch], waiting: deque[PromptSearch], expander: Expander
) -> PromptSearch | None:
    """Nothing is in flight, nothing fits: suspend the youngest prompt, or return the one that does not fit alone.

    Prompts that hold a decoded round are suspended last: it has to be decoded again.
    """
    if not active:
        return waiting.popleft()
    idle = [prompt for prompt in active if prompt not in judging]
    youngest = (idle or active)[-1]
    active.remove(youngest)
    if youngest in judging:
        judging.remove(youngest)
    if not active or (not youngest.live and not youngest.in_flight):
        _release(youngest, expander)
        return youngest
    for expansion in youngest.in_flight:
        expander.cancel(expansion)
    youngest.in_flight = []
    for branch in youngest.live:
        branch.suspend()
    waiting.appendleft(youngest)
    return None


def _release(prompt: PromptSearch, expander: Expander) -> None:
    for expansion in prompt.in_flight:
        expander.cancel(expansion)
    for branch in prompt.live:
        branch.drop()
