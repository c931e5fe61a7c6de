"""Make the small pair: a trained teacher and a cold-started student that share a tokenizer.

The teacher learns written solutions of mixed style until its samples are mostly right in every style, mental arithmetic
included. The student sees the same mixture only briefly: long enough for written-out digit operations to become
predictable to it, too short for it to solve problems reliably.

Run as `python -m genssd.distill.small_pair.make --output DIRECTORY`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genssd.distill.small_pair.chat import PAD, build_tokenizer, find_token_id, write_corpus
from genssd.distill.small_pair.models import build_student, build_teacher, save
from genssd.distill.small_pair.problems import make_problems
from genssd.distill.small_pair.report import measure
from genssd.distill.small_pair.training import (
    STUDENT_PHASES,
    TEACHER_PHASES,
    Phase,
    iter_batches,
    make_example_writer,
    train,
)

log = logging.getLogger(__name__)

POOL: Final = 200_000
"""Number of problems that the training examples are drawn from."""
REPORT_EVERY: Final = 100
"""Number of steps between two reports."""
REPORT_PROBLEMS: Final = 100
"""Number of held-out problems that a report is measured on."""

# seeds of the problem sets; they differ from the demo's, so that no model is trained on its problems
TEACHER_PROBLEMS: Final = 1
STUDENT_PROBLEMS: Final = 3
HELD_OUT_PROBLEMS: Final = 2


def train_phases(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, phases: Sequence[Phase], problem_seed: int, seed: int
) -> None:
    """Train an untrained model through its phases; log greedy and sampled accuracy on held-out problems."""
    log.info("%s parameters %d", type(model).__name__, model.num_parameters())
    problems = make_problems(POOL, problem_seed)
    held_out = make_problems(REPORT_PROBLEMS, HELD_OUT_PROBLEMS, split="eval")
    for phase in phases:
        writer = make_example_writer(tokenizer, problems, phase)
        batches = iter_batches(writer, phase, find_token_id(tokenizer, PAD), seed)
        train(model, phase, batches, lambda step: measure(model, tokenizer, held_out), every=REPORT_EVERY)


def make_teacher(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Train a teacher until its sampled answers are mostly right."""
    torch.manual_seed(seed)
    model = build_teacher(tokenizer)
    train_phases(model, tokenizer, TEACHER_PHASES, TEACHER_PROBLEMS, seed)
    return model


def make_student(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """Cold-start a student on a little of the mixture."""
    torch.manual_seed(seed)
    model = build_student(tokenizer)
    train_phases(model, tokenizer, STUDENT_PHASES, STUDENT_PROBLEMS, seed)
    return model


def main() -> None:
    """Make both models and write a log into the same directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for teacher/, student/ and make.log")
    parser.add_argument("--only", choices=("teacher", "student"), help="make one of the two models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="results repeat exactly only at the same number")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [
        logging.StreamHandler(),
        logging.FileHandler(arguments.output / "make.log", mode="a"),
    ]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer(write_corpus())
    makers = {"student": make_student, "teacher": make_teacher}
    for name in [arguments.only] if arguments.only else makers:
        save(makers[name](tokenizer, arguments.seed), tokenizer, arguments.output / name)


if __name__ == "__main__":
    main()
