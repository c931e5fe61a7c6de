"""What every pool of workers does, wherever they are: the hand-out, the results, the budget, and workers that end.

The process of the command hands out items and takes results; it alone writes. A worker that ends, whatever ended it, is
replaced, and its items are done again, to the same results. How workers are started and heard is left to a subclass:
processes of this machine (processes.py), or actors on the nodes of a Ray cluster (ray_pool.py).
"""

from __future__ import annotations

import logging
import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, Generic, TypeVar

from genssd.distill.pool.hand_out import MAX_ENDS, HandOut
from genssd.distill.pool.messages import (
    Begin,
    Counts,
    Ended,
    Failed,
    Finished,
    Idle,
    Item,
    Log,
    NoMore,
    Ready,
    Refused,
    Wanted,
)
from genssd.distill.pool.pool import Lost, Stopped, Work
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.worker import Recipe, WorkerModels
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError, WorkerError
from genssd.engine.search.budget import Budget, BudgetMeter

logger = logging.getLogger("genssd.pool")

MAX_FAILED_STARTS = 3
"""Number of workers that may end in one place, one after the other, while they load their models."""
MAX_BARREN_ENDS = 24
"""Number of workers that may end one after the other without any item finished or given up between."""
WAKE_INTERVAL = 0.25
"""Seconds after which the budget is looked at although no worker says anything."""
MAX_WAITING = 16
"""Number of results that may wait for the process of the command before it hears no worker any more.

More of them would only take memory: workers that finish faster than their results are written wait with them.
"""

R = TypeVar("R")
M = TypeVar("M", bound=WorkerModels)
Result = tuple[int, Any]


class Worker(ABC):
    """A worker, as the process of the command knows it."""

    def __init__(self, recipe: Recipe[WorkerModels]) -> None:
        self.recipe = recipe
        self.is_ready = False
        self.is_idle = True
        """Whether it has no work."""
        self.wants = False
        """Whether it has asked for an item and got none yet."""
        self.reason: str | None = None
        """Its own words on why it failed; None where it had none."""
        self.failed_starts = 0
        """Number of workers before it, in whose place it is, that ended one after the other while they loaded."""

    @abstractmethod
    def send(self, message: object) -> None:
        """Send a message; do nothing where the worker has ended."""

    @abstractmethod
    def end(self) -> None:
        """End the worker, which may have ended, and return when it has."""

    @abstractmethod
    def describe_end(self) -> str:
        """Return what ended the worker, which has ended, in words."""


W = TypeVar("W", bound=Worker)


