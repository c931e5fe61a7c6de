"""Tables of a diagnosis: the mean alignment of every teacher and loss over groups of nodes, with its uncertainty.

Every node has the same weight, so windows of depth count in proportion to their nodes. Intervals and comparisons come
from one bootstrap over the questions of the run, with the same draws for all groups.

Shapes:  Q questions   D draws   M pairs of a teacher and a loss
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from genssd.distill.diagnose.alignment import Floats, LossName
from genssd.distill.diagnose.diagnosis import Cell, Costs, Diagnosis, Group, Lead
from genssd.distill.diagnose.reliability import (
    Interval,
    disattenuate,
    draw_questions,
    make_interval,
    pooled_mean,
    resample_means,
)
from genssd.distill.diagnose.rows import Row

GROUPS: dict[str, Callable[[Row], bool]] = {
    "all nodes": lambda node: True,
    "incorrect rollouts": lambda node: not node["correct"],
    "correct rollouts": lambda node: bool(node["correct"]),
    "questions never solved": lambda node: node["solved"] == 0.0,
    "questions sometimes solved": lambda node: 0.0 < node["solved"] < 1.0,
    "questions always solved": lambda node: node["solved"] == 1.0,
}
"""Function that returns whether a line of nodes.jsonl is in a group, by the group's name."""


def build_diagnosis(
    rows: Sequence[Row], nodes: Sequence[Row], teachers: Sequence[str], losses: Sequence[LossName], seed: int
) -> Diagnosis:
    """Return the tables of a run. rows: lines of questions.jsonl, in order. nodes: lines of nodes.jsonl.

    seed: of the bootstrap.
    """
    places = {row["index"]: place for place, row in enumerate(rows)}  # rows that could not be used have an index, too
    rows = [{**row, "index": places[row["index"]]} for row in rows]
    nodes = [{**node, "index": places[node["index"]]} for node in nodes]
    draws_DQ = draw_questions(len(rows), seed)
    rollouts = [rollout for row in rows for rollout in row["rollouts"]]
    windows = sorted({node["window"] for node in nodes})
    square = sum(float(np.square(node["ideal"]).sum()) for node in nodes)
    noise = sum(float(np.sum(node["variance"])) for node in nodes)
    return Diagnosis(
        teachers=tuple(teachers),
        losses=tuple(losses),
        questions=len(rows),
        rollouts=len(rollouts),
        correct_rollouts=sum(rollout["correct"] for rollout in rollouts),
        truncated_rollouts=sum(rollout["status"] == "length" for rollout in rollouts),
        undecided=sum(rollout.get("undecided") is not None for rollout in rollouts)
        + sum(node.get("undecided", 0) for row in rows for node in row["nodes"]),
        mass=float(np.mean([node["mass"] for node in nodes])) if nodes else math.nan,
        signal=1.0 - noise / square if square else math.nan,
        costs=_sum_costs(rows),
        groups=tuple(
            _tabulate(name, [node for node in nodes if is_member(node)], teachers, losses, draws_DQ)
            for name, is_member in GROUPS.items()
        ),
        windows=tuple(
            _tabulate(_name_window(w), [node for node in nodes if node["window"] == w], teachers, losses, draws_DQ)
            for w in windows
        ),
        by_question=tuple(
            _mean_alignments([n for n in nodes if n["index"] == row["index"]], teachers, losses) for row in rows
        ),
    )


def _name_window(window: int) -> str:
    """Return the numbers of a window's first and last token, from 1."""
    return f"{2**window}-{2 ** (window + 1) - 1}" if window else "1"


def _sum_costs(rows: Sequence[Row]) -> Costs:
    totals: Counter[str] = Counter()
    for row in rows:
        totals.update(row["spent"])
    return Costs(
        completions=totals["completions"],
        truncated=totals["truncated"],
        sampled_tokens=totals["sampled_tokens"],
        prefix_tokens=totals["forced_tokens"] + totals["prefix_tokens"],
        naive_prefix_tokens=totals["naive_prefix_tokens"],
        planned_nodes=sum(row["planned_nodes"] for row in rows),
        nodes=sum(len(row["nodes"]) for row in rows),
    )


