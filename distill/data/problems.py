"""Reading of problems: rows of data files with a prompt and, where known, its reference answer.

{"prompt": "raw text"}                      completed without a chat template
{"prompt": [{"role": ..., "content": ...}]} or {"messages": [...]}      rendered with the chat template
{"question" | "problem" | "instruction" | "query" | "input": "..."}    becomes one user message, see messages.py
{"answer" | "target" | "solution": ...}     the reference answer, optional; GSM8K's "... #### 72" is understood

A field that is null is absent, so that the columns of united data sets do no harm.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from genssd.distill.answers.reading import read_closing_line
from genssd.distill.data.messages import parse_prompt, parse_tools
from genssd.distill.data.parts import Shard
from genssd.distill.files.pipes import describe
from genssd.distill.files.rows import RawRow, read_rows
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.texts.chat import NO_SYSTEM_PROMPT, Messages, add_system_prompt

ANSWER_FIELDS = ("answer", "target", "solution")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemRow:
    """One problem."""

    prompt: str | Messages
    answer: str | None
    """Reference answer; None where the row has none."""
    line: int
    """Number of the row's line in its file, or, in a table, of the row; from 1."""
    where: str
    """Name of the file and number of the line or row, for messages."""
    index: int
    """Index of the row among all rows of its file, from 0; rows that cannot be used count as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSet:
    """The problems of a data file that can be used, and the reasons why other rows cannot."""

    name: str
    """Name of the data file, for messages."""
    problems: tuple[ProblemRow, ...]
    """Problems in the order of their rows."""
    faults: Mapping[int, str]
    """A message naming file and line for every row that cannot be used, by the row's index."""

    def leave_out(self, find_fault: Callable[[ProblemRow], str | None]) -> ProblemSet:
        """Return the set without the problems that have a fault. Raises InputError when none is left.

        find_fault: returns the reason why a problem cannot be used, or raises it as InputError; None if it can be used.
        """
        faults = dict(self.faults)
        for problem in self.problems:
            try:
                fault = find_fault(problem)
            except InputError as error:
                fault = str(error)
            if fault is not None:
                faults[problem.index] = f"{problem.where}: {fault}"
        rest = tuple(problem for problem in self.problems if problem.index not in faults)
        return replace(self, problems=rest, faults=faults).check_any()

    def list_bad_rows(self, failures: Mapping[int, str] = MappingProxyType({})) -> tuple[str, ...]:
        """Return the messages in the order of their rows. failures: further ones, by the row's index."""
        return tuple(message for _, message in sorted({**self.faults, **failures}.items()))

    def check_any(self) -> ProblemSet:
        """Return the set itself. Raises InputError that lists the first bad rows when no problem is usable."""
        if not self.problems:
            bad_rows = self.list_bad_rows()
            listed = "".join(f"\n  {message}" for message in bad_rows[:10])
            raise InputError(
                f"{describe(self.name)}: {format_count(len(bad_rows), 'row')}, none of which can be used:{listed}"
            )
        return self


def read_objects(path: str | Path) -> Iterator[tuple[RawRow, dict[str, Any]]]:
    """Yield the rows of a data file (see files/rows.py), each with the JSON object in it.

    Raises InputError naming file and line of a line that holds no object.
    """
    for row in read_rows(path):
        yield row, parse_object(row.text, row.where)


def read_problems(path: str | Path, limit: int | None = None, *, system_prompt: str | None = None) -> list[ProblemRow]:
    """Return the first `limit` problems of a data file, of which every row must be one.

    system_prompt: system message of the problems that have none. Raises InputError naming file and line of a row that
    is no problem, or whose prompt is text where a system prompt is given; and on a file without rows.
    """
    rows: list[ProblemRow] = []
    for _, row in _iter_problems(path, limit, system_prompt):
        if isinstance(row, InputError):
            raise row
        rows.append(row)
    return rows


def read_usable_problems(
    path: str | Path,
    limit: int | None = None,
    *,
    system_prompt: str | None = None,
    shard: str | None = None,
    offset: int = 0,
) -> ProblemSet:
    """Return the usable problems among the first `limit` rows of a data file, and why the other rows are unusable.

    offset: number of rows before these that are left out. shard: part of these rows, as `Shard.parse` reads it. The
    other arguments are those of `read_problems`. Raises InputError on a file that cannot be read, and when no row is
    usable.
    """
    part = Shard.parse(shard)
    rows = {index: row for index, row in _iter_problems(path, limit, system_prompt, offset) if part.has(index)}
    if not rows:
        raise InputError(f"{describe(str(path))} has no row in the shard {shard}")
    return ProblemSet(
        name=str(path),
        problems=tuple(row for row in rows.values() if isinstance(row, ProblemRow)),
        faults={index: str(row) for index, row in rows.items() if isinstance(row, InputError)},
    ).check_any()


