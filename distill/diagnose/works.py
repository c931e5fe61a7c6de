"""The phases of a diagnosis as the work of engines: questions in; rollouts, readings and findings out.

A phase has one model, and is done by the processes of a pool over it. The items of a phase are questions: of the
rollouts by their places among all of them, because equal prompts are distinguished by how many come before, of the
other phases by their indices in the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from genssd.distill.answers.forms import Verdict
from genssd.distill.answers.judge import AnswerJudge
from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.forcing import (
    CompletionOptions,
    DecisionNode,
    NodeReading,
    Question,
    Verify,
    force_nodes,
    succeeds,
)
from genssd.distill.diagnose.readers import Reader
from genssd.distill.diagnose.rows import Findings
from genssd.engine.calls.generation import Completion
from genssd.engine.calls.nodes import NodeReader
from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutWork:
    """The student's responses to the questions; a `Work`, whose items are places of questions."""

    questions: Sequence[Question]
    """All questions: how many equal prompts come before one decides what is drawn for it."""
    items: Sequence[int]
    config: DiagnoseConfig

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens of all responses to one question."""
        return self.config.rollouts * self.config.max_tokens

    def run(
        self, engine: Engine, feed: Feed | None, budget: Budget
    ) -> Iterator[tuple[int, tuple[Completion, ...] | str]]:
        """Yield the rollouts of every question, or why there are none; see `Work`."""
        generated = engine.iter_generate(
            [q.prompt for q in self.questions],
            model="student",
            n=self.config.rollouts,
            sampling=self.config.sampling,
            max_tokens=self.config.max_tokens,
            seed=self.config.seed,
            skip=frozenset(range(len(self.questions))) - frozenset(self.items),
            labels=[q.label for q in self.questions],
            feed=feed,
        )
        for outcome in generated:
            yield outcome.index, tuple(outcome.completions) if outcome.error is None else outcome.error


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStates:
    """The hidden states of one reader at the nodes of the rollouts."""

    reader: Reader
    questions: Mapping[int, Question]
    """Questions with their rollouts, by their indices."""
    prompts: Mapping[int, Sequence[int]]
    """Token ids of the reader's prompts."""
    positions: Mapping[int, Sequence[Sequence[int]]]
    """Positions of every rollout's nodes."""
    kept: dict[int, list[Tensor]] | None
    """States that were computed before, where this process does the work. None: other processes do; a question may
    come to another one the next time, and its states are computed again."""

    def compute(self, reader: NodeReader, index: int) -> list[Tensor]:
        """Return the states of a question, on the CPU, [nodes, hidden] of every rollout."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        question = self.questions[index]
        responses = [rollout.token_ids for rollout in question.rollouts]
        states = reader.states(self.prompts[index], responses, self.positions[index], question.label)
        if self.kept is not None:
            self.kept[index] = states
        return states


@dataclass(frozen=True, slots=True, kw_only=True)
class LikeliestWork:
    """The most likely tokens of one reader at every node; a `Work`, whose items are indices of questions."""

    states: NodeStates
    items: Sequence[int]
    top_k: int
    min_probability: float
    """Least probability of a token."""
    excluded_ids: frozenset[int]
    """Tokens that are left out."""

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, list[list[list[int]]]]]:
        """Yield token ids, [rollout][node][token], of every question; see `Work`."""
        reader = engine.node_reader(self.states.reader.role)
        for index in _take(self.items, feed):
            label = self.states.questions[index].label
            yield (
                index,
                [
                    [
                        [token for token in tokens if token not in self.excluded_ids]
                        for tokens in reader.likeliest(states_ND, self.top_k, label, least=self.min_probability)
                    ]
                    for states_ND in self.states.compute(reader, index)
                ],
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobWork:
    """The log-probabilities of the candidates under one reader; a `Work`, whose items are indices of questions."""

    states: NodeStates
    items: Sequence[int]
    nodes: Mapping[int, Sequence[DecisionNode]]
    """Nodes within the budget of every question."""

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, list[list[float]]]]:
        """Yield log-probabilities, [node][candidate], of every question; see `Work`."""
        reader = engine.node_reader(self.states.reader.role)
        for index in _take(self.items, feed):
            nodes, positions = self.nodes[index], self.states.positions[index]
            if not nodes:
                yield index, []
                continue
            states = self.states.compute(reader, index)
            rows = [states[node.rollout][positions[node.rollout].index(node.position)] for node in nodes]
            label = self.states.questions[index].label
            yield index, reader.logprob(torch.stack(rows), [node.candidates for node in nodes], label)


def _report_nothing(index: int, completions: int) -> None:
    """Take how many completions are written, where nobody shows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcingWork:
    """The completions after every candidate, and what they show; a `Work`, whose items are indices of questions."""

    questions: Mapping[int, Question]
    """Questions with their rollouts, by their indices."""
    items: Sequence[int]
    readings: Mapping[int, Sequence[NodeReading]]
    planned_nodes: Mapping[int, int]
    """Number of nodes before the budget is applied, of every question."""
    config: DiagnoseConfig
    verify: Verify | None = None
    """Judges responses instead of `AnswerJudge`; one that can be pickled where other processes work."""
    report: Callable[[int, int], None] = _report_nothing
    """Receiver of a question's index and of the number of its completions so far."""

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, Findings]]:
        """Yield what was measured of every question; see `Work`."""
        for index in _take(self.items, feed):
            yield index, self._force(engine, self.questions[index])

    def _force(self, engine: Engine, question: Question) -> Findings:
        """Force every candidate at every node of a question."""
        config, readings = self.config, self.readings[question.index]
        options = CompletionOptions(
            completions=config.completions, sampling=config.sampling, max_tokens=config.max_tokens, seed=config.seed
        )

        def report(completions: int) -> None:
            self.report(question.index, completions)

        report(0)
        verify = self.verify or AnswerJudge(engine.tokenizer("student")).for_prompt(question.prompt_ids)
        outcomes, cost = force_nodes(engine, question, [reading.node for reading in readings], verify, options, report)
        verdicts: dict[str, Verdict] = {}
        correct = [succeeds(rollout, question.answer, verify, verdicts) for rollout in question.rollouts]
        return Findings(
            correct=correct,
            undecided=[verdicts[r.text].undecided if r.text in verdicts else None for r in question.rollouts],
            planned_nodes=self.planned_nodes[question.index],
            readings=readings,
            outcomes=outcomes,
            completions=config.completions,
            cost=cost,
        )


def _take(items: Sequence[int], feed: Feed | None) -> Iterator[int]:
    """Yield the items that a process does, one after the other."""
    return iter(items) if feed is None else iter(lambda: feed.take(wait=True), None)
