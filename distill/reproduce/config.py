"""Options of `genssd reproduce`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import tyro

from genssd.distill.reproduce.arm_lists import list_arms
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import FileName, ModelPath, Operational
from genssd.engine.common.closest import suggest_or_list
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.common.thread_count import check_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one arm of a task, where the config does not give them."""

    problems: int
    eval_problems: int
    train_tokens: int
    learning_rate: float
    batch_size: int


SIZES = {
    "small": Sizes(problems=400, eval_problems=200, train_tokens=300_000, learning_rate=3e-3, batch_size=24),
    "words": Sizes(problems=400, eval_problems=300, train_tokens=600_000, learning_rate=1e-4, batch_size=16),
}
"""Sizes by the name of the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReproduceConfig:
    """Compare ways to make training data, and ways to train on it: one student each, at equal training tokens."""

    NEEDS: ClassVar[Needs] = {
        name: Need(lambda o: o.task == "words", "the task words, whose models and problems are not shipped")
        for name in ("model", "data")
    }

    task: Annotated[Literal["small", "words"], tyro.conf.Positional]
    """Pair and problems: small (the shipped pair, sums in steps) or words (a language model and word problems)."""
    # more arms and seeds may be asked for than before
    arms: Operational[tuple[str, ...]] = ()
    """Names of the arms to run, in addition to their controls; none: all arms of the task."""
    seeds: Operational[int] = 5
    """Number of seeds. Each has its own problems, draws of the teacher, order of training and test problems."""
    output_dir: Operational[FileName[str]] = "runs/reproduce"
    """Directory that everything is written to."""
    resume: Operational[bool] = False
    """Continue an interrupted run: an arm of a seed that is in the journal is not run again."""
    table: Operational[FileName[str | None]] = None
    """File that the table is written to as well, in Markdown: after every arm, over what is finished."""
    model: ModelPath[str | None] = None
    """Hub id or local directory of a small language model with a chat template, of which teacher and student of the
    task words are made."""
    data: FileName[str | None] = None
    """Directory with gsm8k/train.jsonl and gsm8k/test.jsonl, and mawps/*.jsonl, for the task words."""
    problems: int | None = None
    """Number of problems that the teacher writes solutions for, per seed. None: 400 for both tasks."""
    eval_problems: int | None = None
    """Number of held-out problems per seed. None: 200 for small, 300 for words."""
    candidates: int = 4
    """Number of the teacher's candidates: per step of a search, or whole responses to one problem."""
    train_tokens: int | None = None
    """Number of completion tokens that each student is trained on. None: 300,000 for small, 600,000 for words."""
    learning_rate: float | None = None
    """Learning rate of each student's training. None: 3e-3 for small, 1e-4 for words."""
    batch_size: int | None = None
    """Number of examples in one optimizer step. None: 24 for small, 16 for words."""
    model_steps: int | None = None
    """Number of optimizer steps of every training that makes a model of the task (other teachers and cold starts of
    small, both models of words). None: as many as the task needs; fewer are for trying things out."""
    threads: Operational[int | None] = None
    """Number of CPU threads. None: every part chooses, as the commands do."""

    def __post_init__(self) -> None:
        check_types(self)
        check_threads(self.threads)
        for name in ("seeds", "problems", "eval_problems", "candidates", "train_tokens", "batch_size", "model_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.learning_rate is not None and not self.learning_rate > 0.0:
            raise InputError(f"learning_rate must be positive, not {self.learning_rate}")
        if self.candidates < 2:
            raise InputError("candidates must be at least 2: with one there is nothing to choose")
        if self.task == "words" and (self.model is None or self.data is None):
            raise InputError("the task words needs a model and problems: give --model and --data")
        known = [arm.name for arm in list_arms(self.task)]
        for name in self.arms:
            if name not in known:
                raise InputError(f"{self.task} has no arm {name!r}{suggest_or_list(name, known)}")

    @property
    def sizes(self) -> Sizes:
        """Sizes of every arm: those of the config, and for the others those of the task."""
        chosen = SIZES[self.task]
        return Sizes(
            problems=self.problems or chosen.problems,
            eval_problems=self.eval_problems or chosen.eval_problems,
            train_tokens=self.train_tokens or chosen.train_tokens,
            learning_rate=self.learning_rate or chosen.learning_rate,
            batch_size=self.batch_size or chosen.batch_size,
        )
