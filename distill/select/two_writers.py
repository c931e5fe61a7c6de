"""Responses that teacher and student write in turns, many of them side by side.

Every response asks for its next turn (turns.py); turns of one kind go to the engine as one batch. A response that does
not fit into the cache beside the others waits, and is begun again: draws depend on seed, prompt, position and branch
alone, so it gets the same tokens.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.select.alternation import make_judge, write_alternately
from genssd.distill.select.relay import write_in_relay
from genssd.distill.select.turns import Turn, TwoWriterCompletion, Writing
from genssd.distill.select.two_writer_options import Alternation, Relay
from genssd.engine.calls.generation import Generation
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.common.options_check import check_count
from genssd.engine.criteria.criterion import needs_answer
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.decoding.feed import Feed, Intake
from genssd.engine.decoding.rewinding import rewind
from genssd.engine.engine import Engine
from genssd.engine.models.sampling import Sampling, child_stream, prompt_stream
from genssd.engine.setup.requests import check_answers, labels_of
from genssd.engine.setup.resources import ANSWER_ROOM
from genssd.engine.texts.text import Prompt

MAX_RUNNING = 64
"""Maximum number of responses that are written side by side."""

TurnKind = tuple[Role, int, Chunk, Sampling | None]
"""What turns of one batch have in common: writer, number of candidates, chunk, and how the student samples."""


@dataclass(slots=True, eq=False)
class _Response:
    """One response while it is written, or while it waits."""

    index: int
    """Index of the prompt."""
    number: int
    """Number of the response among those to its prompt."""
    begin: Callable[[], Writing]
    """Function that begins the response, each time with the same tokens."""
    writing: Writing | None = None
    turn: Turn | None = None

    def stop(self) -> None:
        """Free all pages; the response can be begun again."""
        if self.writing is not None:
            self.writing.close()
        self.writing = self.turn = None


@dataclass(slots=True)
class _Prompt:
    """The outcome of a prompt while its responses are written."""

    label: str
    most_tokens: int
    """Largest number of tokens in all responses together."""
    responses: Sequence[_Response]
    completions: dict[int, TwoWriterCompletion] = field(default_factory=dict)
    """Finished responses by their numbers."""


def generate_two_writers(
    engine: Engine,
    prompts: Sequence[Prompt],
    method: Alternation | Relay,
    *,
    n: int = 1,
    sampling: Sampling = Sampling(top_p=0.95),
    max_tokens: int = 4096,
    seed: int = 0,
    answers: Sequence[str | None] | None = None,
    stop: tuple[str, ...] = (),
    include_stop: bool = False,
) -> list[list[TwoWriterCompletion]]:
    """Let teacher and student write n responses per prompt in turns; return those of each prompt, in order.

    method: how they take turns, with its options. sampling: how the teacher samples. max_tokens: maximum number of
    tokens in a response. answers: reference answers, for a criterion that reads them and for `Relay(error="answer")`.
    stop, include_stop: texts at which a response ends, whoever writes, and whether it keeps them (see `SearchOptions`).
    Raises InputError on an unusable argument, an answer that is missing, models whose tokens are not the same and a
    teacher on a server; CapacityError on a prompt that fits into no cache, NumericsError on NaN or infinite logits.
    """
    outcomes = iter_two_writers(
        engine, prompts, method, n=n, sampling=sampling, max_tokens=max_tokens, seed=seed, answers=answers, stop=stop,
        include_stop=include_stop,
    )  # fmt: skip
    completions = {outcome.index: outcome.completions for outcome in outcomes}
    return [[c for c in completions[i] if isinstance(c, TwoWriterCompletion)] for i in range(len(prompts))]


def iter_two_writers(
    engine: Engine,
    prompts: Sequence[Prompt],
    method: Alternation | Relay,
    *,
    n: int = 1,
    sampling: Sampling = Sampling(top_p=0.95),
    max_tokens: int = 4096,
    seed: int = 0,
    answers: Sequence[str | None] | None = None,
    stop: tuple[str, ...] = (),
    include_stop: bool = False,
    skip: frozenset[int] = frozenset(),
    labels: Sequence[str] | None = None,
    feed: Feed | None = None,
) -> Iterator[Generation]:
    """Write as `generate_two_writers` does and yield each prompt's Generation as soon as its last response ends.

    Its completions are `TwoWriterCompletion`s. A prompt that is longer than a model's positions or than the cache
    yields a Generation with `error` set. skip: indices of prompts that are not run, because they were done before.
    labels: names of the prompts in messages. feed: hands out the indices of the prompts to run, one after the other,
    where several engines divide them; the others have no outcome here. Arguments and prompts are checked at once.
    """
    check_count("n", n)
    check_count("max_tokens", max_tokens)
    names = labels_of(prompts, labels)
    if not engine.reader.is_identity:
        raise InputError(f"two writers need models whose tokens are the same: {engine.reader.describe()}")
    begin = _Begin(engine, method)
    begin.check_answers(answers, names)
    waiting: dict[int, _Prompt] = {}
    failed: dict[int, Generation] = {}
    seen: Counter[tuple[int, ...]] = Counter()
    for index, prompt in enumerate(prompts):
        answer = None if answers is None else answers[index]
        try:
            root = engine.branch(
                prompt, sampling=sampling, seed=seed, answer=answer, max_tokens=max_tokens, stop=stop,
                include_stop=include_stop,
            )  # fmt: skip
        except InputError as error:
            raise InputError(f"{names[index]}: {str(error).removeprefix('the prompt: ')}") from None
        except CapacityError as error:
            failed[index] = Generation(index=index, label=names[index], error=str(error))
            continue
        stream = prompt_stream(seed, root.prompt.teacher, seen[root.prompt.teacher])
        seen[root.prompt.teacher] += 1
        begin.limit(root)
        starts = [partial(begin, root, child_stream(stream, 0, number), names[index]) for number in range(n)]
        responses = [_Response(index, number, start) for number, start in enumerate(starts)]
        waiting[index] = _Prompt(names[index], n * max_tokens, responses)
    waiting = {index: prompt for index, prompt in waiting.items() if index not in skip}
    failed = {index: outcome for index, outcome in failed.items() if index not in skip}
    return _Driver(engine, waiting, failed, feed).run()


class _Begin:
    """Begins responses by one method."""

    def __init__(self, engine: Engine, method: Alternation | Relay) -> None:
        self._engine = engine
        self._method = method
        self._tokenizer = engine.tokenizer("teacher")
        self._judge = make_judge(method) if isinstance(method, Alternation) else None
        self._answers = AnswerJudge(self._tokenizer)

    def check_answers(self, answers: Sequence[str | None] | None, labels: Sequence[str]) -> None:
        """Raise InputError naming the first prompt without the reference answer that the method reads."""
        if self._judge is not None:
            check_answers(answers, self._judge.criterion, labels)
        elif isinstance(self._method, Relay) and self._method.error == "answer":
            for i, label in enumerate(labels):
                if answers is None or answers[i] is None:
                    raise InputError(f"{label}: no reference answer, by which relay.error=answer tells errors")

    def limit(self, root: Branch) -> None:
        """Leave the student positions for the reference answer, where the criterion reads it after the response."""
        if self._judge is None or not needs_answer(self._judge.criterion) or root.max_tokens is None:
            return
        num_answer = len(self._engine.tokenizer("student").encode_plain(root.prompt.answer or "")) + ANSWER_ROOM
        free = self._engine.positions("student") - len(root.prompt.student) - num_answer
        root.max_tokens = max(1, min(root.max_tokens, free))

    def __call__(self, root: Branch, stream: int, label: str) -> Writing:
        """Begin a response with a random stream of its own, in a branch of its own."""
        branch = rewind(root, 0)
        branch.stream = stream
        if isinstance(self._method, Relay):
            return write_in_relay(branch, self._method, self._tokenizer, self._is_wrong)
        assert self._judge is not None
        return write_alternately(branch, self._method, self._judge, self._tokenizer, label)

    def _is_wrong(self, branch: Branch) -> bool:
        """Return whether an ended response gives another answer; False where that cannot be judged."""
        verdict = self._answers.judge(branch.prompt.teacher, branch.history, branch.prompt.answer)
        return not verdict.is_correct and verdict.undecided is None


class _Driver:
    """Writes many responses side by side, as many as the cache holds."""

    def __init__(
        self, engine: Engine, prompts: Mapping[int, _Prompt], failed: Mapping[int, Generation], feed: Feed | None
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._failed = failed
        self._feed = feed
        self._waiting: deque[_Response] = deque()
        """Responses to prompts that have begun."""
        self._running: list[_Response] = []
        self._width = MAX_RUNNING
        self._outcomes: deque[Generation] = deque()

    def run(self) -> Iterator[Generation]:
        """Yield the outcomes that are known already, then every other one. Closing early frees all pages."""
        if self._feed is None:
            yield from self._failed.values()
        intake = Intake(self._prompts, self._engine.usage, self._feed, self._failed)
        try:
            while self._waiting or self._running or intake.fill(wait=True) or intake.found_misfits:
                self._begin_some(intake)
                while intake.found_misfits:
                    yield self._failed[intake.found_misfits.pop()]
                for group in self._group():
                    self._expand(group)
                while self._outcomes:
                    yield self._outcomes.popleft()
        finally:
            for response in self._running:
                response.stop()

    def _begin_some(self, intake: Intake[_Prompt]) -> None:
        """Begin responses that wait, then those to further prompts, as long as there is room."""
        while len(self._running) < self._width:
            if not self._waiting:
                if not intake.fill(wait=False):
                    return
                self._waiting.extend(intake.pop().responses)
            self._begin(self._waiting.popleft())

    def _begin(self, response: _Response) -> None:
        response.writing = response.begin()
        response.turn = next(response.writing)
        self._running.append(response)

    def _group(self) -> list[list[_Response]]:
        """Return the running responses by the kind of their turns."""
        groups: dict[TurnKind, list[_Response]] = {}
        for response in self._running:
            if (turn := response.turn) is not None:
                groups.setdefault((turn.writer, turn.n, turn.chunk, turn.sampling), []).append(response)
        return list(groups.values())

    def _expand(self, group: Sequence[_Response]) -> None:
        """Have one batch of turns sampled, and send what comes; where the cache does not hold it, fewer run."""
        turns = [(response, response.turn) for response in group if response.turn is not None]
        if not turns:
            return
        first = turns[0][1]
        try:
            candidates = self._engine.expand(
                [turn.branch for _, turn in turns], first.n, first.chunk, model=first.writer, sampling=first.sampling
            )
        except CapacityError as error:
            fault = str(error)
        else:
            for (response, _), children in zip(turns, candidates, strict=True):
                self._send(response, children)
            return
        self._make_room(fault)
        self._expand(group)

    def _send(self, response: _Response, children: list[Branch]) -> None:
        """Give a response the candidates that it asked for, and take its next turn or its end."""
        assert response.writing is not None
        try:
            response.turn = response.writing.send(children)
        except StopIteration as end:
            self._running.remove(response)
            response.stop()
            self._finish(response, end.value)
        except CapacityError as error:  # the criterion found no room; the response is over, and begun again
            if len(self._running) == 1:
                self._fail(response, str(error))
            else:
                self._restart(response)

    def _make_room(self, fault: str) -> None:
        """Take the pages of a quarter of the responses, those begun last; where one runs alone, fail its prompt.

        Few at a time, as every refusal of the cache takes a moment, and the number that runs never grows again.
        """
        if len(self._running) == 1:
            self._fail(self._running[0], fault.removeprefix("the branch: "))
            return
        for response in self._running[: -max(1, len(self._running) // 4) - 1 : -1]:
            self._restart(response)

    def _restart(self, response: _Response) -> None:
        """Free all pages of a running response; it is begun again when fewer run."""
        response.stop()
        self._running.remove(response)
        self._waiting.appendleft(response)
        self._width = max(1, len(self._running))

    def _finish(self, response: _Response, completion: TwoWriterCompletion) -> None:
        prompt = self._prompts[response.index]
        prompt.completions[response.number] = completion
        if len(prompt.completions) == len(prompt.responses):
            sampled = tuple(prompt.completions[number] for number in range(len(prompt.responses)))
            self._engine.usage.finish(prompt.most_tokens, sum(one.sampled_tokens for one in sampled))
            self._outcomes.append(Generation(index=response.index, label=prompt.label, sampled=sampled))

    def _fail(self, response: _Response, error: str) -> None:
        """Give a prompt up, with all its responses."""
        for other in [other for other in self._running if other.index == response.index]:
            other.stop()
            self._running.remove(other)
        self._waiting = deque(other for other in self._waiting if other.index != response.index)
        prompt = self._prompts[response.index]
        self._engine.usage.finish(prompt.most_tokens, 0)
        self._outcomes.append(Generation(index=response.index, label=prompt.label, error=error))
