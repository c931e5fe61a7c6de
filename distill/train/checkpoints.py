"""Training checkpoints: a save_pretrained directory, plus the state from which training continues exactly.

checkpoint-N/optimizer.safetensors   Adam's moments by parameter name
checkpoint-N/trainer_state.json      how far the training is, its settings, and checksums; written last

Where FSDP2 shards the weights, a checkpoint has the shards of the trained weights and of Adam's moments instead of the
directory and the first file (shards.py):

checkpoint-N/shards/                 a file of every process

Both are resumed by any number of processes, with shards or without (resume.py). No state of a random generator is
kept, because all that is random depends on the seed and the step: the order of the examples (schedule.py), completions
(on_policy.py) and dropout (step.py).

The weights of a checkpoint are float32, whatever the type of the model that the training began from.
reading.py reads and checks a checkpoint, restoring.py puts it back.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors.torch import save_file
from torch import Tensor

from genssd.distill.runs.journal import write_json
from genssd.distill.runs.writing import TEMPORARY, make_directory
from genssd.distill.train.directories import publish_directory, remove_directory
from genssd.distill.train.distributed import World
from genssd.distill.train.saving import name_save_failure, save_model
from genssd.distill.train.shards import SHARDS, find_shard, save_shards
from genssd.engine.common.errors import InputError
from genssd.engine.texts.text import Tokenizer

STATE, OPTIMIZER = "trainer_state.json", "optimizer.safetensors"
WEIGHTS = "weights/"
"""Beginning of the names of trained weights among shards."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's state of a parameter, in addition to `step`."""


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
    saved_dtype: torch.dtype
    """Data type in which the result of the training is saved: that of the checkpoint that it began from."""

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


def save_checkpoint(output_dir: Path, trained: TrainedModel, state: TrainerState, world: World) -> None:
    """Write a checkpoint under a temporary name and rename it, so that a crash leaves no incomplete checkpoint.

    Every process of a training has to call this: where the weights are sharded, each writes its own shards. Raises
    InputError when it cannot be written; nothing of it is left then, and earlier checkpoints are as they were.
    """
    final = output_dir / f"checkpoint-{state.step}"
    temporary = final.with_name(final.name + TEMPORARY)
    try:
        checksums = _write_shards(temporary, trained, world) if world.mesh is not None else None
        if not world.is_main:
            return
        with name_save_failure(final):
            if checksums is None:
                checksums = _write_whole(temporary, trained)
            fields = {**dataclasses.asdict(state), "files": checksums}
            write_json(temporary / STATE, {**fields, "checksum": compute_checksum(fields)})
        publish_directory(temporary, final)
    except InputError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{error}; {_describe_kept(output_dir)}") from None


def _write_whole(directory: Path, trained: TrainedModel) -> dict[str, str]:
    """Write the files of a checkpoint whose weights this process has as a whole; return their checksums."""
    shutil.rmtree(directory, ignore_errors=True)
    save_model(trained.model, trained.tokenizer, directory)
    tensors = {f"extra/{name}": p.detach().cpu() for name, p in trained.extra_parameters.items()}
    tensors |= {name: value.cpu().contiguous() for name, value in _iter_moments(trained)}
    save_file(tensors, directory / OPTIMIZER)
    return compute_checksums(directory)


def _write_shards(directory: Path, trained: TrainedModel, world: World) -> dict[str, str]:
    """Write this process's shards of a checkpoint; return the checksums of all shards."""
    folder = directory / SHARDS

    def make_folder() -> None:
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
            make_directory(folder)

    def compute() -> dict[str, str]:
        path = find_shard(folder, world.rank)
        with name_save_failure(folder):
            return {} if path is None else {f"{SHARDS}/{path.name}": _checksum_file(path)}

    world.collect(make_folder)
    weights = {f"{WEIGHTS}{name}": p.detach() for name, p in trained.named_parameters() if p.requires_grad}
    save_shards(folder, {**weights, **dict(_iter_moments(trained))})
    return {name: value for shard in world.collect(compute) for name, value in shard.items()}


def _iter_moments(trained: TrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer's state of every trained parameter, by `<name of the parameter>/<name of the state>`."""
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:
            continue
        # AdamW makes this state at a parameter's first gradient, which may be still to come
        moments = trained.optimizer.state[parameter] or {
            "step": torch.zeros(()),
            **{key: torch.zeros_like(parameter) for key in MOMENTS},
        }
        for key, value in moments.items():
            yield f"{name}/{key}", value.detach()


def compute_checksums(directory: Path) -> dict[str, str]:
    """Return the CRC-32 of every file that a training is resumed from, by its name in the directory."""
    files = sorted([*directory.rglob("*.safetensors"), *directory.glob("model*.json"), *directory.glob("config.json")])
    return {path.relative_to(directory).as_posix(): _checksum_file(path) for path in files}


def _checksum_file(path: Path) -> str:
    value = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            value = crc32(block, value)
    return f"{value:08x}"


def compute_checksum(fields: Mapping[str, object]) -> str:
    """Return the CRC-32 of the fields of trainer_state.json."""
    return f"{crc32(json.dumps(fields, sort_keys=True).encode()):08x}"


def is_sharded(path: Path) -> bool:
    """Return whether a checkpoint consists of shards."""
    return (path / SHARDS).exists() and not (path / OPTIMIZER).exists()


def find_step(path: Path) -> int | None:
    """Return the N of a directory's name checkpoint-N; None for another name."""
    match = re.fullmatch(r"checkpoint-(\d{1,18})", path.name)
    return None if match is None else int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a training, oldest first."""
    steps = {path: find_step(path) for path in output_dir.glob("checkpoint-*")}
    complete = [(step, path) for path, step in steps.items() if step is not None and (path / STATE).exists()]
    return [path for _, path in sorted(complete)]


def remove_old_checkpoints(output_dir: Path, keep: int) -> None:
    """Remove all checkpoints except the newest `keep`."""
    for path in list_checkpoints(output_dir)[:-keep]:
        remove_directory(path)


def remove_later_checkpoints(output_dir: Path, step: int) -> None:
    """Remove the checkpoints after a step from which the training is resumed: their steps are taken again."""
    for path in list_checkpoints(output_dir):
        if (find_step(path) or 0) > step:
            remove_directory(path)


def describe_remedy(path: Path) -> str:
    """Return what to do about a damaged checkpoint: which one before it to resume from."""
    step = find_step(path)
    earlier = [p for p in list_checkpoints(path.parent) if step is None or (find_step(p) or 0) < step]
    earlier = [p for p in earlier if p != path]
    if not earlier:
        return "there is no checkpoint before it: begin the training again in another output_dir"
    return f"resume from the checkpoint before it: --resume-from-checkpoint {earlier[-1]}"


def _describe_kept(output_dir: Path) -> str:
    kept = list_checkpoints(output_dir)
    return f"{kept[-1].name} is kept, from which the training can be resumed" if kept else "there is no checkpoint yet"
