"""Training checkpoints: a save_pretrained directory, plus the state from which training continues exactly.

checkpoint-N/optimizer.safetensors   Adam's moments by parameter name, and the state of torch's random generators
checkpoint-N/trainer_state.json      how far the training is, and its settings
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genssd.distill.runs.journal import read_json, write_json
from genssd.distill.runs.writing import remove_directory, replace_directory
from genssd.distill.train.distributed import World, gather_shards, shard_like
from genssd.distill.train.models import has_adapters, load_adapters, save_model
from genssd.engine.errors import CheckpointError, InputError
from genssd.engine.text import Tokenizer


@dataclass(slots=True)
class TrainerState:
    """How far a training is; with the weights and the optimizer's state, enough to continue exactly."""

    settings: dict[str, object]
    """Settings that decide the result: models, data, options. A training is resumed with the same settings."""
    step: int = 0
    """Number of optimizer steps taken."""
    epoch: int = 0
    """Number of finished epochs."""
    batch: int = 0
    """Number of optimizer steps taken in the current epoch."""
    tokens: int = 0
    """Number of completion tokens trained so far."""
    best_eval_loss: float | None = None
    """Loss on eval_data of the model in best/; None before the first evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The model under training with its tokenizer, and everything else that an optimizer step changes."""

    model: Any
    """The student, a transformers model."""
    tokenizer: Tokenizer
    extra_parameters: Mapping[str, torch.nn.Parameter]
    """Parameters, by name, that are trained in addition to the model's own."""
    optimizer: torch.optim.Optimizer

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the model's parameters and then the extra ones, with their names."""
        yield from self.model.named_parameters()
        yield from self.extra_parameters.items()

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the optimizer changes."""
        return list_trainable(self.model, self.extra_parameters)


def list_trainable(model: Any, extra_parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return the parameters of the model, and the extra ones, that have gradients."""
    return [p for p in (*model.parameters(), *extra_parameters.values()) if p.requires_grad]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Files of a checkpoint other than the weights, as read from disk."""

    path: Path
    state: TrainerState
    tensors: Mapping[str, Tensor]
    """Extra parameters and the optimizer's state, by name."""
    rng_states: Sequence[Tensor]
    """State of the random generators of every process, uint8."""


def save_checkpoint(
    output_dir: Path, trained: TrainedModel, state: TrainerState, rng_states: Sequence[Tensor], *, write: bool = True
) -> None:
    """Write a checkpoint under a temporary name and rename it, so that a crash leaves no incomplete checkpoint.

    rng_states: of every process, see `get_rng_state`. Every process of a training has to call this, because sharded
    tensors are gathered from all; only one of them with write. Raises InputError when it cannot be written.
    """
    final = output_dir / f"checkpoint-{state.step}"
    temporary = final.with_suffix(".tmp")
    if write:
        remove_directory(temporary)
        remove_directory(final)
    save_model(trained.model, trained.tokenizer, temporary, write=write)
    tensors = {f"rng/{rank}": rng_state for rank, rng_state in enumerate(rng_states)}
    tensors |= {f"extra/{name}": p.detach().cpu() for name, p in trained.extra_parameters.items()}
    for name, parameter in trained.named_parameters():
        for key, value in trained.optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = gather_shards(value).cpu().contiguous()
    if not write:
        return
    try:
        save_file(tensors, temporary / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{temporary} cannot be written: {error}; earlier checkpoints are kept") from None
    write_json(temporary / "trainer_state.json", dataclasses.asdict(state))
    replace_directory(temporary, final)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read all files of a checkpoint other than the weights. Raises CheckpointError when they are damaged."""
    fields = read_json(path / "trainer_state.json")
    try:
        state = TrainerState(**fields)
        tensors = load_file(path / "optimizer.safetensors")
        processes = sum(name.startswith("rng/") for name in tensors)
        rng_states = [tensors.pop(f"rng/{rank}") for rank in range(max(1, processes))]
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}; resume from an earlier checkpoint") from None
    return Checkpoint(path=path, state=state, tensors=tensors, rng_states=rng_states)


@torch.no_grad()
def restore_checkpoint(checkpoint: Checkpoint, trained: TrainedModel, world: World) -> None:
    """Put adapters, extra parameters, the optimizer's state and this process's random generators back."""
    set_rng_state(checkpoint.rng_states[world.rank], world.device)
    if has_adapters(trained.model):
        load_adapters(trained.model, checkpoint.path / "adapter")
    for name, parameter in trained.extra_parameters.items():
        parameter.copy_(checkpoint.tensors[f"extra/{name}"])
    for name, parameter in trained.named_parameters():
        keys = [key for key in checkpoint.tensors if key.startswith(f"{name}/")]
        # Adam counts its steps on the CPU
        trained.optimizer.state[parameter] = {
            key.rsplit("/", 1)[1]: checkpoint.tensors[key]
            if key.endswith("/step")
            else shard_like(checkpoint.tensors[key].to(parameter.device), parameter)
            for key in keys
        }


def get_rng_state(device: torch.device) -> Tensor:
    """Return the state of the random generators that a training on a device uses, uint8."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Restore the random generators to a state that `get_rng_state` returned."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a training, oldest first."""
    steps = {p: p.name.removeprefix("checkpoint-") for p in output_dir.glob("checkpoint-*")}
    complete = [p for p, step in steps.items() if step.isdecimal() and (p / "trainer_state.json").exists()]
    return sorted(complete, key=lambda p: int(steps[p]))


def remove_old_checkpoints(output_dir: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep`."""
    for path in list_checkpoints(output_dir)[:-keep]:
        _remove(path)


def remove_later_checkpoints(output_dir: Path, step: int) -> None:
    """Remove the checkpoints after a step from which the training is resumed: their steps are taken again."""
    for path in list_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint and then remove it, so that a crash leaves no incomplete checkpoint."""
    renamed = checkpoint.with_suffix(".old")
    remove_directory(renamed)
    replace_directory(checkpoint, renamed)
    remove_directory(renamed)
