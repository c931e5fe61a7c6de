"""A stand-in for the package Ray whose actors are objects of this process, and whose calls may fail as Ray's do.

Every call is made in a thread of its own. A fault takes the call's reply away, before or after the actor has done it,
as a network does; the caller sees `ActorUnavailableError` and cannot tell which.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class ActorDiedError(RayError):
    pass


class ActorUnavailableError(RayError):
    pass


class FakeRay:
    """The part of the package that a pool uses. fault_rate: probability that a call's reply is lost."""

    exceptions = SimpleNamespace(
        RayError=RayError, ActorDiedError=ActorDiedError, ActorUnavailableError=ActorUnavailableError
    )

    def __init__(self, *, seed: int = 0, fault_rate: float = 0.0, places: int = 1 << 30) -> None:
        """places: number of actors that find a place at the same time; others wait."""
        self._random = random.Random(seed)
        self._fault_rate = fault_rate
        self._threads = ThreadPoolExecutor(64)
        self._places = threading.Semaphore(places)
        self.actors: list[FakeActor] = []
        self.num_lost = 0

    def remote(self, actor_class: Any) -> Any:
        def start(*arguments: Any) -> FakeActor:
            self.actors.append(FakeActor(self, actor_class, arguments))
            return self.actors[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def submit(self, actor: FakeActor, arguments: Sequence[Any]) -> Future[Any]:
        fault = self._random.choice(("before", "after")) if self._random.random() < self._fault_rate else None
        return self._threads.submit(self._call, actor, arguments, fault)

    def _call(self, actor: FakeActor, arguments: Sequence[Any], fault: str | None) -> Any:
        reply = None if fault == "before" else actor.do(arguments)
        if actor.is_dead.is_set():
            raise ActorDiedError("The actor is dead because its node has died. Some common causes include: many")
        if fault is not None:
            self.num_lost += 1
            raise ActorUnavailableError("The actor is temporarily unavailable.")
        return reply

    def wait(self, calls: Sequence[Future[Any]], *, num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        if num_returns == 1:
            wait(calls, timeout, "FIRST_COMPLETED")
        done = [call for call in calls if call.done()]
        return done[:num_returns], [call for call in calls if call not in done[:num_returns]]

    def get(self, call: Future[Any]) -> Any:
        return call.result()

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: FakeActor) -> None:
        actor.is_dead.set()

    def take_place(self, actor: FakeActor) -> bool:
        while not actor.is_dead.is_set():
            if self._places.acquire(timeout=0.01):
                return True
        return False

    def add_place(self) -> None:
        self._places.release()


class FakeActor:
    """An actor, which begins when there is a place for it."""

    def __init__(self, ray: FakeRay, actor_class: Any, arguments: Sequence[Any]) -> None:
        self._ray = ray
        self.is_dead = threading.Event()
        self.object: Any = None
        self._begun = threading.Event()
        threading.Thread(target=self._begin, args=(actor_class, arguments), daemon=True).start()
        self.exchange = SimpleNamespace(remote=lambda *given: ray.submit(self, given))

    def _begin(self, actor_class: Any, arguments: Sequence[Any]) -> None:
        if not self._ray.take_place(self):
            return
        self.object = actor_class(*arguments)
        self._begun.set()
        self.is_dead.wait()
        self._ray.add_place()

    def do(self, arguments: Sequence[Any]) -> Any:
        while not self._begun.wait(0.01):
            if self.is_dead.is_set():
                return None
        box: list[Any] = []
        thread = threading.Thread(target=lambda: box.append(self.object.exchange(*arguments)), daemon=True)
        thread.start()
        while thread.is_alive() and not self.is_dead.is_set():
            time.sleep(0.001)
        return box[0] if box else None
