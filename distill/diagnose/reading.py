"""Log-probabilities of every reader at the nodes of a student's rollouts, from one forward pass of each reader.

Models are in memory one at a time. Which tokens are tried at a node depends on what every reader finds likely there, so
the hidden states at the nodes are kept until all readers have computed theirs; then the heads are applied once more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.distill.diagnose.forcing import DecisionNode, Question, limit_to_budget, merge_candidates
from genssd.distill.diagnose.placement import interleave_rollouts
from genssd.distill.diagnose.readers import Reader
from genssd.distill.runs.progress import SILENT, Progress
from genssd.engine.engine import Engine
from genssd.engine.model_choices import Role
from genssd.engine.nodes import NodeReader

Load = Callable[[str, Role], Engine]
"""Function that returns the engine over a model (hub id or directory) in a role."""


class Models:
    """The models of a run, of which one at a time is held in memory."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._held: tuple[str, Role] | None = None
        self._engine: Engine | None = None

    def engine(self, model: str, role: Role) -> Engine:
        """Return the engine over a model; the engine held before is freed first."""
        if self._engine is None or self._held != (model, role):
            self._engine = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._engine, self._held = self._load(model, role), (model, role)
        return self._engine

    def reader(self, reader: Reader) -> NodeReader:
        """Return the node reader of a reader's model; as long as it is referenced, that model stays in memory."""
        return self.engine(reader.model, reader.role).node_reader(reader.role)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReading:
    """A node within the budget, with the log-probabilities of its candidates."""

    node: DecisionNode
    logprob: Mapping[str, Sequence[float]]
    """Log-probability of every candidate over the whole vocabulary, by the reader's name."""


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


Prompts = Mapping[tuple[str, int], Sequence[int]]
"""Prompt token ids by the reader's name and the question's index."""
Positions = Mapping[int, Sequence[Sequence[int]]]
"""Positions of every rollout's nodes by the question's index, in the order in which the budget is spent."""
States = Mapping[tuple[str, int], Sequence[Tensor]]
"""Hidden states of every rollout at its nodes, [nodes, hidden], by the reader's name and the question's index."""


def read_nodes(
    models: Models,
    readers: Sequence[Reader],
    questions: Sequence[Question],
    prompts: Prompts,
    positions: Positions,
    options: ReadingOptions,
    report: Progress = SILENT,
) -> dict[int, list[NodeReading]]:
    """Return the nodes within the budget with their log-probabilities, by the question's index.

    readers: the student first; its engine is the one in memory at the end. Raises GenssdError naming the question that
    a reader cannot process.
    """
    states: dict[tuple[str, int], list[Tensor]] = {}
    likeliest: dict[tuple[str, int], list[list[list[int]]]] = {}
    for i, reader in enumerate(readers):
        k = options.teacher_top_k if i else options.top_k
        for done, q in enumerate(questions):
            key = reader.name, q.index
            node_reader = models.reader(reader)
            if done == 0:
                report.begin(f"the rollouts are read as {reader.name!r}", unit="questions", total=len(questions))
            responses = [rollout.token_ids for rollout in q.rollouts]
            states[key] = node_reader.states(prompts[key], responses, positions[q.index], q.label)
            likeliest[key] = [
                [
                    [token for token in tokens if token not in options.excluded_ids]
                    for tokens in node_reader.likeliest(rollout_states, k, q.label, least=options.min_probability)
                ]
                for rollout_states in states[key]
            ]
            report(done + 1, len(questions))
            del node_reader  # it would keep this model in memory while the next one is loaded
    nodes: dict[int, Sequence[DecisionNode]] = {}
    for q in questions:
        question_likeliest = [likeliest[reader.name, q.index] for reader in readers]
        planned = _list_nodes(q, question_likeliest, positions[q.index])
        nodes[q.index] = limit_to_budget(planned, options.end_ids, options.completions, options.budget)
    return _add_logprob(models, readers, questions, nodes, positions, states)


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


def _add_logprob(
    models: Models,
    readers: Sequence[Reader],
    questions: Sequence[Question],
    nodes: Mapping[int, Sequence[DecisionNode]],
    positions: Positions,
    states: States,
) -> dict[int, list[NodeReading]]:
    logprob: dict[tuple[str, int], list[list[float]]] = {}
    # in reverse order: the last reader's model is still in memory, and the student, needed next, comes last
    for reader in reversed(readers):
        for q in questions:
            key = reader.name, q.index
            rows = [states[key][n.rollout][positions[q.index][n.rollout].index(n.position)] for n in nodes[q.index]]
            ids = [node.candidates for node in nodes[q.index]]
            logprob[key] = models.reader(reader).logprob(torch.stack(rows), ids, q.label) if rows else []
    return {
        q.index: [
            NodeReading(node=node, logprob={reader.name: logprob[reader.name, q.index][i] for reader in readers})
            for i, node in enumerate(nodes[q.index])
        ]
        for q in questions
    }
