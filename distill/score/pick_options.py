"""Options of the choice of scored responses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.score.feature_rows import FeatureRow
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class PickOptions:
    """Options of the choice of responses."""

    NEEDS: ClassVar[Needs] = {"similarity": Need(lambda o: o.keep > 1, "a pick.keep of at least 2")}

    by: str | None = None
    """Name of the criterion that picks, one of the criteria; None: the first of them."""
    keep: int = 1
    """Maximum number of responses that are picked per prompt."""
    correct: bool = False
    """Whether only responses that are known to be correct may be picked."""
    finished: bool = True
    """Whether only responses that end by themselves may be picked."""
    loops: bool = False
    """Whether responses that end in a repetition may be picked, too."""
    min_steps: int = 0
    """Minimum number of steps in a picked response."""
    max_steps: int | None = None
    """Maximum number of steps in a picked response; None: no maximum."""
    threshold: float | None = None
    """Worst value that a picked response may have under the criterion; None: any value."""
    best_share: float = 1.0
    """Fraction of the picked responses, the best over all prompts, that are kept (MoRSD keeps about 0.3 by
    rationale_difficulty)."""
    similarity: float = 1.0
    """Maximum similarity of two picked responses to one prompt; of two that are more similar the better is picked. It
    is the Jaccard index of their word triples, in [0, 1]."""
    mix: tuple[str, ...] = ()
    """Kinds of responses and the proportion in which they are picked, one response per prompt: long=1 short=4 (Mix
    Distillation, 2502.12143), or teachers by name, big=1 small=4, each with its best response."""
    weigh: bool = False
    """Whether the picked rows get LARK's training weights (mean 1 per prompt); the picking criterion must be lark."""

    def __post_init__(self) -> None:
        check_types(self, infinite=("threshold",))
        if self.keep < 1:
            raise InputError(f"pick.keep must be at least 1, not {self.keep}")
        if self.min_steps < 0 or (self.max_steps is not None and self.max_steps < max(1, self.min_steps)):
            raise InputError(f"pick.min_steps and max_steps are no range: {self.min_steps} to {self.max_steps}")
        if self.threshold is not None and math.isnan(self.threshold):
            raise InputError("pick.threshold must be a number, not NaN")
        if not 0.0 < self.best_share <= 1.0:
            raise InputError(f"pick.best_share must lie in (0, 1], not {self.best_share}")
        if not 0.0 <= self.similarity <= 1.0:
            raise InputError(f"pick.similarity must lie in [0, 1], not {self.similarity}")
        self.parse_mix()
        if self.mix and (self.keep > 1 or self.similarity < 1.0 or self.best_share < 1.0):
            raise InputError("pick.mix takes one response per prompt: it has no keep, similarity or best_share")
        if self.weigh and (self.mix or self.similarity < 1.0 or self.best_share < 1.0 or self.threshold is not None):
            raise InputError("pick.weigh weighs the best of a pool: it has no mix, similarity, best_share or threshold")

    def is_eligible(self, row: FeatureRow) -> bool:
        """Return whether a response may be picked, apart from its value."""
        return (
            (row["finished"] or not self.finished)
            and (row["correct"] is True or not self.correct)
            and (not row["loop"] or self.loops)
            and row["steps"] >= self.min_steps
            and (self.max_steps is None or row["steps"] <= self.max_steps)
        )

    def parse_mix(self) -> dict[str, float]:
        """Return the fraction of every kind of the mix; they sum to 1. Empty without a mix.

        Raises InputError on a term of the mix that is not a new kind with a positive number.
        """
        parts: dict[str, float] = {}
        for term in self.mix:
            kind, _, number = term.rpartition("=")
            try:
                part = float(number)
            except ValueError:
                part = math.nan
            if not kind or not 0.0 < part < math.inf or kind in parts:
                raise InputError(f"pick.mix: {term!r} is not one kind with its part, like long=1 or a teacher's name=4")
            parts[kind] = part
        return {kind: part / sum(parts.values()) for kind, part in parts.items()}
