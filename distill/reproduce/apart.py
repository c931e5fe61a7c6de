"""Tasks in which a step's style, its length and the teacher's liking are taken apart.

On the shipped pair the style that a student cannot learn (mental arithmetic) is also the shortest, so that a choice by
length does what a choice by the student does. Here mental arithmetic is written in several ways:

spelled    every digit operation written out, as on the shipped pair: the one style that can be learnt by imitation
recited    mental arithmetic after a fixed sentence: longer than spelled, the most frequent, and cheap to predict
rambling   mental arithmetic after random words: the longest
jump       mental arithmetic alone: the shortest

In `apart` the spelled step is neither the longest nor the shortest, nor the most frequent, nor the one that the teacher
finds likeliest per token. In `apart-short` there are no jumps: the spelled step is the shortest. styles.py measures all
that before any arm is trained.

Both models are made by the command. The teacher is the shipped one, trained further until it writes these styles. The
student has a cold start as long as that of the shipped one, on the same mixture as the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from genssd.distill.reproduce.arms import SHIPPED
from genssd.distill.reproduce.small import SHIPPED_PAIR, SmallTask
from genssd.distill.reproduce.worlds import Pair
from genssd.distill.runs.progress import Progress
from genssd.distill.runs.writing import remove_directory, replace_directory
from genssd.distill.small_pair.chat import PAD, find_token_id
from genssd.distill.small_pair.make import POOL, STUDENT_PROBLEMS, TEACHER_PROBLEMS
from genssd.distill.small_pair.models import build_student, save
from genssd.distill.small_pair.problems import JUMP, RAMBLING, RECITED, SPELLED, make_problems
from genssd.distill.small_pair.training import STUDENT_PHASES, Phase, iter_batches, make_example_writer, train
from genssd.kernels.threads import torch_threads

MIXTURES: Final[Mapping[str, Sequence[str]]] = {
    "apart": (RECITED,) * 4 + (SPELLED,) * 3 + (RAMBLING,) * 2 + (JUMP,),
    "apart-short": (RECITED,) * 4 + (SPELLED,) * 3 + (RAMBLING,) * 3,
}
"""Styles in proportion to their frequency, by the name of the task. Spelled steps are as frequent as in the mixture of
the shipped pair, and recited ones as jumps are there."""
TEACHER: Final = Phase(
    name="teacher-apart", stream="teacher-apart", steps=500, batch=48, peak_lr=1.2e-3, final_lr_fraction=0.02, warmup=20
)
"""Training that teaches the shipped teacher the styles of a mixture."""
STOPPED_EARLY: Final = replace(STUDENT_PHASES[0], steps=400, horizon=STUDENT_PHASES[0].steps)
"""Training of a cold start that is stopped before it is done, when the student has begun to learn digit operations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApartTask(SmallTask):
    """Sums in steps, with a teacher and a cold start that were trained on one of the mixtures."""

    mixture: str
    """Key of MIXTURES."""

    def make_pair(self, world: str, report: Progress) -> Pair:
        """Return both models, which are made once. world: `early` has a cold start that was stopped earlier."""
        start = STUDENT_PHASES[0] if world == SHIPPED else STOPPED_EARLY
        pair = Pair(
            teacher=self.models / "teacher",
            student=self.models / ("student" if world == SHIPPED else f"{world}-student"),
        )
        tokenizer = AutoTokenizer.from_pretrained(SHIPPED_PAIR / "student")
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        if not pair.student.exists():
            torch.manual_seed(0)
            self._train(build_student(tokenizer), tokenizer, start, STUDENT_PROBLEMS, pair.student, report)
        if not pair.teacher.exists():
            shipped = AutoModelForCausalLM.from_pretrained(SHIPPED_PAIR / "teacher")
            self._train(shipped, tokenizer, TEACHER, TEACHER_PROBLEMS, pair.teacher, report)
        return pair

    def _train(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, phase: Phase, seed: int, directory: Path,
        report: Progress,
    ) -> None:  # fmt: skip
        """Train a model on the mixture, and write it into a directory. seed: that of its problems."""
        report.begin(f"training the {directory.name} of {self.mixture}")
        if self.steps is not None:
            phase = replace(phase, steps=self.steps, warmup=min(phase.warmup, self.steps))
        phase = replace(phase, styles=tuple(MIXTURES[self.mixture]))
        problems = make_problems(POOL if self.steps is None else 200, seed)
        writer = make_example_writer(tokenizer, problems, phase)
        remove_directory(temporary := directory.with_name(f"{directory.name}.tmp"))
        with torch_threads(self.threads or 2):
            batches = iter_batches(writer, phase, find_token_id(tokenizer, PAD), seed=0)
            train(model, phase, batches, lambda step: "", 100)
        save(model, tokenizer, temporary)
        replace_directory(temporary, directory)
