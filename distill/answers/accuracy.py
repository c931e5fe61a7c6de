"""How many of a run's responses are correct, and with what certainty."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from genssd.distill.answers.forms import Verdict
from genssd.distill.answers.intervals import Estimate, wilson_of_groups


def describe_verdict(verdict: Verdict | None) -> dict[str, Any]:
    """Return the fields of a row that say whether its response is correct.

    verdict: None where no reference answer is known. `correct` is null there, and where `undecided` gives a reason.
    """
    if verdict is None or verdict.undecided is not None:
        return {"correct": None, "undecided": None if verdict is None else verdict.undecided}
    return {"correct": verdict.is_correct, "undecided": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The verdicts on the responses of a run."""

    estimate: Estimate | None
    """Fraction of correct responses: of all with a reference answer, the mean over prompts. Undecided ones count as not
    correct. None where no reference answer is known."""
    correct: int
    wrong: int
    undecided: int
    """Number of responses that could not be judged."""

    @property
    def judged(self) -> int:
        """Number of responses with a reference answer."""
        return self.correct + self.wrong + self.undecided

    def as_json(self) -> dict[str, Any]:
        """Return the fields of a summary."""
        return {
            "accuracy": None if self.estimate is None else dataclasses.asdict(self.estimate),
            "correct": self.correct,
            "wrong": self.wrong,
            "undecided": self.undecided,
        }


def measure_accuracy(prompts: Iterable[Sequence[Mapping[str, Any]]]) -> Accuracy:
    """Return the accuracy of the responses to prompts, from the fields that `describe_verdict` made."""
    outcomes: list[list[bool]] = []
    undecided = 0
    for responses in prompts:
        known = [row for row in responses if row["correct"] is not None or row["undecided"] is not None]
        undecided += sum(row["correct"] is None for row in known)
        if known:
            outcomes.append([row["correct"] is True for row in known])
    correct, total = sum(map(sum, outcomes)), sum(map(len, outcomes))
    estimate = wilson_of_groups(outcomes) if outcomes else None
    return Accuracy(estimate=estimate, correct=correct, wrong=total - correct - undecided, undecided=undecided)
