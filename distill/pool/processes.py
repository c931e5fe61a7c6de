"""A pool of worker processes, each with an engine of its own: the devices of a node, or parts of its cores.

Workers end with this process, however it ends: each waits for that in a thread (worker.py).
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import ClassVar, cast

from genssd.distill.pool.messages import Ended, receive, send
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.worker import Recipe, run_worker
from genssd.distill.pool.workers import Worker, WorkerPool

CLOSE_TIME = 5.0
"""Seconds that workers have to end by themselves."""
KEPT_SIGNALS = (signal.SIGINT, signal.SIGHUP)
"""Signals of a terminal to all of its processes, which only the process of the command answers."""

START_METHOD = "spawn"
"""How `multiprocessing` starts a worker: as a new interpreter, because a forked one cannot use CUDA or the threads that
this process has started."""


class WorkerProcess(Worker):
    """A worker process, as this process knows it."""

    def __init__(self, recipe: Recipe, process: BaseProcess, pipe: Connection) -> None:
        super().__init__(recipe)
        self.process = process
        self.pipe = pipe

    @staticmethod
    def start(recipe: Recipe) -> WorkerProcess:
        """Start a process, which loads its models."""
        context = cast(SpawnContext, multiprocessing.get_context(START_METHOD))
        pipe, far_end = context.Pipe()
        process = context.Process(target=run_worker, args=(far_end, recipe), daemon=True)
        resource_tracker.ensure_running()  # it unblocks signals when it starts
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_SIGNALS)
        try:
            process.start()  # it inherits what is blocked
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            far_end.close()
        return WorkerProcess(recipe, process, pipe)

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
        if self.reason is not None:
            return f"failed ({self.reason})"
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
        return f"ended with exit code {code}"


class ProcessPool(WorkerPool[WorkerProcess]):
    """A `Pool` of worker processes; a context manager, which ends them."""

    noun: ClassVar[str] = "worker process"
    peers: ClassVar[str] = "devices"

    def __init__(self, models: RemoteModels, recipes: Sequence[Recipe]) -> None:
        """Start a worker for every recipe. They load their models until `open` returns."""
        super().__init__(models)
        self.size = len(recipes)
        self._workers = [self._start(recipe) for recipe in recipes]

    def __enter__(self) -> ProcessPool:
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

    def _start(self, recipe: Recipe) -> WorkerProcess:
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
