"""The result of `genssd diagnose`: tables of alignments over groups of nodes, and what they cost.

summary.json holds all fields of `Diagnosis` under their names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from genssd.distill.diagnose.alignment import LossName
from genssd.distill.diagnose.reliability import Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Mean alignment of one pair of a teacher and a loss over one group of nodes."""

    teacher: str
    loss: LossName
    alignment: Interval
    """Mean cosine over the nodes that have one."""
    corrected: Interval
    """Mean cosine corrected for the noise of finitely many completions; NaN where the reliability is not positive in
    97.5 % of the bootstrap's draws."""
    nodes: int
    """Number of nodes that have an alignment."""
    ahead: float
    """Fraction of the bootstrap's draws in which no other pair has a larger mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """Comparison of the pair with the largest mean of a group to the next pairs; None where there is no other pair."""

    best: Cell
    """Pair with the largest mean."""
    other: Cell | None
    """Pair with the largest mean among those of other teachers."""
    difference: Interval | None
    """Mean of `best` minus mean of `other`."""
    other_loss: Cell | None
    """Pair with the next mean among those of the same teacher."""
    loss_difference: Interval | None
    """Mean of `best` minus mean of `other_loss`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Table of one group of nodes."""

    name: str
    nodes: int
    """Number of nodes in the group."""
    questions: int
    """Number of questions with at least one node that is neither forced nor flat."""
    forced: int
    """Number of nodes with one candidate: there is nothing to choose, and no alignment."""
    flat: int
    """Number of nodes at which no candidate succeeds more often than another, so that no alignment is defined."""
    undefined: Mapping[str, Mapping[str, int]]
    """Number of the other nodes without an alignment under some loss, by teacher and reason."""
    reliability: float
    """Mean cosine of the gradients from the two halves of the completions, over nodes neither forced nor flat."""
    advantage: Mapping[str, Interval]
    """Mean over all nodes of how much success grows when the teacher draws one token, by teacher."""
    cells: tuple[Cell, ...]
    """Cells of all pairs, the largest mean first."""
    lead: Lead | None
    """Comparison of the best pair to the next ones; None where no node has an alignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Cost of the targeted rollouts of a run, summed over its questions; see `QuestionCost`."""

    completions: int
    truncated: int
    sampled_tokens: int
    prefix_tokens: int
    """Tokens computed before the completions: prompts, rollouts and forced tokens."""
    naive_prefix_tokens: int
    """Tokens computed before the completions if every forced token had a generation of its own."""
    planned_nodes: int
    """Number of nodes before the budget is applied."""
    nodes: int
    """Number of nodes within the budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All tables of a run."""

    teachers: tuple[str, ...]
    """Names of the readers that are compared as teachers."""
    losses: tuple[LossName, ...]
    questions: int
    rollouts: int
    correct_rollouts: int
    truncated_rollouts: int
    undecided: int
    """Number of rollouts and completions that could not be judged; they count as failures."""
    mass: float
    """Mean probability of the candidates together, under the student."""
    signal: float
    """Fraction of |g|^2 that is not sampling noise, over all nodes; it can be below 0 where noise dominates."""
    costs: Costs
    groups: tuple[Group, ...]
    """Groups of nodes: all, by correctness of the rollout, and by how often the question is solved."""
    windows: tuple[Group, ...]
    """Groups of nodes by depth."""
    by_question: tuple[Mapping[str, float | None], ...]
    """Mean alignment by "teacher | loss", for every question; None where it has no node with an alignment."""

    @property
    def distinct_groups(self) -> list[Group]:
        """The group of all nodes, and every group that holds some but not all of them."""
        everything, *parts = self.groups
        return [everything, *(part for part in parts if 0 < part.nodes < everything.nodes)]

    def as_json(self) -> dict[str, Any]:
        """Return all fields as values that JSON has; NaN becomes None."""
        fields: dict[str, Any] = _to_json(dataclasses.asdict(self))
        return fields


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_json(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(element) for element in value]
    return None if isinstance(value, float) and math.isnan(value) else value
