"""One prompt's search: the teacher proposes chunks, the student's scores decide which are expanded.

Every prompt moves through its rounds independently of the others:

    EXPAND   decode candidates of all its live branches, in one batch with the candidates of the other prompts; where
             several teachers compete, each writes its own
    SELECT   reject duplicates, loops and values worse than the threshold; keep the best `beam` of the rest, or draw
             them; where nothing is left, a policy (policies.py) prunes, samples again or keeps the best all the same
    COMMIT   the kept candidates become the branches of the next round; the pages of all others are freed at once

The scheduler (scheduler.py) decides when each prompt's next round starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import KEPT, STATUSES, Status
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.search.budget import BudgetMeter, BudgetName
from genssd.engine.search.judging import Judge, JudgedCandidate
from genssd.engine.search.policies import Policy, Step, UnlearnableRound
from genssd.engine.search.selection import CandidateRecord, ChunkScore, RoundRecord, Selection, Trajectory, Watch
from genssd.engine.search.teacher_tally import TeacherTally
from genssd.engine.search.team import Team
from genssd.engine.search.views import Views
from genssd.kernels.logprob import TopK


@dataclass(slots=True, eq=False, kw_only=True)
class PromptSearch:
    """The rounds of one prompt, and their results so far."""

    index: int
    """Index of the prompt in the call."""
    label: str
    """Name of the prompt in messages."""
    occurrence: int
    """Number of equal prompts before this one."""
    team: Team
    """The teachers that write."""
    root: Views
    """The prompt without a response."""
    max_tokens: int
    """Maximum number of tokens in the response, limited by the option and by the positions of the models."""
    judge: Judge
    """Rules by which the candidates are judged, with the options of the search."""
    policy: Policy
    """Rule for rounds without an acceptable candidate."""
    watch: Watch | None = None
    """Called after every attempt at a round."""
    live: list[Views] = field(init=False)
    """Committed responses that the next round expands, each as every teacher holds it."""
    round: list[Expansion] = field(init=False)
    """Expansions of the live branches: the next round, or the one that is being decoded or judged."""
    attempt: int = 0
    """Number of times that the round was sampled before."""
    chunk: Chunk = field(init=False)
    """Rule by which the candidates of the round end."""
    meter: BudgetMeter = field(init=False)
    """What the prompt has taken of its budget."""
    tally: TeacherTally = field(init=False)
    """What each teacher has done."""
    ended_by: BudgetName | None = None
    """Budget that ended the search; None where no budget did."""
    num_unfinished: int = 0
    """Number of the round's expansions that are still being decoded."""
    is_started: bool = False
    """Whether the round was submitted to the expander."""
    no_room: str | None = None
    """Why the criterion could not judge the decoded round yet; None where there was room."""
    records: list[CandidateRecord] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    chunk_scores: dict[tuple[int, ...], tuple[ChunkScore, ...]] = field(default_factory=dict)
    """Scores of the chunks that led to each kept branch, by the branch's trace."""
    ended: list[tuple[Branch, Status]] = field(default_factory=list)
    """Branches that are not expanded any more."""

    def __post_init__(self) -> None:
        options = self.judge.options
        self.live = [self.root]
        self.meter = BudgetMeter(options.prompt_budget, ("prompt_budget.tokens", "prompt_budget.seconds"))
        self.tally = TeacherTally(self.team.size, options.drop_teacher_after)
        self._plan_round(0, options.chunk)

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that all rounds may sample together, each attempt once."""
        options = self.judge.options
        num_writing = sum(self.policy.asks(teacher, 0) for teacher in range(self.team.size))
        most = num_writing * options.candidates * options.beam * self.policy.most_tokens(options, self.max_tokens)
        return most if options.prompt_budget.tokens is None else min(most, options.prompt_budget.tokens)

    def start_round(self) -> list[Expansion]:
        """Mark the round as submitted and return its expansions."""
        self.meter.start()
        self.is_started = True
        self.num_unfinished = len(self.round)
        return self.round

    def finish_round(self) -> Selection | None:
        """Judge the decoded round and plan the next; return the prompt's outcome if it was the last.

        Raises CapacityError, changing nothing, when the criterion needs more of the cache than is free: call it again
        later.
        """
        if self.round:
            self._select()
            reached = self.meter.find_reached(sum(expansion.most_tokens for expansion in self.round))
            if reached is not None:
                self.stop(reached)
        return None if self.live else self.outcome()

    def stop(self, budget: BudgetName) -> None:
        """End the live branches as they are, because a budget is reached; a round in flight must be cancelled before.

        Without a live branch the search is over already, and nothing changes.
        """
        if self.live:
            self.ended_by = budget
        self.drop()
        self.ended += [(views.main, "budget") for views in self.live]
        self.live, self.round = [], []

    def suspend(self) -> None:
        """Free the pages of all live branches; the round, whose expansions were cancelled, can be started again."""
        self.is_started, self.no_room = False, None
        for views in self.live:
            views.suspend()

    def drop(self) -> None:
        """Free the pages of all live branches for good."""
        for views in self.live:
            views.drop()

    def outcome(
        self, error: str | None = None, *, missing_token: int | None = None, missing_teacher: int = 0
    ) -> Selection:
        """Return the results of the search. error: why the prompt failed; its responses then have no scores."""
        written = [branch for branch, _ in self.ended if branch.history and error is None]
        try:
            for branch in written:
                branch.finish_reading()
        except InputError as fault:  # held back, and no text of the student's
            return self.outcome(error=str(fault))
        scores = dict(zip(written, self.judge.score_responses(written, self.label), strict=True))
        trajectories = [self._trajectory(b, status, scores.get(b, math.nan)) for b, status in self.ended]
        trajectories.sort(key=lambda t: (STATUSES.index(t.status), self.judge.sort_key(t.score)))
        return Selection(
            index=self.index,
            prompt_ids=self.root.main.prompt.teacher,
            student_prompt_ids=self.root.main.prompt.student,
            num_lead=self.root.main.prompt.num_lead,
            trajectories=tuple(trajectories),
            tree=tuple(self.records),
            rounds=tuple(self.rounds),
            teachers=self.tally.list_uses(next(iter(trajectories), None)) if self.team.size > 1 else (),
            ended_by=self.ended_by,
            seed=self.judge.options.seed,
            occurrence=self.occurrence,
            error=error,
            missing_token=missing_token,
            missing_teacher=missing_teacher,
        )

    def _plan_round(self, attempt: int, chunk: Chunk) -> None:
        """Make the expansions of the live branches; attempts whose teachers cannot read any of them are left out.

        No expansions where no teacher can go on: the prompt is longer than its positions, and is not run.
        """
        self.is_started, self.attempt, self.chunk = False, attempt, chunk
        self.round = [expansion for views in self.live for expansion in self._expand(views)]
        if not self.round and any(map(self._list_able, self.live)):
            self._plan_round(attempt + 1, chunk)

    def _expand(self, views: Views) -> list[Expansion]:
        """Return an expansion of a response for every teacher that writes in the round.

        Their candidates are further children of one response, numbered one teacher after the other; a dropped teacher
        keeps its numbers, so that the noise of the others stays what it was.
        """
        start, count = views.num_children, self.judge.options.candidates
        # after a prompt that is too long nobody has room; its outcome says so, and no round is run
        able = self._list_able(views) or views.list_present()
        remaining = [branch for branch in able if branch.writer not in self.tally.dropped]
        asked = [writer for writer in range(self.team.size) if self.policy.asks(writer, self.attempt)]
        expansions: list[Expansion] = []
        for branch in remaining or able:
            if branch.writer in asked:
                branch.num_children = start + asked.index(branch.writer) * count
                expansions.append(Expansion(branch, count, self.chunk, self._max_new(branch), self.label))
        return expansions

    def _max_new(self, branch: Branch) -> int:
        """Return the maximum number of tokens that a teacher can add to a response."""
        return min(self.max_tokens - branch.num_written, self.team.find_room(branch))

    def _list_able(self, views: Views) -> list[Branch]:
        """Return the branches of the teachers that can go on with a response: they can read it, and have room."""
        return [branch for branch in views.list_present() if self._max_new(branch) >= 1]

    def _select(self) -> None:
        """Judge the candidates of the decoded round, commit the kept ones, drop the others, plan the next round."""
        judged = self._judged_round()
        step = self._decide(judged)
        self._record(judged, step)
        for one in judged:
            if one.verdict not in KEPT:
                one.branch.drop()
        if step.again is not None:
            self._plan_round(self.attempt + 1, step.again)
            return
        self._close_pruned(judged)
        before, self.live = self.live, []
        for winner in step.accepted:
            parent = next(views for views in before if views.trace == winner.branch.trace[:-1])
            self._keep(winner, parent, judged)
        for views in before:
            views.drop()
        self._plan_round(0, self.judge.options.chunk)

    def _decide(self, judged: Sequence[JudgedCandidate]) -> Step:
        """Return what follows the round, and set the verdicts of the candidates that were not rejected."""
        num_slots = self.judge.options.beam - sum(status != "pruned" for _, status in self.ended)
        acceptable = [one for one in judged if one.verdict == "kept"]
        if acceptable:
            step = Step(decision="selected", accepted=self.judge.choose(acceptable, num_slots))
        else:
            step = self.policy.next_step(
                UnlearnableRound(
                    attempt=self.attempt,
                    chunk=self.chunk,
                    judged=judged,
                    judge=self.judge,
                    teachers={branch.writer for views in self.live for branch in self._list_able(views)},
                )
            )
        for one in acceptable:
            one.verdict = "beaten"
        for one in step.accepted:
            one.verdict = step.verdict
        return step

    def _record(self, judged: Sequence[JudgedCandidate], step: Step) -> None:
        """Keep the candidates and the decision for the outcome."""
        records = [one.record(self.attempt) for one in judged]
        self.records += records
        kept = [one for one in records if one.verdict in KEPT]
        usage = self.team.expander.usage
        usage.judged_candidates += len(records)
        usage.kept_candidates += len(kept)
        usage.kept_tokens += sum(len(one.token_ids) for one in kept)
        self.meter.tokens += sum(len(one.branch.chunk) for one in judged)
        self.tally.note(self.round, {one.branch.writer for one in step.accepted})
        teachers = tuple(sorted({expansion.parent.writer for expansion in self.round}))
        self.rounds.append(
            RoundRecord(
                round=len(self.live[0].trace),
                attempt=self.attempt,
                chunk_tokens=self.chunk.least,
                chunk_limit=self.chunk.longest,
                decision=step.decision,
                teachers=teachers if self.team.size > 1 else None,
            )
        )
        if self.watch is not None:
            self.watch(self.index, records, self.rounds[-1])

    def _judged_round(self) -> list[JudgedCandidate]:
        """Score all candidates of the round and reject the unfit ones, response by response."""
        judged = self.judge.judge_round([child for expansion in self.round for child in expansion.children], self.label)
        for _, siblings in groupby(judged, key=lambda one: one.branch.trace[:-1]):
            self.judge.reject_unfit(list(siblings), by_text=not self.team.has_one_tokenizer)
        return judged

    def _close_pruned(self, judged: Sequence[JudgedCandidate]) -> None:
        """End every branch none of whose candidates was acceptable; it stays in the outcome as pruned."""
        accepted = {one.branch.trace[:-1] for one in judged if one.verdict in (*KEPT, "beaten")}
        parents = [views.main for views in self.live]
        self.ended += [(parent, "pruned") for parent in parents if parent.trace not in accepted]

    def _keep(self, winner: JudgedCandidate, parent: Views, judged: Sequence[JudgedCandidate]) -> None:
        """Commit a kept candidate: it is live, or ended. parent: the response that it continues."""
        branch, num_tokens = winner.branch, len(winner.branch.chunk)
        others = [one.score for one in judged if one is not winner and one.verdict != "duplicate"]
        runner_up = min(others, key=self.judge.sort_key, default=None)
        chosen = ChunkScore(
            tokens=num_tokens,
            score=winner.score,
            runner_up=runner_up,
            teacher=branch.writer,
            is_forced=winner.verdict == "forced",
        )
        self.chunk_scores[branch.trace] = (*self.chunk_scores.get(branch.trace[:-1], ()), chosen)
        branch.commit()
        if branch.ended is None:
            views = self.team.continue_with(parent, branch)
            if self._list_able(views):
                self.live.append(views)
                return
            views.drop()  # teachers' tokenizers differ, and the chunk takes the last positions of all
        self.ended.append((branch, "finished" if branch.ended in ("finished", "stopped") else "length"))
        branch.drop()

    def _trajectory(self, branch: Branch, status: Status, score: float) -> Trajectory:
        return Trajectory(
            token_ids=tuple(branch.history) if self.team.has_one_tokenizer else self._written_ids(branch.trace),
            text=branch.text,
            score=score,
            status=status,
            stop_reason=branch.stop_reason,
            trace=branch.trace,
            chunks=self.chunk_scores.get(branch.trace, ()),
            readings=branch.history_readings,
            stats=branch.response().stats,
            is_drifted=branch.is_drifted,
            teacher_topk=TopK.concatenate(branch.history_topk) if branch.history_topk else None,
        )

    def _written_ids(self, trace: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens of a response, those of each chunk as its teacher wrote them."""
        tokens_of = {record.trace: record.token_ids for record in self.records if record.verdict in KEPT}
        return tuple(token for depth in range(1, len(trace) + 1) for token in tokens_of[trace[:depth]])
