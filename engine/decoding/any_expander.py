"""What every expander can do: the scheduler and the sessions know no more of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from genssd.engine.common.usage import Usage
from genssd.engine.decoding.expansion import Expansion
from genssd.engine.decoding.page_budget import PageBudget
from genssd.engine.models.runner import ModelRunner


class AnyExpander(Protocol):
    """What runs the expansions of a session: a decoding batch here (expander.py), or a server (served/expander.py)."""

    usage: Usage
    """Counts of the engine, which every step raises."""
    pages: PageBudget
    """The pages that the expansions in flight may take."""
    runners: Sequence[ModelRunner]
    """The models here that the expansions run on."""

    @property
    def has_room(self) -> bool:
        """Whether another expansion would be worked on at once."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do in a step."""
        ...

    def submit(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions that fit and start together."""
        ...

    def start(self, expansions: Sequence[Expansion]) -> None:
        """Add expansions for which the pages are reserved already."""
        ...

    def cancel(self, expansion: Expansion) -> None:
        """Stop an expansion and drop its candidates, as if it had not been submitted."""
        ...

    def step(self, *, waits: bool = True) -> list[Expansion]:
        """Go on with the candidates; return the expansions that are complete and scored.

        Those that are `unreadable` or `failed` are complete and not scored. waits: whether to wait a moment where
        nothing can be done at once.
        """
        ...
