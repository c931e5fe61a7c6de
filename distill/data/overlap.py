"""Questions of the training data that stand in the evaluation data: exactly, or up to their spelling."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from genssd.distill.data.examples import Example
from genssd.distill.data.messages import find_question
from genssd.distill.data.problems import ProblemRow, read_objects
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

MAX_LISTED = 5
"""Maximum number of rows that a message lists."""
OPERATORS = frozenset("+-*/%=<>^")
"""Characters that tell questions of arithmetic apart, which normalisation keeps."""
KEPT = {".": "\ue000", "!": "\ue001"}
"""Private characters for the point within a number and the mark of a factorial, which normalisation keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionRow:
    """The question of a row of a data file."""

    texts: tuple[str, ...]
    """The question, and further texts that are equal where the questions are: the rendered prompt."""
    where: str
    """File and line of the row, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOverlap:
    """Rows of the training data whose question stands in the evaluation data."""

    rows: int
    """Number of rows of the training data."""
    exact: tuple[tuple[str, str], ...]
    """Location of every row whose question stands there exactly, and of the first row of the evaluation data there."""
    near: tuple[tuple[str, str], ...]
    """Location of every further row whose normalised question stands there, likewise."""

    def counts(self) -> dict[str, int]:
        """Return the numbers of rows for a summary."""
        return {"rows": self.rows, "exact": len(self.exact), "near": len(self.near)}

    def check(self, *, is_allowed: bool) -> None:
        """Raise InputError naming the first rows, unless there are none or an overlap is allowed."""
        pairs = [*self.exact, *self.near]
        if not pairs or is_allowed:
            return
        listed = "".join(f"\n  {where} = {other}" for where, other in pairs[:MAX_LISTED])
        more = f"\n  and {len(pairs) - MAX_LISTED} more" if len(pairs) > MAX_LISTED else ""
        raise InputError(
            f"the questions of {len(pairs)} of {format_count(self.rows, 'row')} of the training data stand in the "
            "evaluation data, "
            f"{len(self.exact)} exactly and {len(self.near)} with other case, spaces or punctuation; remove them, or "
            f"pass --allow-eval-overlap:{listed}{more}"
        )


def find_eval_overlap(rows: Iterable[QuestionRow], eval_rows: Iterable[QuestionRow]) -> EvalOverlap:
    """Return the rows whose question stands in the evaluation data."""
    exact_index: dict[str, str] = {}
    near_index: dict[str, str] = {}
    for row in eval_rows:
        for text in row.texts:
            exact_index.setdefault(text, row.where)
            near_index.setdefault(normalise_question(text), row.where)
    count = 0
    exact, near = [], []
    for row in rows:
        count += 1
        texts = [text for text in row.texts if text]
        keys = [key for text in texts if (key := normalise_question(text))]
        if (other := next((exact_index[text] for text in texts if text in exact_index), None)) is not None:
            exact.append((row.where, other))
        elif (other := next((near_index[key] for key in keys if key in near_index), None)) is not None:
            near.append((row.where, other))
    return EvalOverlap(rows=count, exact=tuple(exact), near=tuple(near))


def normalise_question(text: str) -> str:
    """Return a question without its case, its spacing, its punctuation and the variants of its characters (NFKC).

    Signs of arithmetic stay, as do points within numbers and the mark of a factorial: they tell questions apart.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = re.sub(r"(?<=\d),(?=\d{3}\b)", "", folded)  # between thousands
    folded = re.sub(r"(?<=\d)\.(?=\d)|(?<=[\d)])!", lambda match: KEPT[match[0]], folded)
    kept = []
    for character in folded:
        category = unicodedata.category(character)
        if category == "Pd" or character == "\u2212":
            kept.append("-")
        elif character in OPERATORS or not (category.startswith("P") or character in "$`"):
            kept.append(character)
        else:
            kept.append(" ")
    return re.sub(r" *([-+*/%=<>^]) *", r"\1", " ".join("".join(kept).split()))


def list_problems(problems: Sequence[ProblemRow]) -> Iterator[QuestionRow]:
    """Yield the questions of problems of a file."""
    for problem in problems:
        prompt = problem.prompt
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        yield QuestionRow(texts=(text,), where=problem.where)


def list_examples(examples: Sequence[Example], tokenizer: Tokenizer) -> Iterator[QuestionRow]:
    """Yield the questions of training examples; a preference pair counts once."""
    for example in examples:
        if not example.rejected:
            rendered = str(tokenizer.hf.decode(list(example.input_ids[: example.num_prompt])))
            where = example.where.removesuffix(", chosen")
            yield QuestionRow(texts=(example.question, rendered), where=where)


def iter_file_questions(paths: Sequence[str | Path]) -> Iterator[QuestionRow]:
    """Yield the questions of files of training rows, without those that have none."""
    for path in paths:
        for row, fields in read_objects(path):
            if question := find_question(fields, row.where):
                yield QuestionRow(texts=(question,), where=row.where)
