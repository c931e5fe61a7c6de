"""Options of the completions that the student writes during its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from genssd.distill.answers.forms import Outcome
from genssd.distill.runs.field_kinds import Operational
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types
from genssd.engine.models.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutOptions:
    """Options of the completions that the student writes during its training."""

    max_tokens: int = 512
    """Maximum number of tokens in a completion."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling of the student's tokens."""
    train_on: Literal["unverified", "all", "correct", "wrong"] = "unverified"
    """Completions that are trained on, by the judge's verdict on them against the row's reference answer: all, or those
    that are correct, or wrong, alone. With all, too, the log has the losses of both apart. unverified: nothing is
    judged."""
    memory_bytes: Operational[int | None] = None
    """Size of the student's KV cache in bytes; None: a third of the free memory."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_tokens < 1:
            raise InputError(f"rollout.max_tokens must be at least 1, not {self.max_tokens}")

    @property
    def is_verified(self) -> bool:
        """Whether the completions are judged."""
        return self.train_on != "unverified"

    def is_trained(self, outcome: Outcome) -> bool:
        """Return whether a completion is trained on; one that could not be judged is neither correct nor wrong."""
        return self.train_on in ("all", outcome)
