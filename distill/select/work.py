"""The search over the prompts of `genssd select` as the work of an engine: prompts in, lines of the journals out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from genssd.distill.answers.thoughts import ThoughtReader
from genssd.distill.data.problems import ProblemRow
from genssd.distill.data.response_limits import ResponseLimits
from genssd.distill.pool.pool import Stopped
from genssd.distill.runs.journal import begin_line, make_line
from genssd.distill.runs.teacher_options import StateType
from genssd.distill.select.kept_states import KeptText, add_states
from genssd.distill.select.notes import NoteMaker
from genssd.distill.select.peek import Peek
from genssd.distill.select.rows import ModelRecord, Origin, make_decision_row, make_selection_row
from genssd.distill.select.summary import list_special
from genssd.engine.common.model_choices import Role
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget, BudgetName
from genssd.engine.search.policies import make_policy
from genssd.engine.search.search_options import SearchOptions
from genssd.engine.search.selection import Selection
from genssd.kernels.logprob import TopK

ROLES: tuple[Role, Role] = ("teacher", "student")
TOTAL_BUDGET: tuple[BudgetName, ...] = ("total_budget.tokens", "total_budget.seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchedPrompt:
    """The outcome of one prompt, as it is written."""

    tokens_sampled: int
    begun: bytes = b""
    """Line of selections.jsonl without `teacher_topk` and `teacher_states`, to be completed (`complete_line`); empty
    where the prompt failed."""
    decisions: bytes = b""
    """Line of decisions.jsonl, with its checksum; empty where the prompt failed."""
    correct: bool | None = None
    """Verdict on the best trajectory."""
    topk: TopK | None = None
    """The teacher's most likely tokens along the best trajectory, on the CPU; None where they are not kept."""
    states: Tensor | None = None
    """The teacher's hidden states along the best trajectory, on the CPU; None where they are not kept."""
    special: tuple[str, ...] = ()
    """What a user may want to see of the prompt while others run."""
    error: str | None = None
    """Why the prompt failed; None where it has both lines."""
    missing_token: str | None = None
    """String and id of the teacher's token that the student does not have, where that is why it failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchWork:
    """The search over problems; a `Work`, whose items are places of problems."""

    problems: Sequence[ProblemRow]
    """All problems: how many equal prompts come before one decides what is drawn for it."""
    items: Sequence[int]
    options: SearchOptions
    threshold: float | None
    data: str
    """Name of the data file, which the rows record."""
    teachers: Sequence[str]
    """Hub ids or directories of the teachers, which the rows record."""
    student: str
    """Hub id or directory of the student, which the rows record."""
    teacher_states: StateType | None = None
    """Data type in which the teacher's hidden states are kept; None keeps none."""
    peek: bool = False
    """Whether the search of the first item is logged round by round."""

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that the attempts at the rounds of one prompt sample, each attempt once."""
        policy, options = make_policy(self.options, len(self.teachers)), self.options
        num_writing = sum(policy.asks(teacher, 0) for teacher in range(len(self.teachers)))
        most = num_writing * options.candidates * options.beam * policy.most_tokens(options, options.max_tokens)
        return min(most, options.prompt_budget.tokens or most)

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, SearchedPrompt | Stopped]]:
        """Yield the outcome of every prompt; see `Work`."""
        writer = _RowMaker(engine, self)
        selections = engine.iter_select_expand(
            [problem.prompt for problem in self.problems],
            self.options,
            threshold=self.threshold,
            total_budget=budget,
            answers=[problem.answer for problem in self.problems],
            skip=frozenset(range(len(self.problems))) - frozenset(self.items),
            labels=[problem.where for problem in self.problems],
            feed=feed,
            watch=self._watch(engine),
        )
        outcomes = (self._make_outcome(writer, selection) for selection in selections)
        for place, outcome, states in add_states(engine, self.teacher_states, outcomes):
            if isinstance(outcome, Stopped) or states is None:
                yield place, outcome
            elif isinstance(states, str):
                yield place, SearchedPrompt(tokens_sampled=outcome.tokens_sampled, error=states)
            else:
                yield place, replace(outcome, states=states)

    def _make_outcome(
        self, writer: _RowMaker, selection: Selection
    ) -> tuple[int, SearchedPrompt | Stopped, KeptText | None]:
        """Return the index of a prompt, its outcome, and the text whose hidden states may be kept."""
        if selection.ended_by in TOTAL_BUDGET:
            return selection.index, Stopped(by=selection.ended_by), None
        outcome, text = writer.make(selection, self.problems[selection.index]), None
        if outcome.error is None:
            ids = selection.best.student_ids
            text = KeptText.of(selection.prompt_ids, selection.student_prompt_ids, selection.num_lead, ids)
        return selection.index, outcome, text

    def _watch(self, engine: Engine) -> Peek | None:
        """Return what logs the rounds of the first item; None where it is not asked for."""
        if not self.peek or not self.items:
            return None
        return Peek(engine, self.items[0], self.problems[self.items[0]].where)


class _RowMaker:
    """Makes the rows of one search. engine: the one that searches."""

    def __init__(self, engine: Engine, work: SearchWork) -> None:
        teachers = engine.teachers
        self._readers = [one.reader for one in teachers]
        limits = ResponseLimits.of(engine, ROLES, work.options.max_tokens)
        tokenizers = [one.tokenizer("teacher").fingerprint for one in teachers]
        is_mixed = len({*tokenizers}) > 1 and engine.reader.reads_bytes
        self._notes = NoteMaker(engine.tokenizer("student" if is_mixed else "teacher"), limits, by_student=is_mixed)
        self._thoughts = ThoughtReader(engine.tokenizer("teacher"))
        self._origin = Origin(
            data=work.data,
            criterion=str(work.options.criterion),
            teachers=[
                ModelRecord(name=name, fingerprint=one.fingerprints["teacher"])
                for name, one in zip(work.teachers, teachers, strict=True)
            ],
            student=ModelRecord(name=work.student, fingerprint=engine.fingerprints["student"]),
            tokenizer=engine.tokenizer("student").fingerprint,
            teacher_tokenizer=tokenizers[0] if engine.reader.reads_bytes and not is_mixed else None,
        )

    def make(self, selection: Selection, problem: ProblemRow) -> SearchedPrompt:
        """Return the outcome of one prompt."""
        sampled = selection.tokens_sampled
        if selection.error is not None:
            token = selection.missing_token
            missing = None if token is None else self._readers[selection.missing_teacher].name_token(token)
            return SearchedPrompt(tokens_sampled=sampled, error=selection.error, missing_token=missing)
        notes = self._notes.of_selection(selection, problem.answer)
        opening = self._thoughts.read_opening(selection.prompt_ids)
        topk = selection.best.teacher_topk
        row = make_selection_row(selection, problem, self._origin, notes, opening)
        return SearchedPrompt(
            tokens_sampled=sampled,
            begun=begin_line(row),
            decisions=make_line(make_decision_row(selection, problem.index)),
            correct=row["correct"],
            topk=None if topk is None else replace(topk, ids=topk.ids.cpu(), logprob=topk.logprob.cpu()),
            special=tuple(list_special(selection)),
        )
