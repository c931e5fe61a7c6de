"""Where in a response to ask: nodes in windows of exponentially growing depth, under a budget of completions.

Window w holds the response's tokens 2^w to 2^(w + 1) - 1, counted from 1. From every window equally many nodes are
drawn, so a long response costs a few nodes more than a short one, and its beginning, where most is decided, is looked
at closely (2605.10889; numbers per window are ours). A node at position t (from 0) lies in front of token t.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

import numpy as np


def window_of(position: int) -> int:
    """The window of a node."""
    return (position + 1).bit_length() - 1


def windows(length: int) -> list[range]:
    """The positions of every window of a response of `length` tokens; the last one may be cut short."""
    count = length.bit_length()
    return [range(2**w - 1, min(2 ** (w + 1) - 1, length)) for w in range(count)]


def place(length: int, per_window: int, random: np.random.Generator) -> list[int]:
    """Positions of distinct nodes, at most `per_window` of each window, in the order in which they are to be afforded:

    one of every window, the windows in random order, then a second of every window, and so on.
    """
    drawn = [random.permutation(np.array(window))[:per_window].tolist() for window in windows(length)]
    order = random.permutation(len(drawn))
    return [drawn[w][turn] for turn in range(per_window) for w in order if turn < len(drawn[w])]


def affordable(costs: Sequence[int], budget: int) -> int:
    """How many of the first nodes fit into the budget together. A cheaper node behind one that does not is not taken:
    its price depends on what stands there."""
    spent = 0
    for count, cost in enumerate(costs):
        spent += cost
        if spent > budget:
            return count
    return len(costs)


def in_turns(of_rollouts: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(rollout, position) of all nodes: the first of every rollout, then the second of every rollout, and so on."""
    rows = [[(rollout, position) for position in positions] for rollout, positions in enumerate(of_rollouts)]
    return [node for node in chain.from_iterable(zip_longest(*rows)) if node is not None]
