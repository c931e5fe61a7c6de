"""Accuracy of evaluated models with intervals, and the problems on which they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.distill.answers.intervals import Estimate, paired_difference, wilson, wilson_of_groups
from genssd.distill.report.found import FoundRun
from genssd.distill.report.texts import write_prompt
from genssd.distill.runs.journal import sound_rows

MAX_PROBLEMS = 100
"""Maximum number of problems on which models differ that the page lists."""
MAX_CHARACTERS = 1500
"""Maximum number of characters of a response in that list: those at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadEvaluation:
    """One run of `genssd evaluate`, finished or not."""

    found: FoundRun
    rows: Mapping[str, Mapping[str, Any]]
    """What the journal says of every problem, by its prompt."""

    def as_json(self, first: ReadEvaluation) -> dict[str, Any]:
        """Return the accuracy, and its difference from that of the first evaluation over the problems of both."""
        rows = list(self.rows.values())
        samples = [row["samples"] for row in rows]
        is_sampled = bool(samples) and all(samples)
        common = [key for key in self.rows if key in first.rows]
        difference = None
        if common and self is not first:
            outcomes = [[e.rows[key]["correct"] for key in common] for e in (self, first)]
            difference = paired_difference(*outcomes)
        return {
            "name": self.found.name,
            "model": self.found.config.get("model"),
            "is_finished": self.found.is_finished,
            "problems": len(rows),
            "accuracy": _fields(wilson([row["correct"] for row in rows]) if rows else None),
            "avg_at_k": _fields(wilson_of_groups(samples) if is_sampled else None),
            "samples": len(samples[0]) if is_sampled else 0,
            "cut_off": sum(row["status"] == "length" for row in rows),
            "mean_tokens": sum(row["tokens"] for row in rows) / max(1, len(rows)),
            "difference": _fields(difference),
            "common": len(common),
        }


def read_evaluation(found: FoundRun, faults: list[str]) -> ReadEvaluation:
    """Read the journal of an evaluation. faults: takes lines that cannot be read."""
    path = found.path / "evaluation.jsonl"
    rows: dict[str, Mapping[str, Any]] = {}
    for row, number in sound_rows(path, faults):
        try:
            rows[write_prompt(row["prompt"])] = {
                "correct": row["correct"] is True,
                "samples": [sample["correct"] is True for sample in row["samples"]],
                "status": str(row["status"]),
                "tokens": int(row["tokens"]),
                "response": str(row["response"]),
                "answer": str(row["answer"]),
            }
        except (LookupError, TypeError, ValueError):
            faults.append(f"{path}, line {number} is no result of this version of genssd")
    return ReadEvaluation(found=found, rows=rows)


def list_differing(evaluations: Sequence[ReadEvaluation]) -> tuple[list[dict[str, Any]], int]:
    """Return the first problems on which not all evaluations have the same verdict, and the number of all of them.

    The first MAX_PROBLEMS have the ends of the responses.
    """
    differing: list[dict[str, Any]] = []
    total = 0
    for question in evaluations[0].rows if evaluations else ():
        rows = [evaluation.rows.get(question) for evaluation in evaluations]
        if len({row["correct"] for row in rows if row is not None}) < 2:
            continue
        total += 1
        if total <= MAX_PROBLEMS:
            results = [None if row is None else [row["correct"], row["response"][-MAX_CHARACTERS:]] for row in rows]
            differing.append({"question": question, "answer": evaluations[0].rows[question]["answer"], "of": results})
    return differing, total


def _fields(estimate: Estimate | None) -> dict[str, float] | None:
    return None if estimate is None else dataclasses.asdict(estimate)
