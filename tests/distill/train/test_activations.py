"""The estimate of a training's memory against what the system reports, and the refusal that it leads to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny_pair import TinyPair
from support.training_memory import TrainingCase, measure
from support.training_runs import config_for

from genssd.distill.data.examples import Example
from genssd.distill.train.activations import BatchShape
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.distill.train.trainer import run_train
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.parameters import count_parameters
from genssd.engine.common.errors import CapacityError
from genssd.engine.setup import memory

WIDE = TrainingCase(attention="sdpa", hidden_size=256, layers=4, feed_forward=768, vocabulary=1000, rows=4, length=384)
LONG = TrainingCase(attention="eager", hidden_size=64, layers=4, feed_forward=128, vocabulary=1000, rows=2, length=640)
LOGITS = dataclasses.replace(WIDE, layers=1, vocabulary=24000, feed_forward=256)


def test_the_estimate_is_near_the_real_peak() -> None:
    cases = [WIDE, dataclasses.replace(WIDE, gradient_checkpointing=True, layers=6), LONG, LOGITS]
    measured = measure(cases)
    assert len(measured) == len(cases)
    assert all(0.7 < estimated / real < 1.5 for estimated, real in measured), measured


def examples_of(*sizes: tuple[int, int]) -> list[Example]:
    return [
        Example(input_ids=tuple(range(prompt + completion)), num_prompt=prompt, where=f"row {i}")
        for i, (prompt, completion) in enumerate(sizes)
    ]


def test_the_largest_batch_that_the_data_can_form(tiny_pair: TinyPair, tmp_path: Path) -> None:
    examples = examples_of((3, 4), (1, 9), (5, 2), (2, 2))
    config = config_for(tiny_pair, tmp_path, tmp_path, max_length=16)
    assert BatchShape.of(examples, config) == BatchShape(rows=2, length=10, completion_tokens=13)
    packed = dataclasses.replace(config, layout="pack")
    assert BatchShape.of(examples, packed) == BatchShape(rows=1, length=17, completion_tokens=13)
    many = dataclasses.replace(config, per_device_train_batch_size=8)
    assert BatchShape.of(examples, many) == BatchShape(rows=4, length=10, completion_tokens=17)
    own = dataclasses.replace(
        config, lmbda=0.5, kd_ratio=0.5, teacher_model_name_or_path="t", rollout=RolloutOptions(max_tokens=12)
    )
    assert BatchShape.of(examples, own) == BatchShape(rows=2, length=16, completion_tokens=24)


def test_a_batch_that_does_not_fit_is_refused_before_the_training(
    tiny_pair: TinyPair, write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows([{"prompt": "1+1=", "completion": "2" * 200}] * 3)
    config = config_for(tiny_pair, data, tmp_path / "out")
    states = 3 * 4 * count_parameters(ModelConfig.load(tiny_pair.student))
    monkeypatch.setattr(memory, "available_memory", lambda *, promised: states)
    message = (
        r"activations of one pass over 2 x 20\d tokens take [\d,]+ bytes, and [\d,]+ bytes .* free .*; use "
        "gradient_checkpointing, lower per_device_train_batch_size .*, lower max_length, or raise"
    )
    with pytest.raises(CapacityError, match=message):
        run_train(config)
    monkeypatch.setattr(memory, "available_memory", lambda *, promised: 1000)
    with pytest.raises(CapacityError, match=r"the gradients and the optimizer's states take .*use_peft.*smaller model"):
        run_train(dataclasses.replace(config, per_device_train_batch_size=1))
    assert not (tmp_path / "out").exists()
