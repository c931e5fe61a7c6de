"""What an interrupted `genssd select` has finished: the prompts that both of its journals hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from genssd.distill.data.problems import ProblemRow, check_same_problem
from genssd.distill.data.topk_store import check_topk_file
from genssd.distill.runs.journal import complete_rows, damaged_line, has_lines
from genssd.distill.runs.run import Run
from genssd.distill.runs.writing import keep_spans
from genssd.engine.common.errors import InputError

TOPK_FILE = "teacher_topk.bin"


def keep_complete(run: Run, problems: Sequence[ProblemRow], data: str, *, has_topk: bool) -> frozenset[int]:
    """Cut both journals back to the prompts that are in both, in the order of the selections; return their indices.

    data: name of the data file, for messages. has_topk: whether the run keeps the teacher's most likely tokens.
    A prompt that only one of the journals holds is done again: a crash, or the user who removed a damaged line, left it
    so. Raises InputError when the run was begun with other data, and when a file of finished prompts is lost.
    """
    decisions = run.path("decisions.jsonl")
    _check_neither_lost(run.journal_path, decisions)
    selected: dict[int, int] = {}
    for number, row in enumerate(run.done()):
        check_same_problem(row, problems, data, run.journal_path)
        if row["index"] in selected:
            raise damaged_line(run.journal_path, number + 1, f"prompt {row['index']} is also in an earlier line")
        selected[row["index"]] = number
    decided: dict[object, tuple[int, int]] = {}
    start = 0
    for row, end in complete_rows(decisions):
        decided[row.get("index")] = (start, end)
        start = end
    if has_topk:
        check_topk_file(run.path(TOPK_FILE), run.done(), run.journal_path, decisions)
    done = [index for index in selected if index in decided]
    run.keep_rows([selected[index] for index in done])
    keep_spans(decisions, [decided[index] for index in done])
    return frozenset(done)


def _check_neither_lost(selections: Path, decisions: Path) -> None:
    """Raise InputError where one of the two journals holds lines and the other is missing."""
    for lost, held in ((selections, decisions), (decisions, selections)):
        if not lost.exists() and has_lines(held):
            raise InputError(
                f"{lost} is lost, and {held.name} beside it is not; restore it, or remove {held} to begin anew"
            )
