"""The default size of the decoding batch: as few sequences as keep the rate, so that the first responses end early."""

from __future__ import annotations

from collections.abc import Iterable

import torch

LARGEST = 256
"""Default on a GPU, and the largest one on a CPU."""
SMALLEST = 32
"""Smallest default on a CPU."""
WEIGHTS_PER_STEP = 1_000_000_000
"""Products per step and thread on a CPU, weights times sequences, beyond which a larger batch gains less than a tenth.

A step costs about a millisecond in Python, whatever the batch; docs/log.md has the measurements."""


def choose_max_num_seqs(weights: Iterable[int], device: torch.device, threads: int) -> int:
    """Return how many sequences are decoded at once by default.

    weights: number of weights that each model of the engine multiplies a token with; the largest counts. On a CPU a
    row's bits do not depend on the choice.
    """
    if device.type != "cpu":
        return LARGEST
    size = SMALLEST
    most = max(weights)
    while size < LARGEST and size * most < WEIGHTS_PER_STEP * threads:
        size *= 2
    return size
