"""The settings of `genssd diagnose`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from genssd.distill.diagnose.alignment import LOSSES, Loss
from genssd.distill.diagnose.contexts import Reader, Templates, readers_of
from genssd.distill.runs.engine_options import EngineOptions
from genssd.distill.runs.settings import Checkpoint, NamedCheckpoint, Operational, Recomputed
from genssd.engine.errors import InputError
from genssd.engine.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseConfig(EngineOptions):
    """Measure how teachers, losses and contexts are aligned with the student's success, without training."""

    student: Checkpoint[str]
    """Hub id or local directory of the model that would be trained."""
    teacher: NamedCheckpoint[tuple[str, ...]] = ()
    """Hub ids or directories of teachers, with the student's tokenizer; loaded one after another."""
    contexts: tuple[str, ...] = ()
    """Fields of the rows (hint, solution, summary, any other) that the student reads as its own teacher."""
    context_readers: Literal["student", "all"] = "student"
    """Whether the teachers are asked with each context, too."""
    templates: Templates = field(default_factory=Templates)
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[str]
    """JSONL file of problems with answers."""
    output_dir: Operational[str] = "runs/diagnose"
    resume: Operational[bool] = False
    """Go on with an interrupted run; a finished one is drawn again."""
    limit: Operational[int | None] = None
    """Take only the first rows of the data."""
    rollouts: int = 4
    """Of the student, per question."""
    nodes_per_window: int = 1
    """Places looked at among tokens 1, 2-3, 4-7, 8-15, ... of every rollout."""
    top_k: int = 5
    """The student's most likely tokens are tried at a node, beside the one that stands there."""
    teacher_top_k: int = 2
    """And each teacher's most likely ones."""
    min_probability: float = 0.01
    """That the student or the teacher gives a token at least to have it tried. Where only one token is left there is
    nothing to choose, and no completion is spent."""
    completions: int = 8
    """Of the student behind every tried token; even, for the halves that reliability is taken from."""
    budget: int = 2048
    """Completions per question, at most; nodes that it does not hold are left out, and counted."""
    max_tokens: int = 2048
    """Of a whole response. One that is cut off has failed."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the student writes: as it would in training. Losses and ideal gradient are taken at temperature 1."""
    losses: Recomputed[tuple[Loss, ...]] = LOSSES
    beta: Recomputed[float] = 0.5
    """Of jsd."""
    alpha: Recomputed[float] = 0.1
    """Of the skewed losses."""
    page_questions: Recomputed[int] = 24
    """Shown with their text on the page."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rollouts", "nodes_per_window", "top_k", "teacher_top_k", "budget", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.completions < 2 or self.completions % 2:
            raise InputError(f"completions must be even and at least 2, not {self.completions}")
        if not 0.0 <= self.min_probability < 1.0:
            raise InputError(f"min_probability must lie in [0, 1), not {self.min_probability}")
        if self.page_questions < 0:
            raise InputError(f"page_questions must be at least 0, not {self.page_questions}")
        if not self.teacher and not self.contexts:
            raise InputError("diagnose needs a teacher or a context to compare: give --teacher or --contexts")
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise InputError(f"losses must name each loss once, not {self.losses}")
        if not 0.0 < self.beta < 1.0 or not 0.0 <= self.alpha < 1.0:
            raise InputError(f"beta must lie in (0, 1) and alpha in [0, 1), not {self.beta} and {self.alpha}")

    def readers(self) -> list[Reader]:
        """The student, then its teachers."""
        return readers_of(self.student, self.teacher, self.contexts, self.context_readers)
