"""How many threads a command computes with, and the functions of the engine that run on them.

The first of these decides:

    --threads (Engine.from_pretrained(threads=...))
    OMP_NUM_THREADS, which torchrun sets as well
    the cores that this process is given (machine.py)

The native kernels divide no work that is too small for that (csrc/operators.hpp), and their results do not depend on
the number. torch's operators round differently with another number, and lose time where the tensors are small, so a
training takes at most one thread per WORK_PER_THREAD of a forward pass. Neither choice looks at the machine's load.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

from genssd.engine.common.amounts import format_count
from genssd.engine.common.thread_count import check_threads
from genssd.engine.host.machine import available_cores
from genssd.kernels.threads import native_threads, num_threads

logger = logging.getLogger(__name__)

WORK_PER_THREAD = 1_500_000
"""Parameters of a trained model, times the examples in one forward pass, that give work to one more thread of torch.

Measured with examples of 75 tokens (docs/log.md, 2026-11-27, "threads of a long training")."""
REQUESTED, VARIABLE = "as asked for", "OMP_NUM_THREADS"
"""Reasons of a number of threads that the user has decided."""

P = ParamSpec("P")
R = TypeVar("R")


class HasThreads(Protocol):
    """A model's runner, or what computes with one."""

    @property
    def threads(self) -> int | None: ...


C = TypeVar("C", bound=HasThreads)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadChoice:
    """A number of threads, and what decided it."""

    count: int
    reason: str

    @property
    def is_of_user(self) -> bool:
        """Whether the user has decided the number."""
        return self.reason in (REQUESTED, VARIABLE)

    def __str__(self) -> str:
        return f"computing with {self.count} thread{'s' if self.count > 1 else ''} ({self.reason})"


def choose_engine_threads(
    requested: int | None, *, cores: int | None = None, environment: Mapping[str, str] = os.environ
) -> ThreadChoice:
    """Return the number of threads of the native kernels. cores: those that this process is given; None asks for them.

    Raises InputError on a number of threads below 1 or above MAX_THREADS.
    """
    check_threads(requested)
    if requested is not None:
        return ThreadChoice(count=requested, reason=REQUESTED)
    from_environment = _read_environment(environment)
    if from_environment is not None:
        return ThreadChoice(count=from_environment, reason=VARIABLE)
    cores = available_cores() if cores is None else cores
    return ThreadChoice(count=cores, reason=f"{cores} core{'s' if cores > 1 else ''} given")


def choose_training_threads(
    requested: int | None,
    parameters: int,
    *,
    examples: int = 1,
    cores: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> ThreadChoice:
    """Return the number of threads of torch for a model of so many parameters. examples: those in one forward pass.

    Where a launcher has started several processes on this machine (LOCAL_WORLD_SIZE), they divide the cores. Raises
    InputError as `choose_engine_threads` does.
    """
    choice = choose_engine_threads(requested, cores=cores, environment=environment)
    if choice.is_of_user:
        return choice
    processes = _positive(environment.get("LOCAL_WORLD_SIZE", "1")) or 1
    count, useful = max(1, choice.count // processes), max(1, parameters * examples // WORK_PER_THREAD)
    if useful < count:
        return ThreadChoice(count=useful, reason=_describe_work(parameters, examples))
    return ThreadChoice(
        count=count, reason=choice.reason + (f", {format_count(processes, 'process')}" if processes > 1 else "")
    )


def _describe_work(parameters: int, examples: int) -> str:
    model = f"a model of {parameters:,} parameters"
    return model if examples == 1 else f"{model}, {format_count(examples, 'example')} in a forward pass"


def limit_torch_threads() -> None:
    """Let torch use no more threads than cores are given to this process; for processes of the command line."""
    torch.set_num_threads(effective_threads(None))


def computes(function: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Let a function compute without gradients, on the threads of its first argument.

    Without a number of its own the first argument has torch's, but no more than the cores that the process is given.
    """

    @functools.wraps(function)
    def compute(subject: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(), native_threads(effective_threads(subject.threads)):
            return function(subject, *args, **kwargs)

    return compute


def effective_threads(threads: int | None) -> int:
    """Return a number of threads; for None, that of the block around, and no more than the cores that are given.

    Raises InputError as `check_threads` does.
    """
    check_threads(threads)
    return threads or min(num_threads(), _cores())


@functools.cache
def _cores() -> int:
    return available_cores()


def _read_environment(environment: Mapping[str, str]) -> int | None:
    """Return the number in OMP_NUM_THREADS, the first one of a list; None where there is no usable number."""
    return _positive(environment.get(VARIABLE, "").split(",")[0])


def _positive(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() and int(text) > 0 else None


_announced: list[ThreadChoice] = []


def announce(choice: ThreadChoice) -> None:
    """Log how many threads compute, unless the last line had the same number."""
    if [last.count for last in _announced] != [choice.count]:
        _announced[:] = [choice]
        logger.info("%s", choice)
