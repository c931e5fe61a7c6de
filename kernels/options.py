"""Values and ranges of the options of kernels. Commands check them before torch is imported, so this file does not."""

from __future__ import annotations

import math
from typing import Literal

COLDEST = 1e-30
"""Smallest temperature above 0. Logits of 1e8 divided by it are finite in float32, whose largest number is 3e38."""

VocabularyRule = Literal["restrict", "drop"]
"""Treatment of token ids that only one of two heads of different widths has: see `linear_divergence`."""

TailRule = Literal["bucket", "renormalize", "drop", "policy_gradient"]
"""Treatment of the tokens outside the top k: see `topk_divergence`."""

PARTIAL_SUMS = frozenset(("drop", "policy_gradient"))
"""Rules under which the loss is the part of the sum that the top k contribute, and so no divergence itself."""


def check_options(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raise ValueError naming the first sampling option that is out of range."""
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be >= 0 and finite, not {temperature}")
    if 0.0 < temperature < COLDEST:
        raise ValueError(
            f"temperature must be 0, for the most likely token, or at least {COLDEST:g}, not {temperature:g}: logits "
            "divided by less become infinite"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0 (0 keeps all tokens), not {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    if not 0.0 <= min_p < 1.0:
        raise ValueError(f"min_p must be in [0, 1), not {min_p}")
