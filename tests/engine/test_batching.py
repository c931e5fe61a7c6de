"""The default batch: few sequences for models whose steps are long, many where the step's own cost counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from genssd.distill.demo.parts import PAIR
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import count_weights
from genssd.engine.decoding.batching import choose_max_num_seqs

SMALL = ModelConfig.load(PAIR / "student")
SMOLLM2_135M = dataclasses.replace(
    SMALL, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64,
)  # fmt: skip
OF_17M = dataclasses.replace(SMOLLM2_135M, hidden_size=256, intermediate_size=682, num_hidden_layers=6)


@pytest.mark.parametrize(
    ("configs", "device", "threads", "size"),
    [
        ([SMOLLM2_135M], "cpu", 1, 32),
        ([SMALL, SMOLLM2_135M], "cpu", 1, 32),
        ([OF_17M], "cpu", 1, 64),
        ([SMALL], "cpu", 1, 256),
        ([SMOLLM2_135M], "cpu", 16, 128),
        ([SMOLLM2_135M], "cuda", 1, 256),
    ],
)
def test_the_default_batch(configs: list[ModelConfig], device: str, threads: int, size: int) -> None:
    assert choose_max_num_seqs(map(count_weights, configs), torch.device(device), threads) == size


def test_weights_are_counted_from_the_config() -> None:
    assert count_weights(SMOLLM2_135M) == 134_479_872
