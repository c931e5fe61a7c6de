"""Comparison of criteria over one pool of traces: their correlation, and the responses that each of them picks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genssd.distill.score.feature_rows import FeatureRow
from genssd.distill.score.rank_statistics import Floats, mean_ranks
from genssd.distill.score.ranking import group_by_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseSet:
    """Statistics of a set of responses."""

    name: str
    responses: int
    """Number of responses in the set."""
    tokens: float
    """Mean number of tokens per response."""
    steps: float
    """Mean number of steps per response."""
    tokens_per_step: float
    """Number of tokens over number of steps in the whole set."""
    correct: float | None
    """Fraction of correct responses among those of which it is known; None where it is known of none."""
    finished: float
    """Fraction of responses that end by themselves."""
    teachers: Mapping[str, float]
    """Fraction of the responses that each teacher wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Comparison of criteria over one pool of traces."""

    names: tuple[str, ...]
    """Names of the criteria."""
    correlation: Floats
    """[criteria, criteria]: Spearman's rank correlation of the values over the pool, each turned so that higher is
    better; NaN where one of them is constant."""
    correlation_within_prompts: Floats
    """[criteria, criteria]: rank correlation over the responses to one prompt, averaged over the prompts that have at
    least three responses; NaN where none of them has a correlation."""
    agreement: Floats
    """[criteria, criteria]: fraction of contested prompts at which both pick the same response."""
    contested: int
    """Number of prompts with more than one eligible response."""
    pool: ResponseSet
    """Statistics of all responses."""
    picked: tuple[ResponseSet, ...]
    """Statistics of the responses that each criterion picks."""
    selected: ResponseSet
    """Statistics of the responses that are written out."""


def compare(
    rows: Sequence[FeatureRow],
    columns: Mapping[str, Sequence[float]],
    higher_is_better: Mapping[str, bool],
    picks: Mapping[str, Sequence[int]],
    contested: Sequence[str],
    selected: Sequence[int],
) -> Comparison:
    """Compare criteria over the rows of one pool.

    columns, higher_is_better, picks: by criterion, the values of all rows, their direction, and the indices of the rows
    that it picks, the best of a prompt first. contested: the prompts with more than one eligible response. selected:
    the indices of the rows that are written out.
    """
    names = tuple(columns)
    values = np.array([columns[name] for name in names], dtype=np.float64)
    values *= np.where([higher_is_better[name] for name in names], 1.0, -1.0)[:, None]
    best = {name: {rows[i]["prompt"]: i for i in reversed(picks[name])} for name in names}
    agreement = [
        [np.mean([float(best[a].get(p) == best[b].get(p)) for p in contested] or [np.nan]) for b in names]
        for a in names
    ]
    return Comparison(
        names=names,
        correlation=rank_correlation(values),
        correlation_within_prompts=_correlate_within_prompts(rows, values),
        agreement=np.array(agreement),
        contested=len(contested),
        pool=describe("all responses", rows),
        picked=tuple(describe(name, [rows[i] for i in picks[name]]) for name in names),
        selected=describe("selected.jsonl", [rows[i] for i in selected]),
    )


def _correlate_within_prompts(rows: Sequence[FeatureRow], values: Floats) -> Floats:
    """Return the mean rank correlation over prompts with three responses or more. values: [criteria, responses]."""
    groups = [members for members in group_by_prompt(rows).values() if len(members) > 2]
    if not groups:
        return np.full((len(values), len(values)), np.nan)
    correlations = np.array([rank_correlation(values[:, members]) for members in groups])
    defined = ~np.isnan(correlations)
    sums, counts = np.where(defined, correlations, 0.0).sum(0), np.maximum(defined.sum(0), 1)
    return np.where(defined.any(0), sums / counts, np.nan)


def describe(name: str, rows: Sequence[FeatureRow]) -> ResponseSet:
    """Return the statistics of the responses of some rows."""
    known = [row["correct"] for row in rows if row["correct"] is not None]
    count = max(1, len(rows))
    tokens, steps = sum(row["tokens"] for row in rows), sum(row["steps"] for row in rows)
    teachers = sorted({row["teacher"] for row in rows})
    return ResponseSet(
        name=name,
        responses=len(rows),
        tokens=tokens / count,
        steps=steps / count,
        tokens_per_step=tokens / max(1, steps),
        correct=sum(known) / len(known) if known else None,
        finished=sum(row["finished"] for row in rows) / count,
        teachers={teacher: sum(row["teacher"] == teacher for row in rows) / count for teacher in teachers},
    )


def rank_correlation(values: Floats) -> Floats:
    """Return Spearman's rank correlation, [criteria, criteria]; NaN where a criterion is constant.

    values: [criteria, responses]; equal values have the mean of their ranks.
    """
    ranks = np.array([mean_ranks(row) for row in values])
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: Floats = (ranks @ ranks.T) / np.outer(norms, norms)
    return correlation
