"""The models of a diagnosis: each in a pool of its own, of which one at a time is open."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType

import torch

from genssd.distill.diagnose.config import DiagnoseConfig
from genssd.distill.diagnose.forcing import Verify
from genssd.distill.pool.pool import Pool
from genssd.distill.runs.pools import open_pool
from genssd.distill.runs.progress import Progress
from genssd.distill.runs.run import Run
from genssd.engine.common.errors import InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.engine import Engine

Load = Callable[[str, Role], Engine]
"""Function that returns the engine over a model (hub id or directory) in a role."""
OpenModel = Callable[[str, Role, int], AbstractContextManager[Pool]]
"""Function that opens a pool over a model in a role; the third argument is the number of questions to come."""


class ModelPools:
    """The models of a run, of which one at a time is held in memory. A context manager, which closes the last one."""

    def __init__(self, open_model: OpenModel) -> None:
        self._open_model = open_model
        self._held: tuple[str, Role] | None = None
        self._pool: Pool | None = None
        self._stack = ExitStack()

    def pool(self, model: str, role: Role, questions: int) -> Pool:
        """Return the pool over a model; that of another model is closed first, and must not be referenced any more.

        questions: number of questions that it is for.
        """
        if self._pool is None or self._held != (model, role):
            self._pool = None
            self._stack.close()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._pool = self._stack.enter_context(self._open_model(model, role, questions))
            self._held = model, role
        return self._pool

    def __enter__(self) -> ModelPools:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool = None
        self._stack.__exit__(kind, error, trace)


def check_in_processes(config: DiagnoseConfig, load: Load | None, verify: Verify | None) -> None:
    """Raise InputError where functions of the caller's are to work in other processes."""
    name = next((name for name in ("processes", "devices", "ray") if getattr(config, name) is not None), None)
    if name is None:
        return
    for function, value in (("load", load), ("verify", verify)):
        if value is not None:
            raise InputError(f"{name}: {function} is given, which works in this process; leave one of them out")


def make_opener(config: DiagnoseConfig, run: Run, load: Load | None, report: Progress) -> OpenModel:
    """Return the function that opens the pool over a model, with `load` or as the config says, and records it."""

    @contextmanager
    def open_model(model: str, role: Role, questions: int) -> Iterator[Pool]:
        with open_pool(
            config,
            None if load is None else load(model, role),
            run.chat_options,
            teacher=model if role == "teacher" else None,
            student=model if role == "student" else None,
            items=questions,
            report=report,
        ) as pool:
            run.use(pool.models)
            yield pool

    return open_model
