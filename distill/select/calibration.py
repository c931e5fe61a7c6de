"""A threshold from data: the criterion value that a given fraction of the teacher's plain chunks reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from genssd.engine.candidate import AnyCriterion, PoolCriterion
from genssd.engine.criterion_names import resolve
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.search_options import SearchOptions
from genssd.engine.text import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A threshold, and the sampled chunks that it comes from."""

    criterion: str
    fraction: float
    """Fraction of the chunks whose value is no worse than the threshold."""
    threshold: float
    prompts: int
    chunks: int
    thresholds: dict[str, float | None]
    """Threshold for each of some other fractions; None where it is infinite."""

    def as_json(self) -> dict[str, object]:
        """Return the content of calibration.json."""
        return {
            "criterion": self.criterion,
            "share": self.fraction,
            "threshold": self.threshold,
            "prompts": self.prompts,
            "chunks": self.chunks,
            "shares": self.thresholds,
        }


def check_calibration(criterion: str | AnyCriterion, fraction: float) -> None:
    """Raise InputError when no threshold can be computed."""
    if not 0.0 < fraction <= 1.0:
        raise InputError(f"calibrate.share must lie in (0, 1], not {fraction}")
    if isinstance(resolve(criterion), PoolCriterion):
        raise InputError(
            f"{criterion} judges candidates against each other: its values have no threshold that holds for all prompts"
        )


def calibrate(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: SearchOptions,
    *,
    fraction: float,
    labels: Sequence[str],
    answers: Sequence[str | None],
) -> Calibration:
    """Sample one plain response per prompt and return the threshold that `fraction` of its chunks reach.

    The prompts should be others than those of the run, to which the threshold would be fitted too well.
    """
    criterion = options.criterion
    check_calibration(criterion, fraction)
    selections = engine.select_expand(
        prompts,
        options,
        candidates=1,
        beam=1,
        threshold=None,
        teacher_topk=0,
        loop_guard=False,
        answers=answers,
        labels=labels,
    )
    values = [record.score for selection in selections for record in selection.tree]
    if not values:
        raise InputError("calibration: no prompt fits into the key-value cache; raise memory_bytes")
    values.sort(reverse=resolve(criterion).higher_is_better())
    threshold = worst_of_best(values, fraction)
    if not math.isfinite(threshold):
        raise InputError(f"calibration: {criterion} is infinite at the share {fraction}; lower calibrate.share")
    others = {f"{other:g}": worst_of_best(values, other) for other in (0.5, 0.75, 0.9, 0.95, 0.99)}
    return Calibration(
        criterion=str(criterion),
        fraction=fraction,
        threshold=threshold,
        prompts=sum(selection.error is None for selection in selections),
        chunks=len(values),
        thresholds={other: value if math.isfinite(value) else None for other, value in others.items()},
    )


def worst_of_best(values: Sequence[float], fraction: float) -> float:
    """Return the worst value among the best `fraction` of the values, which are sorted best first."""
    return values[min(len(values), max(1, math.ceil(fraction * len(values) - 1e-9))) - 1]
