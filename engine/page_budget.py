"""The pages that expansions in flight may still take, so that no step ever runs out of cache.

An expansion is admitted only when the cache can take it at its longest, in addition to all that is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genssd.engine.expansion import Expansion
from genssd.engine.runner import ModelRunner


@dataclass(frozen=True, slots=True)
class Reservation:
    """The most pages that an expansion in flight takes of one model's pool."""

    runner: ModelRunner
    prefix: int
    """Pages for the pending tokens of the parent; taken before the first candidate exists."""
    candidates: int
    """Pages for all candidates together."""

    @property
    def total(self) -> int:
        """Number of pages in all."""
        return self.prefix + self.candidates


Reservations = dict[Expansion, list[Reservation]]
"""Reservations of all expansions in flight on one engine, whichever call they belong to."""


class PageBudget:
    """The reservations of one call, made next to those of all other calls on the engine."""

    def __init__(self, runners: Sequence[ModelRunner], reservations: Reservations) -> None:
        self._runners = runners
        self._reservations = reservations

    def fits(self, expansions: Sequence[Expansion]) -> bool:
        """Return whether the cache can take these expansions at their longest, in addition to all in flight."""
        return all(
            runner.tree.pool.num_free - self._outstanding(runner)
            >= sum(_reservation(runner, expansion).total for expansion in expansions)
            for runner in self._runners
        )

    def missing_pages(self, expansion: Expansion) -> int:
        """Return how many pages an otherwise empty cache would lack for this expansion; 0 if it fits."""
        totals = [(runner, _reservation(runner, expansion).total) for runner in self._runners]
        return max(0, *(total - runner.tree.pool.num_pages for runner, total in totals))

    def reserve(self, expansion: Expansion) -> None:
        """Reserve the pages of an expansion that fits."""
        self._reservations[expansion] = [_reservation(runner, expansion) for runner in self._runners]

    def release(self, expansion: Expansion) -> None:
        """Give up the reservation of an expansion that is complete or cancelled; of any other, do nothing."""
        self._reservations.pop(expansion, None)

    def _outstanding(self, runner: ModelRunner) -> int:
        """Return the number of pages reserved for the expansions in flight and not taken yet."""
        outstanding = 0
        for expansion, reservations in self._reservations.items():
            paths = [child.state(runner.role).path for child in expansion.children]
            taken = sum(len(path.leaf.pages) for path in paths if path is not None)
            for reservation in reservations:
                if reservation.runner is runner:
                    outstanding += reservation.candidates - taken + (0 if expansion.children else reservation.prefix)
        return outstanding


def _reservation(runner: ModelRunner, expansion: Expansion) -> Reservation:
    size = runner.tree.pool.page_size
    num_pending = len(expansion.parent.state(runner.role).pending)
    # one page more each: a half-filled page is copied on the first write
    return Reservation(
        runner=runner,
        prefix=-(-num_pending // size) + 1,
        candidates=expansion.n * (-(-expansion.longest // size) + 1),
    )
