"""Options of `genssd tune`."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.distill.runs.field_kinds import FileName, ModelPath
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Measure the fastest kernel configurations on this GPU for the shapes of models, and keep them in a file."""

    model_name_or_path: ModelPath[str | None] = None
    """Model to tune for: hub id or local directory, of which only config.json is read."""
    teacher: ModelPath[str | None] = None
    """Teacher to tune for: hub id or local directory."""
    student: ModelPath[str | None] = None
    """Student to tune for: hub id or local directory."""
    dtype: str = "auto"
    """Data type of weights and cache, as in the commands that will use the result. auto: the checkpoint's type."""
    device: str | None = None
    """CUDA device to tune on. None: the first one."""
    tune_file: FileName[str | None] = None
    """File to add the results to. None: the file that the environment variable GENSSD_TUNE_FILE names, else
    genssd/tune.json in the user's cache directory. The other commands find another file through that variable alone."""
    seconds: float = 110.0
    """Time in seconds after which no further candidate is begun; the fastest ones until then are kept."""

    def __post_init__(self) -> None:
        check_types(self)
