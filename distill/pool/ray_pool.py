"""A pool of Ray actors, each with an engine of its own, on whatever nodes of a cluster have room.

Ray decides where an actor runs, starts nodes for actors that have no place yet (its autoscaler), and says when one has
ended, with its node or alone. Which actor gets which item, and what becomes of the items of one that ended, is decided
here as for worker processes (workers.py). The number of actors moves between two limits: all that Ray finds a place for
take part, and those for which nothing is left give theirs back.
"""

from __future__ import annotations

import logging
import pickle
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from typing import Any, ClassVar

from genssd.distill.pool.mailbox import Mailbox
from genssd.distill.pool.messages import Begin, Ended, Failed, Placed, Ready
from genssd.distill.pool.pool import Lost, Stopped, Work
from genssd.distill.pool.ray_actor import EngineActor
from genssd.distill.pool.ray_options import Team
from genssd.distill.pool.remote_models import RemoteModels
from genssd.distill.pool.worker import Recipe, WorkerModels
from genssd.distill.pool.workers import WAKE_INTERVAL, M, R, Worker, WorkerPool
from genssd.engine.common.amounts import format_count
from genssd.engine.common.model_choices import Role
from genssd.engine.search.budget import Budget

logger = logging.getLogger("genssd.pool")

PATIENCE = 60.0
"""Seconds for which an actor may be out of reach before another one takes its place."""
RETRY_PAUSE = 1.0
"""Seconds between two calls of an actor that is out of reach."""
PLACING_TIME = 20.0
"""Seconds after which it is said that actors do not run yet."""
MAX_CALLS = 4
"""Number of calls of one actor that are made in parallel: one waits for letters, others bring some."""
DETAIL = re.compile(r"(?:Worker exit detail: |because )(.*?)(?: Some common causes|$)", re.DOTALL)
NODE = re.compile(r"\bip[:=] ?([\da-fA-F.:]+\w)")


class RayWorker(Worker):
    """A Ray actor, as the process of the command knows it."""

    def __init__(self, ray: Any, recipe: Recipe[WorkerModels], team: Team) -> None:
        super().__init__(recipe)
        self._ray = ray
        self._mail = Mailbox()
        options = {
            "num_cpus": team.cpus,
            "num_gpus": team.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": MAX_CALLS,
            "scheduling_strategy": "SPREAD",
        }
        content = pickle.dumps(recipe, protocol=pickle.HIGHEST_PROTOCOL)
        self._actor = ray.remote(EngineActor).options(**options).remote(content, team.cpus, version("genssd"))
        self.calls: list[Any] = []
        """Calls whose replies have not come."""
        self.node: str | None = None
        """Address of the node that it runs on; None before it is known."""
        self.pid: int | None = None
        """Number of its process on that node; None before it is known."""
        self.work: Any = None
        """Reference of the pickle of the work that is begun."""
        self._begins = False
        """Whether a letter that it has not confirmed begins the work."""
        self._end: str | None = None
        self._unreachable_since: float | None = None
        self._next_call = 0.0
        self.call()

    def call(self) -> None:
        """Ask for letters, and bring those that it has not confirmed."""
        letters = self._mail.list_posted()
        work = self.work if letters and self._begins else None
        self.calls.append(self._actor.exchange.remote(self._mail.num_received, letters, work))

    def send(self, message: object) -> None:
        """Send a message at once, although a call waits; do nothing where the actor has ended."""
        self._mail.post(message)
        self._begins = self._begins or isinstance(message, Begin)
        if len(self.calls) < MAX_CALLS:
            self.call()

    def hear(self, call: Any) -> Iterator[object]:
        """Yield the messages in the reply of a call, an `Ended` where the actor has ended, and call it again."""
        self.calls.remove(call)
        errors = self._ray.exceptions
        try:
            confirmed, letters = self._ray.get(call)
        except errors.ActorUnavailableError as error:
            if self._wait_for_recovery():
                return
            self._end = f"on node {self.node} was out of reach for {PATIENCE:g} s ({_shorten(error)})"
            yield Ended()
            return
        except errors.RayError as error:
            self.node = self.node or _find_node(error)
            self._end = f"{f'on node {self.node} ' if self.node else ''}ended ({_shorten(error)})"
            yield Ended()
            return
        self._unreachable_since = None
        self._mail.take_in(confirmed, letters)
        self._begins = self._begins and bool(self._mail.list_posted())
        if not self.calls or self._mail.list_posted():
            self.call()
        while self._mail.poll(0.0):
            message = self._mail.receive()
            if isinstance(message, Placed):
                self.node, self.pid = message.node, message.pid
            else:
                yield message
            if isinstance(message, Failed):  # its process lives on, and does nothing
                yield Ended()

    def call_again(self) -> None:
        """Call an actor that was out of reach, when it is time."""
        if not self.calls and time.monotonic() >= self._next_call:
            self.call()

    def end(self) -> None:
        """End the actor, whether it runs, waits for a place or has ended."""
        with suppress(Exception):  # it has ended, or Ray is not there any more
            self._ray.kill(self._actor)
        self.calls.clear()

    def describe_end(self) -> str:
        """Return what ended the actor, in words."""
        if self.reason is not None:
            return f"on node {self.node} failed ({self.reason})"
        return self._end or "was ended"

    def _wait_for_recovery(self) -> bool:
        """Return whether an actor that is out of reach is called again."""
        now = time.monotonic()
        if self._unreachable_since is None:
            self._unreachable_since = now
        self._next_call = now + RETRY_PAUSE
        return now - self._unreachable_since < PATIENCE


