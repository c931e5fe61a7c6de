"""What the processes of tests/support/ranks.py run. Arguments and results are what JSON can hold."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from genssd.distill.train import checkpoints, trainer
from genssd.distill.train.build import Training, build_training
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.forward import ForwardPass
from genssd.distill.train.on_policy import Rollouts
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.engine.common.errors import InputError


def make_config(options: dict[str, Any]) -> TrainConfig:
    """Return a config from its fields; lists are tuples, and `rollout` is an object of fields."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if "rollout" in fields:
        fields["rollout"] = RolloutOptions(**fields["rollout"])
    return TrainConfig(**fields)


def train(*runs: dict[str, Any]) -> list[dict[str, Any]]:
    """Train with each of several configs in turn; return what this process did and held in each."""
    return [train_one(options) for options in runs]


def train_one(options: dict[str, Any]) -> dict[str, Any]:
    """Train with a config; return what this process did and held.

    counted: by step, the rows whose losses it counted. written: by step, the completions that it wrote, by index.
    bytes: of the parameters of student and teacher, those that it holds and those of the whole models.
    """
    counted: dict[str, list[str]] = {}
    written: dict[int, dict[int, Any]] = {}
    trainings: list[Training] = []
    compute, write = ForwardPass.compute_loss, Rollouts.write

    def compute_and_note(self: ForwardPass, batch: Any, *, counted: bool, when: str) -> Any:
        if counted and torch.is_grad_enabled():
            rows_of_step.setdefault(when, []).extend(example.where for example in batch.examples)
        return compute(self, batch, counted=counted, when=when)

    def write_and_note(self: Rollouts, examples: Any, step: int, indices: Any) -> Any:
        examples = write(self, examples, step, indices)
        written[step] = {i: example.completion_ids for i, example in zip(indices, examples, strict=True)}
        return examples

    def build_and_note(*arguments: Any) -> Training:
        trainings.append(build_training(*arguments))
        return trainings[-1]

    rows_of_step = counted
    with (
        mock.patch.object(ForwardPass, "compute_loss", compute_and_note),
        mock.patch.object(Rollouts, "write", write_and_note),
        mock.patch.object(trainer, "build_training", build_and_note),
    ):
        trainer.run_train(make_config(options))
    (training,) = trainings
    teacher = training.forward._teacher
    models = {"student": training.trained.model, "teacher": None if teacher is None else teacher.model}
    sizes = {name: count_bytes(model) for name, model in models.items() if model is not None}
    return {"counted": counted, "written": written, "bytes": sizes}


def count_bytes(model: torch.nn.Module) -> list[int]:
    """Return the bytes of the parameters that this process holds, and those of the whole model."""
    held = whole = 0
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        held += local.untyped_storage().nbytes()
        whole += parameter.numel() * parameter.element_size()
    return [held, whole]


def train_and_die(options: dict[str, Any], moment: str, rank: int) -> None:
    """Train until a process kills itself while a checkpoint is saved.

    moment: the function of checkpoints.py at whose call it does, when the files before that call are written.
    """

    def die(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if int(os.environ["RANK"]) == rank:
        with mock.patch.object(checkpoints, moment, die):
            trainer.run_train(make_config(options))
    else:
        trainer.run_train(make_config(options))


def train_on_a_full_disk(options: dict[str, Any], rank: int) -> tuple[str, list[str]]:
    """Train where the disk of one process takes no shard, and once more where it does.

    Return the error, and the checkpoints that it left.
    """
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if int(os.environ["RANK"]) == rank and name.startswith("shard-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    message = ""
    with mock.patch.object(os, "fsync", refuse):
        try:
            trainer.run_train(make_config(options))
        except InputError as error:
            message = str(error)
    torch.distributed.barrier()  # until the main process has removed what it wrote
    left = [path.name for path in Path(options["output_dir"]).glob("checkpoint-*")]
    torch.distributed.barrier()
    trainer.run_train(make_config(options))
    return message, left
