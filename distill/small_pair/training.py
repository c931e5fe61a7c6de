"""Training of the small pair: phases of AdamW on solutions that are written during training."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from genssd.distill.small_pair.chat import ChatExample, encode_example
from genssd.distill.small_pair.problems import DETOUR, JUMP, MIXTURE, SPELLED, Problem, write_solution

WriteExample: TypeAlias = Callable[[random.Random], ChatExample]

log = logging.getLogger(__name__)

IGNORED: Final = -100
"""Label of tokens that the loss leaves out, as transformers defines it."""
BUCKETS: Final = 8
"""Number of batches whose examples are drawn together and sorted by length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One phase of training: its optimizer steps, the styles of its solutions, and its learning rates."""

    name: str
    stream: str
    """Name of the random numbers that the batches are drawn with."""
    steps: int
    batch: int
    """Number of examples per step."""
    peak_lr: float
    final_lr_fraction: float
    """Learning rate at the end of the cosine, as a fraction of peak_lr."""
    warmup: int
    """Number of steps in which the learning rate grows linearly."""
    styles: tuple[str, ...] = MIXTURE
    horizon: int = 0
    """Number of steps up to the end of the cosine; 0: `steps`. A phase may end before its cosine does."""


# The teacher learns the digit operations from written-out steps first, then mostly mental arithmetic, which is short
# and by far the slowest to learn, and last the mixture, which sets how often it writes each style.
MOSTLY_MENTAL: Final = (JUMP,) * 6 + (SPELLED,) * 2 + (DETOUR,)
TEACHER_PHASES: Final = (
    Phase(
        name="teacher-basics",
        stream="drill",
        steps=800,
        batch=32,
        peak_lr=3e-3,
        final_lr_fraction=0.5,
        warmup=100,
        horizon=1500,
    ),
    Phase(
        name="teacher-mental",
        stream="drill",
        steps=500,
        batch=48,
        peak_lr=3e-3,
        final_lr_fraction=0.5,
        warmup=20,
        styles=MOSTLY_MENTAL,
        horizon=1500,
    ),
    Phase(
        name="teacher-mental-anneal",
        stream="teacher-mental",
        steps=600,
        batch=48,
        peak_lr=2.5e-3,
        final_lr_fraction=0.2,
        warmup=20,
        styles=MOSTLY_MENTAL,
    ),
    Phase(
        name="teacher-mixture",
        stream="teacher-mixture",
        steps=800,
        batch=48,
        peak_lr=1.2e-3,
        final_lr_fraction=0.02,
        warmup=20,
    ),
)
STUDENT_PHASES: Final = (
    Phase(
        name="student-cold-start",
        stream="student-cold-start",
        steps=600,
        batch=48,
        peak_lr=3e-3,
        final_lr_fraction=0.3,
        warmup=100,
    ),
)


def make_example_writer(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem], phase: Phase) -> WriteExample:
    """Return a function that draws a problem and writes a new solution to it in the styles of a phase."""

    def write(rng: random.Random) -> ChatExample:
        problem = rng.choice(problems)
        return encode_example(tokenizer, problem.question, write_solution(problem, rng, phase.styles))

    return write


def collate(examples: Sequence[ChatExample], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded ids and labels, int64 [examples, longest].

    With causal attention no token attends to the padding after it, so no mask is needed.
    """
    longest = max(len(ids) for ids, _ in examples)
    inputs = torch.full((len(examples), longest), pad)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, (ids, prompt) in enumerate(examples):
        tokens = torch.tensor(ids)
        inputs[row, : len(ids)] = tokens
        labels[row, prompt : len(ids)] = tokens[prompt:]
    return inputs, labels


def iter_batches(write: WriteExample, phase: Phase, pad: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield one batch per step of a phase, each of examples of similar length, which need little padding."""
    rng = random.Random(f"{phase.stream}-{seed}")
    count = 0
    while count < phase.steps:
        pool = sorted((write(rng) for _ in range(phase.batch * BUCKETS)), key=lambda example: len(example[0]))
        starts = [index * phase.batch for index in range(BUCKETS)]
        rng.shuffle(starts)
        for start in starts[: phase.steps - count]:
            yield collate(pool[start : start + phase.batch], pad)
            count += 1


def scale_learning_rate(step: int, phase: Phase) -> float:
    """Return the fraction of the peak learning rate at a step: a linear warm-up, then a cosine."""
    if step < phase.warmup:
        return (step + 1) / phase.warmup
    progress = (step - phase.warmup) / max(1, (phase.horizon or phase.steps) - phase.warmup)
    cosine = 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * progress)).item())
    return phase.final_lr_fraction + (1.0 - phase.final_lr_fraction) * cosine


def train(
    model: PreTrainedModel,
    phase: Phase,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    report: Callable[[int], str],
    every: int,
) -> None:
    """Train a model with AdamW on the batches of a phase.

    Every `every` steps the loss, the time and the text of `report(step)` are logged.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale_learning_rate(step, phase))
    started, tokens, losses = time.monotonic(), 0, 0.0
    model.train()
    for step, (inputs, labels) in enumerate(batches, start=1):
        loss = model(input_ids=inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        tokens += inputs.numel()
        losses += loss.item()
        if step % every == 0 or step == phase.steps:
            window = (step - 1) % every + 1
            model.train(False)
            log.info(
                "%s step %d tokens %.2fM loss %.4f %s time %.0fs",
                *(phase.name, step, tokens / 1e6, losses / window, report(step), time.monotonic() - started),
            )
            model.train()
            losses = 0.0
    model.train(False)
