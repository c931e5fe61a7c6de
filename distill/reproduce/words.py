"""The task of a real language model and real word problems: teacher and student are made of one model.

The teacher is the model, fine-tuned on human solutions in two styles (word_problems.py). The student is the model
without every other layer, with a cold start on other problems of the same kind. Both are made once, into
OUTPUT_DIR/models; on a CPU that takes hours, on a GPU minutes.

Problems of the teacher's training, the cold start, the arms' training and the test have no question in common.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM

from genssd.distill.console import report_training
from genssd.distill.data.overlap import normalise_question
from genssd.distill.reproduce.arms import SHIPPED
from genssd.distill.reproduce.sources import ChunkName
from genssd.distill.reproduce.word_problems import Part, WordProblem, detect_writing, read_gsm8k, read_mawps
from genssd.distill.reproduce.worlds import Pair, ProblemFiles
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.runs.progress import Progress
from genssd.distill.runs.writing import remove_directory, replace_directory
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.saving import find_stored_dtype, save_model
from genssd.distill.train.trainer import run_train
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.decoding.chunk import Chunk
from genssd.engine.models.sampling import Sampling
from genssd.engine.texts.text import Tokenizer

MAX_TOKENS: Final = 256
CALIBRATION: Final = 32
"""Number of problems that a threshold is taken from."""
CHUNKS: Final[Mapping[ChunkName, Chunk]] = {
    "step": Chunk(tokens=1, until="\n", limit=96),
    "short": Chunk(tokens=16, until=None),
    "whole": Chunk(tokens=MAX_TOKENS, until=None),
}
TEACHER_STEPS: Final = 200
"""Number of optimizer steps of the teacher's fine-tuning, of 16 solutions each."""
STUDENT_STEPS: Final = 200
"""Number of optimizer steps of the student's cold start, of 16 solutions each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WordsTask:
    """Word problems, with a teacher and a student that are made of one language model."""

    base: str
    """Hub id or local directory of the model."""
    data: Path
    """Directory with gsm8k/ and mawps/."""
    models: Path
    """Directory that both models are kept in."""
    problems: int
    """Number of problems of most arms."""
    multiple: int
    """How many times as many problems the file of a seed has, as far as there are as many."""
    eval_problems: int
    steps: int | None = None
    """Number of optimizer steps of both trainings; None: those of this task."""
    threads: int | None = None

    chunks = CHUNKS
    max_tokens = MAX_TOKENS
    sampling = Sampling()
    dtype = "auto"
    memory_bytes = None

    def make_pair(self, world: str, report: Progress) -> Pair:
        """Return both models, which are made once."""
        assert world == SHIPPED, "the models of this task have one world"
        pair = Pair(teacher=self.models / "teacher", student=self.models / "student")
        if not pair.teacher.exists():
            self._train(self.base, "teacher", TEACHER_STEPS, 1e-4, pair.teacher, report)
        if not pair.student.exists():
            report.begin("removing every other layer")
            short = self.models / "short"
            remove_directory(short)
            drop_layers(self.base, short)
            self._train(str(short), "cold start", STUDENT_STEPS, 3e-4, pair.student, report)
            remove_directory(short)
        return pair

    def write_problems(self, seed: int, directory: Path) -> ProblemFiles:
        """Write the problems of a seed. Raises InputError where there are too few of them."""
        known = [problem for problem in read_gsm8k(self.data / "gsm8k" / "train.jsonl") if problem.part == "run"]
        held_out = [*read_gsm8k(self.data / "gsm8k" / "test.jsonl"), *read_mawps(self.data / "mawps")]
        test_questions = {normalise_question(problem.question) for problem in held_out}
        own = [problem for problem in known if normalise_question(problem.question) not in test_questions]
        rng = random.Random(f"words-{seed}")
        rng.shuffle(own)
        rng.shuffle(held_out)
        if len(own) < self.problems + CALIBRATION or len(held_out) < self.eval_problems:
            raise InputError(
                f"{self.data} has {format_count(len(own), 'problem')} to train on and {len(held_out):,} to test; lower "
                "--problems or --eval-problems"
            )
        files = ProblemFiles(
            train=directory / "train.jsonl",
            calibration=directory / "calibration.jsonl",
            test=directory / "test.jsonl",
        )
        write_jsonl(files.calibration, map(_make_row, own[:CALIBRATION]))
        write_jsonl(files.train, map(_make_row, own[CALIBRATION : CALIBRATION + self.problems * self.multiple]))
        write_jsonl(files.test, map(_make_row, held_out[: self.eval_problems]))
        return files

    def count_styles(self, responses: Sequence[str]) -> Counter[str]:
        """Return how many lines of the responses are terse, and how many are in words."""
        lines = (line for response in responses for line in response.split("\n"))
        return Counter(style for line in lines if (style := detect_writing(line)))

    def _train(self, model: str, part: Part, steps: int, rate: float, directory: Path, report: Progress) -> None:
        """Fine-tune a model on the human solutions of a part of the problems, and write it into a directory."""
        problems = [problem for problem in read_gsm8k(self.data / "gsm8k" / "train.jsonl") if problem.part == part]
        rows = self.models / f"{directory.name}.jsonl"
        write_jsonl(rows, map(_make_training_row, problems))
        temporary = directory.with_name(f"{directory.name}.tmp")
        remove_directory(temporary)
        config = TrainConfig(
            model_name_or_path=model, data=(str(rows),), output_dir=str(temporary), max_steps=self.steps or steps,
            per_device_train_batch_size=16, learning_rate=rate, warmup_steps=0.05, threads=self.threads,
        )  # fmt: skip
        run_train(config, report_training(report.within(f"making the {directory.name}")))
        replace_directory(temporary, directory)


def drop_layers(base: str, directory: Path) -> None:
    """Write a model without every other layer (the second, the fourth, ...) into a directory."""
    source = locate(base)
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = model.base_model.layers
    model.base_model.layers = torch.nn.ModuleList(list(layers)[::2])
    model.config.num_hidden_layers = len(model.base_model.layers)
    if getattr(model.config, "layer_types", None) is not None:
        model.config.layer_types = model.config.layer_types[::2]
    save_model(model, Tokenizer(source), directory, dtype=find_stored_dtype(source))


def _make_row(problem: WordProblem) -> dict[str, str]:
    return {"problem": problem.question, "answer": problem.answer}


def _make_training_row(problem: WordProblem) -> dict[str, object]:
    turns = [("user", problem.question), ("assistant", problem.write_solution())]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
