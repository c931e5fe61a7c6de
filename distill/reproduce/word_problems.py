r"""Word problems with human solutions (GSM8K), and their deterministic rewriting in two styles; test problems of MAWPS.

A line of a solution of GSM8K marks its calculation: `Natalia sold 48/2 = <<48/2=24>>24 clips in May.` It is written

    in words  Natalia sold 48/2 = 24 clips in May.
    terse     48/2=24

The style of every line is drawn by a hash of the question and the line, so that a solution mixes both. The last line
is `\boxed{ANSWER}`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from genssd.distill.data.overlap import normalise_question
from genssd.distill.files.rows import read_rows
from genssd.engine.common.errors import InputError

Part: TypeAlias = Literal["teacher", "cold start", "run"]

MOST_STEPS: Final = 3
"""Maximum number of steps in a short problem's solution."""
MOST_WORDS: Final = 60
"""Maximum number of words in a short problem's question."""
PARTS: Final[Sequence[Part]] = ("teacher",) * 4 + ("cold start",) * 2 + ("run",) * 10
"""Parts of the training problems in proportion to their sizes."""

_MARK: Final = re.compile(r"<<([^<>=]+)=([^<>]+)>>")
_TERSE: Final = re.compile(r"[-+*/().,%\d ]+=-?[\d.,]+")
_INTEGER: Final = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class WordProblem:
    """A word problem, with the lines of its solution where one is known."""

    question: str
    answer: str
    """Reference answer, a whole number in digits."""
    lines: tuple[str, ...] = ()
    """Lines of the human solution, each with one marked calculation."""

    @property
    def part(self) -> Part:
        """Which part of the training problems the question belongs to: the same for questions that are nearly equal."""
        return PARTS[_hash(normalise_question(self.question)) % len(PARTS)]

    def write_solution(self) -> str:
        """Return the solution with the style of every line drawn by its hash."""
        lines = [
            write_terse(line) if _hash(f"{self.question}\n{number}") % 2 else write_in_words(line)
            for number, line in enumerate(self.lines)
        ]
        return "\n".join([*lines, rf"\boxed{{{self.answer}}}"])


def write_in_words(line: str) -> str:
    """Return a line of a solution as its author wrote it, without the marks."""
    return _MARK.sub("", line).strip()


def write_terse(line: str) -> str:
    """Return the calculation of a line of a solution alone."""
    return ", ".join(f"{expression.strip()}={result.strip()}" for expression, result in _MARK.findall(line))


def detect_writing(line: str) -> str | None:
    """Return the style that a line of a solution is written in; None for the answer and for an empty line."""
    if not line.strip() or line.startswith("\\boxed"):
        return None
    return "terse" if _TERSE.fullmatch(line.strip()) else "in words"


def read_gsm8k(path: Path) -> list[WordProblem]:
    """Return the short problems of a file of GSM8K. Raises InputError on a file that holds none."""
    return _keep_distinct((_parse_gsm8k(row) for row in _read(path)), path)


def read_mawps(directory: Path) -> list[WordProblem]:
    """Return the problems of all files of MAWPS in a directory, each once. Raises InputError where there is none."""
    rows = (row for path in sorted(directory.glob("*.jsonl")) for row in _read(path))
    return _keep_distinct((_parse_mawps(row) for row in rows), directory)


def _parse_gsm8k(row: Mapping[str, Any]) -> WordProblem | None:
    question, solution = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(solution, str):
        return None
    *lines, last = solution.strip().split("\n")
    answer = last.removeprefix("####").strip().replace(",", "")
    is_marked = all(len(_MARK.findall(line)) == 1 for line in lines)
    is_short = 1 <= len(lines) <= MOST_STEPS and len(question.split()) <= MOST_WORDS
    if not (is_marked and is_short and last.startswith("####") and _INTEGER.fullmatch(answer)):
        return None
    return WordProblem(question=question.strip(), answer=answer, lines=tuple(lines))


def _parse_mawps(row: Mapping[str, Any]) -> WordProblem | None:
    question, target = row.get("input"), row.get("target")
    if not isinstance(question, str) or not isinstance(target, int | float) or target != int(target):
        return None
    return WordProblem(question=question.strip(), answer=str(int(target)))


def _read(path: Path) -> Iterable[Mapping[str, Any]]:
    for row in read_rows(str(path)):
        value = json.loads(row.text)
        if isinstance(value, dict):
            yield value


def _keep_distinct(problems: Iterable[WordProblem | None], source: Path) -> list[WordProblem]:
    """Return the problems, of those with nearly equal questions the first."""
    distinct: dict[str, WordProblem] = {}
    for problem in problems:
        if problem is not None:
            distinct.setdefault(normalise_question(problem.question), problem)
    if not distinct:
        raise InputError(f"{source} holds no problem that the task words can use; give --data DIR with GSM8K and MAWPS")
    return list(distinct.values())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
