"""Budgets of a search: the tokens that the teacher may sample and the seconds that may pass, per prompt and in all."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Literal

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types

BudgetName = Literal["prompt_budget.tokens", "prompt_budget.seconds", "total_budget.tokens", "total_budget.seconds"]
"""The option that ended the search of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits of what a search may take; None is no limit."""

    tokens: int | None = None
    """Maximum number of tokens that the teacher samples, those of dropped candidates included. None: no limit."""
    seconds: float | None = None
    """Maximum number of seconds of wall time. How far the search comes in them depends on the machine and its load.
    None: no limit."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"budget tokens must be at least 1, not {self.tokens}")
        if self.seconds is not None and self.seconds <= 0.0:
            raise InputError(f"budget seconds must be above 0, not {self.seconds}")


def find_limit(budget: Budget, name: BudgetName) -> float:
    """Return the limit that an option sets, for messages."""
    limit = budget.tokens if name.endswith("tokens") else budget.seconds
    assert limit is not None, "what ended a search has a limit"
    return limit


class BudgetMeter:
    """What a search has taken of a budget. names: the options that limit its tokens and its seconds."""

    def __init__(self, budget: Budget, names: tuple[BudgetName, BudgetName]) -> None:
        self._budget = budget
        self._names = names
        self._started: float | None = None
        self.tokens = 0
        """Number of tokens sampled so far."""

    def start(self) -> None:
        """Let the seconds pass from now on, unless they do already."""
        if self._started is None:
            self._started = monotonic()

    def find_reached(self, more_tokens: int) -> BudgetName | None:
        """Return the option that does not allow so many more tokens now; None if both do."""
        if self._budget.tokens is not None and self.tokens + more_tokens > self._budget.tokens:
            return self._names[0]
        if self._budget.seconds is not None and self._started is not None:
            return self._names[1] if monotonic() - self._started >= self._budget.seconds else None
        return None
