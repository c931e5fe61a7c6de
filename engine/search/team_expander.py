"""The expansions of several teachers: each runs on the expander of its own teacher, and all share one page budget."""

from __future__ import annotations

import time
from collections.abc import Sequence

from genssd.engine.decoding.any_expander import AnyExpander
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.page_budget import PageBudget, Reservations
from genssd.engine.host.threads import computes
from genssd.engine.models.runner import ModelRunner


class TeamExpander:
    """The `AnyExpander` of a search with several teachers. members: the expander of each teacher, in their order.

    A step is a step of each teacher that has something to do. Its seconds, in which the student scores what is
    complete, are divided equally between the candidates in flight (`Expansion.seconds`).
    """

    def __init__(self, members: Sequence[AnyExpander], reservations: Reservations) -> None:
        self._members = members
        self.usage = members[0].usage
        self.runners: Sequence[ModelRunner] = list(dict.fromkeys(runner for one in members for runner in one.runners))
        self.pages = PageBudget(self.runners, reservations)
        for member in members:
            member.pages = self.pages
        self._in_flight: list[dict[Expansion, None]] = [{} for _ in members]

    @property
    def threads(self) -> int | None:
        """Number of threads that compute; None for the default."""
        return self.runners[0].threads

    @property
    def has_room(self) -> bool:
        """Whether another expansion would be worked on at once, whichever teacher writes."""
        return all(member.has_room for member in self._members)

    @property
    def is_idle(self) -> bool:
        """Whether no teacher has anything to do."""
        return all(member.is_idle for member in self._members)

    @computes
    def submit(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions that fit and start together."""
        self.usage.prefill_tokens += self.pages.open(expansions)
        self.start(expansions)

    def start(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions for which the pages are reserved already."""
        for writer, member in enumerate(self._members):
            own = [expansion for expansion in expansions if expansion.parent.writer == writer]
            if own:
                member.start(own)
                self._in_flight[writer].update(dict.fromkeys(own))

    def cancel(self, expansion: Expansion) -> None:
        """Stop an expansion and drop its candidates, as if it had not been submitted."""
        writer = expansion.parent.writer
        self._in_flight[writer].pop(expansion, None)
        self._members[writer].cancel(expansion)

    def step(self, *, waits: bool = True) -> list[Expansion]:
        """Go on with the candidates of every teacher; return the expansions that are complete and scored.

        Those that are `unreadable` or `failed` are complete and not scored. waits: see `AnyExpander.step`; where
        several teachers have something to do, none waits for a server.
        """
        busy = [writer for writer, member in enumerate(self._members) if not member.is_idle]
        complete: list[Expansion] = []
        for writer in busy:
            started = time.perf_counter()
            done = self._members[writer].step(waits=waits and len(busy) == 1)
            self._count(writer, time.perf_counter() - started)
            for expansion in done:
                self._in_flight[writer].pop(expansion, None)
            complete += done
        return complete

    def _count(self, writer: int, seconds: float) -> None:
        """Divide the seconds of a teacher's step between its expansions, by their numbers of candidates."""
        expansions = self._in_flight[writer]
        total = sum(expansion.n for expansion in expansions)
        for expansion in expansions:
            expansion.seconds += seconds * expansion.n / total
