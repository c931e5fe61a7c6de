"""From nodes to tables: the mean alignment of every teacher and loss over groups of nodes, with what is known about it.

Every node counts alike, so every window of depth does. Intervals and comparisons come from one bootstrap over the
questions of the run, the same draws for all groups.

Shapes:  Q questions   D draws   M pairs of a teacher and a loss
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genssd.distill.diagnose.alignment import Floats, Loss
from genssd.distill.diagnose.reliability import (
    Interval,
    disattenuated,
    interval,
    pooled_mean,
    question_draws,
    resampled_means,
)
from genssd.distill.diagnose.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One teacher with one loss over one group of nodes."""

    teacher: str
    loss: Loss
    alignment: Interval
    """Mean cosine over the nodes that have one."""
    corrected: Interval
    """Without the noise of finitely many completions; NaN where the halves of them may well not agree at all."""
    nodes: int
    """That have an alignment."""
    ahead: float
    """Share of the bootstrap's draws in which no other pair has a larger mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """The pair with the largest mean of a group, beside the best one of another teacher, and beside the same teacher's
    next loss; None where there is no other."""

    best: Cell
    other: Cell | None
    difference: Interval | None
    other_loss: Cell | None
    loss_difference: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Nodes that belong together."""

    name: str
    nodes: int
    questions: int
    """With at least one node that is neither forced nor flat."""
    forced: int
    """Nodes with one candidate: there is nothing to choose, and no alignment."""
    flat: int
    """Nodes at which no candidate succeeds more often than another: nothing can be said there."""
    undefined: Mapping[str, Mapping[str, int]]
    """By teacher and reason: the other nodes that have no alignment, under any loss."""
    reliability: float
    """Mean agreement of the gradients from the two halves of the completions, over nodes neither forced nor
    flat."""
    advantage: Mapping[str, Interval]
    """By teacher: how much more often the student would succeed after one token of the teacher's, over all nodes."""
    cells: tuple[Cell, ...]
    """Largest mean first."""
    lead: Lead | None
    """None where no node has an alignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What the targeted rollouts of a run cost; see `Spent`."""

    completions: int
    truncated: int
    sampled_tokens: int
    prefix_tokens: int
    """Computed in front of the completions: prompts, rollouts, forced tokens."""
    naive_prefix_tokens: int
    """The same with a fresh generation per forced token."""
    planned_nodes: int
    nodes: int
    """That the budget held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All tables of a run."""

    teachers: tuple[str, ...]
    losses: tuple[Loss, ...]
    questions: int
    rollouts: int
    correct_rollouts: int
    truncated_rollouts: int
    mass: float
    """Mean probability of the candidates together, under the student."""
    signal: float
    """Share of |g|^2 that is not sampling noise, over all nodes; below 0 where noise is all there is."""
    costs: Costs
    groups: tuple[Group, ...]
    """All nodes, by correctness of the rollout, by how often the question is solved."""
    windows: tuple[Group, ...]
    """By depth."""
    by_question: tuple[Mapping[str, float | None], ...]
    """The mean alignment of every "teacher | loss"."""

    @property
    def distinct_groups(self) -> list[Group]:
        """All nodes, and the groups of some of them."""
        whole, *parts = self.groups
        return [whole, *(part for part in parts if 0 < part.nodes < whole.nodes)]

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN is null."""
        fields: dict[str, Any] = _plain(dataclasses.asdict(self))
        return fields


Belongs = Callable[[Row], bool]
GROUPS: dict[str, Belongs] = {
    "all nodes": lambda node: True,
    "incorrect rollouts": lambda node: not node["correct"],
    "correct rollouts": lambda node: bool(node["correct"]),
    "questions never solved": lambda node: node["solved"] == 0.0,
    "questions sometimes solved": lambda node: 0.0 < node["solved"] < 1.0,
    "questions always solved": lambda node: node["solved"] == 1.0,
}


def diagnose(
    rows: Sequence[Row], nodes: Sequence[Row], teachers: Sequence[str], losses: Sequence[Loss], seed: int
) -> Diagnosis:
    """rows: of questions.jsonl, in order; nodes: of nodes.jsonl."""
    draws_DQ = question_draws(len(rows), seed)
    every = [rollout for row in rows for rollout in row["rollouts"]]
    windows = sorted({node["window"] for node in nodes})
    square = sum(float(np.square(node["ideal"]).sum()) for node in nodes)
    noise = sum(float(np.sum(node["variance"])) for node in nodes)
    return Diagnosis(
        teachers=tuple(teachers),
        losses=tuple(losses),
        questions=len(rows),
        rollouts=len(every),
        correct_rollouts=sum(rollout["correct"] for rollout in every),
        truncated_rollouts=sum(rollout["status"] == "length" for rollout in every),
        mass=float(np.mean([node["mass"] for node in nodes])) if nodes else math.nan,
        signal=1.0 - noise / square if square else math.nan,
        costs=_costs(rows),
        groups=tuple(
            _group(name, [node for node in nodes if belongs(node)], teachers, losses, draws_DQ)
            for name, belongs in GROUPS.items()
        ),
        windows=tuple(
            _group(_depth(w), [node for node in nodes if node["window"] == w], teachers, losses, draws_DQ)
            for w in windows
        ),
        by_question=tuple(_means([n for n in nodes if n["index"] == row["index"]], teachers, losses) for row in rows),
    )


def _depth(window: int) -> str:
    return f"{2**window}-{2 ** (window + 1) - 1}" if window else "1"


def _costs(rows: Sequence[Row]) -> Costs:
    spent: Counter[str] = Counter()
    for row in rows:
        spent.update(row["spent"])
    return Costs(
        completions=spent["completions"],
        truncated=spent["truncated"],
        sampled_tokens=spent["sampled_tokens"],
        prefix_tokens=spent["forced_tokens"] + spent["prefix_tokens"],
        naive_prefix_tokens=spent["naive_prefix_tokens"],
        planned_nodes=sum(row["planned_nodes"] for row in rows),
        nodes=sum(len(row["nodes"]) for row in rows),
    )


def _group(name: str, nodes: Sequence[Row], teachers: Sequence[str], losses: Sequence[Loss], draws_DQ: Floats) -> Group:
    questions, pairs = draws_DQ.shape[1], [(teacher, loss) for teacher in teachers for loss in losses]
    reasons = Counter(_without_signal(node, teachers, losses) for node in nodes)
    informative = [node for node in nodes if _without_signal(node, teachers, losses) is None]
    sums_QM, counts_QM = _sums(informative, pairs, questions)
    means_M, resampled_DM = pooled_mean(sums_QM, counts_QM), resampled_means(draws_DQ, sums_QM, counts_QM)
    agreement_Q1, agreements_Q1 = _column([(node["index"], node["agreement"]) for node in informative], questions)
    half_1 = pooled_mean(agreement_Q1, agreements_Q1)
    halves_D1 = resampled_means(draws_DQ, agreement_Q1, agreements_Q1)
    with np.errstate(invalid="ignore"):
        corrected_M, corrected_DM = disattenuated(means_M, half_1), disattenuated(resampled_DM, halves_D1)
    ahead_M = _ahead(resampled_DM)
    cells = [
        Cell(
            teacher=teacher,
            loss=loss,
            alignment=interval(means_M[m], resampled_DM[:, m]),
            corrected=_where_reliable(corrected_M[m], corrected_DM[:, m], halves_D1[:, 0]),
            nodes=int(counts_QM[:, m].sum()),
            ahead=float(ahead_M[m]),
        )
        for m, (teacher, loss) in enumerate(pairs)
    ]
    order = sorted(range(len(pairs)), key=lambda m: -means_M[m] if np.isfinite(means_M[m]) else math.inf)
    return Group(
        name=name,
        nodes=len(nodes),
        questions=len({node["index"] for node in informative}),
        forced=reasons["forced"],
        flat=reasons["flat"],
        undefined={teacher: _reasons(informative, teacher) for teacher in teachers},
        reliability=float(half_1[0]),
        advantage={teacher: _advantage(nodes, teacher, draws_DQ) for teacher in teachers},
        cells=tuple(cells[m] for m in order),
        lead=_lead(cells, order, means_M, resampled_DM),
    )


def _without_signal(node: Row, teachers: Sequence[str], losses: Sequence[Loss]) -> str | None:
    """forced | flat: what makes a node say nothing about any teacher, else None."""
    value = node["alignment"][teachers[0]][losses[0]]
    return value if value in ("forced", "flat") else None


def _reasons(nodes: Sequence[Row], teacher: str) -> dict[str, int]:
    """Why nodes have no alignment under some loss, and how many; each node once per reason."""
    found: Counter[str] = Counter()
    for node in nodes:
        found.update({value for value in node["alignment"][teacher].values() if isinstance(value, str)})
    return dict(found)


def _sums(nodes: Sequence[Row], pairs: Sequence[tuple[str, Loss]], questions: int) -> tuple[Floats, Floats]:
    """Every question's sum of alignments and their number, [Q, M]."""
    columns = [
        _column(
            [
                (node["index"], value)
                for node in nodes
                if not isinstance(value := node["alignment"][teacher][loss], str)
            ],
            questions,
        )
        for teacher, loss in pairs
    ]
    return np.concatenate([sums for sums, _ in columns], 1), np.concatenate([counts for _, counts in columns], 1)


