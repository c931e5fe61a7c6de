"""The default size of the decoding batch: as few sequences as keep the rate, so that the first responses end early."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from genssd.engine.config import ModelConfig

LARGEST = 256
"""Default on a GPU, and the largest one on a CPU."""
SMALLEST = 32
"""Smallest default on a CPU."""
WEIGHTS_PER_STEP = 1_000_000_000
"""Products per step and thread on a CPU, weights times sequences, beyond which a larger batch gains less than a tenth.

A step costs about a millisecond in Python, whatever the batch; docs/log.md has the measurements."""


def choose_max_batch(configs: Iterable[ModelConfig], device: torch.device, threads: int) -> int:
    """Return how many sequences are decoded at once by default.

    configs: the models of the engine, of which the largest counts. On a CPU a row's bits do not depend on the choice.
    """
    if device.type != "cpu":
        return LARGEST
    size = SMALLEST
    most = max(map(count_weights, configs))
    while size < LARGEST and size * most < WEIGHTS_PER_STEP * threads:
        size *= 2
    return size


def count_weights(config: ModelConfig) -> int:
    """Return the number of weights that a model multiplies with for every token; biases and norms are left out."""
    c = config
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    widths = [c.intermediate_size] * c.num_hidden_layers
    if c.experts is not None:
        routed = c.experts.per_token * c.experts.intermediate_size
        widths = [routed if has_experts else c.intermediate_size for has_experts in c.experts.layers]
    feed_forward = 3 * c.hidden_size * sum(widths)
    return c.num_hidden_layers * attention + feed_forward + c.vocab_size * c.hidden_size
