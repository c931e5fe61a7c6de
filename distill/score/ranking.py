"""From scored traces to values: a column per criterion, and a ranking of teachers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genssd.engine.candidate import AnyCriterion, PoolCriterion

DRAWS = 2000

Row = Mapping[str, Any]
"""A line of features.jsonl, see run.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRank:
    """One teacher under one criterion: the mean over prompts of its responses' mean, with its 95 % interval."""

    teacher: str
    value: float
    low: float
    high: float
    first: float
    """Share of the bootstrap's draws in which no teacher is better."""
    prompts: int


def column_of(criterion: AnyCriterion, name: str, rows: Sequence[Row]) -> list[float]:
    """A criterion's value of every row."""
    features = [tuple(float(value) for value in row["features"][name]) for row in rows]
    if not isinstance(criterion, PoolCriterion):
        return [values[0] for values in features]
    if criterion.pool == "data":
        return criterion.score_pool(features)
    column = [0.0] * len(rows)
    for members in by_prompt(rows).values():
        for i, value in zip(members, criterion.score_pool([features[i] for i in members]), strict=True):
            column[i] = value
    return column


def by_prompt(rows: Sequence[Row]) -> dict[str, list[int]]:
    """The indices of every prompt's rows, prompts in the order of their first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["prompt"]].append(i)
    return groups


def rank_teachers(
    rows: Sequence[Row], criteria: Mapping[str, AnyCriterion], columns: Mapping[str, Sequence[float]], seed: int = 0
) -> tuple[dict[str, tuple[TeacherRank, ...]], int]:
    """Per criterion the teachers, best first, over the prompts that all of them answered; and how many were left out.

    A prompt at which a criterion has no finite value is left out under it. Intervals are percentiles of a bootstrap
    over prompts: responses to one prompt are not independent.
    """
    teachers = sorted({row["teacher"] for row in rows})
    groups = list(by_prompt(rows).values())
    complete = [members for members in groups if {rows[i]["teacher"] for i in members} == set(teachers)]
    ranks: dict[str, tuple[TeacherRank, ...]] = {}
    for name, criterion in criteria.items() if len(teachers) > 1 else ():
        shares = [ratio_of(name, row, value) for row, value in zip(rows, columns[name], strict=True)]
        # [prompts, teachers, numerator and denominator]: the mean over a teacher's responses to a prompt
        table = np.array(
            [
                [np.mean([shares[i] for i in members if rows[i]["teacher"] == teacher], axis=0) for teacher in teachers]
                for members in complete
            ]
        ).reshape(-1, len(teachers), 2)
        table = table[np.isfinite(table).all(axis=(1, 2))]
        if len(table):
            ranks[name] = _rank(table, teachers, criterion.higher_is_better(), seed)
    return ranks, len(groups) - len(complete)


def ratio_of(name: str, row: Row, value: float) -> tuple[float, float]:
    """What a response adds to a data set's numerator and denominator; of an ordinary criterion its value and 1."""
    numerator, denominator = row["ratios"].get(name, (value, 1.0))
    return float(numerator), float(denominator)


def _rank(table: np.ndarray, teachers: Sequence[str], higher_is_better: bool, seed: int) -> tuple[TeacherRank, ...]:
    prompts = len(table)
    draws = np.random.default_rng(seed).integers(0, prompts, size=(DRAWS, prompts))
    counts = np.apply_along_axis(np.bincount, 1, draws, minlength=prompts)
    sums = np.einsum("dp,ptr->dtr", counts, table)
    resampled = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
    totals = table.sum(0)
    values = totals[:, 0] / np.maximum(totals[:, 1], 1e-12)
    sign = 1.0 if higher_is_better else -1.0
    best = (sign * resampled).max(1)
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    found = [
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
    return tuple(sorted(found, key=lambda rank: -sign * rank.value))
