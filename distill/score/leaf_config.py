"""Options of `genssd leaf`."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.distill.runs.pool_options import ProcessOptions
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.common.thread_count import check_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafConfig(ProcessOptions, ChatSettings):
    """Find the words of the questions that distract the student, and write rows without them."""

    student: ModelPath[str]
    """Hub id or local directory of the student."""
    teacher: ModelPath[str]
    """Hub id or local directory of a teacher with the student's tokenizer. It reads the prompts as the student does."""
    data: FileName[tuple[str, ...]]
    """Data files of traces, as for score."""
    output_dir: Operational[FileName[str]] = "runs/leaf"
    """Directory that the journal and the results are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: traces that are in the journal are not computed again."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    limit: int | None = None
    """Take only the first rows of each file."""
    share: float = 0.05
    """Fraction of a question's tokens that is removed, rounded up to whole words; the paper, which cuts inside words:
    0.05 for mathematics, 0.1 for code."""
    max_length: int = 4096
    """Maximum number of tokens in prompt and response; longer traces are left out, and named."""
    device: Operational[str | None] = None
    """Device of both models. None: CUDA where there is one, else the CPU."""
    threads: Operational[int | None] = None
    """Number of CPU threads, of all processes together. None: OMP_NUM_THREADS where it is set, else at most the cores
    that are given; fewer for a small teacher. A resumed run takes the number in each process that it was begun with."""

    def __post_init__(self) -> None:
        check_types(self)
        check_threads(self.threads)
        if not self.data:
            raise InputError("leaf needs at least one data file")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, not {self.limit}")
        if not 0.0 < self.share <= 0.5:
            raise InputError(f"share must lie in (0, 0.5], not {self.share}")
