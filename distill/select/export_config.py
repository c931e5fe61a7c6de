"""Options of `genssd export`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """Write the trajectories of a finished `genssd select --teacher-topk` as another trainer reads them."""

    run: FileName[str]
    """Output directory of the finished `genssd select`."""
    format: Literal["distillkit"] = "distillkit"
    """What is written. distillkit: a data set of token ids and the teacher's compressed log-probabilities, as
    DistillKit captures them."""
    student: ModelPath[str | None] = None
    """Hub id or local directory of the run's student, for its tokenizer. None: as the run recorded it."""
    statuses: tuple[str, ...] = ("finished",)
    """Rows with another `status` are left out."""
    require_correct: bool = False
    """Whether rows are left out whose response is not known to be correct."""
    output_dir: Operational[FileName[str]] = "runs/export"
    """Directory that the results are written to; one that holds results already is refused."""

    def __post_init__(self) -> None:
        check_types(self)
