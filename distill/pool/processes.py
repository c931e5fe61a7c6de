"""A pool of worker processes, each with an engine of its own: the devices of a node, or parts of its cores.

Workers end with this process, however it ends: each waits for that in a thread (worker.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import ClassVar

from genssd.distill.pool.messages import Ended, receive, send
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.starting import describe_end, start_process
from genssd.distill.pool.worker import Recipe, WorkerModels, run_worker
from genssd.distill.pool.workers import M, Worker, WorkerPool

CLOSE_TIME = 5.0
"""Seconds that workers have to end by themselves."""


class WorkerProcess(Worker):
    """A worker process, as this process knows it."""

    def __init__(self, recipe: Recipe[WorkerModels], process: BaseProcess, pipe: Connection) -> None:
        super().__init__(recipe)
        self.process = process
        self.pipe = pipe

    @staticmethod
    def start(recipe: Recipe[WorkerModels]) -> WorkerProcess:
        """Start a process, which loads its models."""
        return WorkerProcess(recipe, *start_process(run_worker, recipe))

    def send(self, message: object) -> None:
        """Send a message; do nothing where the process has ended."""
        with suppress(OSError):  # the next `_listen` finds that it has ended
            send(self.pipe, message)

    def end(self) -> None:
        """End the process, and return when it has ended."""
        self.pipe.close()
        self.process.kill()
        self.process.join()

    def describe_end(self) -> str:
        """Return what ended the process, which has ended, in words."""
        return describe_end(self.process, self.reason)


class ProcessPool(WorkerPool[WorkerProcess, M]):
    """A `Pool` of worker processes; a context manager, which ends them."""

    noun: ClassVar[str] = "worker process"
    peers: ClassVar[str] = "devices"

    def __init__(self, models: RemoteModels, recipes: Sequence[Recipe[M]]) -> None:
        """Start a worker for every recipe. They load their models until `open` returns."""
        super().__init__(models)
        self.size = len(recipes)
        self._workers = [self._start(recipe) for recipe in recipes]

    def __enter__(self) -> ProcessPool[M]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            if kind is not None or not (worker.is_ready and worker.is_idle):
                worker.process.kill()
            worker.pipe.close()
        until = time.monotonic() + CLOSE_TIME
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()

    def _start(self, recipe: Recipe[WorkerModels]) -> WorkerProcess:
        return WorkerProcess.start(recipe)

    def _receive(self, timeout: float | None) -> Iterator[tuple[WorkerProcess, object]]:
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in connection.wait(list(by_pipe), timeout):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            try:
                message = receive(pipe)
            except (EOFError, OSError):
                message = Ended()
                worker.process.join(CLOSE_TIME)  # so that its exit code is its own
            yield worker, message
