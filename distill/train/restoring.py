"""Putting a checkpoint back: the weights of adapters, the optimizer's state, and the random generators."""

from __future__ import annotations

import torch
from torch import Tensor

from genssd.distill.train.adapters import has_adapters, load_adapters
from genssd.distill.train.checkpoints import MOMENTS, OPTIMIZER, TrainedModel, describe_remedy
from genssd.distill.train.distributed import World, shard_like
from genssd.distill.train.reading import Checkpoint, make_damaged_error
from genssd.engine.errors import CheckpointError
from genssd.engine.quoting import one_line


@torch.no_grad()
def restore_checkpoint(checkpoint: Checkpoint, trained: TrainedModel, world: World) -> None:
    """Put adapters, extra parameters, the optimizer's state and this process's random generators back.

    Raises CheckpointError when the state of the generators, or an adapter, does not fit.
    """
    name = f"rng/{world.rank}"
    try:
        set_rng_state(checkpoint.rng_states[world.rank], world.device)
    except RuntimeError as error:
        fault = f"{name} is no state of the random generators of this {world.device.type}: {one_line(error)}"
        raise make_damaged_error(checkpoint.path, OPTIMIZER, fault) from None
    if has_adapters(trained.model):
        try:
            load_adapters(trained.model, checkpoint.path / "adapter")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {describe_remedy(checkpoint.path)}") from None
    for name, parameter in trained.extra_parameters.items():
        parameter.copy_(checkpoint.tensors[f"extra/{name}"])
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            trained.optimizer.state[parameter] = {
                "step": checkpoint.tensors[f"{name}/step"],  # AdamW counts its steps on the CPU
                **{
                    key: shard_like(checkpoint.tensors[f"{name}/{key}"].to(parameter.device), parameter)
                    for key in MOMENTS
                },
            }


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Restore the random generators to a state that `get_rng_state` returned. Raises RuntimeError on another one."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)
