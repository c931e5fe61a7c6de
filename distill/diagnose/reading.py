"""Log-probabilities of every reader at the nodes of a student's rollouts.

Models are in memory one at a time. Which tokens are tried at a node depends on what every reader finds likely there, so
each reader is asked twice: for its most likely tokens, and, when all have answered, for the log-probabilities of the
candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from genssd.distill.diagnose.forcing import DecisionNode, NodeReading, Question, limit_to_budget, merge_candidates
from genssd.distill.diagnose.model_pools import ModelPools
from genssd.distill.diagnose.placement import interleave_rollouts
from genssd.distill.diagnose.readers import Reader
from genssd.distill.diagnose.works import LikeliestWork, LogprobWork, NodeStates
from genssd.distill.pool.pool import Lost, Pool, Stopped, Work
from genssd.distill.runs.progress import SILENT, Progress
from genssd.engine.engine import Engine

Prompts = Mapping[tuple[str, int], Sequence[int]]
"""Prompt token ids by the reader's name and the question's index."""
Positions = Mapping[int, Sequence[Sequence[int]]]
"""Positions of every rollout's nodes by the question's index, in the order in which the budget is spent."""
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingOptions:
    """Options of the choice of candidates, and of the budget that limits a question's nodes."""

    top_k: int
    """How many of the student's most likely tokens are candidates at a node."""
    teacher_top_k: int
    """How many of each other reader's most likely tokens are candidates at a node."""
    min_probability: float
    """Least probability that a reader must give one of its most likely tokens to make it a candidate."""
    completions: int
    """Number of completions per candidate."""
    budget: int
    """Maximum number of completions per question."""
    end_ids: frozenset[int]
    """Tokens that end a response, after which the student writes nothing."""
    excluded_ids: frozenset[int] = frozenset()
    """Tokens that not all models have, which are no candidates."""


class RolloutReaders:
    """The readers of the rollouts of some questions.

    models: their pools. readers: the student first; its pool is the one that is open at the end. questions: with their
    rollouts. failures: gets why a question was given up, by its index.
    """

    def __init__(
        self,
        models: ModelPools,
        readers: Sequence[Reader],
        questions: Sequence[Question],
        prompts: Prompts,
        positions: Positions,
        failures: MutableMapping[int, str],
        report: Progress = SILENT,
    ) -> None:
        self._models = models
        self._readers = readers
        self._questions = {q.index: q for q in questions}
        self._prompts = prompts
        self._positions = positions
        self._failures = failures
        self._report = report
        self._kept: dict[str, dict[int, list[Tensor]]] = {reader.name: {} for reader in readers}
        """States that one process keeps between its two passes, by the reader's name."""

    def read(self, options: ReadingOptions) -> dict[int, list[NodeReading]]:
        """Return the nodes within the budget with their log-probabilities, by the question's index.

        Raises GenssdError naming the question that a reader cannot process.
        """
        likeliest = [self._find_likeliest(reader, options, is_first=i == 0) for i, reader in enumerate(self._readers)]
        nodes: dict[int, Sequence[DecisionNode]] = {}
        for index in self._list_open():
            planned = _list_nodes(
                self._questions[index], [of_reader[index] for of_reader in likeliest], self._positions[index]
            )
            nodes[index] = limit_to_budget(planned, options.end_ids, options.completions, options.budget)
        # in reverse order: the last reader's model is still in memory, and the student, needed next, comes last
        logprob = {reader.name: self._find_logprob(reader, nodes) for reader in reversed(self._readers)}
        for states in self._kept.values():
            states.clear()
        return {
            index: [
                NodeReading(
                    node=node, logprob={reader.name: logprob[reader.name][index][i] for reader in self._readers}
                )
                for i, node in enumerate(nodes[index])
            ]
            for index in self._list_open()
        }

    def _find_likeliest(
        self, reader: Reader, options: ReadingOptions, *, is_first: bool
    ) -> Mapping[int, Sequence[Sequence[Sequence[int]]]]:
        """Return a reader's most likely tokens, [rollout][node][token], by the question's index."""
        pool, items = self._open(reader), self._list_open()
        self._report.begin(f"the rollouts are read as {reader.name!r}", unit="questions", total=len(items))
        work = LikeliestWork(
            states=self._states_of(reader, pool),
            items=items,
            top_k=options.top_k if is_first else options.teacher_top_k,
            min_probability=options.min_probability,
            excluded_ids=options.excluded_ids,
        )
        return self._collect(pool, work)

    def _find_logprob(
        self, reader: Reader, nodes: Mapping[int, Sequence[DecisionNode]]
    ) -> Mapping[int, Sequence[Sequence[float]]]:
        """Return a reader's log-probabilities, [node][candidate], by the question's index."""
        pool, items = self._open(reader), self._list_open()
        if not pool.is_own_process:
            self._report.begin(f"the candidates are read as {reader.name!r}", unit="questions", total=len(items))
        return self._collect(pool, LogprobWork(states=self._states_of(reader, pool), items=items, nodes=nodes))

    def _open(self, reader: Reader) -> Pool:
        return self._models.pool(reader.model, reader.role, len(self._questions))

    def _states_of(self, reader: Reader, pool: Pool) -> NodeStates:
        return NodeStates(
            reader=reader,
            questions=self._questions,
            prompts={index: self._prompts[reader.name, index] for index in self._questions},
            positions=self._positions,
            kept=self._kept[reader.name] if pool.is_own_process else None,
        )

    def _collect(self, pool: Pool, work: Work[Engine, R]) -> Mapping[int, R]:
        """Return the results of a work by the question's index; note the questions that were given up."""
        results: dict[int, R] = {}
        for done, (index, outcome) in enumerate(pool.run(work), start=1):
            assert not isinstance(outcome, Stopped), "nothing limits the run"
            if isinstance(outcome, Lost):
                self._failures[index] = f"{self._questions[index].label}: {outcome.reason}"
            else:
                results[index] = outcome
            self._report(done, len(work.items))
        return results

    def _list_open(self) -> list[int]:
        """Return the indices of the questions that were not given up."""
        return [index for index in self._questions if index not in self._failures]


def _list_nodes(
    q: Question, likeliest: Sequence[Sequence[Sequence[Sequence[int]]]], positions: Sequence[Sequence[int]]
) -> list[DecisionNode]:
    """Return all nodes of a question in the order in which the budget is spent.

    likeliest: token ids, [reader][rollout][node][token]. positions: [rollout][node].
    """
    nodes = []
    for rollout, position in interleave_rollouts(positions):
        index = positions[rollout].index(position)
        node_likeliest = [reader_likeliest[rollout][index] for reader_likeliest in likeliest]
        candidates = merge_candidates(q.rollouts[rollout].token_ids[position], node_likeliest)
        nodes.append(DecisionNode(rollout=rollout, position=position, candidates=candidates))
    return nodes
