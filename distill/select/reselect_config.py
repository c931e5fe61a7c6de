"""Options of `genssd reselect`."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.engine.common.options_check import check_types
from genssd.engine.criteria.criterion_names import check_criterion


@dataclass(frozen=True, slots=True, kw_only=True)
class ReselectConfig(EngineOptions):
    """Judge the candidates of a finished `genssd select` again, and export them."""

    run: FileName[str]
    """Output directory of the finished `genssd select`."""
    criterion: str | None = None
    """Name of the criterion that judges the candidates now, and by which pairs and steps are labelled. None: that of
    the run."""
    student: ModelPath[str | None] = None
    """Hub id or local directory of the run's student. None: as the run recorded it."""
    output_dir: Operational[FileName[str]] = "runs/reselect"
    """Directory that the results are written to; one that holds results already is refused."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.criterion is not None:
            check_criterion(self.criterion)
