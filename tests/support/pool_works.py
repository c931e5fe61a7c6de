"""Works whose items end their worker, are refused, or are taken by as many as there are."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genssd.distill.score.leaf_work import GradientModels, LeafWork, find_spans
from genssd.engine.budget import Budget
from genssd.engine.engine import Engine
from genssd.engine.errors import InputError
from genssd.engine.feed import Feed


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultyWork:
    """Squares numbers. faults: what happens instead, by item."""

    items: tuple[int, ...]
    faults: Mapping[int, str]

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, Any]]:
        assert feed is not None
        while (item := feed.take(wait=True)) is not None:
            fault = self.faults.get(item)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "refused":
                raise InputError("item 1 cannot be squared")
            elif fault is not None:
                raise RuntimeError(fault)
            yield item, item**2


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyWork:
    """Takes all items that it is given before it does them; a result is how many it had at once."""

    items: tuple[int, ...]

    most_tokens: ClassVar[int] = 0

    def run(self, engine: Engine, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, int]]:
        assert feed is not None
        while (first := feed.take(wait=True)) is not None:
            held = [first]
            while (item := feed.take(wait=False)) is not None:
                held.append(item)
            for item in held:
                yield item, len(held)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlyLeafWork(LeafWork):
    """The work of `genssd leaf`; a process that begins the third trace is killed."""

    def run(self, models: GradientModels, feed: Feed | None, budget: Budget) -> Iterator[tuple[int, list[list[int]]]]:
        assert feed is not None
        while (item := feed.take(wait=True)) is not None:
            if item == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield item, find_spans(models, self.traces[item], self.share)
