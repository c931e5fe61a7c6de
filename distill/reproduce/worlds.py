"""A world of the comparison: two models, and the problems of a seed. small.py and words.py say how they are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from genssd.distill.data.overlap import find_eval_overlap, iter_file_questions
from genssd.distill.reproduce.sources import ChunkName
from genssd.distill.runs.progress import Progress
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Directories of the two models of a world."""

    teacher: Path
    student: Path
    """The cold start that every arm is trained from, and that scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemFiles:
    """Files of problems of one seed, with no question in common."""

    train: Path
    """`candidates` times as many problems as most arms take; they take the first ones."""
    calibration: Path
    """Problems that a threshold is taken from."""
    test: Path

    def check_disjoint(self) -> None:
        """Raise InputError naming the first rows where a question stands in two of the files."""
        for held_out, others in ((self.test, [self.train, self.calibration]), (self.calibration, [self.train])):
            rows, eval_rows = iter_file_questions(others), iter_file_questions([held_out])
            find_eval_overlap(rows, eval_rows).check(is_allowed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(ABC):
    """A kind of problems with its models."""

    models: Path
    """Directory that the models are kept in which the task makes."""
    problems: int
    """Number of problems of most arms."""
    multiple: int
    """How many times as many problems the file of a seed has, as far as there are as many."""
    eval_problems: int
    steps: int | None = None
    """Number of optimizer steps of every training that makes a model; None: those of the task."""
    threads: int | None = None

    chunks: ClassVar[Mapping[ChunkName, Chunk]]
    """Rules by which candidates of a search end, by name."""
    max_tokens: ClassVar[int]
    """Maximum number of tokens in a response."""
    sampling: ClassVar[Sampling] = Sampling()
    """Temperature and filters with which the teacher samples."""
    dtype: ClassVar[str]
    """Data type in which the engine computes, as configs name it."""
    memory_bytes: ClassVar[int | None] = None
    """Size of the caches of every engine in bytes; None: what the machine has left."""

    @abstractmethod
    def make_pair(self, world: str, report: Progress) -> Pair:
        """Return the models of a world, which are made once and then found again."""

    @abstractmethod
    def write_problems(self, seed: int, directory: Path) -> ProblemFiles:
        """Write the problems of a seed into a directory, the same ones at every call."""

    @abstractmethod
    def find_style(self, line: str) -> str | None:
        """Return the style that a line of a response is written in; None where it is no step."""

    def count_styles(self, responses: Sequence[str]) -> Counter[str]:
        """Return how many steps of the responses are written in each style."""
        lines = (line for response in responses for line in response.split("\n"))
        return Counter(style for line in lines if (style := self.find_style(line)))