def _column(values: Sequence[tuple[int, float]], questions: int) -> tuple[Floats, Floats]:
    """Sums and counts by question, [Q, 1]."""
    index = np.array([q for q, _ in values], dtype=np.int64)
    sums_Q, counts_Q = np.zeros(questions), np.zeros(questions)
    np.add.at(sums_Q, index, [value for _, value in values])
    np.add.at(counts_Q, index, 1.0)
    return sums_Q[:, None], counts_Q[:, None]


def _where_reliable(value: float, resampled_D: Floats, halves_D: Floats) -> Interval:
    """The interval, if the halves agree in nearly all of the bootstrap's draws; in the others it would be infinite."""
    known_D = halves_D[np.isfinite(halves_D)]
    sure = len(known_D) > 0 and float((known_D > 0.0).mean()) >= 0.975
    return interval(value, resampled_D) if sure else Interval(value=math.nan, low=math.nan, high=math.nan)


def _ahead(resampled_DM: Floats) -> Floats:
    """How often each pair is in front; draws in which nothing has a value count for nobody."""
    known_DM = np.where(np.isfinite(resampled_DM), resampled_DM, -np.inf)
    best_D1 = known_DM.max(1, keepdims=True)
    share: Floats = ((known_DM >= best_D1) & np.isfinite(best_D1)).mean(0)
    return share


