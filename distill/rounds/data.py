"""The data of a round of `genssd distill`: its problems, and the trajectories that are trained on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genssd.distill.data import state_store, topk_store
from genssd.distill.data.problems import ProblemRow, ProblemSet, read_usable_problems
from genssd.distill.files.rows import read_rows
from genssd.distill.runs.journal import complete_rows, write_jsonl
from genssd.distill.runs.writing import write_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPart:
    """The problems of one round, in a file of their own."""

    path: Path
    """File of JSON lines, one per problem."""
    problems: Sequence[ProblemRow]
    """Problems of the lines, in order, as they stand in the data of the run."""

    def name_origins(self, messages: Sequence[str]) -> list[str]:
        """Return messages about lines of the file as messages about the rows of the run's data, each one once."""
        place = re.compile(re.escape(f"{self.path}, line ") + r"(\d+)")
        return list(
            dict.fromkeys(place.sub(lambda match: self.problems[int(match[1]) - 1].where, text) for text in messages)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundProblems:
    """The problems that the rounds take from."""

    data: ProblemSet

    @staticmethod
    def read(name: str, *, system_prompt: str | None, are_answers_needed: bool) -> RoundProblems:
        """Read a data file of problems.

        are_answers_needed: whether problems without a reference answer are left out. Raises InputError on a file that
        cannot be read, and when no row is usable.
        """
        data = read_usable_problems(name, system_prompt=system_prompt)
        if are_answers_needed:
            fault = (
                "no reference answer, by which require_correct chooses what is trained on; give --no-require-correct "
                "to train on all trajectories"
            )
            data = data.leave_out(lambda problem: fault if problem.answer is None else None)
        return RoundProblems(data=data)

    def write(self, path: Path, number: int, count: int | None) -> RoundPart:
        """Write the rows of a round to a file and return them; count: number of them, None for all."""
        problems = self.data.problems
        if count is not None:
            problems = tuple(problems[i % len(problems)] for i in range((number - 1) * count, number * count))
        usable = {problem.index for problem in problems}
        texts = {index: row.text + b"\n" for index, row in enumerate(read_rows(self.data.name)) if index in usable}
        write_bytes(path, [texts[problem.index] for problem in problems])
        return RoundPart(path=path, problems=problems)


def keep_trajectories(
    selections: Path, path: Path, *, statuses: Sequence[str], require_correct: bool
) -> tuple[Sequence[Mapping[str, Any]], Mapping[str, int]]:
    """Write the selected trajectories that are trained on; return them, and the number of the others by reason.

    They are written in the order of their problems: that of the journal depends on what was decoded beside them, and on
    how many processes did so, and the batches of the training would follow it.

    selections: a journal of `genssd select`, whose verdicts decide with require_correct. statuses: those that are
    trained on.
    """
    rows: list[Mapping[str, Any]] = []
    left_out: Counter[str] = Counter()
    for row, _ in complete_rows(selections):
        if row["status"] not in statuses:
            left_out[f"status {row['status']}"] += 1
        elif require_correct and not row["correct"]:
            left_out["wrong" if row["undecided"] is None else "undecided"] += 1
        else:
            for place in filter(None, (row.get(topk_store.FIELD), row.get(state_store.FIELD))):
                place["file"] = f"{selections.parent.name}/{place['file']}"
            rows.append(row)
    rows.sort(key=lambda row: int(row["index"]))
    write_jsonl(path, rows)
    return rows, dict(left_out)
