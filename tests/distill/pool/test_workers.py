"""The pool of workers over stand-ins that finish at once: what it holds while the command is the slower side."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

from genssd.distill.pool.messages import Finished, Idle, Item, NoMore, Wanted
from genssd.distill.pool.pool import Stopped
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.worker import Recipe, WorkerModels
from genssd.distill.pool.workers import MAX_WAITING, Worker, WorkerPool
from genssd.engine.search.budget import Budget

NUM_WORKERS = 40


class InstantWorker(Worker):
    """A worker that has finished an item when it is handed one."""

    def __init__(self, usage: Any) -> None:
        super().__init__(cast(Any, None))
        self.is_ready = True
        self.said: deque[object] = deque()
        self._usage = usage

    def send(self, message: object) -> None:
        if isinstance(message, Item):
            self._usage.sampled_tokens += 1
            self.said += [Finished(message.number, None), Wanted()]
        else:
            self.said.append(Idle() if isinstance(message, NoMore) else Wanted())

    def end(self) -> None: ...

    def describe_end(self) -> str:
        raise AssertionError("nothing ends these")


class InstantPool(WorkerPool[InstantWorker, Any]):
    def __init__(self) -> None:
        models = SimpleNamespace(usage=SimpleNamespace(sampled_tokens=0), to_come=None)
        super().__init__(cast(RemoteModels, models))
        self._workers = [InstantWorker(models.usage) for _ in range(NUM_WORKERS)]

    def _start(self, recipe: Recipe[WorkerModels]) -> InstantWorker:
        raise AssertionError("nothing ends these")

    def _receive(self, timeout: float | None) -> Iterator[tuple[InstantWorker, object]]:
        for worker in self._workers:
            while worker.said:
                yield worker, worker.said.popleft()


def test_results_that_wait_for_the_command_are_few() -> None:
    pool = InstantPool()
    work = SimpleNamespace(items=range(20 * NUM_WORKERS), most_tokens=0)
    done, most = [], 0
    for item, _ in pool.run(cast(Any, work)):
        done.append(item)
        most = max(most, len(pool._results))
    assert sorted(done) == list(work.items)
    assert most <= MAX_WAITING + NUM_WORKERS


def test_what_is_finished_when_a_budget_ends_is_kept_and_the_rest_is_stopped() -> None:
    pool = InstantPool()
    work = SimpleNamespace(items=range(20 * NUM_WORKERS), most_tokens=1)
    outcomes = dict(pool.run(cast(Any, work), Budget(tokens=5 * NUM_WORKERS)))
    stopped = [item for item, outcome in outcomes.items() if isinstance(outcome, Stopped)]
    assert sorted(outcomes) == list(work.items)
    assert len(outcomes) - len(stopped) == pool.models.usage.sampled_tokens >= 5 * NUM_WORKERS
