"""What the student and its teachers say at the nodes of a student's rollouts: one pass of each reader over them.

Models are in memory one at a time. Which tokens are tried at a node depends on what every reader finds likely there,
so the hidden states at the nodes are kept until all have read; the heads are applied to these once more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from genssd.distill.diagnose.contexts import Reader
from genssd.distill.diagnose.forcing import Node, Question, candidates_of, within_budget
from genssd.distill.diagnose.placement import in_turns
from genssd.engine.engine import Engine
from genssd.engine.nodes import NodeReader
from genssd.engine.runner import Role

Load = Callable[[str, Role], Engine]
"""A model's engine, in a role."""


class Models:
    """Holds one engine at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._held: tuple[str, Role] | None = None
        self._engine: Engine | None = None

    def engine(self, model: str, role: Role) -> Engine:
        """The engine over a model; the one before is let go of first."""
        if self._engine is None or self._held != (model, role):
            self._engine = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._engine, self._held = self._load(model, role), (model, role)
        return self._engine

    def reader(self, reader: Reader) -> NodeReader:
        """A reader's eyes. Who keeps them keeps the model in memory, beside the one that is asked for next."""
        return self.engine(reader.model, reader.role).node_reader(reader.role)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadNode:
    """A node that the budget holds. logprob: of every candidate by every reader, over the whole vocabulary."""

    node: Node
    logprob: Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is asked of every question's readers."""

    top_k: int
    """Tokens that the student finds most likely are candidates."""
    teacher_top_k: int
    """And those of every teacher."""
    min_probability: float
    """That a reader gives a token at least to make it a candidate."""
    completions: int
    """Of every candidate."""
    budget: int
    """Completions of one question, at most."""
    ends: frozenset[int]
    """Tokens behind which the student writes nothing."""


Prompts = Mapping[tuple[str, int], Sequence[int]]
"""Token ids by the reader's name and the question's index."""
Places = Mapping[int, Sequence[Sequence[int]]]
"""By the question's index: the positions of every rollout's nodes, in the order in which they are to be afforded."""
States = Mapping[tuple[str, int], Sequence[Tensor]]
"""By the reader's name and the question's index: every rollout's hidden states at its places."""
Report = Callable[[int, int], None]


def read_nodes(
    models: Models,
    readers: Sequence[Reader],
    questions: Sequence[Question],
    prompts: Prompts,
    places: Places,
    options: Reading,
    report: Report = lambda done, total: None,
) -> dict[int, list[ReadNode]]:
    """The nodes that the budget holds, by the question's index. readers: the student first; its engine is held at the
    end. Raises GenssdError naming the question that a reader cannot read."""
    states: dict[tuple[str, int], list[Tensor]] = {}
    likeliest: dict[tuple[str, int], list[list[list[int]]]] = {}
    for i, reader in enumerate(readers):
        k = options.teacher_top_k if i else options.top_k
        for done, q in enumerate(questions):
            report(i * len(questions) + done, len(readers) * len(questions))
            key = reader.name, q.index
            eyes = models.reader(reader)
            responses = [rollout.token_ids for rollout in q.rollouts]
            states[key] = eyes.states(prompts[key], responses, places[q.index], q.label)
            likeliest[key] = [
                eyes.likeliest(of_rollout, k, q.label, least=options.min_probability) for of_rollout in states[key]
            ]
            del eyes  # it would keep the model in memory beside the next one
    nodes: dict[int, Sequence[Node]] = {}
    for q in questions:
        said = [likeliest[reader.name, q.index] for reader in readers]
        nodes[q.index] = within_budget(
            _nodes(q, said, places[q.index]), options.ends, options.completions, options.budget
        )
    return _with_logprob(models, readers, questions, nodes, places, states)


def _nodes(
    q: Question, said: Sequence[Sequence[Sequence[Sequence[int]]]], places: Sequence[Sequence[int]]
) -> list[Node]:
    """All places of a question in the order in which they are to be afforded. said: [reader][rollout][place]."""
    nodes = []
    for rollout, position in in_turns(places):
        place = places[rollout].index(position)
        likeliest = [of_reader[rollout][place] for of_reader in said]
        sampled = q.rollouts[rollout].token_ids[position]
        nodes.append(Node(rollout=rollout, position=position, candidates=candidates_of(sampled, likeliest)))
    return nodes


def _with_logprob(
    models: Models,
    readers: Sequence[Reader],
    questions: Sequence[Question],
    nodes: Mapping[int, Sequence[Node]],
    places: Places,
    states: States,
) -> dict[int, list[ReadNode]]:
    logprob: dict[tuple[str, int], list[list[float]]] = {}
    # the last reader's model is still in memory, and the student goes on writing after this
    for reader in reversed(readers):
        for q in questions:
            key = reader.name, q.index
            rows = [states[key][n.rollout][places[q.index][n.rollout].index(n.position)] for n in nodes[q.index]]
            ids = [node.candidates for node in nodes[q.index]]
            logprob[key] = models.reader(reader).logprob(torch.stack(rows), ids, q.label) if rows else []
    return {
        q.index: [
            ReadNode(node=node, logprob={reader.name: logprob[reader.name, q.index][i] for reader in readers})
            for i, node in enumerate(nodes[q.index])
        ]
        for q in questions
    }
