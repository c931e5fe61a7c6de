"""The queue of a pool under random ends of workers: every item is finished or given up once, and lone ones alone."""

from __future__ import annotations

import random

import pytest

from genssd.distill.pool.hand_out import MAX_ENDS, HandOut


def test_items_come_in_order() -> None:
    queue = HandOut([5, 3, 4])
    assert [queue.take("a"), queue.take("b"), queue.take("a"), queue.take("b")] == [5, 3, 4, None]
    assert not queue.is_over
    for worker, item in (("a", 4), ("a", 5), ("b", 3)):
        queue.finish(worker, item)
    assert queue.is_over
    assert HandOut([]).is_over


def test_an_item_that_ends_every_worker_is_found_and_given_up() -> None:
    """An item that ends its worker is given up after tries of its own; the 63 others are done."""
    queue, finished, given_up, ends = HandOut(range(64)), set(), [], 0
    while not queue.is_over:
        held = []
        while (item := queue.take("worker")) is not None:
            held.append(item)
        if 17 in held:
            ends += 1
            given_up += queue.end("worker")
        else:
            for item in held:
                queue.finish("worker", item)
                finished.add(item)
    assert given_up == [17]
    assert finished == set(range(64)) - {17}
    assert ends == 3 + MAX_ENDS  # among 64, 16 and 4, then alone


def test_items_of_a_worker_that_ended_keep_their_order() -> None:
    queue = HandOut(range(8))
    assert [queue.take("a") for _ in range(8)] == list(range(8))
    assert queue.end("a") == []
    assert [queue.take("b") for _ in range(3)] == [0, 1, None], "a quarter of the company at a time"
    assert queue.take("c") == 2


@pytest.mark.parametrize("seed", range(20))
def test_random_ends_lose_and_double_nothing(seed: int) -> None:
    rng = random.Random(seed)
    killers = set(rng.sample(range(40), 3))
    queue, outcomes = HandOut(range(40)), []
    held: dict[str, list[int]] = {name: [] for name in "abc"}
    lone_ends: dict[int, int] = {}
    while not queue.is_over:
        worker = rng.choice("abc")
        event = rng.random()
        if event < 0.6:
            item = queue.take(worker)
            if item is not None:
                held[worker].append(item)
        elif killers & {*held[worker]} or (event > 0.99 and held[worker]):
            if len(held[worker]) == 1:
                lone_ends[held[worker][0]] = lone_ends.get(held[worker][0], 0) + 1
            outcomes += queue.end(worker)
            held[worker] = []
        elif held[worker]:
            item = held[worker].pop(rng.randrange(len(held[worker])))
            queue.finish(worker, item)
            outcomes.append(item)
        assert queue.count_held(worker) == len(held[worker])
    assert sorted(outcomes) == list(range(40))
    assert all(lone_ends[killer] == MAX_ENDS for killer in killers)


@pytest.mark.parametrize(("num_items", "num_workers"), [(1, 3), (4, 2), (5, 2), (7, 3), (64, 8), (3, 1)])
def test_no_worker_takes_more_than_its_part(num_items: int, num_workers: int) -> None:
    """The first one asks without end, and the others do the same with what is left."""
    queue, workers = HandOut(range(num_items)), [f"worker {i}" for i in range(num_workers)]
    counts = []
    for worker in workers:
        while queue.take(worker, num_workers) is not None:
            pass
        counts.append(queue.count_held(worker))
    assert sum(counts) == num_items
    assert max(counts) == -(-num_items // num_workers)


@pytest.mark.parametrize("seed", range(10))
def test_a_part_shrinks_with_what_is_left_and_somebody_may_always_take(seed: int) -> None:
    rng = random.Random(seed)
    num_workers, num_items = rng.randint(2, 5), rng.randint(1, 40)
    queue, held = HandOut(range(num_items)), {worker: list[int]() for worker in range(num_workers)}
    while not queue.is_over:
        unfinished = queue.num_queued + sum(map(len, held.values()))
        assert queue.num_unfinished == unfinished
        takers = 0
        for worker in rng.sample(range(num_workers), num_workers):
            item = queue.take(worker, num_workers)
            if item is not None:
                takers += 1
                held[worker].append(item)
                assert len(held[worker]) <= -(-unfinished // num_workers)
        assert takers or not queue.num_queued, "items wait, and nobody may take one"
        for worker in rng.sample(range(num_workers), rng.randint(1, num_workers)):
            if held[worker]:
                queue.finish(worker, held[worker].pop(rng.randrange(len(held[worker]))))


def test_draining_returns_all_that_is_not_finished() -> None:
    queue = HandOut(range(5))
    queue.take("a")
    queue.take("b")
    queue.finish("a", 0)
    assert sorted(queue.drain()) == [1, 2, 3, 4]
    assert queue.is_over
