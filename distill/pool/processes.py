"""A pool of worker processes, each with an engine of its own: the devices of a node, or parts of its cores.

Workers end with this process, however it ends: each waits for that in a thread (worker.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from selectors import EVENT_READ, BaseSelector, DefaultSelector
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

    def __init__(self, recipe: Recipe[WorkerModels], selector: BaseSelector) -> None:
        """Start a process, which loads its models. selector: waits for what it says until it is ended."""
        super().__init__(recipe)
        self.process, self.pipe = start_process(run_worker, recipe)
        self._selector = selector
        selector.register(self.pipe, EVENT_READ, self)

    def send(self, message: object) -> None:
        """Send a message; do nothing where the process has ended."""
        with suppress(OSError):  # the next `_listen` finds that it has ended
            send(self.pipe, message)

    def end(self) -> None:
        """End the process, and return when it has ended."""
        self.process.kill()
        self.close()
        self.process.join()

    def close(self) -> None:
        """Hear nothing of the process any more, which then ends by itself if it waits for work."""
        if not self.pipe.closed:
            self._selector.unregister(self.pipe)
            self.pipe.close()

    def describe_end(self) -> str:
        """Return what ended the process, which has ended, in words."""
        device = self.recipe.visible_device
        return f"{'' if device is None else f'on device {device} '}{describe_end(self.process, self.reason)}"


class ProcessPool(WorkerPool[WorkerProcess, M]):
    """A `Pool` of worker processes; a context manager, which ends them."""

    noun: ClassVar[str] = "worker process"
    peers: ClassVar[str] = "devices"

    def __init__(self, models: RemoteModels, recipes: Sequence[Recipe[M]]) -> None:
        """Start a worker for every recipe. They load their models until `open` returns."""
        super().__init__(models)
        self.size = len(recipes)
        self._selector = DefaultSelector()
        """Waits for all pipes. It is kept, not made anew for every message, of which there are more with more pipes."""
        self._workers = [self._start(recipe) for recipe in recipes]

    def __enter__(self) -> ProcessPool[M]:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            if kind is not None or not (worker.is_ready and worker.is_idle):
                worker.process.kill()
            worker.close()
        until = time.monotonic() + CLOSE_TIME
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.process.kill()
            worker.process.join()
        self._selector.close()

    def _start(self, recipe: Recipe[WorkerModels]) -> WorkerProcess:
        return WorkerProcess(recipe, self._selector)

    def _receive(self, timeout: float | None) -> Iterator[tuple[WorkerProcess, object]]:
        for key, _ in self._selector.select(timeout):
            worker: WorkerProcess = key.data
            try:
                message = receive(worker.pipe)
            except (EOFError, OSError):
                message = Ended()
                worker.process.join(CLOSE_TIME)  # so that its exit code is its own
            yield worker, message
