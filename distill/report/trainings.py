"""Curves of trainings, from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from genssd.distill.report.boxes import round_value
from genssd.distill.report.found import FoundRun
from genssd.distill.runs.journal import sound_rows
from genssd.distill.runs.metrics import METRICS_FILE

CURVES = ("loss", "eval_loss", "cross_entropy", "divergence", "attention", "learning_rate", "grad_norm")
"""Metrics that the page draws, over optimizer steps."""
MAX_POINTS = 1000
"""Maximum number of points of a curve; of a longer one every k-th point is taken, and the last one."""


def read_training(found: FoundRun, faults: list[str]) -> dict[str, Any]:
    """Return the curves of a training by metric, each a list of [step, value]. faults: takes what cannot be read."""
    rows = [row for row, _ in sound_rows(found.path / METRICS_FILE, faults)]
    return {
        "name": found.name,
        "model": found.config.get("model_name_or_path"),
        "is_finished": found.is_finished,
        "curves": {name: points for name in CURVES if (points := _thin(_read_curve(rows, name)))},
    }


def _read_curve(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[float | None]]:
    return [
        [row["step"], round_value(row[name])]
        for row in rows
        if _is_number(row.get("step")) and _is_number(row.get(name))
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _thin(points: list[list[float | None]]) -> list[list[float | None]]:
    step = -(-len(points) // MAX_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]
