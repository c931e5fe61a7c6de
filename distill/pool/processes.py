"""A pool of worker processes, each with an engine of its own: the devices of a node, or parts of its cores.

The process of the command hands out items and takes results; it alone writes. A worker that ends, whatever ended it, is
replaced, and its items are done again, to the same results. Workers end with this process, however it ends: each waits
for that in a thread (worker.py).
"""

from __future__ import annotations

import logging
import pickle
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from genssd.distill.pool.hand_out import MAX_ENDS, HandOut
from genssd.distill.pool.messages import (
    Begin,
    Counts,
    Failed,
    Finished,
    Idle,
    Item,
    Log,
    NoMore,
    Ready,
    Refused,
    Wanted,
    receive,
    send,
)
from genssd.distill.pool.pool import Lost, Stopped, Work
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.starting import describe_end, start_process
from genssd.distill.pool.worker import Recipe, WorkerModels, run_worker
from genssd.engine.amounts import format_count
from genssd.engine.budget import Budget, BudgetMeter
from genssd.engine.errors import InputError, WorkerError

logger = logging.getLogger("genssd.pool")

MAX_FAILED_STARTS = 3
"""Number of workers that may end one after the other while they load their models."""
MAX_BARREN_ENDS = 24
"""Number of workers that may end one after the other without any item finished or given up between."""
WAKE_INTERVAL = 0.25
"""Seconds after which the budget is looked at although no worker says anything."""
CLOSE_TIME = 5.0
"""Seconds that workers have to end by themselves."""

