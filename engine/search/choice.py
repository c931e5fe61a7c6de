"""The choice among acceptable candidates: the best ones, or a draw from the softmax of their values.

A draw is made with noise that depends on each candidate's random stream and position alone, as that of its tokens does:
the k largest of log-probability plus Gumbel noise are k draws without replacement (Kool et al., 1903.06059).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from genssd.engine.models.sampling import choice_uniform


def softmax(losses: Sequence[float], temperature: float) -> list[float]:
    """Return probabilities proportional to exp(-loss / temperature). Losses may be infinite; the least then wins."""
    least = min(losses)
    if math.isinf(least):
        weights = [float(loss == least) for loss in losses]
    else:
        weights = [math.exp((least - loss) / temperature) for loss in losses]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw_order(probabilities: Sequence[float], losses: Sequence[float], places: Sequence[tuple[int, int]]) -> list[int]:
    """Return the indices of candidates in the order in which they are drawn without replacement.

    places: random stream and position of every candidate. Candidates whose probability is 0 come last, by their losses.
    """
    keys = [
        math.log(probability) - math.log(-math.log(choice_uniform(stream, position))) if probability else -math.inf
        for probability, (stream, position) in zip(probabilities, places, strict=True)
    ]
    return sorted(range(len(keys)), key=lambda i: (-keys[i], losses[i]))
