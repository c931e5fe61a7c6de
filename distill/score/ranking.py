"""Values of every criterion over scored traces, and the ranking of teachers that follows from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genssd.distill.score.feature_rows import FeatureRow
from genssd.engine.common.errors import InputError
from genssd.engine.criteria.criterion import AnyCriterion, PoolCriterion
from genssd.engine.criteria.criterion_calls import call_score_pool, is_higher_better

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRank:
    """One teacher under one criterion: the mean over prompts of its responses' mean, with its 95 % interval."""

    teacher: str
    value: float
    """Mean over prompts of the mean over the teacher's responses to one prompt."""
    low: float
    """Lower end of the 95 % bootstrap interval."""
    high: float
    """Upper end of the 95 % bootstrap interval."""
    first: float
    """Fraction of the bootstrap's draws in which no teacher is better."""
    prompts: int
    """Number of prompts that the mean is taken over."""


def compute_values(criterion: AnyCriterion, name: str, rows: Sequence[FeatureRow]) -> list[float]:
    """Return a criterion's value of every row. name: the criterion's name in the rows.

    Raises InputError when the criterion of a pool gives NaN.
    """
    features = [tuple(float(value) for value in row["features"][name]) for row in rows]
    if not isinstance(criterion, PoolCriterion):
        return [values[0] for values in features]
    pools = [list(range(len(rows)))] if criterion.pool == "data" else list(group_by_prompt(rows).values())
    pooled = [0.0] * len(rows)
    for members in pools:
        for i, value in zip(members, call_score_pool(criterion, [features[i] for i in members]), strict=True):
            if math.isnan(value):
                source = rows[i]["source"]
                raise InputError(f"the criterion {name} gave NaN for {source['file']}, line {source['line']}")
            pooled[i] = value
    return pooled


def group_by_prompt(rows: Sequence[FeatureRow]) -> dict[str, list[int]]:
    """Return the indices of every prompt's rows, prompts in the order of their first row."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["prompt"]].append(i)
    return groups


def rank_teachers(
    rows: Sequence[FeatureRow],
    criteria: Mapping[str, AnyCriterion],
    columns: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> tuple[dict[str, tuple[TeacherRank, ...]], int]:
    """Rank the teachers under every criterion, best first, over the prompts that all of them answered.

    Return the ranks by criterion, and the number of prompts that some teacher did not answer. columns: the values of
    all rows, by criterion. seed: of the bootstrap.

    A prompt at which a criterion has no finite value is left out under it. Intervals are percentiles of a bootstrap
    over prompts: responses to one prompt are not independent.
    """
    teachers = sorted({row["teacher"] for row in rows})
    groups = list(group_by_prompt(rows).values())
    complete = [members for members in groups if {rows[i]["teacher"] for i in members} == set(teachers)]
    ranks: dict[str, tuple[TeacherRank, ...]] = {}
    for name, criterion in criteria.items() if len(teachers) > 1 else ():
        ratios = [read_ratio(name, row, value) for row, value in zip(rows, columns[name], strict=True)]
        # [prompts, teachers, numerator and denominator]: the mean over a teacher's responses to a prompt
        table = np.array(
            [
                [np.mean([ratios[i] for i in members if rows[i]["teacher"] == teacher], axis=0) for teacher in teachers]
                for members in complete
            ]
        ).reshape(-1, len(teachers), 2)
        table = table[np.isfinite(table).all(axis=(1, 2))]
        if len(table):
            ranks[name] = _rank_table(table, teachers, is_higher_better(criterion), seed)
    return ranks, len(groups) - len(complete)


def read_ratio(name: str, row: FeatureRow, value: float) -> tuple[float, float]:
    """Return the numerator and denominator that a response adds to a data set's ratio under a criterion.

    For a criterion that is no ratio these are the response's value and 1.
    """
    numerator, denominator = row["ratios"].get(name, (value, 1.0))
    return float(numerator), float(denominator)


def _rank_table(
    table: np.ndarray, teachers: Sequence[str], higher_is_better: bool, seed: int
) -> tuple[TeacherRank, ...]:
    """Return the teachers, best first. table: [prompts, teachers, 2], the means of numerators and denominators."""
    prompts = len(table)
    draws = np.random.default_rng(seed).integers(0, prompts, size=(BOOTSTRAP_DRAWS, prompts))
    counts = np.apply_along_axis(np.bincount, 1, draws, minlength=prompts)
    sums = np.einsum("dp,ptr->dtr", counts, table)
    resampled = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
    totals = table.sum(0)
    values = totals[:, 0] / np.maximum(totals[:, 1], 1e-12)
    sign = 1.0 if higher_is_better else -1.0
    best = (sign * resampled).max(1)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    ranks = [
        TeacherRank(
            teacher=teacher,
            value=float(values[t]),
            low=float(low[t]),
            high=float(high[t]),
            first=float((sign * resampled[:, t] >= best).mean()),
            prompts=prompts,
        )
        for t, teacher in enumerate(teachers)
    ]
    return tuple(sorted(ranks, key=lambda rank: -sign * rank.value))
