"""Progress of a command: the stages and counts that it reports while it works, and what follows from them.

A command calls `begin` for every stage and then the object itself, with the number of items that are done. What the
models do meanwhile is read from the counts of the engine (engine/common/usage.py), at any moment and from any thread.
"""

from __future__ import annotations

import dataclasses
import math
import time
import weakref
from dataclasses import dataclass
from typing import Literal

from genssd.engine.common.usage import Usage
from genssd.engine.search.budget import Budget
from genssd.engine.setup.model_facts import ModelFacts

Work = Literal["items", "writing", "reading"]
"""What tells how far a stage is: its finished items alone | the tokens that the engine writes: all of the stage's
prompts are given to it in one call | the tokens that the engine reads, whose number is known."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """A stage of a command, and how far it is."""

    name: str
    unit: str = ""
    """What the items are, in the plural; "%" where the fraction of the stage is reported."""
    total: float = 0
    """Number of items; 0 where the stage has none."""
    done: float = 0
    done_before: float = 0
    """Number of items that were done before the stage began, in an earlier part of the run."""
    detail: str = ""
    """Further values of the moment, such as a loss."""
    engine: weakref.ref[ModelFacts] | None = None
    """Engine whose tokens and pages are shown. It is freed when the command drops it, to load another one."""
    work: Work = "items"
    to_read: int = 0
    """Largest number of tokens that the engine has to read in the stage."""
    budget: Budget = Budget()
    """Limits at which the stage ends although work is left."""
    usage_before: Usage | None = None
    """The engine's counts when the stage began."""
    started: float = dataclasses.field(default_factory=time.monotonic)


class Progress:
    """Receiver of a command's progress. This class ignores it; the console shows it (distill/console.py)."""

    def begin(
        self,
        name: str,
        *,
        unit: str = "",
        total: int = 0,
        done: int = 0,
        engine: ModelFacts | None = None,
        work: Work = "items",
        to_read: int = 0,
        budget: Budget = Budget(),
    ) -> None:
        """Begin a stage; the arguments are the fields of `Stage`. done: items done in an earlier part of the run."""
        usage = None if engine is None else dataclasses.replace(engine.usage)
        self.show(
            Stage(
                name=name, unit=unit, total=total, done=done, done_before=done,
                engine=None if engine is None else weakref.ref(engine), work=work, to_read=to_read,
                usage_before=usage, budget=budget,
            )
        )  # fmt: skip

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        """Report how many of the stage's items are done, and how many there are."""

    def show(self, stage: Stage) -> None:
        """Take a stage that begins now."""

    def note(self, text: str) -> None:
        """Take a sentence that is kept on the screen, such as how many rows were read."""

    def within(self, title: str) -> Progress:
        """Return a receiver for a part of this command, whose stages are named after the part."""
        return _Part(self, title)


SILENT = Progress()
"""The receiver that ignores everything."""


class _Part(Progress):
    """The progress of a part of a command, passed on to the progress of the whole."""

    def __init__(self, whole: Progress, title: str) -> None:
        self._whole = whole
        self._title = title

    def show(self, stage: Stage) -> None:
        stage.name = f"{self._title}, {stage.name}" if stage.name else self._title
        self._whole.show(stage)

    def __call__(self, done: float, total: float, detail: str = "") -> None:
        self._whole(done, total, detail)

    def note(self, text: str) -> None:
        self._whole.note(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What a stage has done so far, and what is left of it. Tokens count from the stage's begin."""

    seconds: float
    written: int = 0
    """Number of tokens sampled."""
    kept: int = 0
    """Number of sampled tokens that a search has kept."""
    scored: int = 0
    """Number of candidate tokens that the student has scored."""
    pruned: float | None = None
    """Fraction of the judged candidates of a search that were not kept; None without any."""
    read: int = 0
    """Number of tokens computed, those that were sampled and read again included."""
    tokens_left: float | None = None
    """Number of tokens that are still to be written or read; None where that is not known."""
    is_bound: bool = False
    """Whether less may be left: no prompt has shown yet how long its responses are."""
    seconds_left: float | None = None
    """Time to the end of the stage; None where nothing is done that would tell it."""

    @property
    def rate(self) -> float:
        """Number of tokens per second: of those sampled, where there are any, else of those computed."""
        return (self.written or self.read) / max(self.seconds, 1e-9)


def measure(stage: Stage, now: float) -> Measurement:
    """Return what a stage has done until the moment `now` of `time.monotonic`.

    A prompt takes as many tokens on average as were sampled so far per prompt that has ended, those of running prompts
    included (the estimate of a mean from observations that are cut off), and never more than it may.
    """
    seconds = max(now - stage.started, 1e-9)
    new_items, items_left = stage.done - stage.done_before, stage.total - stage.done
    by_items = seconds / new_items * items_left if new_items > 0 else None
    engine = None if stage.engine is None else stage.engine()
    if engine is None or stage.usage_before is None:
        return Measurement(seconds=seconds, seconds_left=by_items)
    now_usage, before = engine.usage, stage.usage_before
    written = now_usage.sampled_tokens - before.sampled_tokens
    read = now_usage.computed_tokens - before.computed_tokens
    if stage.work == "reading":
        left = max(stage.to_read - read, 0)
        by_tokens = seconds / read * left if read else None
        seconds_left = by_tokens if by_items is None else by_items
        return Measurement(
            seconds=seconds, read=read, tokens_left=left, is_bound=by_items is None, seconds_left=seconds_left
        )
    if stage.work == "items":
        return Measurement(seconds=seconds, written=written, read=read, seconds_left=by_items)
    judged = now_usage.judged_candidates - before.judged_candidates
    kept = now_usage.kept_candidates - before.kept_candidates
    planned = now_usage.planned_prompts - before.planned_prompts
    finished = now_usage.finished_prompts - before.finished_prompts
    most_left = max(now_usage.planned_tokens - before.planned_tokens - written, 0)
    mean = written / finished if finished else math.inf
    tokens_left = min(most_left, max(planned * mean - written, 0.0))
    if stage.budget.tokens is not None:
        tokens_left = min(tokens_left, max(stage.budget.tokens - written, 0))
    seconds_left = seconds / written * tokens_left if written else None
    if stage.budget.seconds is not None:
        until_end = max(stage.budget.seconds - seconds, 0.0)
        seconds_left = until_end if seconds_left is None else min(seconds_left, until_end)
    return Measurement(
        seconds=seconds,
        written=written,
        kept=now_usage.kept_tokens - before.kept_tokens,
        scored=now_usage.scored_tokens - before.scored_tokens,
        pruned=1.0 - kept / judged if judged else None,
        read=read,
        tokens_left=tokens_left,
        is_bound=not finished,
        seconds_left=seconds_left,
    )
