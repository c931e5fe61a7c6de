"""A world of the comparison: two models, and the problems of a seed. small.py and words.py say how they are made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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


class Task(Protocol):
    """A kind of problems with its models. SmallTask and WordsTask follow this."""

    @property
    def chunks(self) -> Mapping[ChunkName, Chunk]:
        """Rules by which candidates of a search end, by name."""
        ...

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens in a response."""
        ...

    @property
    def sampling(self) -> Sampling:
        """Temperature and filters with which the teacher samples."""
        ...

    @property
    def dtype(self) -> str:
        """Data type in which the engine computes, as configs name it."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """Size of the caches of every engine in bytes; None: what the machine has left."""
        ...

    def make_pair(self, world: str, report: Progress) -> Pair:
        """Return the models of a world, which are made once and then found again."""
        ...

    def write_problems(self, seed: int, directory: Path) -> ProblemFiles:
        """Write the problems of a seed into a directory, the same ones at every call."""
        ...

    def count_styles(self, responses: Sequence[str]) -> Counter[str]:
        """Return how many steps of the responses are written in each style; empty where styles are not told apart."""
        ...