def _advantage(nodes: Sequence[Row], teacher: str, draws_DQ: Floats) -> Interval:
    sums_Q1, counts_Q1 = _column([(node["index"], node["advantage"][teacher]) for node in nodes], draws_DQ.shape[1])
    mean = pooled_mean(sums_Q1, counts_Q1)[0]
    return interval(mean, resampled_means(draws_DQ, sums_Q1, counts_Q1)[:, 0])


def _lead(cells: Sequence[Cell], order: Sequence[int], means_M: Floats, resampled_DM: Floats) -> Lead | None:
    known = [m for m in order if np.isfinite(means_M[m])]
    if not known:
        return None
    best, *rest = known

    def behind(m: int | None) -> Interval | None:
        return None if m is None else interval(means_M[best] - means_M[m], resampled_DM[:, best] - resampled_DM[:, m])

    other = next((m for m in rest if cells[m].teacher != cells[best].teacher), None)
    loss = next((m for m in rest if cells[m].teacher == cells[best].teacher), None)
    return Lead(
        best=cells[best],
        other=None if other is None else cells[other],
        difference=behind(other),
        other_loss=None if loss is None else cells[loss],
        loss_difference=behind(loss),
    )


def _means(nodes: Sequence[Row], teachers: Sequence[str], losses: Sequence[Loss]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for teacher in teachers:
        for loss in losses:
            values = [value for node in nodes if not isinstance(value := node["alignment"][teacher][loss], str)]
            found[f"{teacher} | {loss}"] = float(np.mean(values)) if values else None
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(of) for of in value]
    return None if isinstance(value, float) and math.isnan(value) else value
