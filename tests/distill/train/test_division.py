"""An optimizer step that several processes divide has the examples of one process's step."""

from __future__ import annotations

import itertools

from genssd.distill.train.config import TrainSettings
from genssd.distill.train.division import StepDivision, divide_step


def search(size: int, passes: int, processes: int, *, whole_passes: bool) -> tuple[int, int, int]:
    """The division that a search of all of them finds: most processes first, then the largest passes."""
    sizes = [size] if whole_passes else range(1, size + 1)
    return max(
        (count, each, accumulated)
        for count, each in itertools.product(range(1, processes + 1), sizes)
        for accumulated in range(1, size * passes + 1)
        if count * each * accumulated == size * passes
    )


def test_a_step_keeps_its_examples_and_most_processes_take_part() -> None:
    for size, passes, processes in itertools.product((1, 2, 6, 8, 9), (1, 3, 4), (1, 2, 3, 5, 8)):
        settings = TrainSettings(per_device_train_batch_size=size, gradient_accumulation_steps=passes)
        division = divide_step(settings, processes)
        count, each, accumulated = search(size, passes, processes, whole_passes=False)
        assert division == StepDivision(
            processes=count, per_device_train_batch_size=each, gradient_accumulation_steps=accumulated
        ), (size, passes, processes)


def test_passes_stay_whole_where_their_examples_are_compared() -> None:
    for size, passes, processes in itertools.product((2, 6), (1, 3, 4), (1, 2, 3, 8)):
        settings = TrainSettings(
            per_device_train_batch_size=size, gradient_accumulation_steps=passes, adaptive_alpha=True, kd_ratio=1.0,
            teacher_model_name_or_path="x", kd_loss="skew_forward_kl",
        )  # fmt: skip
        division = divide_step(settings, processes)
        assert (
            division.processes, division.per_device_train_batch_size, division.gradient_accumulation_steps
        ) == search(size, passes, processes, whole_passes=True)  # fmt: skip
