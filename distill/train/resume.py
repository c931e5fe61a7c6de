"""Resuming a training: the checkpoint in its directory, and the settings that must be those of the earlier run."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from genssd.distill.data.examples import Example
from genssd.distill.runs.chat_settings import choose_date
from genssd.distill.runs.journal import read_json
from genssd.distill.runs.settings import check_same_settings, settings_of
from genssd.distill.runs.writing import remove_directory
from genssd.distill.train.build import Training, TrainingInputs
from genssd.distill.train.checkpoints import (
    TrainerState,
    list_checkpoints,
    read_checkpoint,
    remove_later_checkpoints,
    restore_checkpoint,
)
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.distributed import World
from genssd.engine.errors import InputError


def collect_settings(config: TrainConfig, inputs: TrainingInputs, world: World) -> dict[str, object]:
    """Return what decides the result: the settings of the config, the examples and the number of processes."""
    return settings_of(config) | {"data": fingerprint_examples(inputs.examples), "processes": world.size}


def fingerprint_examples(examples: Sequence[Example]) -> str:
    """Return a digest that changes when an example or the order of the examples changes."""
    digest = hashlib.sha256()
    for example in examples:
        fields = (
            example.weight,
            example.chunk_weights,
            example.teacher_prompt_ids,
            example.num_prompt,
            example.rejected,
        )
        digest.update(f";{fields}:{','.join(map(str, example.input_ids))}".encode())
    return digest.hexdigest()[:16]


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, or None for a new training.

    resume_from_checkpoint: a directory, or "last" for the newest checkpoint in output_dir. Raises InputError when there
    is no such checkpoint, and when a new training would overwrite an earlier one.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints:
            raise InputError(
                f"{output_dir} holds {checkpoints[-1].name} of an earlier training; pass --resume-from-checkpoint "
                "last, or choose another output_dir"
            )
        if any(output_dir.glob("*.safetensors")) or (output_dir / "best").exists():
            raise InputError(f"{output_dir} holds a model already; choose another output_dir")
        return None
    if resume_from_checkpoint == "last":
        if not checkpoints:
            raise InputError(f"{output_dir} has no checkpoint to resume from")
        return checkpoints[-1]
    path = Path(resume_from_checkpoint)
    if not (path / "trainer_state.json").exists():
        raise InputError(f"{path} is no checkpoint: it has no trainer_state.json")
    return path


def fix_date(config: TrainConfig) -> TrainConfig:
    """Return the config with the date that chat templates print: its own, that of the checkpoint, or today's.

    Raises InputError when there is no checkpoint to resume from.
    """
    recorded = None
    if config.resume_from_checkpoint is not None:
        path = find_checkpoint(config.resume_from_checkpoint, Path(config.output_dir))
        assert path is not None
        settings = read_json(path / "trainer_state.json").get("settings")
        recorded = settings.get("template_date") if isinstance(settings, dict) else None
    return dataclasses.replace(config, template_date=choose_date(config, recorded))


def resume(training: Training, path: Path | None, settings: Mapping[str, object]) -> TrainerState:
    """Restore a training to a checkpoint and return how far it is; path None: a new training.

    Checkpoints and a best model of later steps are removed, because these steps are taken again. Raises
    CheckpointError when the checkpoint is damaged, and InputError naming a setting that differs.
    """
    if path is None:
        return TrainerState(dict(settings))
    checkpoint = read_checkpoint(path)
    check_same_settings(checkpoint.state.settings, settings, f"{path} was trained")
    restore_checkpoint(checkpoint, training.trained, training.world)
    _remove_later_files(training, checkpoint.state)
    return checkpoint.state


def _remove_later_files(training: Training, state: TrainerState) -> None:
    """Remove what the steps after the checkpoint have written, and forget a best model that was lost in a crash."""
    output_dir, world = training.output_dir, training.world
    best = output_dir / "best"
    best_step = read_json(best / "best.json")["step"] if (best / "best.json").exists() else None
    world.wait()  # until all processes have read it
    if best_step is None:
        state.best_eval_loss = None  # a crash came after the old best model was removed and before the new one was kept
    if world.is_main:
        remove_later_checkpoints(output_dir, state.step)
        if best_step is not None and best_step > state.step:
            remove_directory(best)
