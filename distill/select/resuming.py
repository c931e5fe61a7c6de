"""What an interrupted `genssd select` has finished: the prompts that both of its journals hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from genssd.distill.data import state_store, topk_store
from genssd.distill.data.problems import ProblemRow, check_same_problem
from genssd.distill.data.row_bytes import check_bytes_file, find_end
from genssd.distill.data.state_store import StateStore
from genssd.distill.runs.journal import complete_indices, damaged_line, has_lines
from genssd.distill.runs.run import Run
from genssd.distill.runs.teacher_options import StateType
from genssd.distill.runs.writing import keep_spans
from genssd.engine.common.errors import InputError

TOPK_FILE, STATES_FILE = "teacher_topk.bin", "teacher_states.bin"


def keep_complete(run: Run, problems: Sequence[ProblemRow], data: str) -> frozenset[int]:
    """Cut both journals back to the prompts that are in both, in the order of the selections; return their indices.

    data: name of the data file, for messages.
    A prompt that only one of the journals holds is done again: a crash, or the user who removed a damaged line, left it
    so. Raises InputError when the run was begun with other data, and when a file of finished prompts is lost.
    """
    decisions = run.path("decisions.jsonl")
    _check_neither_lost(run.journal_path, decisions)
    selected: dict[int, int] = {}
    located: list[dict[str, object]] = []  # without the long fields: the journal is read once
    for number, row in enumerate(run.done()):
        check_same_problem(row, problems, data, run.journal_path)
        if row["index"] in selected:
            raise damaged_line(run.journal_path, number + 1, f"prompt {row['index']} is also in an earlier line")
        selected[row["index"]] = number
        located.append({name: row.get(name) for name in (topk_store.FIELD, state_store.FIELD)})
    decided: dict[object, tuple[int, int]] = {}
    start = 0
    for index, end in complete_indices(decisions):
        decided[index] = (start, end)
        start = end
    check_bytes_file(run.path(TOPK_FILE), topk_store.FIELD, "top k", located, run.journal_path, decisions)
    check_states_file(run, located, decisions)
    done = [index for index in selected if index in decided]
    run.keep_rows([selected[index] for index in done])
    keep_spans(decisions, [decided[index] for index in done])
    return frozenset(done)


def check_states_file(run: Run, rows: Iterable[Mapping[str, object]], decisions: Path | None = None) -> None:
    """Raise InputError where the hidden states of the journal's rows are lost. decisions: the journal beside it."""
    path = run.path(STATES_FILE)
    check_bytes_file(path, state_store.FIELD, "hidden states", rows, run.journal_path, decisions)


@contextmanager
def open_states(run: Run, dtype: StateType | None, teacher: str) -> Iterator[StateStore | None]:
    """Open the file of the teacher's hidden states, cut off after those of the journal; None where none are kept.

    teacher: fingerprint of its checkpoint.
    """
    if dtype is None:
        yield None
        return
    end = max((find_end(row, state_store.FIELD) for row in run.done()), default=0)
    with StateStore(run.path(STATES_FILE), end, teacher=teacher) as store:
        yield store


def _check_neither_lost(selections: Path, decisions: Path) -> None:
    """Raise InputError where one of the two journals holds lines and the other is missing."""
    for lost, held in ((selections, decisions), (decisions, selections)):
        if not lost.exists() and has_lines(held):
            raise InputError(
                f"{lost} is lost, and {held.name} beside it is not; restore it, or remove {held} to begin anew"
            )