class WorkerPool(ABC, Generic[W, M]):
    """A `Pool` of workers, without what starts and hears them."""

    is_own_process: ClassVar[bool] = False
    noun: ClassVar[str]
    """What messages call a worker."""
    peers: ClassVar[str]
    """What messages call the machines or devices that should be alike."""

    def __init__(self, models: RemoteModels) -> None:
        self.models = models
        self._workers: list[W] = []
        self._hand_out = HandOut(())
        self._begin: Begin | None = None
        """The work that is being done."""
        self._results: deque[Result] = deque()
        self._num_barren_ends = 0
        """Number of workers that ended since an item was finished or given up."""
        self._logged: set[str] = set()

    @abstractmethod
    def _start(self, recipe: Recipe[WorkerModels]) -> W:
        """Start a worker."""

    @abstractmethod
    def _receive(self, timeout: float | None) -> Iterator[tuple[W, object]]:
        """Yield every message that is there, after waiting for the first one, and an `Ended` of workers that ended.

        timeout: seconds to wait at most; None for no limit.
        """

    def open(self) -> None:
        """Wait until every worker has loaded its models.

        Raises the errors of `Engine.from_pretrained`, WorkerError where workers end again and again, and InputError
        where they do not compute alike.
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
        self._begin = self._make_begin(pickle.dumps(work, protocol=pickle.HIGHEST_PROTOCOL))
        self._num_barren_ends = 0
        for worker in self._workers:
            self._begin_work(worker)
        while not self._hand_out.is_over or self._results:
            self.models.to_come = (self._hand_out.num_queued, work.most_tokens)
            if len(self._results) < MAX_WAITING:
                self._listen(0.0 if self._results else WAKE_INTERVAL)
            meter.tokens = self.models.usage.sampled_tokens - sampled_before
            reached = meter.find_reached(more_tokens=1)
            if reached is not None and not self._hand_out.is_over:
                self._hear(0.0)  # what is finished and was not heard counts
                self._results.extend((item, Stopped(by=reached)) for item in self._hand_out.drain())
                self._end_all()
            if self._results:
                yield self._results.popleft()
        self.models.to_come = (0, 0)
        while any(not worker.is_idle for worker in self._workers):
            self._listen()
        self._begin = None

    def _make_begin(self, work: bytes) -> Begin:
        """Return the message with which a work, given as its pickle, begins."""
        return Begin(work)

    def _listen(self, timeout: float | None = None) -> None:
        """Take every message that is there, after waiting for the first one, and hand out items."""
        self._hear(timeout)
        self._feed()

    def _hear(self, timeout: float | None) -> None:
        """Take every message that is there, after waiting for the first one."""
        for worker, message in self._receive(timeout):
            self._take(worker, message)

    def _take(self, worker: W, message: object) -> None:
        """Take one message of a worker."""
        if isinstance(message, Finished):
            if self._hand_out.finish(worker, message.number):
                self._results.append((message.number, message.result))
                self._num_barren_ends = 0
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
        elif isinstance(message, Ended):
            self._replace(worker)

    def _add(self, worker: W, ready: Ready) -> None:
        """Take a worker that has loaded its models, and let it take part in the work if it does it like the others."""
        difference = self._find_difference(worker, ready)
        if difference is not None:
            self._refuse(worker, Refused(InputError, difference))
            return
        worker.is_ready = True
        self.models.add(worker, ready)
        self._begin_work(worker)

    def _find_difference(self, worker: W, ready: Ready) -> str | None:
        """Return why a worker would not do what the others do; None where it would."""
        if not any(other.is_ready for other in self._workers):
            return None
        first = next(iter(self.models.ready.values()))
        if first.launches is not None and ready.launches is not None and first.launches.digest != ready.launches.digest:
            return (
                f"the {self.peers} are not alike: they take different kernel configurations ({first.launches.source}; "
                f"{ready.launches.source}), and rows would depend on the device; take {self.peers} of one kind"
            )
        if first.instruction_set != ready.instruction_set:
            return (
                f"the {self.peers} are not alike: they compute with {first.instruction_set or 'a GPU'} and with "
                f"{ready.instruction_set or 'a GPU'}, whose roundings differ, and rows would depend on where they were "
                f"made; take {self.peers} of one kind"
            )
        return None

    def _begin_work(self, worker: W) -> None:
        if self._begin is not None and worker.is_ready:
            worker.is_idle = False
            worker.send(self._begin)

    def _feed(self) -> None:
        """Answer the workers that have asked for an item."""
        if self._begin is None:
            return
        num_ready = sum(worker.is_ready for worker in self._workers)
        for worker in list(self._workers):
            if not worker.wants:
                continue
            number = self._hand_out.take(worker, num_ready)
            if number is not None:
                worker.wants = False
                worker.send(Item(number))
            elif self._hand_out.is_over:
                worker.wants = False
                worker.send(NoMore())
            elif not self._hand_out.count_held(worker):
                self._rest(worker)

    def _rest(self, worker: W) -> None:
        """Decide what becomes of a worker for which there is no item, while others still have some."""

    def _refuse(self, worker: W, refused: Refused) -> None:
        """Raise an error that every worker would have; go on without one that has no room to start again."""
        others = [other for other in self._workers if other is not worker and other.is_ready]
        if worker.is_ready or not others or self._begin is None:
            raise refused.kind(refused.message)
        logger.warning(
            "a worker cannot take part (%s); going on with %s",
            refused.message,
            format_count(len(others), "worker"),
        )
        self._workers.remove(worker)
        worker.end()

    def _replace(self, worker: W) -> None:
        """Put the items of a worker that ended back into the queue, and start another one in its place."""
        if worker not in self._workers:
            return
        worker.end()
        end = worker.describe_end()
        num_held = self._hand_out.count_held(worker)
        given_up = self._hand_out.end(worker)
        self.models.remove(worker)
        self._num_barren_ends += 1
        for number in given_up:
            reason = f"the worker that did nothing else {end}, the last of {MAX_ENDS}"
            self._results.append((number, Lost(reason=reason)))
            self._num_barren_ends = 0
        failed_starts = 0 if worker.is_ready else worker.failed_starts + 1
        if failed_starts >= MAX_FAILED_STARTS:
            self._leave_out(worker, f"{end} while it loaded the models, {failed_starts} times one after the other")
            return
        if self._num_barren_ends >= MAX_BARREN_ENDS:
            raise WorkerError(f"workers end again and again and nothing is finished: the last {self.noun} {end}")
        again = ""
        if num_held > len(given_up):
            again = f", and does {format_count(num_held, 'item')} again that it had begun"
        logger.warning("a %s %s; another one takes its place%s", self.noun, end, again)
        successor = self._start(worker.recipe)
        successor.failed_starts = failed_starts
        self._workers[self._workers.index(worker)] = successor

    def _leave_out(self, worker: W, end: str) -> None:
        """Go on without a worker in whose place none starts any more; raise WorkerError where it is needed."""
        others = sum(other.is_ready for other in self._workers if other is not worker)
        if not others or self._begin is None:
            raise WorkerError(f"a {self.noun} {end}")
        logger.warning("a %s %s; going on with %s", self.noun, end, format_count(others, "worker"))
        self._workers.remove(worker)

    def _end_all(self) -> None:
        """End the workers, whose items are not wanted any more, and start no others."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
