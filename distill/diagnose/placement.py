"""Placement of nodes in a response: windows of exponentially growing depth, under a budget of completions.

Window w holds the response's tokens 2^w to 2^(w + 1) - 1, counted from 1. The same number of nodes is drawn from every
window, so a long response costs a few nodes more than a short one, and its beginning, where most is decided, is sampled
densely (2605.10889; the numbers per window are our own). A node at position t (from 0) lies before token t.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import numpy as np


def find_window(position: int) -> int:
    """Return the index of the window that a position lies in."""
    return (position + 1).bit_length() - 1


def split_windows(length: int) -> list[range]:
    """Return the positions of every window of a response of `length` tokens; the last window may be incomplete."""
    count = length.bit_length()
    return [range(2**w - 1, min(2 ** (w + 1) - 1, length)) for w in range(count)]


def place_nodes(length: int, per_window: int, random: np.random.Generator) -> list[int]:
    """Draw distinct positions in a response of `length` tokens, at most `per_window` from each window.

    The order is that in which the budget is spent: one of every window, the windows in random order, then a second of
    every window, and so on.
    """
    drawn = [random.permutation(np.array(window))[:per_window].tolist() for window in split_windows(length)]
    order = random.permutation(len(drawn))
    return [drawn[w][turn] for turn in range(per_window) for w in order if turn < len(drawn[w])]


def count_affordable(costs: Sequence[int], budget: int) -> int:
    """Return how many of the first nodes fit into the budget together.

    A cheaper node after the first one that does not fit is not taken: a node's cost depends on its candidates, so that
    would bias which nodes are measured.
    """
    total = 0
    for count, cost in enumerate(costs):
        total += cost
        if total > budget:
            return count
    return len(costs)


def interleave_rollouts(positions: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return (rollout, position) of all nodes: the first of every rollout, then the second of every rollout, and so on.

    positions: [rollout][node].
    """
    rows = [[(rollout, position) for position in row] for rollout, row in enumerate(positions)]
    return [node for node in chain.from_iterable(zip_longest(*rows)) if node is not None]
