"""Options of `genssd score`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from genssd.distill.runs.chat_settings import PairChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational, Recomputed
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.score.pick_options import PickOptions
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.criteria.criterion_names import check_criterion


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig(PoolOptions, PairChatSettings):
    """Compute criteria of finished traces with a student; pick the best responses and rank the teachers by them."""

    NEEDS: ClassVar[Needs] = {"teacher_template_kwargs": Need(lambda o: o.teacher is not None, "a teacher")}

    student: ModelPath[str]
    """Hub id or local directory of the model that scores."""
    teacher: ModelPath[str | None] = None
    """Hub id or local directory of the model whose log-probabilities the criteria divergence and teacher_logprob read,
    with the student's tokenizer. None: those in the field `teacher_logprobs` of rows of select and generate. Where all
    rows have them, or with a teacher, teacher_logprob is computed as a control."""
    data: FileName[tuple[str, ...]]
    """Data files of traces (JSON lines, CSV, Parquet or Arrow, also compressed), - for standard input, or
    ORG/NAME:SPLIT of the Hugging Face hub: selections, generations, messages, or prompt and completion."""
    criteria: tuple[str, ...] = ("ppl",)
    """Criteria to compute: names, names with options, weighted sums or import paths, for instance ppl rsr
    "ppl(norm='byte')" lalp lark package.module:Name "0.5*rsr+0.5*lalp". length and random are computed beside them."""
    output_dir: Operational[FileName[str]] = "runs/score"
    """Directory that the journal and the results are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: traces that are in the journal are not scored again."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    limit: int | None = None
    """Take only the first rows of each file."""
    verify: bool = True
    """Judge answers where a reference answer is known and the row has no verdict."""
    pick: Recomputed[PickOptions] = field(default_factory=PickOptions)
    """Which responses go to selected.jsonl."""
    equal_length: Recomputed[float] = 0.1
    """Maximum difference of two responses' numbers of tokens, as a fraction of the longer one's, at which the controls
    take them to be of equal length."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.data or not self.criteria:
            raise InputError("score needs at least one data file and one criterion")
        if len(set(self.criteria)) < len(self.criteria):
            raise InputError(f"a criterion is listed twice: {', '.join(self.criteria)}")
        for name in self.criteria:
            check_criterion(name)
        if self.pick.by is not None and self.pick.by not in self.criteria:
            raise InputError(f"pick.by {self.pick.by!r} is not among the criteria: {', '.join(self.criteria)}")
        if not 0.0 <= self.equal_length < 1.0:
            raise InputError(f"equal_length must lie in [0, 1), not {self.equal_length}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit must be at least 1, not {self.limit}")
