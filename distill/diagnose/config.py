"""Settings of `genssd diagnose`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from genssd.distill.diagnose.alignment import LOSSES, LossName
from genssd.distill.diagnose.readers import TEMPLATED_CONTEXTS, Reader, Templates, list_readers
from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, NamedModelPath, Operational, Recomputed
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.runs.sampling_options import ModelSampling
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.models.sampling import Sampling

WeightRule = Literal["positive", "alignment", "nodes"]
"""Weights of the nodes in the rows that a diagnosis writes for a training: see weighted_rows.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseConfig(PoolOptions, ChatSettings, ModelSampling):
    """Measure how teachers, losses and contexts are aligned with the student's success, without training."""

    NEEDS: ClassVar[Needs] = {
        "teacher_top_k": Need(lambda o: bool(o.teacher), "a teacher"),
        "context_readers": Need(lambda o: bool(o.contexts and o.teacher), "contexts and a teacher"),
        "templates.hint": Need(lambda o: "hint" in o.contexts, "the context hint"),
        "templates.solution": Need(lambda o: "solution" in o.contexts, "the context solution"),
        "templates.summary": Need(lambda o: "summary" in o.contexts, "the context summary"),
        "templates.other": Need(
            lambda o: bool(set(o.contexts) - set(TEMPLATED_CONTEXTS)),
            f"a context other than {', '.join(TEMPLATED_CONTEXTS)}",
        ),
        **{name: Need(lambda o: bool(o.teacher), "a teacher") for name in ("node_weights", "weights_loss")},
        "beta": Need(lambda o: "jsd" in o.losses, "jsd among the losses"),
        "alpha": Need(lambda o: any("skew" in loss for loss in o.losses), "a skewed loss among the losses"),
    }

    student: ModelPath[str]
    """Hub id or local directory of the model that would be trained."""
    teacher: NamedModelPath[tuple[str, ...]] = ()
    """Hub ids or local directories of teachers with the student's tokenizer; they are loaded one after another."""
    contexts: tuple[str, ...] = ()
    """Fields of the data's rows (hint, solution, summary or any other). With each of them in its prompt, the student is
    compared as its own teacher."""
    context_readers: Literal["student", "all"] = "student"
    """Which models read the contexts: the student alone, or the teachers, too."""
    templates: Templates = field(default_factory=Templates)
    """Texts of the prompts that hold a context."""
    # the rows are compared with the journal's one by one, so that a file that has grown can be resumed
    data: Operational[FileName[str]]
    """Data file of problems with answers, as for select."""
    output_dir: Operational[FileName[str]] = "runs/diagnose"
    """Directory that the journal, the tables and the page are written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run; of a finished one the tables and the page are written again."""
    overwrite: Operational[bool] = False
    """Remove what an earlier run of this command has written to output_dir, and begin anew."""
    limit: Operational[int | None] = None
    """Take only the first rows of the data."""
    rollouts: int = 4
    """Number of responses that the student writes to every question."""
    nodes_per_window: int = 1
    """Number of nodes drawn from each window of a rollout; the windows are tokens 1, 2-3, 4-7, 8-15, ..."""
    top_k: int = 5
    """How many of the student's most likely tokens are tried at a node, in addition to the rollout's own token."""
    teacher_top_k: int = 2
    """How many of each teacher's most likely tokens are tried at a node as well."""
    min_probability: float = 0.01
    """Least probability that the student or a teacher must give one of its most likely tokens to have it tried. At a
    node with one token to try no completion is written."""
    completions: int = 8
    """Number of completions that the student writes after every tried token. It is even: reliability compares the two
    halves of them."""
    budget: int = 2048
    """Maximum number of completions per question; nodes beyond it are left out, and counted."""
    max_tokens: int = 4096
    """Maximum number of tokens in a response, rollout and completion together. A response that is cut off counts as
    failed."""
    sampling: Sampling = field(default_factory=Sampling)
    """How the student samples; it should be the same as in training. Losses and ideal gradient are computed at
    temperature 1."""
    losses: Recomputed[tuple[LossName, ...]] = LOSSES
    """Distillation losses that are compared."""
    beta: Recomputed[float] = 0.5
    """Weight beta of the teacher in the mixture of jsd, in (0, 1)."""
    alpha: Recomputed[float] = 0.1
    """Mixing weight alpha of the skewed KL losses, in [0, 1)."""
    node_weights: Recomputed[WeightRule] = "positive"
    """Weights of the nodes in weighted_rows.jsonl, which holds the rollouts as rows for train: positive is 1 where the
    first teacher's alignment is above 0, alignment is that alignment there, nodes is 1 at every node that has one. All
    other tokens weigh 0."""
    weights_loss: Recomputed[LossName | None] = None
    """Loss whose alignment gives the weights; None: the first of losses."""
    page_questions: Recomputed[int] = 24
    """Number of questions that the page shows with their text."""
    seed: int = 0
    """Seed of all random numbers of the run."""

    def __post_init__(self) -> None:
        check_types(self)
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
        if self.weights_loss is not None and self.weights_loss not in self.losses:
            raise InputError(f"weights_loss: {self.weights_loss} is not among the losses {', '.join(self.losses)}")
        if not 0.0 < self.beta < 1.0 or not 0.0 <= self.alpha < 1.0:
            raise InputError(f"beta must lie in (0, 1) and alpha in [0, 1), not {self.beta} and {self.alpha}")

    def readers(self) -> list[Reader]:
        """Return the student without a context first, then everything that is compared as its teacher."""
        return list_readers(self.student, self.teacher, self.contexts, self.context_readers)
