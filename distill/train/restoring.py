"""Putting a checkpoint back: the weights that are not loaded with the model, and the optimizer's state."""

from __future__ import annotations

import torch

from genssd.distill.train.checkpoints import MOMENTS, WEIGHTS, TrainedModel
from genssd.distill.train.distributed import shard_like
from genssd.distill.train.reading import Checkpoint


@torch.no_grad()
def restore_checkpoint(checkpoint: Checkpoint, trained: TrainedModel) -> None:
    """Put the weights of shards, extra parameters and the optimizer's state back."""
    tensors = checkpoint.tensors
    for name, parameter in trained.named_parameters():
        if f"{WEIGHTS}{name}" in tensors:
            parameter.copy_(tensors[f"{WEIGHTS}{name}"])
        elif f"extra/{name}" in tensors:
            parameter.copy_(tensors[f"extra/{name}"])
        if parameter.requires_grad:
            trained.optimizer.state[parameter] = {
                "step": tensors[f"{name}/step"],  # AdamW counts its steps on the CPU
                **{key: shard_like(tensors[f"{name}/{key}"].to(parameter.device), parameter) for key in MOMENTS},
            }
