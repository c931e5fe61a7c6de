"""The task of the small pair: its problems, and worlds in which one thing is other than in the shipped pair.

Problems of training, calibration and test have no operands in common with each other (`make_problems` divides operand
tuples by a hash) nor with the problems that both models learnt from (`exclude_pools`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from genssd.distill.reproduce.arms import SHIPPED
from genssd.distill.reproduce.sources import ChunkName
from genssd.distill.reproduce.worlds import Pair, ProblemFiles
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.progress import Progress
from genssd.distill.runs.writing import remove_directory, replace_directory
from genssd.distill.small_pair.chat import PAD, ChatExample, encode_example, find_token_id
from genssd.distill.small_pair.make import POOL, STUDENT_PROBLEMS, TEACHER_PROBLEMS
from genssd.distill.small_pair.models import build_student, save
from genssd.distill.small_pair.problems import STYLES, Problem, detect_style, make_problems, write_solution
from genssd.distill.small_pair.training import (
    STUDENT_PHASES,
    Phase,
    WriteExample,
    iter_batches,
    make_example_writer,
    train,
)
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.kernels.threads import torch_threads

SHIPPED_PAIR: Final = Path(__file__).parents[1] / "small_pair"
MAX_TOKENS: Final = 160
FIRST_SEED: Final = 7_000
"""Seed of the problems of seed 0; those of the models and of the demo are others."""
CALIBRATION: Final = 32
"""Number of problems that a threshold is taken from."""
CHUNKS: Final[Mapping[ChunkName, Chunk]] = {
    "step": Chunk(tokens=1, until="\n", limit=64),
    "short": Chunk(tokens=8, until=None),
    "whole": Chunk(tokens=MAX_TOKENS, until=None),
}
TUNED_TEACHER: Final = Phase(
    name="teacher-styles", stream="teacher-styles", steps=150, batch=48, peak_lr=1e-3, final_lr_fraction=0.05, warmup=10
)
"""Training that changes how often the shipped teacher writes each style."""
LONGER_START: Final = Phase(
    name="student-longer", stream="student-longer", steps=600, batch=48, peak_lr=2e-3, final_lr_fraction=0.1, warmup=20
)
"""Training that lengthens the shipped student's cold start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallTask:
    """Sums in steps, with the shipped pair or with a pair that one training has changed."""

    models: Path
    """Directory that the changed models are kept in."""
    problems: int
    """Number of problems of most arms."""
    multiple: int
    """How many times as many problems the file of a seed has."""
    eval_problems: int
    steps: int | None = None
    """Number of steps of every training of a model; None: those of its phase."""
    threads: int | None = None

    chunks = CHUNKS
    max_tokens = MAX_TOKENS
    sampling = Sampling()
    dtype = "float32"
    memory_bytes = 1 << 29

    def make_pair(self, world: str, report: Progress) -> Pair:
        shipped = Pair(teacher=SHIPPED_PAIR / "teacher", student=SHIPPED_PAIR / "student")
        if world == SHIPPED:
            return shipped
        made = self.models / world
        if not made.exists():
            report.begin(f"training the model of {world}")
            remove_directory(temporary := made.with_name(f"{world}.tmp"))
            with torch_threads(self.threads or 2):
                self._make(world, shipped, temporary)
            replace_directory(temporary, made)
        return replace(shipped, **{"teacher" if world in ("uniform", "one-style") else "student": made})

    def write_problems(self, seed: int, directory: Path) -> ProblemFiles:
        count = self.problems * self.multiple
        drawn = make_problems(count + CALIBRATION + 100, FIRST_SEED + seed)
        own = [problem for problem in drawn if problem.operands not in exclude_pools()]
        files = ProblemFiles(
            train=directory / "train.jsonl",
            calibration=directory / "calibration.jsonl",
            test=directory / "test.jsonl",
        )
        write_jsonl(files.train, map(_make_row, own[:count]))
        write_jsonl(files.calibration, map(_make_row, own[count : count + CALIBRATION]))
        write_jsonl(files.test, map(_make_row, make_problems(self.eval_problems, FIRST_SEED + seed, split="eval")))
        return files

    def count_styles(self, responses: Sequence[str]) -> Counter[str]:
        steps = (step for response in responses for step in response.split("\n"))
        return Counter(style for step in steps if (style := detect_style(step)))

    def _make(self, world: str, shipped: Pair, directory: Path) -> None:
        """Train the model in which a world differs from the shipped pair, and write it into a directory."""
        tokenizer = AutoTokenizer.from_pretrained(shipped.student)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        problems = make_problems(POOL if self.steps is None else 200, TEACHER_PROBLEMS)
        if world == "cold-other":
            phase = replace(STUDENT_PHASES[0], stream="student-cold-other")
            model = build_student(tokenizer)
        elif world == "cold-long":
            phase, model = LONGER_START, AutoModelForCausalLM.from_pretrained(shipped.student)
        else:
            phase, model = TUNED_TEACHER, AutoModelForCausalLM.from_pretrained(shipped.teacher)
        if self.steps is not None:
            phase = replace(phase, steps=self.steps, warmup=min(phase.warmup, self.steps))
        uniform = replace(phase, styles=STYLES)
        writer = {
            "uniform": lambda: make_example_writer(tokenizer, problems, uniform),
            "one-style": lambda: _write_in_one_style(tokenizer, problems, phase),
        }.get(world, lambda: make_example_writer(tokenizer, problems, phase))()
        train(model, phase, iter_batches(writer, phase, find_token_id(tokenizer, PAD), seed=1), lambda step: "", 10**9)
        save(model, tokenizer, directory)


def _write_in_one_style(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], phase: Phase) -> WriteExample:
    """Return a function that writes every solution in one style, drawn with the frequencies of the phase."""

    def write(rng: random.Random) -> ChatExample:
        problem = rng.choice(problems)
        return encode_example(tokenizer, problem.question, write_solution(problem, rng, (rng.choice(phase.styles),)))

    return write


@cache
def exclude_pools() -> frozenset[tuple[int, ...]]:
    """Return the operands of all problems that the shipped models learnt from."""
    return frozenset(
        problem.operands for seed in (TEACHER_PROBLEMS, STUDENT_PROBLEMS) for problem in make_problems(POOL, seed)
    )


def _make_row(problem: Problem) -> dict[str, str]:
    return {"problem": problem.question, "answer": problem.answer}
