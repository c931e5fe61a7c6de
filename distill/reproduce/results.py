"""The results of a comparison: what the journal holds, made into comparisons with the controls, and results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genssd.distill.reproduce.arms import STAGES, Arm
from genssd.distill.reproduce.statistics import LEVEL, Difference, compare_paired, correct_holm, find_p_values

JournalRow = Mapping[str, Any]
"""A line of the journal: the results of one arm with one seed, see run.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm minus one of its controls."""

    arm: str
    control: str
    difference: Difference
    p: float | None
    """Two-sided p-value, not corrected; None with one seed."""
    corrected: float | None
    """Holm's corrected p-value within the family of comparisons; None with one seed."""

    @property
    def verdict(self) -> str:
        """What may be said of the comparison at the corrected level of 5 %."""
        if self.corrected is None:
            return "one seed"
        if self.corrected >= LEVEL:
            return "not told apart"
        return "better" if self.difference.value > 0 else "worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """Means of one arm over its finished seeds."""

    arm: Arm
    seeds: tuple[int, ...]
    accuracy: float
    by_seed: tuple[float, ...]
    teacher_tokens: float
    """Mean number of tokens that the teacher sampled."""
    student_tokens: float
    """Mean number of tokens that the student sampled for the rows."""
    train_tokens: float
    rows: float
    right: float | None
    """Mean fraction of the rows that are known to be right; None where there are no rows, or no verdicts."""
    mean_tokens: float | None
    """Mean number of tokens in a row's completion."""
    styles: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Results of all arms that have a finished seed, and their comparisons in four families."""

    arms: tuple[ArmResult, ...]
    main: tuple[Comparison, ...]
    """Every arm with its main control; those of the first stages, and the others, are each corrected together."""
    others: tuple[Comparison, ...]
    """Arms with their further controls, corrected like the main ones."""

    def as_json(self) -> dict[str, Any]:
        """Return the content of results.json."""
        return {
            "arms": [
                {
                    "name": one.arm.name,
                    "command": one.arm.command,
                    "paper": one.arm.paper,
                    **{f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name != "arm"},
                }
                for one in self.arms
            ],
            **{
                name: [{**dataclasses.asdict(one), "verdict": one.verdict} for one in getattr(self, name)]
                for name in ("main", "others")
            },
        }


def compute_results(arms: Sequence[Arm], rows: Sequence[JournalRow]) -> Results:
    """Return the results of the finished part of a comparison."""
    by_arm: dict[str, dict[int, JournalRow]] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    finished = [arm for arm in arms if arm.name in by_arm]
    deciding = [arm for arm in finished if arm.stage < len(STAGES)]
    further = [arm for arm in finished if arm.stage == len(STAGES)]
    main: list[Comparison] = []
    others: list[Comparison] = []
    for group in (deciding, further):  # families of their own, so that the first does not depend on how far a run is
        main += _compare([(arm.name, arm.controls[0]) for arm in group if arm.controls], by_arm)
        others += _compare([(arm.name, control) for arm in group for control in arm.controls[1:]], by_arm)
    return Results(
        arms=tuple(_describe(arm, by_arm[arm.name]) for arm in finished), main=tuple(main), others=tuple(others)
    )


def _compare(
    pairs: Sequence[tuple[str, str]], by_arm: Mapping[str, Mapping[int, JournalRow]]
) -> tuple[Comparison, ...]:
    """Return the comparisons of pairs of arms that have a seed in common, corrected together."""
    compared: list[tuple[str, str, Difference]] = []
    for arm, control in pairs:
        seeds = sorted(by_arm[arm].keys() & by_arm.get(control, {}).keys())
        if seeds:
            left, right = ([by_arm[name][seed]["correct"] for seed in seeds] for name in (arm, control))
            compared.append((arm, control, compare_paired(left, right)))
    values = find_p_values([difference for _, _, difference in compared])
    return tuple(
        Comparison(arm=arm, control=control, difference=difference, p=p, corrected=corrected)
        for (arm, control, difference), p, corrected in zip(compared, values, correct_holm(values), strict=True)
    )


def _describe(arm: Arm, by_seed: Mapping[int, JournalRow]) -> ArmResult:
    seeds = tuple(sorted(by_seed))
    rows = [by_seed[seed] for seed in seeds]
    accuracies = [float(np.mean(row["correct"])) for row in rows]

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in rows]))

    names = sorted({name for row in rows for name in row["styles"]})
    known = all(row["right"] is not None for row in rows)
    return ArmResult(
        arm=arm,
        seeds=seeds,
        accuracy=float(np.mean(accuracies)),
        by_seed=tuple(accuracies),
        teacher_tokens=mean("teacher_tokens"),
        student_tokens=mean("student_tokens"),
        train_tokens=mean("train_tokens"),
        rows=mean("rows"),
        right=mean("right") if known else None,
        mean_tokens=mean("mean_tokens") if all(row["rows"] for row in rows) else None,
        styles={name: float(np.mean([row["styles"].get(name, 0.0) for row in rows])) for name in names},
        seconds=mean("seconds"),
    )
