"""The first rows of a command's data as the doctor reads them: what can be used, what cannot, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from genssd.distill.data.example_files import read_row
from genssd.distill.data.examples import Example
from genssd.distill.data.problems import ProblemRow, parse_object, read_usable_problems
from genssd.distill.doctor.settings import Settings
from genssd.distill.files.rows import read_rows
from genssd.distill.train.models import TeacherReader
from genssd.distill.train.row_needs import check_example
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.texts.text import Tokenizer

RESPONSE_FIELDS = frozenset(("completion_ids", "completion", "response", "output", "chosen", "rejected"))
"""Fields of a row that hold a finished response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The first rows of some data files."""

    problems: tuple[ProblemRow, ...] = ()
    """Problems of a command that writes responses."""
    examples: tuple[Example, ...] = ()
    """Examples of a training; a preference pair has two."""
    faults: tuple[str, ...] = ()
    """A message naming file and line for every row that cannot be used."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of rows that a training leaves out, by reason."""
    count: int = 0
    """Number of rows that were read."""
    is_whole: bool = True
    """Whether these are all rows that the command reads."""

    def describe(self) -> str:
        """Return which rows these are, as the end of a sentence: "of 5 rows", "of the first 1,000 rows"."""
        return f"of {'' if self.is_whole else 'the first '}{format_count(self.count, 'row')}"


def has_responses(name: str) -> bool:
    """Return whether the first row of a data file is a finished response, and not a problem.

    A question with an `answer` or a `solution` is a problem, even where that is a worked one. Raises InputError on a
    file without rows, or that cannot be read.
    """
    row = next(read_rows(name), None)
    if row is None:
        raise InputError(f"{name} has no rows")
    fields = parse_object(row.text, row.where)
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return bool(messages[-1].get("role") == "assistant")
    return not RESPONSE_FIELDS.isdisjoint(fields)


def read_problem_rows(settings: Settings, limit: int) -> Rows:
    """Return the first rows of a file of problems. Raises InputError on an unreadable file, or without a usable row."""
    most = limit + 1 if settings.limit is None else min(limit + 1, settings.limit)
    shard, offset = getattr(settings.config, "shard", None), getattr(settings.config, "offset", 0)
    data = read_usable_problems(
        settings.data[0], most, system_prompt=settings.chat.system_prompt, shard=shard, offset=offset
    )
    count = len(data.problems) + len(data.faults)
    return Rows(
        problems=tuple(problem for problem in data.problems if problem.index - offset < limit),
        faults=tuple(message for index, message in sorted(data.faults.items()) if index - offset < limit),
        count=min(count, limit),
        is_whole=count <= limit,
    )


def read_example_rows(
    files: Sequence[str],
    settings: Settings,
    tokenizer: Tokenizer,
    limit: int,
    *,
    max_length: int,
    teacher: Tokenizer | None,
    reader: TeacherReader | None,
    is_held_out: bool = False,
) -> Rows:
    """Return the first rows of files to train on, as the student of this tokenizer reads them.

    max_length: maximum number of tokens in a prompt with its completion. teacher: as for `read_examples`. reader:
    how the training's teacher reads the rows; None without one. is_held_out: whether the loss is measured on the rows
    only. Raises InputError when a file cannot be read.
    """
    training = settings.training
    assert training is not None
    writer = None if is_held_out or settings.writer == "both" else settings.writer
    examples: list[Example] = []
    faults: list[str] = []
    left_out: Counter[str] = Counter()
    count = 0
    rows = chain.from_iterable(((Path(path).parent, row) for row in read_rows(path)) for path in files)
    first = list(islice(rows, limit + 1))
    for directory, row in first[:limit]:
        count += 1
        try:
            reading = read_row(
                row,
                parse_object(row.text, row.where),
                tokenizer,
                directory,
                max_length=max_length,
                statuses=training.statuses,
                require_correct=settings.needs_correct and not is_held_out,
                require_answers=training.rollout.is_verified and not is_held_out,
                teacher=teacher,
                writer=writer,
            )
            for example in reading.examples:
                check_example(example, training)
                if reader is not None:
                    reader.check_example(example)
        except GenssdError as error:
            faults.append(str(error))
            continue
        if reading.left_out is not None:
            left_out[reading.left_out] += 1
        examples += reading.examples
    if not count:
        raise InputError(f"{', '.join(files)}: no rows")
    return Rows(
        examples=tuple(examples),
        faults=tuple(faults),
        left_out=dict(left_out),
        count=count,
        is_whole=len(first) <= limit,
    )
