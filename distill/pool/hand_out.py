"""Which worker does which item: the queue, what every worker has, and what becomes of it when the worker ends.

A worker asks for as many items as its engine has room for. Where few are left it would take those that another one
could do at the same time, so none has more than its part of all that are not finished: ceil(items / workers).

The items of a worker that ended are done again, the first ones in the queue. Nobody knows which of them ended it, so
they come in smaller and smaller company: after each such end a worker has at most a quarter as many at a time, down to
one that it does alone. An item whose worker ended three times while it did nothing else is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

MAX_ENDS = 3
"""Number of workers that may end while they do one item alone, before the item is given up."""
SHRINKING = 4
"""Factor by which the company of an item becomes smaller when its worker ends."""
UNLIMITED = 1 << 30


@dataclass(slots=True)
class _Item:
    number: int
    company: int = UNLIMITED
    """Maximum number of items that a worker has at a time together with this one, itself included."""
    ends: int = 0
    """Number of workers that ended while they did nothing but this item."""


@dataclass(slots=True)
class HandOut:
    """The items of a run until they are finished or given up. A worker is any key."""

    numbers: Iterable[int]
    _queue: deque[_Item] = field(init=False)
    _held: dict[Hashable, dict[int, _Item]] = field(init=False, default_factory=dict)
    """Items that every worker has, by number."""
    _num_held: int = field(init=False, default=0)
    """Number of items that workers have; it is kept, since it is asked for with every message of every worker."""

    def __post_init__(self) -> None:
        self._queue = deque(map(_Item, self.numbers))

    @property
    def num_queued(self) -> int:
        """Number of items that no worker has."""
        return len(self._queue)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return not self._queue and not self._num_held

    def count_held(self, worker: Hashable) -> int:
        """Return how many items a worker has."""
        return len(self._held.get(worker, ()))

    @property
    def num_unfinished(self) -> int:
        """Number of items that are neither finished nor given up."""
        return len(self._queue) + self._num_held

    def take(self, worker: Hashable, num_workers: int = 1) -> int | None:
        """Give a worker the first item that it may have beside those that it has; None where there is none now.

        num_workers: number of workers that divide the items, this one included.
        """
        held = self._held.setdefault(worker, {})
        part = -(-self.num_unfinished // num_workers)
        limit = min((item.company for item in held.values()), default=UNLIMITED)
        if len(held) >= min(limit, part):
            return None
        for place, item in enumerate(self._queue):
            if len(held) < item.company:
                del self._queue[place]
                held[item.number] = item
                self._num_held += 1
                return item.number
        return None

    def finish(self, worker: Hashable, number: int) -> bool:
        """Note that a worker has finished one of its items; return False where it does not have it (any more)."""
        is_held = self._held.get(worker, {}).pop(number, None) is not None
        self._num_held -= is_held
        return is_held

    def end(self, worker: Hashable) -> list[int]:
        """Take the items of a worker that ended back into the queue; return those that are given up instead."""
        held = list(self._held.pop(worker, {}).values())
        self._num_held -= len(held)
        given_up = []
        for item in reversed(held):
            item.ends += len(held) == 1
            item.company = max(1, min(item.company, len(held) // SHRINKING))
            if item.ends < MAX_ENDS:
                self._queue.appendleft(item)
            else:
                given_up.append(item.number)
        return given_up

    def drain(self) -> list[int]:
        """Return all items that are not finished, and forget them."""
        rest = [number for held in self._held.values() for number in held] + [item.number for item in self._queue]
        self._queue.clear()
        self._held.clear()
        self._num_held = 0
        return rest
