"""What choosing does to the data: how criteria relate, what each of them picks, and what its picks are like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genssd.distill.score.ranking import Row, by_prompt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """What a set of responses is like. Shares are None where nothing is known."""

    name: str
    responses: int
    tokens: float
    """Mean per response."""
    steps: float
    tokens_per_step: float
    correct: float | None
    """Share of the responses whose correctness is known."""
    finished: float
    teachers: Mapping[str, float]
    """Share of the responses that each teacher wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Criteria side by side, over one pool of traces."""

    names: tuple[str, ...]
    better: tuple[bool, ...]
    """Whether higher is better, per criterion."""
    correlation: Floats
    """[criteria, criteria]: Spearman's rank correlation of the values over the pool, each turned so that higher is
    better; NaN where one of them is constant."""
    within: Floats
    """The same, averaged over the prompts that have at least three responses."""
    agreement: Floats
    """[criteria, criteria]: share of contested prompts at which both pick the same response."""
    contested: int
    """Prompts with more than one eligible response."""
    pool: Picked
    picked: tuple[Picked, ...]
    selected: Picked


def compare(
    rows: Sequence[Row],
    columns: Mapping[str, Sequence[float]],
    higher_is_better: Mapping[str, bool],
    picks: Mapping[str, Sequence[int]],
    contested: Sequence[str],
    selected: Sequence[int],
) -> Comparison:
    """picks: of each criterion the rows it picks, the best of a prompt first. contested: the prompts at which there was
    a choice. selected: the rows that are written out."""
    names = tuple(columns)
    better = tuple(higher_is_better[name] for name in names)
    values = np.array([columns[name] for name in names], dtype=np.float64)
    values *= np.where(better, 1.0, -1.0)[:, None]
    groups = [members for members in by_prompt(rows).values() if len(members) > 2]
    inside = [rank_correlation(values[:, members]) for members in groups]
    stacked = np.array(inside) if inside else np.full((1, len(names), len(names)), np.nan)
    known = ~np.isnan(stacked)
    within = np.where(known.any(0), np.where(known, stacked, 0.0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    at = {name: {rows[i]["prompt"]: i for i in reversed(picks[name])} for name in names}
    same = [
        [np.mean([float(at[a].get(p) == at[b].get(p)) for p in contested] or [np.nan]) for b in names] for a in names
    ]
    return Comparison(
        names=names,
        better=better,
        correlation=rank_correlation(values),
        within=within,
        agreement=np.array(same),
        contested=len(contested),
        pool=describe("all responses", rows),
        picked=tuple(describe(name, [rows[i] for i in picks[name]]) for name in names),
        selected=describe("selected.jsonl", [rows[i] for i in selected]),
    )


def describe(name: str, rows: Sequence[Row]) -> Picked:
    """What these responses are like."""
    known = [row["correct"] for row in rows if row["correct"] is not None]
    count = max(1, len(rows))
    tokens, steps = sum(row["tokens"] for row in rows), sum(row["steps"] for row in rows)
    teachers = sorted({row["teacher"] for row in rows})
    return Picked(
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
    """Spearman's, [criteria, criteria] of values [criteria, responses]; equal values share their mean rank."""
    ranks = np.array([mean_ranks(row) for row in values])
    ranks -= ranks.mean(1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: Floats = (ranks @ ranks.T) / np.outer(norms, norms)
    return correlation


def mean_ranks(values: Floats) -> Floats:
    """0 for the smallest; equal values share the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = (last - (counts + 1) / 2.0)[inverse]
    return mean