class RayPool(WorkerPool[RayWorker, M]):
    """A `Pool` of Ray actors; a context manager, which ends them."""

    noun: ClassVar[str] = "Ray actor"
    peers: ClassVar[str] = "nodes"

    def __init__(
        self, models: RemoteModels, ray: Any, recipe: Recipe[M], team: Team, fingerprints: Mapping[Role, str]
    ) -> None:
        """Start as many actors as may be. They load their models until `open` returns.

        ray: the package, connected with the cluster. recipe: for every actor. fingerprints: those of the first teacher
        and the student as the process of the command finds them.
        """
        super().__init__(models)
        self._ray = ray
        self._recipe = recipe
        self._team = team
        self._fingerprints = fingerprints
        self._work: Any = None
        self._fill()

    @property
    def size(self) -> int:
        """Number of actors that Ray has a place for, but at least the smallest number."""
        return max(self._team.range.least, sum(worker.is_ready for worker in self._workers))

    def open(self) -> None:
        """Wait until the smallest number of actors have loaded their models; see `WorkerPool.open`."""
        least, started, is_said = self._team.range.least, time.monotonic(), False
        while sum(worker.is_ready for worker in self._workers) < least:
            self._listen(WAKE_INTERVAL)
            placed = sum(worker.node is not None for worker in self._workers)
            if placed < least and not is_said and time.monotonic() - started > PLACING_TIME:
                is_said = True
                logger.warning(
                    "%d of %s run so far: Ray starts them, or waits for a place with %s for each",
                    placed,
                    format_count(least, "actor"),
                    self._team.describe_each(),
                )

    def run(self, work: Work[M, R], budget: Budget = Budget()) -> Iterator[tuple[int, R | Stopped | Lost]]:
        """Yield every item of the work once; see `Pool`."""
        self._fill()
        yield from super().run(work, budget)
        self._work = None
        for worker in self._workers:
            worker.work = None

    def __enter__(self) -> RayPool[M]:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_all()

    def _fill(self) -> None:
        """Start actors up to the largest number."""
        while len(self._workers) < self._team.range.most:
            self._workers.append(self._start(self._recipe))

    def _start(self, recipe: Recipe[WorkerModels]) -> RayWorker:
        worker = RayWorker(self._ray, recipe, self._team)
        worker.work = self._work
        return worker

    def _make_begin(self, work: bytes) -> Begin:
        """Put the pickle of a work into the object store, from which every node takes it once."""
        self._work = self._ray.put(work)
        for worker in self._workers:
            worker.work = self._work
        return Begin(b"")

    def _receive(self, timeout: float | None) -> Iterator[tuple[RayWorker, object]]:
        for worker in self._workers:
            worker.call_again()
        by_call = {call: worker for worker in self._workers for call in worker.calls}
        timeout = WAKE_INTERVAL if timeout is None else timeout
        if not by_call:
            time.sleep(timeout)
            return
        calls = list(by_call)
        replies, _ = self._ray.wait(calls, num_returns=1, timeout=timeout)
        if replies:
            replies, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in replies:
            worker = by_call[call]
            if call in worker.calls:  # it has not ended meanwhile
                for message in worker.hear(call):
                    yield worker, message

    def _find_difference(self, worker: RayWorker, ready: Ready) -> str | None:
        found = ready.pairs[0].fingerprints
        wrong = [role for role, value in self._fingerprints.items() if found.get(role) != value]
        if wrong:
            return (
                f"node {worker.node}: the {wrong[0]} there is another one than where the command runs (fingerprint "
                f"{found.get(wrong[0])}, not {self._fingerprints[wrong[0]]}); copy the same checkpoint to every node"
            )
        return super()._find_difference(worker, ready)

    def _rest(self, worker: RayWorker) -> None:
        """Give the place of an actor back for which nothing is left, unless the smallest number are needed."""
        if len(self._workers) > self._team.range.least:
            self._workers.remove(worker)
            self.models.remove(worker)
            worker.end()


def _shorten(error: Exception) -> str:
    """Return what Ray says of an actor that ended as one short line."""
    text = str(error)
    if "No module named 'genssd'" in text:
        return "genssd is not installed there, in the environment in which `ray start` runs"
    match = DETAIL.search(text)
    return " ".join((match[1] if match else text).split())[:300].rstrip(". ")


def _find_node(error: Exception) -> str | None:
    """Return the address of the node that Ray names in an error."""
    match = NODE.search(str(error))
    return None if match is None else match[1]
