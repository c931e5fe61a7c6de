"""Options of `genssd demo`."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.distill.runs.field_kinds import FileName
from genssd.engine.common.options_check import check_types
from genssd.engine.common.thread_count import check_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Distil the small teacher into the small student twice, with and without selection, and compare."""

    output_dir: FileName[str] = "runs/demo"
    """Directory of the demo; an earlier demo in it is replaced."""
    prompts: int = 800
    """Number of problems that the teacher writes solutions for."""
    candidates: int = 4
    """Number of continuations per step that the student chooses from."""
    train_tokens: int = 1_000_000
    """Number of completion tokens that each student is trained on."""
    learning_rate: float = 2e-3
    """Learning rate of each student's training."""
    batch_size: int = 48
    """Number of examples in one optimizer step."""
    eval_problems: int = 200
    """Number of held-out problems that every student is evaluated on."""
    post_hoc: bool = False
    """Train a third student on the best of the same number of whole solutions, chosen after they are written."""
    threads: int | None = None
    """Number of CPU threads. None: two where two cores are given, one for each student. With 1 the students are made
    one after the other."""
    seed: int = 0
    """Seed of the problems, of sampling and of training."""

    def __post_init__(self) -> None:
        check_types(self)
        check_threads(self.threads)
