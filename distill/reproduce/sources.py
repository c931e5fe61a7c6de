"""Where the training rows of an arm come from, as plain data; making.py makes them with the project's own functions.

Nothing here imports torch: the names of arms are options of the command.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from genssd.distill.score.pick_options import PickOptions

ChunkName = Literal["step", "short", "whole"]
"""Rule by which candidates of a search end: with a step of the solution | after a few tokens | with the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Untrained:
    """No training at all: a model of the pair as it is."""

    model: Literal["student", "teacher"] = "student"

    @property
    def command(self) -> str:
        return "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One response of the teacher to each problem, nobody chooses."""

    several: bool = False
    """Whether `candidates` times as many problems are taken, so that the teacher writes as much as in a search."""

    @property
    def command(self) -> str:
        return "generate, on N times the problems" if self.several else "generate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """Responses of a pool, chosen when they are finished. All arms of a seed share the pool of one writer."""

    criterion: str
    pick: PickOptions = PickOptions()
    writer: Literal["teacher", "student"] = "teacher"
    responses: int | None = None
    """Number of responses to each problem; None: `candidates`."""

    @property
    def command(self) -> str:
        count = "N" if self.responses is None else str(self.responses)
        options = [f"--n {count}", *(["--teacher STUDENT"] if self.writer == "student" else [])]
        changed = _list_changes(self.pick, PickOptions(), "pick.")
        return " ".join(["generate", *options, "+ score --criteria", self.criterion, *changed])


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """Trajectories of a search in which a criterion chooses among the teacher's candidates for every chunk."""

    criterion: str = "ppl"
    chunk: ChunkName = "step"
    factor: float = 1.0
    """Number of candidates, as a multiple of `candidates`."""
    share: float | None = None
    """Fraction of the teacher's plain chunks that a threshold lets pass; None: no threshold."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of SelectConfig."""

    @property
    def command(self) -> str:
        count = "N" if self.factor == 1.0 else f"{self.factor:g}*N"
        share = [] if self.share is None else [f"--calibrate.share {self.share:g}"]
        chunk = [] if self.chunk == "step" else [f"--chunk ({self.chunk})"]
        criterion = self.criterion.rpartition(":")[2]
        parts = [f"select --candidates {count} --criterion {criterion}", *chunk, *share, *_list_flags(self.options)]
        return " ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """Rounds of search and training, in which the trained student chooses in the next round."""

    rounds: int = 3

    @property
    def command(self) -> str:
        return f"distill --rounds {self.rounds}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Responses in which the student refuses single tokens of the teacher (reverse speculation)."""

    @property
    def command(self) -> str:
        return "generate --method rsd"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixed:
    """The teacher's responses, cut to the prefix that the student needs, and continued by the student."""

    @property
    def command(self) -> str:
        return "generate + prefix --judge solves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distracted:
    """The teacher's responses, and their counterfactuals without the words that distract the student (LeaF)."""

    @property
    def command(self) -> str:
        return "generate + leaf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The student's own rollouts, with weight only on tokens that a diagnosis has probed."""

    rule: Literal["positive", "nodes"] = "positive"

    @property
    def command(self) -> str:
        return f"diagnose --node-weights {self.rule}"


Source = Untrained | Single | Picked | Searched | Refreshed | Refused | Prefixed | Distracted | Probed


def _list_flags(options: Mapping[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')} {value}" for name, value in options.items()]


def _list_changes(value: PickOptions, default: PickOptions, prefix: str) -> list[str]:
    """Return the options of picking that differ from the defaults, as flags."""
    names = [name for name in PickOptions.__slots__ if getattr(value, name) != getattr(default, name)]
    return [
        f"--{prefix}{name.replace('_', '-')}" + ("" if getattr(value, name) is True else f" {getattr(value, name)}")
        for name in names
    ]
