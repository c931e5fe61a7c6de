"""The items of a command, done by one engine or by several: what is handed out, taken back, and by whom.

A command describes its work (`Work`), and a `Pool` runs it:

    for item, result in pool.run(work):
        journal.append(...)

`OwnProcess` runs it on an engine of this process. `ProcessPool` (processes.py) hands the items to worker processes with
an engine each. Only the process of the command writes. Another pool, of workers on other machines, follows the same
protocol: it ships `Work` to its engines, gives each a `Feed` that hands out items (hand_out.py decides which), and
yields what they return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from genssd.engine.decoding.feed import Feed
from genssd.engine.engine import Engine
from genssd.engine.search.budget import Budget, BudgetName
from genssd.engine.setup.model_facts import ModelFacts

R = TypeVar("R")
M_contra = TypeVar("M_contra", contravariant=True)
"""The models that do a work: an engine, or others that a worker can open."""
R_co = TypeVar("R_co", covariant=True)


class Work(Protocol[M_contra, R_co]):
    """What models do with the items of a command. It can be pickled, and so can its results.

    A result depends on its item, and not on the process that has done it or on what else that process was given.
    """

    @property
    def items(self) -> Sequence[int]:
        """Numbers of the items to do, in order. Those of which most is to do come first, where that is known."""
        ...

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that one item may sample; 0 where none are sampled."""
        ...

    def run(self, models: M_contra, feed: Feed | None, budget: Budget, /) -> Iterator[tuple[int, R_co | Stopped]]:
        """Yield the items with their results, each as soon as it is finished.

        feed: hands out the items that this process does; None: it does all of them, within the budget.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """In place of a result: the item was not finished, because the budget of all items is reached."""

    by: BudgetName


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """In place of a result: the item was given up, because the worker that did it ended again and again."""

    reason: str


class Pool(Protocol):
    """The engines of a command."""

    @property
    def models(self) -> ModelFacts:
        """The models, which are the same in all engines."""
        ...

    @property
    def size(self) -> int:
        """Number of engines."""
        ...

    @property
    def is_own_process(self) -> bool:
        """Whether this process does the work, which may then hold what cannot be sent to another one.

        A pool of one engine may be another process: that of the only GPU.
        """
        ...

    def run(self, work: Work[Engine, R], budget: Budget = Budget()) -> Iterator[tuple[int, R | Stopped | Lost]]:
        """Yield every item of the work once, as soon as it is known what has become of it.

        budget: limits of all items together. Raises the errors of the work.
        """
        ...


class OwnProcess:
    """A pool of one engine, in this process."""

    size = 1
    is_own_process = True

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def models(self) -> ModelFacts:
        """The engine itself."""
        return self._engine

    def run(self, work: Work[Engine, R], budget: Budget = Budget()) -> Iterator[tuple[int, R | Stopped | Lost]]:
        """Yield every item as soon as the engine has finished it."""
        yield from work.run(self._engine, None, budget)