def _tabulate(
    name: str, nodes: Sequence[Row], teachers: Sequence[str], losses: Sequence[LossName], draws_DQ: Floats
) -> Group:
    """Return the table of one group of nodes."""
    questions, pairs = draws_DQ.shape[1], [(teacher, loss) for teacher in teachers for loss in losses]
    reasons = Counter(_explain_missing_signal(node, teachers, losses) for node in nodes)
    informative = [node for node in nodes if _explain_missing_signal(node, teachers, losses) is None]
    sums_QM, counts_QM = _sum_alignments(informative, pairs, questions)
    means_M, resampled_DM = pooled_mean(sums_QM, counts_QM), resample_means(draws_DQ, sums_QM, counts_QM)
    agreement_Q1, agreement_counts_Q1 = _sum_by_question(
        [(node["index"], node["agreement"]) for node in informative], questions
    )
    half_1 = pooled_mean(agreement_Q1, agreement_counts_Q1)
    halves_D1 = resample_means(draws_DQ, agreement_Q1, agreement_counts_Q1)
    with np.errstate(invalid="ignore"):
        corrected_M, corrected_DM = disattenuate(means_M, half_1), disattenuate(resampled_DM, halves_D1)
    ahead_M = _fraction_ahead(resampled_DM)
    cells = [
        Cell(
            teacher=teacher,
            loss=loss,
            alignment=make_interval(means_M[m], resampled_DM[:, m]),
            corrected=_make_interval_if_reliable(corrected_M[m], corrected_DM[:, m], halves_D1[:, 0]),
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
        undefined={teacher: _count_undefined(informative, teacher) for teacher in teachers},
        reliability=float(half_1[0]),
        advantage={teacher: _mean_advantage(nodes, teacher, draws_DQ) for teacher in teachers},
        cells=tuple(cells[m] for m in order),
        lead=_find_lead(cells, order, means_M, resampled_DM),
    )


def _explain_missing_signal(node: Row, teachers: Sequence[str], losses: Sequence[LossName]) -> str | None:
    """Return "forced" or "flat" if a node has no alignment for that reason, whatever teacher and loss; else None."""
    value = node["alignment"][teachers[0]][losses[0]]
    return value if value in ("forced", "flat") else None


def _count_undefined(nodes: Sequence[Row], teacher: str) -> dict[str, int]:
    """Return how many nodes have no alignment under some loss, by reason; each node counts once per reason."""
    counts: Counter[str] = Counter()
    for node in nodes:
        counts.update({value for value in node["alignment"][teacher].values() if isinstance(value, str)})
    return dict(counts)


def _sum_alignments(
    nodes: Sequence[Row], pairs: Sequence[tuple[str, LossName]], questions: int
) -> tuple[Floats, Floats]:
    """Return every question's sum of alignments and their number, both [Q, M]."""
    columns = [
        _sum_by_question(
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


def _sum_by_question(values: Sequence[tuple[int, float]], questions: int) -> tuple[Floats, Floats]:
    """Return sums and counts by question, both [Q, 1]. values: pairs of a question's index and a value."""
    index = np.array([q for q, _ in values], dtype=np.int64)
    sums_Q, counts_Q = np.zeros(questions), np.zeros(questions)
    np.add.at(sums_Q, index, [value for _, value in values])
    np.add.at(counts_Q, index, 1.0)
    return sums_Q[:, None], counts_Q[:, None]


def _make_interval_if_reliable(value: float, resampled_D: Floats, halves_D: Floats) -> Interval:
    """Return the interval if the halves' reliability is positive in 97.5 % of the bootstrap's draws, else NaNs.

    Where it is not positive, the corrected mean has no finite value.
    """
    finite_D = halves_D[np.isfinite(halves_D)]
    is_reliable = len(finite_D) > 0 and float((finite_D > 0.0).mean()) >= 0.975
    return make_interval(value, resampled_D) if is_reliable else Interval(value=math.nan, low=math.nan, high=math.nan)


def _fraction_ahead(resampled_DM: Floats) -> Floats:
    """Return the fraction of draws in which each pair has the largest mean, [M]; a draw without values counts for none.

    Pairs with equal means are both counted.
    """
    finite_DM = np.where(np.isfinite(resampled_DM), resampled_DM, -np.inf)
    best_D1 = finite_DM.max(1, keepdims=True)
    fraction: Floats = ((finite_DM >= best_D1) & np.isfinite(best_D1)).mean(0)
    return fraction


def _mean_advantage(nodes: Sequence[Row], teacher: str, draws_DQ: Floats) -> Interval:
    values = [(node["index"], node["advantage"][teacher]) for node in nodes]
    sums_Q1, counts_Q1 = _sum_by_question(values, draws_DQ.shape[1])
    mean = pooled_mean(sums_Q1, counts_Q1)[0]
    return make_interval(mean, resample_means(draws_DQ, sums_Q1, counts_Q1)[:, 0])


def _find_lead(cells: Sequence[Cell], order: Sequence[int], means_M: Floats, resampled_DM: Floats) -> Lead | None:
    """Return the comparison of the best pair to the next ones. order: indices of the pairs, the largest mean first."""
    defined = [m for m in order if np.isfinite(means_M[m])]
    if not defined:
        return None
    best, *rest = defined

    def difference_to(m: int | None) -> Interval | None:
        if m is None:
            return None
        return make_interval(means_M[best] - means_M[m], resampled_DM[:, best] - resampled_DM[:, m])

    other = next((m for m in rest if cells[m].teacher != cells[best].teacher), None)
    loss = next((m for m in rest if cells[m].teacher == cells[best].teacher), None)
    return Lead(
        best=cells[best],
        other=None if other is None else cells[other],
        difference=difference_to(other),
        other_loss=None if loss is None else cells[loss],
        loss_difference=difference_to(loss),
    )


def _mean_alignments(
    nodes: Sequence[Row], teachers: Sequence[str], losses: Sequence[LossName]
) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for teacher in teachers:
        for loss in losses:
            values = [value for node in nodes if not isinstance(value := node["alignment"][teacher][loss], str)]
            means[f"{teacher} | {loss}"] = float(np.mean(values)) if values else None
    return means
