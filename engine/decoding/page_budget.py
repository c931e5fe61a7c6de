"""The pages that expansions in flight may still take, so that no step ever runs out of cache.

An expansion is admitted only when the cache can take it at its longest, in addition to all that is in flight.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

from genssd.engine.common.amounts import format_count
from genssd.engine.decoding.branch import Branch
from genssd.engine.decoding.candidate_scoring import StudentRoom
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.restoring import innermost_spans, open_paths, shared_spans
from genssd.engine.decoding.shared_prefixes import SharedPrefixes
from genssd.engine.models.pages import count_pages
from genssd.engine.models.runner import ModelRunner
from genssd.engine.readers.prompt_ids import PromptIds


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
    """The pages of one call: what its prompts share, and its reservations next to those of all other calls.

    runners: the models whose caches the call uses. An expansion takes pages of those that its branch's session uses.
    """

    def __init__(self, runners: Sequence[ModelRunner], reservations: Reservations) -> None:
        self._runners = runners
        self._reservations = reservations
        self._prefixes = {runner: SharedPrefixes[PromptIds](runner, {}) for runner in runners}

    def share_prefixes(self, roots: Sequence[Branch]) -> None:
        """Let the prompts of these branches, which are to be expanded, share the pages of what they have in common.

        Tell every prompt that is over (`forget`), and the end of the call (`drop_prefixes`).
        """
        for runner in self._runners:
            prompts = [root.prompt for root in roots if root.session.uses(runner)]
            self._prefixes[runner] = SharedPrefixes(runner, {prompt: prompt.of(runner.role) for prompt in prompts})

    def forget(self, prompt: PromptIds) -> None:
        """Note that a prompt is over; free what no other prompt shares with it."""
        for prefixes in self._prefixes.values():
            prefixes.forget(prompt)

    def drop_prefixes(self) -> None:
        """Free all shared prefixes; none are shared any more."""
        for prefixes in self._prefixes.values():
            prefixes.close()

    def fits(self, expansions: Sequence[Expansion], *, collecting: bool = False) -> bool:
        """Return whether the cache can take these expansions at their longest, in addition to all in flight.

        The expansions start together: what their suspended parents share counts once (see restoring.py). Gives up
        prefixes that no running prompt holds, where their pages are needed. collecting: look for branches in cycles
        that nobody holds any more before saying no, which takes a moment.
        """
        if all(self._has_room(runner, expansions) for runner in self._runners):
            return True
        return collecting and gc.collect() > 0 and self.fits(expansions)

    def find_misfit(self, expansions: Sequence[Expansion]) -> str | None:
        """Return why candidates that start together do not fit into an otherwise empty cache; None if they do.

        The pages that their parents hold count as well.
        """
        reason = self._find_reason(expansions)
        if reason is None:
            return None
        longest = max(expansion.longest for expansion in expansions)
        return (
            f"{format_count(sum(expansion.n for expansion in expansions), 'candidate')} of up to "
            f"{format_count(longest, 'token')} {reason}; raise "
            "memory_bytes or memory_utilization, or ask for fewer or shorter ones"
        )

    def _find_reason(self, expansions: Sequence[Expansion]) -> str | None:
        for runner in self._runners:
            pool, prefixes = runner.tree.pool, self._prefixes[runner]
            parents = _find_parents(runner, expansions)
            paths = [parent.state(runner.role).path for parent in parents]
            paths += prefixes.paths(parent.prompt for parent in parents)
            num_pages = _pages_to_take(runner, expansions, prefixes) + runner.tree.count_held(paths)
            if num_pages > pool.num_pages:
                return f"need {pool.describe(num_pages)}; the {runner.role}'s cache has {pool.describe()}"
        return None

    def describe_need(self, expansions: Sequence[Expansion]) -> str:
        """Return how many pages expansions take of the fullest cache, and how many are free there, for messages."""
        needs = [
            (
                _pages_to_take(runner, expansions, self._prefixes[runner]),
                runner.tree.num_free - self._outstanding(runner),
                runner,
            )
            for runner in self._runners
        ]
        taken, free, runner = max(needs, key=lambda need: need[0] - need[1])
        pages, whole = format_count(taken, "page"), runner.tree.pool.describe()
        return f"{pages}, with {free} free of the {whole} of the {runner.role}'s cache,"

    def open(self, expansions: Sequence[Expansion]) -> int:
        """Give the parents of expansions that fit their paths and reserve pages; return how many tokens were computed.

        What they share is computed; the tokens after that stay pending.
        """
        num_computed = sum(
            open_paths(runner, _find_parents(runner, expansions), self._prefixes[runner]) for runner in self._runners
        )
        for expansion in expansions:
            self._reservations[expansion] = []
        for runner in self._runners:
            for expansion, is_first in _find_users(runner, expansions):
                self._reservations[expansion].append(_reservation(runner, expansion, is_first=is_first))
        return num_computed

    def release(self, expansion: Expansion) -> None:
        """Give up the reservation of an expansion that is complete or cancelled; of any other, do nothing."""
        self._reservations.pop(expansion, None)

    def room(self, runner: ModelRunner, expansion: Expansion) -> StudentRoom:
        """Return the pages of one model's pool that the candidates of an expansion in flight may take."""
        (own,) = (reserved for reserved in self._reservations[expansion] if reserved.runner is runner)
        return StudentRoom(reserved=own.candidates, free=max(0, runner.tree.num_free - self._outstanding(runner)))

    def _has_room(self, runner: ModelRunner, expansions: Sequence[Expansion]) -> bool:
        prefixes, kept = self._prefixes[runner], {expansion.parent.prompt for expansion in expansions}
        while runner.tree.num_free - self._outstanding(runner) < _pages_to_take(runner, expansions, prefixes):
            if not (prefixes.give_up(kept) or runner.tree.give_up(but=prefixes)):
                return False
        return True

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


