"""The end of a run of `genssd select`: why prompts failed or were not finished, and the counts over the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from genssd.distill.answers.accuracy import Accuracy, measure_accuracy
from genssd.distill.data.problems import ProblemSet
from genssd.distill.data.response_limits import count_cuts
from genssd.distill.runs.run import Run
from genssd.distill.select.calibration import Calibration
from genssd.distill.select.teachers import TeacherTotals, sum_teachers
from genssd.engine.common.amounts import format_count
from genssd.engine.common.outcomes import SPECIAL
from genssd.engine.search.budget import Budget, BudgetName, find_limit
from genssd.engine.search.selection import Selection


@dataclass(slots=True)
class SearchEnd:
    """The prompts of one search that are not in the journal, and why."""

    failures: dict[int, str] = field(default_factory=dict)
    """Why prompts failed, by the index of the row."""
    stopped_by: BudgetName | None = None
    """Option of total_budget that ended the search; None where all prompts were run."""
    unfinished: int = 0
    """Number of prompts that total_budget left unfinished."""
    tokens_dropped: int = 0
    """Number of tokens sampled for these prompts."""
    missing_tokens: Counter[str] = field(default_factory=Counter)
    """Number of the failures because of a token that the student does not have, by its string and id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSummary:
    """What a finished run has written. Counts are over the whole journal, earlier parts of the run included."""

    path: Path
    prompts: int
    statuses: Mapping[str, int]
    """Number of best trajectories by status."""
    accuracy: Accuracy
    """Verdicts on the best trajectories."""
    cuts: Mapping[str, int]
    """Number of best trajectories that were cut off, by what cut them."""
    calibration: Calibration | None
    """Where the threshold comes from; None where it is not taken from data."""
    drifted: int
    """Number of best trajectories whose tokens of a student that reads bytes were others in pieces than as a whole."""
    tokens_kept: int
    """Number of the teacher's tokens in the best trajectories."""
    tokens_sampled: int
    median_chunks: float
    """Median number of chunks in the best trajectories: of rounds in which one was chosen. 0 without a trajectory."""
    rounds: Mapping[str, int]
    """Number of attempts at rounds by what the search did after them (see `Decision`)."""
    teachers: tuple[TeacherTotals, ...]
    """What each of several teachers did; empty where there is one."""
    stopped_by: BudgetName | None
    """Option of total_budget that ended the run; None where all prompts were run."""
    unfinished: int
    """Number of prompts that total_budget left unfinished."""
    tokens_dropped: int
    """Number of tokens that this part of the run sampled for unfinished prompts, which are run again from their
    beginning."""
    failures: tuple[str, ...]
    """Prompts that are too long, did not fit into the cache, or for which the teacher wrote a token that the student
    does not have, and why. They are in no journal: resuming tries them again."""
    missing_tokens: Mapping[str, int]
    """Number of the failures because of a token that the student does not have, by its string and id."""
    bad_rows: tuple[str, ...]
    """Rows that could not be used, of the data and of the calibration's data; the failures are among them."""

    def describe_stop(self, budget: Budget) -> str | None:
        """Return what total_budget left unfinished, in a line; None where all prompts were run."""
        if self.stopped_by is None:
            return None
        remedy = (
            "--resume with a larger one goes on" if self.stopped_by == "total_budget.tokens" else "--resume goes on"
        )
        return (
            f"{self.stopped_by}={find_limit(budget, self.stopped_by)} ended the search: "
            f"{format_count(self.prompts, 'prompt')} finished, {self.unfinished} unfinished "
            f"({format_count(self.tokens_dropped, 'token')} of theirs not kept); {remedy}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        names = (
            "prompts", "statuses", "cuts", "drifted", "tokens_kept", "tokens_sampled", "median_chunks", "rounds",
            "stopped_by", "unfinished", "tokens_dropped",
        )  # fmt: skip
        return {
            "path": self.path.name,
            **{name: getattr(self, name) for name in names},
            **({"teachers": [one.as_json() for one in self.teachers]} if self.teachers else {}),
            **self.accuracy.as_json(),
            "threshold": None if self.calibration is None else self.calibration.threshold,
            "failures": len(self.failures),
            "missing_tokens": self.missing_tokens,
            "bad_rows": len(self.bad_rows),
        }


def summarise(run: Run, end: SearchEnd, data: ProblemSet, calibration: Calibration | None) -> SelectSummary:
    """Return the counts over the journal."""
    statuses: Counter[str] = Counter()
    rounds: Counter[str] = Counter()
    kept = sampled = drifted = 0
    num_chunks: list[int] = []
    best: list[dict[str, Any]] = []
    uses: list[list[dict[str, Any]]] = []
    for row in run.done():
        statuses[row["status"]] += 1
        rounds.update(row["rounds"])
        kept += len(row.get("teacher_ids", row["completion_ids"]))
        sampled += row["tokens_sampled"]
        num_chunks.append(len(row["chunks"]))
        uses += [row["teachers"]] if "teachers" in row else []
        drifted += row.get("drifted") is True
        best.append({name: row[name] for name in ("correct", "undecided", "cut_by")})
    return SelectSummary(
        path=run.journal_path,
        prompts=statuses.total(),
        statuses=dict(statuses),
        accuracy=measure_accuracy([[row] for row in best]),
        cuts=count_cuts(best),
        calibration=calibration,
        drifted=drifted,
        tokens_kept=kept,
        tokens_sampled=sampled,
        median_chunks=median(num_chunks) if num_chunks else 0.0,
        rounds=dict(rounds),
        teachers=sum_teachers(uses),
        stopped_by=end.stopped_by,
        unfinished=end.unfinished,
        tokens_dropped=end.tokens_dropped,
        failures=tuple(message for _, message in sorted(end.failures.items())),
        missing_tokens=dict(end.missing_tokens),
        bad_rows=(*(calibration.bad_rows if calibration else ()), *data.list_bad_rows(end.failures)),
    )


def list_special(selection: Selection) -> Iterator[str]:
    """Yield what a user may want to see of a prompt while others run, in words."""
    for record in selection.rounds:
        if record.decision in SPECIAL:
            yield f"rounds {record.decision}"
    for use in selection.teachers:
        if use.dropped_after is not None:
            yield "times a teacher was dropped"
    if selection.best.status == "pruned":
        yield "prompts pruned"
    if selection.ended_by is not None:
        yield "prompts ended by their budget"
