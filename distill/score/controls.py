"""Controls beside every ranking: how far a criterion's ranking is one of length, of steps or of teachers, and what of
its relation to correctness is left among responses of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from genssd.distill.score.feature_rows import FeatureRow
from genssd.distill.score.rank_statistics import (
    MIN_PAIRS,
    MIN_PROMPTS,
    Flags,
    Floats,
    Pairs,
    RankEstimate,
    RankMoments,
    count_wins,
    explained_by_label,
    list_pairs,
    rank_over_pool,
    rank_within,
)
from genssd.distill.score.ranking import group_by_prompt
from genssd.engine.common.amounts import format_count

EXPLAINED = 0.5
"""Fraction of the variance of the ranks from which on length is said to explain a ranking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherWins:
    """How often the responses of one teacher rank before those of the others to the same prompt."""

    teacher: str
    all_pairs: RankEstimate | None
    """Fraction of the pairs with another teacher's response; None for too few pairs."""
    equal_length: RankEstimate | None
    """Fraction of these pairs of equal length; None for too few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriterionControls:
    """What a criterion's ranking has to do with other properties of the responses; None where n is too small.

    Every value is turned so that more is better: a positive correlation with length means that long responses rank
    first. Correlations are Spearman's, within prompts unless their name says otherwise.
    """

    name: str
    length_over_pool: RankEstimate | None
    """Rank correlation with the number of tokens over all responses."""
    length: RankEstimate | None
    """Rank correlation with the number of tokens."""
    steps: RankEstimate | None
    """Rank correlation with the number of steps."""
    teacher: float | None
    """Fraction of the variance of the ranks that the teachers explain (eta squared)."""
    correct: RankEstimate | None
    """Rank correlation with correctness, over the prompts that have right and wrong responses."""
    correct_given_length: RankEstimate | None
    """Partial rank correlation with correctness given the number of tokens, over the same prompts."""
    right_first: RankEstimate | None
    """Fraction of the pairs of a right and a wrong response in which the right one ranks first."""
    right_first_at_equal_length: RankEstimate | None
    """Fraction of these pairs of equal length in which the right one ranks first."""
    teachers: tuple[TeacherWins, ...]
    """The teachers' wins; empty with fewer than two teachers."""
    warning: str | None
    """One sentence where length explains the ranking."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTable:
    """The controls of all criteria over one pool of responses."""

    equal_length: float
    """Maximum difference of lengths, as a fraction of the longer one's, at which a pair counts as equally long."""
    responses: int
    choices: int
    """Number of prompts with at least two responses."""
    mixed: int
    """Number of prompts with right and wrong responses."""
    pairs: int
    """Number of pairs of responses to the same prompt."""
    pairs_of_equal_length: int
    teacher_by_chance: float | None
    """What eta squared of the teachers would be on average without any relation."""
    criteria: tuple[CriterionControls, ...]
    notes: tuple[str, ...]
    """Sentences about numbers that are missing."""

    def of(self, name: str) -> CriterionControls:
        """Return the controls of a criterion."""
        return next(controls for controls in self.criteria if controls.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """The responses that all criteria are compared over."""

    rows: Sequence[FeatureRow]
    equal_length: float
    groups: Sequence[Sequence[int]]
    """Indices of the rows of every prompt with at least two."""
    mixed: Sequence[Sequence[int]]
    """Indices of the rows whose correctness is known, of every prompt with right and wrong ones."""
    lengths: Floats
    steps: Floats
    correct: Floats
    """1 for right, 0 for wrong or unknown."""
    pairs: Pairs
    is_equal: Flags
    """Whether each pair is of equal length."""
    judged: Pairs
    """Pairs of a right and a wrong response, the right one first."""
    judged_is_equal: Flags

    @staticmethod
    def of(rows: Sequence[FeatureRow], equal_length: float) -> _Pool:
        groups = [members for members in group_by_prompt(rows).values() if len(members) > 1]
        known = [[i for i in members if rows[i]["correct"] is not None] for members in groups]
        mixed = [members for members in known if len({rows[i]["correct"] for i in members}) > 1]
        lengths = np.array([row["tokens"] for row in rows], dtype=np.float64)
        correct = np.array([float(row["correct"] is True) for row in rows])
        pairs, judged = list_pairs(groups), list_pairs(mixed).with_larger_first(correct)
        return _Pool(
            rows=rows,
            equal_length=equal_length,
            groups=groups,
            mixed=mixed,
            lengths=lengths,
            steps=np.array([row["steps"] for row in rows], dtype=np.float64),
            correct=correct,
            pairs=pairs,
            is_equal=pairs.length_differences(lengths) <= equal_length,
            judged=judged,
            judged_is_equal=judged.length_differences(lengths) <= equal_length,
        )


def compute_controls(
    rows: Sequence[FeatureRow],
    columns: Mapping[str, Sequence[float]],
    higher_is_better: Mapping[str, bool],
    *,
    equal_length: float,
    notes: Sequence[str] = (),
) -> ControlTable:
    """Return the controls of every criterion.

    columns, higher_is_better: by criterion, the values of all rows and their direction. equal_length: as in
    `ControlTable`. notes: sentences to which those about missing numbers are added.
    """
    pool = _Pool.of(rows, equal_length)
    teachers = sorted({row["teacher"] for row in rows})
    names = list(columns)
    signs = np.array([1.0 if higher_is_better[name] else -1.0 for name in names])
    values_CN = np.array([columns[name] for name in names], dtype=np.float64).reshape(-1, len(rows)) * signs[:, None]
    every_prompt = list(group_by_prompt(rows).values())
    over_pool = RankMoments(rank_over_pool(np.vstack((values_CN, pool.lengths))), every_prompt)
    ranks_VN = rank_within(np.vstack((values_CN, pool.lengths, pool.steps)), pool.groups)
    within = RankMoments(ranks_VN, pool.groups)
    judged = RankMoments(rank_within(np.vstack((values_CN, pool.lengths, pool.correct)), pool.mixed), pool.mixed)
    labels = [row["teacher"] for row in rows]
    of_teachers = explained_by_label(ranks_VN[: len(names)], labels, pool.groups)
    right_first = count_wins(values_CN, pool.judged)
    at_equal_length = count_wins(values_CN, pool.judged.where(pool.judged_is_equal))
    wins = [_count_teacher(teacher, values_CN, pool) for teacher in teachers if len(teachers) > 1]
    criteria = []
    length, other = len(names), len(names) + 1  # rows of the matrices above after those of the criteria
    for c, name in enumerate(names):
        values = values_CN[c]
        measured = CriterionControls(
            name=name,
            length_over_pool=over_pool.correlate(c, length),
            length=within.correlate(c, length),
            steps=within.correlate(c, other),
            teacher=of_teachers[c],
            correct=judged.correlate(c, other),
            correct_given_length=judged.correlate_given(c, other, length),
            right_first=right_first[c],
            right_first_at_equal_length=at_equal_length[c],
            teachers=tuple(of_criteria[c] for of_criteria in wins),
            warning=None,
        )
        is_length = np.array_equal(np.abs(values), pool.lengths)  # the control itself, in either direction
        criteria.append(measured if is_length else replace(measured, warning=write_warning(measured)))
    return ControlTable(
        equal_length=equal_length,
        responses=len(rows),
        choices=len(pool.groups),
        mixed=len(pool.mixed),
        pairs=len(pool.pairs),
        pairs_of_equal_length=int(pool.is_equal.sum()),
        teacher_by_chance=_chance_of_teachers(labels, pool.groups) if len(teachers) > 1 else None,
        criteria=tuple(criteria),
        notes=(*notes, *_describe_missing(pool)),
    )


def _count_teacher(teacher: str, values_CN: Floats, pool: _Pool) -> list[TeacherWins]:
    """Return how often a teacher's responses rank before those of others, by criterion. values_CN: more is better."""
    is_own = np.array([float(row["teacher"] == teacher) for row in pool.rows])
    against = pool.pairs.with_larger_first(is_own)
    is_equal = against.length_differences(pool.lengths) <= pool.equal_length
    return [
        TeacherWins(teacher=teacher, all_pairs=all_pairs, equal_length=equal_length)
        for all_pairs, equal_length in zip(
            count_wins(values_CN, against), count_wins(values_CN, against.where(is_equal)), strict=True
        )
    ]


def _chance_of_teachers(labels: Sequence[str], groups: Sequence[Sequence[int]]) -> float | None:
    """Return the mean of `explained_by_label` where labels have nothing to do with ranks; None for too few prompts."""
    mixed = [members for members in groups if len({labels[i] for i in members}) > 1]
    if len(mixed) < MIN_PROMPTS:
        return None
    num_labels = len({labels[i] for members in mixed for i in members})
    return (num_labels - 1) / sum(len(members) - 1 for members in mixed)


def write_warning(controls: CriterionControls) -> str | None:
    """Return one sentence where length explains a criterion's ranking, or its relation to correctness."""
    length, where = controls.length, "within prompts"
    if length is None:
        length, where = controls.length_over_pool, "over all responses"
    correct, given = controls.correct, controls.correct_given_length
    is_of_length = length is not None and length.value**2 >= EXPLAINED
    is_correctness_gone = (
        correct is not None and given is not None and correct.excludes(0.0) and not given.excludes(0.0)
    )
    parts = []
    if is_of_length:
        assert length is not None
        preferred = "long responses" if length.value > 0.0 else "short responses"
        parts.append(
            f"length explains {length.value**2:.0%} of its ranks {where} (rho {_show(length)}): it prefers {preferred}"
        )
    if is_correctness_gone:
        assert correct is not None
        assert given is not None
        parts.append(f"its relation to correctness (rho {_show(correct)}) is gone given length ({_show(given)})")
    at_equal_length = controls.right_first_at_equal_length
    if parts and at_equal_length is not None:
        parts.append(
            f"at equal length it ranks the right response first in {at_equal_length.value:.0%} of "
            f"{format_count(at_equal_length.number, 'pair')}"
        )
    return f"{controls.name}: {'; '.join(parts)}" if parts else None


def _show(estimate: RankEstimate) -> str:
    return f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"


def _describe_missing(pool: _Pool) -> Iterator[str]:
    """Yield a sentence for every kind of number that the responses are too few for."""
    if len(pool.groups) < MIN_PROMPTS:
        yield (
            f"too few for correlations within prompts: {format_count(len(pool.groups), 'prompt')} with at least two "
            f"responses, {MIN_PROMPTS} are needed"
        )
    if len(pool.mixed) < MIN_PROMPTS:
        yield (
            f"too few for correctness: {format_count(len(pool.mixed), 'prompt')} with right and wrong responses, "
            f"{MIN_PROMPTS} are needed"
        )
    if pool.judged_is_equal.sum() < MIN_PAIRS <= len(pool.judged):
        count = int(pool.judged_is_equal.sum())
        yield (
            f"too few at equal length: {format_count(count, 'pair')} of a right and a wrong response whose lengths "
            f"differ by at most {pool.equal_length:.0%}, {MIN_PAIRS} are needed"
        )
