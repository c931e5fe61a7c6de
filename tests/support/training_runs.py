"""Small trainings that several test files run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from support.tiny_pair import TinyPair
from transformers import AutoModelForCausalLM

from genssd.distill.runs.journal import complete_rows
from genssd.distill.train.config import TrainConfig

ROWS = [{"prompt": f"{i}+{i}=", "completion": f"{2 * i}" * (1 + i % 3)} for i in range(11)]


def config_for(pair: TinyPair, data: Path, output_dir: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(
        model_name_or_path=str(pair.student),
        data=(str(data),),
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        num_train_epochs=2,
        logging_steps=1,
    )
    if {"max_steps", "max_train_tokens"} & changes.keys():
        changes = {"num_train_epochs": 1.0, **changes}  # which they replace
    return dataclasses.replace(base, **changes)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return dict(model.state_dict())


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [row for row, _ in complete_rows(directory / "metrics.jsonl")]
