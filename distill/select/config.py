"""Options of `genssd select`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from genssd.distill.data.parts import Shard
from genssd.distill.runs.chat_settings import PairChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.distill.runs.monitor_options import MonitorOptions
from genssd.distill.runs.sampling_options import ModelSampling
from genssd.distill.runs.teacher_options import SERVED_NEEDS, TeacherOptions, list_teachers
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.criteria.criterion_names import check_criterion
from genssd.engine.search.budget import Budget
from genssd.engine.search.search_options import SearchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrate:
    """A threshold chosen so that a given fraction of the teacher's plain chunks passes it."""

    NEEDS: ClassVar[Needs] = {name: Need(lambda o: o.data is not None, "calibrate.data") for name in ("share", "limit")}

    data: FileName[str | None] = None
    """Data file of problems for the calibration, other ones than those of the run. None: no calibration."""
    share: float = 0.95
    """Fraction of the teacher's chunks that the threshold lets pass, in (0, 1]."""
    limit: int = 64
    """Maximum number of problems that are read from calibrate.data."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 < self.share <= 1.0:
            raise InputError(f"calibrate.share must lie in (0, 1], not {self.share}")
        if self.limit < 1:
            raise InputError(f"calibrate.limit must be at least 1, not {self.limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectSettings(SearchOptions, TeacherOptions, ModelSampling):
    """Options of the search, of the engine, and of the threshold's calibration."""

    NEEDS: ClassVar[Needs] = {
        "on_unlearnable": Need(
            lambda o: (
                o.threshold is not None
                or o.calibrate.data is not None
                or (o.loop_guard and o.on_unlearnable != "accept_best")
            ),
            "a threshold, calibrate.data or, except for accept_best, loop_guard",
        ),
        "include_stop": Need(lambda o: bool(o.stop), "stop"),
    }

    criterion: str = "ppl"
    """Selection criterion: a registered name (rsr), one with options (ppl(norm='byte')), a weighted sum of ranks
    (0.7*rsr + 0.3*lalp), or an import path (package.module:Name) of an installed module or one in the working
    directory."""
    loop_guard: bool = True
    """Whether candidates that end in a repetition are rejected."""
    # which prompts are finished depends on it, and not how they end
    total_budget: Operational[Budget] = Budget()
    """Limits of the whole run (of each round, in distill). Tokens count those of finished prompts in earlier parts of
    the run, seconds begin with the search of this part. When a limit is reached the run ends with the prompts that are
    finished; --resume with larger limits goes on."""
    calibrate: Calibrate = field(default_factory=Calibrate)
    """Options for computing the threshold from plain samples of the teacher, in place of `threshold`."""

    def __post_init__(self) -> None:
        self.check_values()
        check_criterion(self.criterion)
        if self.calibrate.data is not None and self.threshold is not None:
            raise InputError("give a threshold or calibrate.data, not both")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectConfig(SelectSettings, PairChatSettings, MonitorOptions):
    """Let the student choose what the teacher writes, prompt by prompt."""

    NEEDS: ClassVar[Needs] = {
        **SERVED_NEEDS,
        "drop_teacher_after": Need(lambda o: len(list_teachers(o.teacher)) > 1, "several teachers"),
    }

    teacher: ModelPath[str | tuple[str, ...]]
    """Hub id or local directory of the model that writes, or the URL of a server that runs it, such as
    http://host:8000/v1 of vLLM or SGLang (docs/served.md). Several compete: each writes candidates for every step (or,
    with on_unlearnable=ask_teacher, the next one where none of the last is acceptable)."""
    student: ModelPath[str]
    """Hub id or local directory of the model that scores."""
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[FileName[str]]
    """Data file of problems (JSON lines, CSV, Parquet or Arrow, also compressed), - for standard input, or
    ORG/NAME:SPLIT of the Hugging Face hub. Its rows have prompt (text or messages), messages, or question | problem |
    instruction."""
    output_dir: Operational[FileName[str]] = "runs/select"
    """Directory that the journal is written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: prompts that are in the journal are not run again."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    limit: Operational[int | None] = None
    """Take only so many rows of the data, the first ones after offset."""
    offset: Operational[int] = 0
    """Number of rows at the beginning of the data that are left out. Rows are those of a run over all, unless prompts
    are equal."""
    shard: Operational[str | None] = None
    """Part of the rows for one of several machines: 2/8 takes every eighth row, the second of them first. Rows are
    those of a run over all, unless prompts are equal."""
    peek: Operational[bool] = False
    """Print the search of the first prompt round by round: the text of all candidates, and which of them is kept."""

    def __post_init__(self) -> None:
        SelectSettings.__post_init__(self)
        self.check_monitoring()
        Shard.parse(self.shard)
        if len(names := list_teachers(self.teacher)) == 1:
            object.__setattr__(self, "teacher", names[0])  # one in a list is one
        self.check_teacher_states(self.teacher)
