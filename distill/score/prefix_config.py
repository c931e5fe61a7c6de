"""Options of `genssd prefix`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.sampling_options import ModelSampling
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.models.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixConfig(PoolOptions, ChatSettings, ModelSampling):
    """Keep as much of every trace as the student needs, and let the student write the rest."""

    NEEDS: ClassVar[Needs] = {"judge_tokens": Need(lambda o: o.judge == "says", "judge says")}

    student: ModelPath[str]
    """Hub id or local directory of the model that judges and continues."""
    data: FileName[tuple[str, ...]]
    """Data files of traces, as for score."""
    output_dir: Operational[FileName[str]] = "runs/prefix"
    """Directory that the journal and the results are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: whole batches that are in the journal are not done again."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    limit: int | None = None
    """Take only the first rows of each file."""
    judge: Literal["says", "solves"] = "says"
    """says: the student is asked whether the prefix is sufficient (the paper). A reply with neither [ENOUGH] nor
    [NOT_ENOUGH] counts as no, so that more of the trace is kept; such replies are counted. solves: the prefix is
    sufficient if the student's greedy continuation gives the reference answer (our own rule, for models that do not
    follow instructions; every trace needs a reference answer)."""
    judge_tokens: int = 256
    """Maximum number of tokens in the student's reply when it is asked."""
    max_tokens: int = 4096
    """Maximum number of tokens in a continuation."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.6, top_p=0.9))
    """How the student continues. The paper adds a repetition penalty of 1.05, which is not implemented."""
    batch: int = 64
    """Number of traces that are processed together; a batch is written to disk when all of it is finished."""
    seed: int = 0
    """Seed of all random draws."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("judge_tokens", "max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, not {self.limit}")
        if not self.data:
            raise InputError("prefix needs at least one data file")
