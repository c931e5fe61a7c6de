"""An arm of the comparison: what is done to one student. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final

from genssd.distill.reproduce.sources import Refreshed, Source, Untrained

SHIPPED: Final = "shipped"
"""World of the pair as the task has it."""
STAGES: Final[Sequence[frozenset[str]]] = (
    frozenset(("cold-start", "standard", "gen-ssd", "gen-ssd-random", "random-of-n", "grape", "standard-4x")),
    frozenset(("longest", "gen-ssd-longest", "gen-ssd-teacher")),
)
"""Names of the arms that run with all seeds before the next ones begin: without them no other one can be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to make training data and to train on it."""

    name: str
    source: Source
    train: Mapping[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig that differ from those of the other arms."""
    controls: tuple[str, ...] = ("standard",)
    """Arms that this one is compared with, the main one first."""
    world: str = SHIPPED
    """Teacher, student and task that the arm runs with."""
    paper: str = ""
    """Paper whose method this is, or what it is a control for."""
    tokens: float = 1.0
    """Number of training tokens, as a multiple of those of the other arms: 1 unless that makes no sense."""
    cost: float = 1.0
    """Time that the arm takes, as a multiple of that of the arm `standard`, measured; for the estimate alone."""

    @property
    def stage(self) -> int:
        """Stage of the run that the arm belongs to; arms of one stage run with all seeds before the next begins."""
        return next((number for number, names in enumerate(STAGES) if self.name in names), len(STAGES))

    @property
    def command(self) -> str:
        """Commands of genssd that do the same, in short."""
        flags = " ".join(_name_flag(name, value) for name, value in self.train.items())
        return f"{self.source.command} + train {flags}".strip() if self.is_trained else self.source.command

    @property
    def is_trained(self) -> bool:
        """Whether a student is trained on the rows; otherwise a model is evaluated as it is, or trained in rounds."""
        return not isinstance(self.source, Untrained | Refreshed)


def _name_flag(name: str, value: Any) -> str:
    """Return a field of TrainConfig as a flag; of nested options those that differ from the defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        changed = [(f.name, getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default]
        return " ".join(_name_flag(f"{name}.{inner}", part) for inner, part in changed)
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"
