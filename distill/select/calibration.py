"""A threshold from data: what share of the teacher's plain chunks the student would let pass."""

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
    """Values of chunks that nobody chose. threshold: `share` of them are no worse."""

    criterion: str
    share: float
    threshold: float
    prompts: int
    chunks: int
    shares: dict[str, float | None]
    """The thresholds of other shares; None where infinite."""


def check_calibration(criterion: str | AnyCriterion, share: float) -> None:
    """Raise InputError when no threshold can be had."""
    if not 0.0 < share <= 1.0:
        raise InputError(f"calibrate.share must lie in (0, 1], not {share}")
    if isinstance(resolve(criterion), PoolCriterion):
        raise InputError(
            f"{criterion} judges candidates against each other: its values have no threshold that holds for all prompts"
        )


def calibrate(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: SearchOptions,
    *,
    share: float,
    labels: Sequence[str],
    answers: Sequence[str | None],
) -> Calibration:
    """One plain response of the teacher per prompt, chunk by chunk; the values of all chunks give the threshold.

    Take prompts that are not selected from later: on those the threshold would fit too well.
    """
    criterion = options.criterion
    check_calibration(criterion, share)
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
    threshold = share_passes(values, share)
    if not math.isfinite(threshold):
        raise InputError(f"calibration: {criterion} is infinite at the share {share}; lower calibrate.share")
    others = {f"{of:g}": share_passes(values, of) for of in (0.5, 0.75, 0.9, 0.95, 0.99)}
    return Calibration(
        criterion=str(criterion),
        share=share,
        threshold=threshold,
        prompts=sum(selection.error is None for selection in selections),
        chunks=len(values),
        shares={of: value if math.isfinite(value) else None for of, value in others.items()},
    )


def share_passes(values: Sequence[float], share: float) -> float:
    """The value that at least this share of them, sorted best first, is no worse than."""
    return values[min(len(values), max(1, math.ceil(share * len(values) - 1e-9))) - 1]