def _iter_problems(
    path: str | Path, limit: int | None, system_prompt: str | None, offset: int = 0
) -> Iterator[tuple[int, ProblemRow | InputError]]:
    """Yield the index of every row, and its problem or the error that makes it unusable."""
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}")
    if offset < 0:
        raise InputError(f"offset must be at least 0, not {offset}")
    index = -1
    end = None if limit is None else offset + limit
    for index, row in islice(enumerate(read_rows(path)), offset, end):
        try:
            yield index, _parse_problem(row, index, system_prompt)
        except InputError as error:
            yield index, error
    if index < 0:
        after = f" after the first {offset}" if offset else ""
        raise InputError(f"{describe(str(path))} has no rows{after}")


def _parse_problem(row: RawRow, index: int, system_prompt: str | None) -> ProblemRow:
    fields = parse_object(row.text, row.where)
    prompt = _parse_prompt(fields, row.where)
    if isinstance(prompt, str):
        if system_prompt is not None:
            raise InputError(f"{row.where}: {NO_SYSTEM_PROMPT}")
    else:
        prompt = add_system_prompt(prompt, system_prompt)
    answer = parse_answer(fields, row.where)
    return ProblemRow(prompt=prompt, answer=answer, line=row.number, where=row.where, index=index)


def check_same_problem(row: Mapping[str, Any], problems: Sequence[ProblemRow], data: str | Path, journal: Path) -> None:
    """Check that a journal's line (index, prompt, answer) belongs to these problems; raise InputError if not.

    data, journal: the files' names, for the message.
    """
    index = row.get("index")
    if not isinstance(index, int) or not problems or not problems[0].index <= index <= problems[-1].index:
        raise InputError(
            f"{journal} was begun with more rows than {describe(str(data))} has, a larger limit, another offset or "
            "another shard"
        )
    problem = problems[bisect_left(problems, index, key=lambda problem: problem.index)]
    if (problem.index, problem.prompt, problem.answer) != (index, row.get("prompt"), row.get("answer")):
        raise InputError(
            f"{describe(str(data))} is not the file that {journal} was begun with: row {index} differs; choose another "
            "output_dir"
        )


def describe_problems(problems: Sequence[ProblemRow], data: str, done: int = 0, bad_rows: int = 0) -> str:
    """Return how many problems were read, for the progress.

    done: number of them that an earlier part of the run has finished. bad_rows: number of rows that cannot be used.
    """
    earlier = f", {done} of them finished in an earlier part of the run" if done else ""
    unusable = f"; {format_count(bad_rows, 'row')} cannot be used" if bad_rows else ""
    return f"{format_count(len(problems), 'problem')} read from {describe(data)}{earlier}{unusable}"


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object in one line of a file, without the fields that are null, at any depth: null is absent.

    Raises InputError naming `where`, the file and line.
    """
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: JSON that cannot be read: {error}") from None
    if b"\\ud" in raw.lower() and not _is_unicode(fields):
        raise InputError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no text")
    if not isinstance(fields, dict):
        raise InputError(f"{where}: a row must be a JSON object, not {type(fields).__name__}")
    return {name: _drop_nulls(value) for name, value in fields.items() if value is not None}


def _drop_nulls(value: Any) -> Any:
    """Return a JSON value without the fields that are null; elements of lists that are null stay in their places."""
    if isinstance(value, dict):
        return {name: _drop_nulls(element) for name, element in value.items() if element is not None}
    return [_drop_nulls(element) for element in value] if isinstance(value, list) else value


def _is_unicode(fields: object) -> bool:
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_prompt(fields: Mapping[str, Any], where: str) -> str | Messages:
    if parse_tools(fields, where):
        raise InputError(f"{where}: tools cannot be used in a problem, only in a finished conversation; remove them")
    return parse_prompt(fields, where)


def parse_answer(fields: Mapping[str, Any], where: str) -> str | None:
    """Return the row's reference answer, None where it has none.

    Raises InputError naming `where` when it is neither text nor a number.
    """
    for name in ANSWER_FIELDS:
        value = fields.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        if isinstance(value, str):
            return read_closing_line(value) or value.strip()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return str(int(value)) if value == int(value) else format(Decimal(str(value)), "f")
        raise InputError(f"{where}: {name} must be text or a number, not {value!r}")
    return None
