"""The pool of Ray actors over a stand-in for Ray: replies that are lost, actors that die, places that come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.fake_ray import FakeRay
from support.pool_works import FaultyWork, SlowWork
from support.tiny_pair import TinyPair

from genssd.distill.pool import ray_pool
from genssd.distill.pool.mailbox import Mailbox
from genssd.distill.pool.messages import Placed
from genssd.distill.pool.pool import Lost, Stopped
from genssd.distill.pool.ray_actor import EngineActor, Inbox
from genssd.distill.pool.ray_options import ActorRange, Team
from genssd.distill.pool.ray_pool import RayPool
from genssd.distill.pool.remote_models import LocalTokens, RemoteModels
from genssd.distill.pool.worker import EngineRecipe, serve
from genssd.engine.common.errors import InputError, WorkerError
from genssd.engine.common.model_choices import Role
from genssd.engine.search.budget import Budget
from genssd.engine.texts.chat_options import ChatOptions

PAIR: list[TinyPair] = []
"""The models that actors of this process have instead of loading some."""


class NearActor(EngineActor):
    """An actor whose engine is one of this process, or an error."""

    fault: Exception | None = None

    def __init__(self, recipe: bytes, cpus: int, package_version: str) -> None:
        self._mail, self._work = Mailbox(), b""
        self._mail.post(Placed(node="10.0.0.7", pid=1))

        def open_engine() -> Any:
            if self.fault is not None:
                raise self.fault
            return PAIR[0].engine

        threading.Thread(target=serve, args=(Inbox(self), open_engine, "node 10.0.0.7: "), daemon=True).start()


@pytest.fixture(autouse=True)
def near_actors(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ray_pool, "EngineActor", NearActor)
    monkeypatch.setattr(ray_pool, "RETRY_PAUSE", 0.0)
    PAIR[:] = [tiny_pair]
    yield
    PAIR.clear()


def make_pool(pair: TinyPair, ray: FakeRay, least: int = 2, most: int = 2, **fingerprints: str) -> RayPool:
    roles: tuple[Role, Role] = ("teacher", "student")
    tokens = LocalTokens(tokenizers={role: pair.engine.tokenizer(role) for role in roles}, reader=pair.engine.reader)
    team = Team(range=ActorRange(least, most), cpus=1, gpus=0, threads=1)
    known: dict[Role, str] = {role: fingerprints.get(role, pair.engine.fingerprints[role]) for role in roles}
    return RayPool(RemoteModels([tokens]), ray, EngineRecipe(arguments={}, chat=ChatOptions()), team, known)


@pytest.mark.parametrize("seed", range(3))
def test_lost_replies_lose_and_double_nothing(tiny_pair: TinyPair, seed: int) -> None:
    ray = FakeRay(seed=seed, fault_rate=0.2)
    with make_pool(tiny_pair, ray) as pool:
        pool.open()
        for length in (40, 7):  # one work after the other
            results = list(pool.run(FaultyWork(items=tuple(range(length)), faults={})))
            assert sorted(results) == [(i, i * i) for i in range(length)]
    assert ray.num_lost > 5
    assert len(ray.actors) == 2, "an actor that is out of reach for a moment is not replaced"


def test_an_actor_that_dies_is_replaced(tiny_pair: TinyPair, caplog: pytest.LogCaptureFixture) -> None:
    ray = FakeRay()
    with make_pool(tiny_pair, ray) as pool:
        pool.open()
        results = []
        for count, outcome in enumerate(pool.run(SlowWork(items=tuple(range(20))))):
            if count == 3:
                ray.kill(ray.actors[0])
            results.append(outcome)
    assert sorted(results) == [(i, i * i) for i in range(20)]
    assert len(ray.actors) == 3
    assert "a Ray actor on node 10.0.0.7 ended (its node has died); another one takes its place" in caplog.text


def test_an_item_that_ends_its_actors_is_given_up(tiny_pair: TinyPair) -> None:
    ray = FakeRay()
    with make_pool(tiny_pair, ray) as pool:
        pool.open()
        results = dict(pool.run(FaultyWork(items=tuple(range(8)), faults={2: "CUDA error"})))
    reason = "the worker that did nothing else on node 10.0.0.7 failed (RuntimeError: CUDA error), the last of 3"
    assert results == {i: i * i for i in range(8)} | {2: Lost(reason=reason)}


def test_an_actor_that_stays_out_of_reach_is_replaced(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pool, "PATIENCE", 0.05)
    ray = FakeRay()
    with make_pool(tiny_pair, ray) as pool:
        pool.open()
        submit = ray.submit

        def lose(actor: Any, arguments: Any) -> Any:
            ray._fault_rate = 1.0 if actor is ray.actors[0] else 0.0
            return submit(actor, arguments)

        monkeypatch.setattr(ray, "submit", lose)
        results = list(pool.run(FaultyWork(items=tuple(range(9)), faults={})))
    assert sorted(results) == [(i, i * i) for i in range(9)]
    assert "a Ray actor on node 10.0.0.7 was out of reach for 0.05 s" in caplog.text


def test_the_number_of_actors_follows_the_places(tiny_pair: TinyPair) -> None:
    ray = FakeRay(places=1)
    with make_pool(tiny_pair, ray, least=1, most=3) as pool:
        pool.open()
        assert pool.size == 1
        sizes = []
        for count, _ in enumerate(pool.run(SlowWork(items=tuple(range(60))))):
            if count == 2:
                ray.add_place()
                ray.add_place()
            sizes.append(pool.size)
        assert max(sizes) == 3, "actors that find a place take part"
        assert len(pool._workers) < 3, "what is left over gives its place back"
        assert len(list(pool.run(FaultyWork(items=(1, 2, 3), faults={})))) == 3


def test_a_budget_ends_the_actors(tiny_pair: TinyPair) -> None:
    ray = FakeRay()
    with make_pool(tiny_pair, ray) as pool:
        pool.open()
        results = dict(pool.run(SlowWork(items=tuple(range(1000))), Budget(seconds=0.2)))
    assert len(results) == 1000
    assert results[999] == Stopped(by="total_budget.seconds")
    assert all(actor.is_dead.is_set() for actor in ray.actors)


def test_a_node_without_the_model_is_named(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NearActor, "fault", InputError("model directory /data/m does not exist"))
    pool = make_pool(tiny_pair, FakeRay())
    with pytest.raises(InputError, match=r"^node 10\.0\.0\.7: model directory /data/m does not exist$"), pool:
        pool.open()


def test_a_node_with_another_model_is_refused(tiny_pair: TinyPair) -> None:
    pool = make_pool(tiny_pair, FakeRay(), student="0123456789abcdef")
    message = r"node 10\.0\.0\.7: the student there is another one than where the command runs .*, not 0123456789abcdef"
    with pytest.raises(InputError, match=message), pool:
        pool.open()


def test_actors_that_never_load_end_the_run(tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NearActor, "fault", RuntimeError("no kernel image"))
    pool = make_pool(tiny_pair, FakeRay(), least=1, most=1)
    message = r"a Ray actor on node 10\.0\.0\.7 failed \(RuntimeError: no kernel image\) while it loaded .*, 3 times"
    with pytest.raises(WorkerError, match=message), pool:
        pool.open()


def test_nodes_whose_processors_round_otherwise_are_refused(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(("avx2", "avx512", "avx2", "avx2"))
    monkeypatch.setattr("genssd.distill.pool.worker.native.instruction_set", lambda: next(names))
    pool = make_pool(tiny_pair, FakeRay())
    with pytest.raises(InputError, match=r"the nodes are not alike: they compute with avx(2|512) and with avx"), pool:
        pool.open()


def test_it_is_said_when_actors_find_no_place(
    tiny_pair: TinyPair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_pool, "PLACING_TIME", 0.05)
    ray = FakeRay(places=1)
    with make_pool(tiny_pair, ray) as pool:
        threading.Thread(target=lambda: (time.sleep(0.8), ray.add_place()), daemon=True).start()
        pool.open()
    assert "1 of 2 actors run so far: Ray starts them, or waits for a place with 1 CPU for each" in caplog.text
