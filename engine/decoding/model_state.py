"""The part of a branch that one model has computed."""

from __future__ import annotations

from dataclasses import dataclass

from genssd.engine.cache.tree import Path
from genssd.engine.models.state_rows import StateRow


@dataclass(slots=True)
class ModelState:
    """The part of a branch that one model has computed."""

    pending: list[int]
    """Tokens that are not in the cache yet."""
    path: Path | None = None
    """Path of the branch in the model's cache. None before the first token is computed, and after a drop."""
    hidden: StateRow | None = None
    """Last hidden state of the tokens in the cache; it predicts the next token."""
