"""Options of `genssd evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from genssd.distill.data.parts import Shard
from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.sampling_options import ModelSampling, StopOptions
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.models.sampling import Sampling
from genssd.engine.texts.stops import StopStrings


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig(PoolOptions, ChatSettings, ModelSampling, StopOptions):
    """Measure a model's accuracy."""

    NEEDS: ClassVar[Needs] = {
        **{
            name: Need(lambda o: o.samples > 0, "a number of samples above 0")
            for name in ("sampling", "generation_config", "seed")
        },
        "include_stop": Need(lambda o: bool(o.stop), "stop"),
    }

    model: ModelPath[str]
    """Hub id or local directory of the model."""
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[FileName[str]]
    """Data file of problems, as for select, with an answer | solution | target field."""
    output_dir: Operational[FileName[str]] = "runs/evaluate"
    """Directory that the results are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: problems that are in the journal are not run again."""
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
    samples: int = 0
    """Number of samples per problem for avg@k, in addition to the greedy response; 0: greedy only."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the samples are drawn."""
    max_tokens: int = 4096
    """Maximum number of tokens in a response."""
    seed: int = 0
    """Seed of the samples."""

    def __post_init__(self) -> None:
        check_types(self)
        Shard.parse(self.shard)
        StopStrings(texts=self.stop)
        if self.samples < 0:
            raise InputError(f"samples must be >= 0, not {self.samples}")