R = TypeVar("R")
M = TypeVar("M", bound=WorkerModels)
Result = tuple[int, Any]


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker process, as this process knows it."""

    recipe: Recipe[WorkerModels]
    process: BaseProcess
    pipe: Connection
    is_ready: bool = False
    is_idle: bool = True
    """Whether it has no work."""
    wants: bool = False
    """Whether it has asked for an item and got none yet."""
    reason: str | None = None
    """Its own words on why it failed; None where it had none."""

    @staticmethod
    def start(recipe: Recipe[WorkerModels]) -> _Worker:
        return _Worker(recipe, *start_process(run_worker, recipe))

    def describe_end(self) -> str:
        """Return what ended the process, which has ended, in words."""
        return describe_end(self.process, self.reason)


class ProcessPool(Generic[M]):
    """A `Pool` of worker processes; a context manager, which ends them."""

    is_own_process = False

    def __init__(self, models: RemoteModels, recipes: Sequence[Recipe[M]]) -> None:
        """Start a worker for every recipe. They load their models until `open` returns."""
        self.models = models
        self.size = len(recipes)
        self._workers = [_Worker.start(recipe) for recipe in recipes]
        self._hand_out = HandOut(())
        self._begin: Begin | None = None
        """The work that is being done."""
        self._results: deque[Result] = deque()
        self._ends: Counter[str] = Counter()
        """Number of workers that ended since one was ready ("starting") and since an item was done ("barren")."""
        self._logged: set[str] = set()

    def open(self) -> None:
        """Wait until every worker has loaded its models.

        Raises the errors of `Engine.from_pretrained`, WorkerError where workers end again and again, and InputError
        where they do not compute with the same kernels.
        """
        while not all(worker.is_ready for worker in self._workers):
            self._listen()

    def run(self, work: Work[M, R], budget: Budget = Budget()) -> Iterator[tuple[int, R | Stopped | Lost]]:
        """Yield every item of the work once, as soon as a worker has finished it; see `Pool`.

        Raises WorkerError where workers end again and again and nothing is finished.
        """
        meter = BudgetMeter(budget, ("total_budget.tokens", "total_budget.seconds"))
        meter.start()
        assert self._workers, "the budget of an earlier run has ended them"
        sampled_before = self.models.usage.sampled_tokens
        self._hand_out = HandOut(work.items)
        self._begin = Begin(pickle.dumps(work, protocol=pickle.HIGHEST_PROTOCOL))
        self._ends.clear()
        for worker in self._workers:
            self._begin_work(worker)
        while not self._hand_out.is_over or self._results:
            self.models.to_come = (self._hand_out.num_queued, work.most_tokens)
            self._listen(0.0 if self._results else WAKE_INTERVAL)
            meter.tokens = self.models.usage.sampled_tokens - sampled_before
            reached = meter.find_reached(more_tokens=1)
            if reached is not None and not self._hand_out.is_over:
                self._results.extend((item, Stopped(by=reached)) for item in self._hand_out.drain())
                self._kill_busy()
            if self._results:
                yield self._results.popleft()
        self.models.to_come = (0, 0)
        while any(not worker.is_idle for worker in self._workers):
            self._listen()
        self._begin = None

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

    def _listen(self, timeout: float | None = None) -> None:
        """Take every message that is there, after waiting for the first one."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in connection.wait(list(by_pipe), timeout):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            try:
                message = receive(pipe)
            except (EOFError, OSError):
                self._replace(worker)
            else:
                self._take(worker, message)
        self._feed()

    def _take(self, worker: _Worker, message: object) -> None:
        """Take one message of a worker."""
        if isinstance(message, Finished):
            self._hand_out.finish(worker, message.number)
            self._results.append((message.number, message.result))
            self._ends.clear()
        elif isinstance(message, Wanted):
            worker.wants = True
        elif isinstance(message, Counts):
            self.models.count(worker, message)
        elif isinstance(message, Ready):
            self._add(worker, message)
        elif isinstance(message, Idle):
            worker.is_idle, worker.wants = True, False
        elif isinstance(message, Log):
            if message.text not in self._logged:  # once, and not for every worker
                self._logged.add(message.text)
                logger.log(message.level, "%s", message.text)
        elif isinstance(message, Refused):
            self._refuse(worker, message)
        elif isinstance(message, Failed):
            worker.reason = message.reason

    def _add(self, worker: _Worker, ready: Ready) -> None:
        """Take a worker that has loaded its models, and let it take part in the work."""
        worker.is_ready = True
        self._ends["starting"] = 0
        launches = self.models.launches if any(w.is_ready for w in self._workers if w is not worker) else None
        if launches is not None and ready.launches is not None and launches.digest != ready.launches.digest:
            raise InputError(
                f"the devices are not alike: they take different kernel configurations ({launches.source}; "
                f"{ready.launches.source}), and rows would depend on the device; name devices of one kind"
            )
        self.models.add(worker, ready)
        self._begin_work(worker)

    def _begin_work(self, worker: _Worker) -> None:
        if self._begin is not None and worker.is_ready:
            worker.is_idle = False
            self._send(worker, self._begin)

    def _feed(self) -> None:
        """Answer the workers that have asked for an item."""
        if self._begin is None:
            return
        num_ready = sum(worker.is_ready for worker in self._workers)
        for worker in self._workers:
            if not worker.wants:
                continue
            number = self._hand_out.take(worker, num_ready)
            if number is not None:
                worker.wants = False
                self._send(worker, Item(number))
            elif self._hand_out.is_over:
                worker.wants = False
                self._send(worker, NoMore())

    def _send(self, worker: _Worker, message: object) -> None:
        with suppress(OSError):  # it has ended, which the next `_listen` finds
            send(worker.pipe, message)

    def _refuse(self, worker: _Worker, refused: Refused) -> None:
        """Raise an error that every worker would have; go on without one that has no room to start again."""
        others = [other for other in self._workers if other is not worker and other.is_ready]
        if worker.is_ready or not others or self._begin is None:
            raise refused.kind(refused.message)
        logger.warning(
            "a worker cannot be started again (%s); going on with %s",
            refused.message,
            format_count(len(others), "worker"),
        )
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join()

    def _replace(self, worker: _Worker) -> None:
        """Put the items of a worker that ended back into the queue, and start another one in its place."""
        worker.pipe.close()
        worker.process.join(CLOSE_TIME)
        worker.process.kill()
        worker.process.join()
        end = worker.describe_end()
        num_held = self._hand_out.count_held(worker)
        given_up = self._hand_out.end(worker)
        self.models.remove(worker)
        self._ends.update(["barren"] if worker.is_ready else ["starting", "barren"])
        for number in given_up:
            reason = f"the worker that did nothing else {end}, the last of {MAX_ENDS}"
            self._results.append((number, Lost(reason=reason)))
            self._ends.clear()
        if self._ends["starting"] >= MAX_FAILED_STARTS:
            raise WorkerError(
                f"a worker process {end} while it loaded the models, {MAX_FAILED_STARTS} times one after the other"
            )
        if self._ends["barren"] >= MAX_BARREN_ENDS:
            raise WorkerError(f"worker processes end again and again and nothing is finished: the last one {end}")
        again = ""
        if num_held > len(given_up):
            again = f", and does {format_count(num_held, 'item')} again that it had begun"
        logger.warning("a worker process %s; another one takes its place%s", end, again)
        self._workers[self._workers.index(worker)] = _Worker.start(worker.recipe)

    def _kill_busy(self) -> None:
        """End the workers, whose items are not wanted any more, and start no others."""
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers.clear()
