"""The config of `genssd report`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.field_kinds import FileName, ModelPath
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.criteria.criterion_names import check_criterion

CRITERIA = ("ppl", "rsr", "rsd_accept", "divergence", "teacher_logprob", "length")
"""Criteria that need neither a model nor the text, so that a page of many prompts is made in minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig(EngineOptions):
    """Make one HTML page of runs: search trees, text coloured by surprisal, scores, training curves, accuracy."""

    NEEDS: ClassVar[Needs] = {
        name: Need(lambda o: o.student is not None, "student")
        for name in (
            "device", "dtype", "memory_utilization", "memory_bytes", "max_num_seqs", "deterministic", "threads",
            "backend",
        )
    }  # fmt: skip

    run: FileName[Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")]]
    """Output directories of runs of select, generate, train or evaluate, finished or not, or directories that hold
    such runs, as distill and demo leave them. Searches over the same prompts can be shown side by side."""
    output: FileName[str] = "report.html"
    """File that the page is written to; an earlier page of genssd in its place is replaced."""
    criteria: tuple[str, ...] = CRITERIA
    """Criteria that the page can switch to, in addition to each run's own: where they would have chosen otherwise."""
    prompts: int = 1000
    """Maximum number of prompts of each run that are shown with their trees and texts, the first ones of its journal;
    all prompts count for the figures."""
    student: ModelPath[str | None] = None
    """Hub id or local directory of the runs' student, which is then loaded to compute what they do not store: the
    values of criteria that run the model (lalp), and the student's surprisal in responses of generate. None: no model
    is loaded, and the page says what is missing."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.run:
            raise InputError("report needs at least one run: the output directory of a command")
        if self.prompts < 1:
            raise InputError(f"prompts must be at least 1, not {self.prompts}")
        if len(set(self.criteria)) < len(self.criteria):
            raise InputError(f"a criterion is listed twice: {', '.join(self.criteria)}")
        for name in self.criteria:
            check_criterion(name)
