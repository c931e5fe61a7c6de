"""Options of `genssd doctor` and `genssd env`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorConfig:
    """Examine the inputs of a command before anything is loaded. Put `doctor` before the command, as in `genssd doctor
    select --teacher ...`, or name models and data, a config file, or the directory of a run. Options of the doctor
    stand before the command. The exit code is 0, 1 with warnings, and 2 with errors."""

    NEEDS: ClassVar[Needs] = {"verify_seconds": Need(lambda o: o.verify, "verify")}

    teacher: ModelPath[str | None] = None
    """Teacher to examine: hub id or local directory. Of a hub id only the small files are fetched."""
    student: ModelPath[str | None] = None
    """Student to examine: hub id or local directory."""
    data: FileName[tuple[str, ...]] = ()
    """Data files to examine: problems, or rows to train on."""
    config: FileName[str | None] = None
    """YAML file of a command to examine."""
    run: FileName[str | None] = None
    """Output directory of a run of a command to examine."""
    command: Literal["select", "train", "distill", "generate", "evaluate"] | None = None
    """Command that the config file is for. None: the first of these whose options it has."""
    rows: int = 1000
    """Number of rows of the data that are read."""
    verify: bool = False
    """Also load the models, and compare the engine with transformers on them."""
    verify_seconds: float = 30.0
    """Time in seconds after which --verify begins no further prompt. Loading the models comes on top."""
    json: bool = False
    """Print the findings as JSON."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.rows < 1:
            raise InputError(f"rows must be at least 1, not {self.rows}")
        if self.verify_seconds <= 0:
            raise InputError(f"verify_seconds must be above 0, not {self.verify_seconds}")
        if self.command is not None and self.config is None:
            raise InputError("command names what a config file is for: give --config, or put the command after doctor")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvConfig:
    """Print versions, machine and kernels as plain text, to be pasted into a bug report."""
