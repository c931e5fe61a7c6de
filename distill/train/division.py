"""How several processes divide an optimizer step, so that it takes the examples that one process would take."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.distill.train.config import TrainSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDivision:
    """The division of the examples of one optimizer step over processes."""

    processes: int
    """Number of processes that take part."""
    per_device_train_batch_size: int
    """Number of examples in one forward pass of one process."""
    gradient_accumulation_steps: int
    """Number of forward passes of each process."""


def divide_step(settings: TrainSettings, processes: int) -> StepDivision:
    """Return how at most so many processes divide the step that the settings describe for one process.

    The step has per_device_train_batch_size times gradient_accumulation_steps examples, of which every process takes as
    many, in forward passes that are as large as possible and no larger than the settings'. Where they cannot be divided
    evenly, fewer processes take part: the largest number that divides them. With adaptive_alpha, which compares the
    examples of a forward pass, whole passes are divided.
    """
    size, passes = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    units = passes if settings.adaptive_alpha else size * passes
    count = _largest_divisor(units, processes)
    examples = size * passes // count
    largest = _largest_divisor(examples, size)
    return StepDivision(
        processes=count, per_device_train_batch_size=largest, gradient_accumulation_steps=examples // largest
    )


def _largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that is at most the limit."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
