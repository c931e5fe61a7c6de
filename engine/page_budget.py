"""The pages that expansions in flight may still take, so that no step ever runs out of cache.

An expansion is admitted only when the cache can take it at its longest, in addition to all that is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genssd.engine.amounts import format_count
from genssd.engine.candidate_scoring import StudentRoom
from genssd.engine.expansion import Expansion
from genssd.engine.pages import count_pages
from genssd.engine.restoring import innermost_spans, shared_spans
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
        """Return whether the cache can take these expansions at their longest, in addition to all in flight.

        The expansions start together: what their suspended parents share counts once (see restoring.py).
        """
        return all(
            runner.tree.num_free - self._outstanding(runner) >= _pages_to_take(runner, expansions)
            for runner in self._runners
        )

    def find_misfit(self, expansions: Sequence[Expansion]) -> str | None:
        """Return why these expansions, which start together, do not fit into an otherwise empty cache; None if they do.

        The pages that their parents hold count as well.
        """
        for runner in self._runners:
            pool, paths = runner.tree.pool, [e.parent.state(runner.role).path for e in expansions]
            num_pages = _pages_to_take(runner, expansions) + runner.tree.count_held(paths)
            if num_pages > pool.num_pages:
                return f"need {pool.describe(num_pages)}; the {runner.role}'s cache has {pool.describe()}"
        return None

    def explain_misfit(self, expansions: Sequence[Expansion]) -> str | None:
        """Return the reason of `find_misfit` as a sentence about the candidates, with the fix; None if they fit."""
        reason = self.find_misfit(expansions)
        if reason is None:
            return None
        longest = max(expansion.longest for expansion in expansions)
        return (
            f"{format_count(sum(expansion.n for expansion in expansions), 'candidate')} of up to "
            f"{format_count(longest, 'token')} {reason}; raise "
            "memory_bytes or memory_utilization, or ask for fewer or shorter ones"
        )

    def describe_need(self, expansions: Sequence[Expansion]) -> str:
        """Return how many pages expansions take of the fullest cache, and how many are free there, for messages."""
        needs = [
            (_pages_to_take(runner, expansions), runner.tree.num_free - self._outstanding(runner), runner)
            for runner in self._runners
        ]
        taken, free, runner = max(needs, key=lambda need: need[0] - need[1])
        pages, whole = format_count(taken, "page"), runner.tree.pool.describe()
        return f"{pages}, with {free} free of the {whole} of the {runner.role}'s cache,"

    def reserve(self, expansion: Expansion) -> None:
        """Reserve the pages of an expansion that fits and whose parent is restored."""
        self._reservations[expansion] = [_reservation(runner, expansion) for runner in self._runners]

    def release(self, expansion: Expansion) -> None:
        """Give up the reservation of an expansion that is complete or cancelled; of any other, do nothing."""
        self._reservations.pop(expansion, None)

    def room(self, runner: ModelRunner, expansion: Expansion) -> StudentRoom:
        """Return the pages of one model's pool that the candidates of an expansion in flight may take."""
        (own,) = (reserved for reserved in self._reservations[expansion] if reserved.runner is runner)
        return StudentRoom(reserved=own.candidates, free=max(0, runner.tree.num_free - self._outstanding(runner)))

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


def _pages_to_take(runner: ModelRunner, expansions: Sequence[Expansion]) -> int:
    """Return the most pages that expansions which start together take of one model's pool."""
    size = runner.tree.pool.page_size
    spans = shared_spans([expansion.parent for expansion in expansions], runner.role)
    innermost = innermost_spans(spans)
    total = sum(count_pages(span.start, span.end, size) for span in spans)
    for expansion in expansions:
        span = innermost.get(expansion.parent)
        total += _reservation(runner, expansion, 0 if span is None else span.end).total
    return total


def _reservation(runner: ModelRunner, expansion: Expansion, num_shared: int = 0) -> Reservation:
    """Return the most pages that an expansion takes. num_shared: number of its parent's tokens in shared spans."""
    size = runner.tree.pool.page_size
    state = expansion.parent.state(runner.role)
    num_pending = len(state.pending) - num_shared
    if state.path is None:
        first = num_shared
        prefix = count_pages(first, first + num_pending, size)
    else:
        first = state.path.length
        prefix = runner.tree.pages_to_append(state.path, num_pending) if num_pending else 0
    first += num_pending
    return Reservation(
        runner=runner,
        prefix=prefix,
        candidates=expansion.n * count_pages(first, first + expansion.count_longest(runner.role), size),
    )
