"""Options of the weights of tokens in the loss (see token_weights.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from genssd.distill.runs.effects import Need, Needs
from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeightOptions:
    """Options of the weights of tokens in the loss, which multiply those of rows and chunks."""

    NEEDS: ClassVar[Needs] = {
        "fraction": Need(lambda o: o.entropy_of != "none", "token_weights.entropy_of student or teacher")
    }

    entropy_of: Literal["none", "student", "teacher"] = "none"
    """Model whose entropy chooses the tokens that are trained: in every completion those where it is highest. The
    student is the one under training, at the step. none: all tokens. One more product with that model's head."""
    fraction: float = 0.2
    """Fraction of the tokens of a completion that entropy_of chooses, in (0, 1); at least one token."""
    half_life: float | None = None
    """Number of tokens over which the weight of a token falls by half along the completion; None: it does not fall."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0.0 < self.fraction < 1.0:
            raise InputError(f"token_weights.fraction must lie in (0, 1), not {self.fraction}")
        if self.half_life is not None and not 0.0 < self.half_life < math.inf:
            raise InputError(f"token_weights.half_life must be positive, not {self.half_life}")

    @property
    def is_used(self) -> bool:
        """Whether any token has a weight by these options."""
        return self.entropy_of != "none" or self.half_life is not None