def _find_users(runner: ModelRunner, expansions: Sequence[Expansion]) -> list[tuple[Expansion, bool]]:
    """Return the expansions that use a model, each with whether it is the first of those with the state of its parent.

    The branches of several teachers that hold one response share what the student has computed of it.
    """
    seen: set[int] = set()
    users: list[tuple[Expansion, bool]] = []
    for expansion in expansions:
        if expansion.parent.session.uses(runner):
            state = id(expansion.parent.state(runner.role))
            users.append((expansion, state not in seen))
            seen.add(state)
    return users


def _find_parents(runner: ModelRunner, expansions: Sequence[Expansion]) -> list[Branch]:
    """Return the branches whose states under a model some expansions use, each state once."""
    return [expansion.parent for expansion, is_first in _find_users(runner, expansions) if is_first]


def _pages_to_take(runner: ModelRunner, expansions: Sequence[Expansion], prefixes: SharedPrefixes[PromptIds]) -> int:
    """Return the most pages that expansions which start together take of one model's pool."""
    size, parents = runner.tree.pool.page_size, _find_parents(runner, expansions)
    unopened = {parent for parent in parents if parent.state(runner.role).path is None}
    total = sum(map(prefixes.count_pages, prefixes.missing(parent.prompt for parent in unopened)))
    spans = shared_spans(parents, runner.role, prefixes)
    innermost = innermost_spans(spans)
    total += sum(count_pages(span.start, span.end, size) for span in spans)
    for expansion, is_first in _find_users(runner, expansions):
        parent = expansion.parent
        span, num_shared = innermost.get(parent), prefixes.length(parent.prompt) if parent in unopened else 0
        num_shared = num_shared if span is None else span.end
        total += _reservation(runner, expansion, num_shared, is_first=is_first).total
    return total


def _reservation(
    runner: ModelRunner, expansion: Expansion, num_shared: int = 0, *, is_first: bool = True
) -> Reservation:
    """Return the most pages that an expansion takes.

    num_shared: number of its parent's tokens in shared spans. is_first: whether the pages for the pending tokens of the
    parent are counted here, and not with an expansion that shares its state.
    """
    size = runner.tree.pool.page_size
    state = expansion.parent.state(runner.role)
    num_pending = len(state.pending) - num_shared
    if not is_first:
        first, num_pending = (0 if state.path is None else state.path.length), len(state.pending)
        prefix = 0
    elif state.path is None:
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
