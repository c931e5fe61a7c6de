"""Training checkpoints: a save_pretrained directory plus what it takes to go on exactly.

checkpoint-N/optimizer.safetensors   Adam's moments by parameter name, and the state of torch's generator
checkpoint-N/trainer_state.json      where the training is, and with what settings
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genssd.distill.data.examples import Example
from genssd.distill.runs.journal import read_json, write_json
from genssd.distill.train.distributed import like, whole
from genssd.distill.train.models import has_adapters, load_adapters, save_model
from genssd.engine.errors import CheckpointError, InputError
from genssd.engine.text import Tokenizer


@dataclass(slots=True)
class Position:
    """Where a training is: with the weights and the optimizer's state, enough to go on exactly."""

    settings: dict[str, object]
    """What decides the next step: models, data, options. A training is resumed with the same."""
    step: int = 0
    epoch: int = 0
    batch: int = 0
    """Optimizer steps taken in this epoch."""
    tokens: int = 0
    """Completion tokens trained so far."""
    best_eval_loss: float | None = None
    """Of the model in best/."""


def data_fingerprint(examples: Sequence[Example]) -> str:
    """Changes when an example or their order does."""
    digest = hashlib.sha256()
    for example in examples:
        beside = (
            example.weight,
            example.chunk_weights,
            example.teacher_prompt_ids,
            example.num_prompt,
            example.rejected,
        )
        digest.update(f";{beside}:{','.join(map(str, example.input_ids))}".encode())
    return digest.hexdigest()[:16]


def save_checkpoint(
    output_dir: Path,
    model: Any,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    position: Position,
    *,
    extra: Mapping[str, torch.nn.Parameter],
    rng: Sequence[Tensor],
    write: bool = True,
) -> None:
    """Written beside and renamed, so a crash never leaves half a checkpoint under the final name.

    extra: parameters that are trained beside the model's. rng: of every process, its generators' state.

    Of a model that is split over processes all have to call this, one with write.
    """
    final = output_dir / f"checkpoint-{position.step}"
    building = final.with_suffix(".tmp")
    if write:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
    save_model(model, tokenizer, building, write=write)
    tensors = {f"rng/{rank}": state for rank, state in enumerate(rng)}
    tensors |= {f"extra/{name}": p.detach().cpu() for name, p in extra.items()}
    for name, parameter in (*model.named_parameters(), *extra.items()):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = whole(value).cpu().contiguous()
    if not write:
        return
    try:
        save_file(tensors, building / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{building} cannot be written: {error}; earlier checkpoints are kept") from None
    write_json(building / "trainer_state.json", dataclasses.asdict(position))
    building.rename(final)


@torch.no_grad()
def restore(
    checkpoint: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, object],
    extra: Mapping[str, torch.nn.Parameter],
    *,
    rank: int,
    device: torch.device,
) -> Position:
    """Load the optimizer's and the generator's state; return the position.

    Raises InputError naming the setting in which the checkpoint's training differs, CheckpointError when its files are
    damaged.
    """
    state = read_json(checkpoint / "trainer_state.json")
    try:
        position = Position(**state)
        tensors = load_file(checkpoint / "optimizer.safetensors")
        states = [tensors.pop(name) for name in sorted(n for n in tensors if n.startswith("rng/"))]
        if not states:
            raise KeyError("rng")
    except Exception as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}; resume from an earlier checkpoint") from None
    for name, value in settings.items():
        if position.settings.get(name) != value:
            raise InputError(
                f"{checkpoint} was trained with {name} {position.settings.get(name)!r}, not {value!r}; resume with the "
                "same settings, or choose another output_dir"
            )
    set_rng_state(states[rank], device)
    if has_adapters(model):
        load_adapters(model, checkpoint / "adapter")
    for name, parameter in extra.items():
        parameter.copy_(tensors[f"extra/{name}"])
    for name, parameter in (*model.named_parameters(), *extra.items()):
        keys = [key for key in tensors if key.startswith(f"{name}/")]
        # Adam counts its steps on the CPU
        optimizer.state[parameter] = {
            key.rsplit("/", 1)[1]: tensors[key]
            if key.endswith("/step")
            else like(tensors[key].to(parameter.device), parameter)
            for key in keys
        }
    return position


def rng_state(device: torch.device) -> Tensor:
    """Of the generators that a training on a device draws from, uint8."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """What `rng_state` gave."""
    size = len(torch.get_rng_state())
    torch.set_rng_state(state[:size].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[size:].clone(), device)


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: "last" of the directory, or a path. Raises InputError when there is none."""
    found = complete_checkpoints(output_dir)
    if wanted is None:
        if found:
            raise InputError(
                f"{output_dir} holds {found[-1].name} of an earlier training; pass --resume-from-checkpoint last, "
                "or choose another output_dir"
            )
        if any(output_dir.glob("*.safetensors")) or (output_dir / "best").exists():
            raise InputError(f"{output_dir} holds a model already; choose another output_dir")
        return None
    if wanted == "last":
        if not found:
            raise InputError(f"{output_dir} has no checkpoint to resume from")
        return found[-1]
    path = Path(wanted)
    if not (path / "trainer_state.json").exists():
        raise InputError(f"{path} is no checkpoint: it has no trainer_state.json")
    return path


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Oldest first."""
    steps = {p: p.name.removeprefix("checkpoint-") for p in output_dir.glob("checkpoint-*")}
    found = [p for p, step in steps.items() if step.isdecimal() and (p / "trainer_state.json").exists()]
    return sorted(found, key=lambda p: int(steps[p]))


def remove_old_checkpoints(output_dir: Path, keep: int) -> None:
    """Keep only the newest."""
    for old in complete_checkpoints(output_dir)[:-keep]:
        _remove(old)


def remove_later_checkpoints(output_dir: Path, step: int) -> None:
    """Training goes on from an earlier step: what came after it is no longer its future."""
    for path in complete_checkpoints(output_dir):
        if int(path.name.removeprefix("checkpoint-")) > step:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a crash never leaves half a checkpoint under its own."""
    leaving = checkpoint.with_suffix(".old")
    shutil.rmtree(leaving, ignore_errors=True)
    checkpoint.rename(leaving)
    shutil.rmtree(leaving)
