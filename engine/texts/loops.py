"""The loop guard. Text that repeats itself has a perplexity near 1, so a search for low perplexity would choose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genssd.engine.common.errors import InputError
from genssd.engine.common.options_check import check_types


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopGuard:
    """Limits beyond which a repetition is a loop. The defaults are not from a paper.

    A candidate is rejected when its trajectory ends in the same `period` tokens `min_repeats` times or more, over at
    least `min_tokens` tokens, for any period up to `max_period`.
    """

    max_period: int = 64
    """Maximum number of tokens that are repeated."""
    min_repeats: int = 4
    """Minimum number of times that they occur."""
    min_tokens: int = 48
    """Minimum number of tokens in the whole repetition."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_period < 1 or self.min_repeats < 2 or self.min_tokens < 2:
            raise InputError(f"a loop guard needs max_period >= 1, min_repeats >= 2, min_tokens >= 2, not {self}")

    def period(self, token_ids: Sequence[int]) -> int:
        """Return the period of the loop that the tokens end in, 0 if they end in none."""
        num_checked = max(self.min_tokens, self.max_period * self.min_repeats)
        ids = np.asarray(token_ids[-num_checked:], dtype=np.int64)
        for period in range(1, min(self.max_period, len(ids) // self.min_repeats) + 1):
            span = max(self.min_tokens, period * self.min_repeats)
            if len(ids) >= span and np.array_equal(ids[-span + period :], ids[-span:-period]):
                return period
        return 0
