"""The training of a round of `genssd distill`: in this process, or in several that divide the devices or a CPU.

A training that has a checkpoint goes on with the number of processes that it was begun with, by which the order of its
sums is given; a round whose training has not begun takes the processes of the command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from genssd.distill.console import report_training
from genssd.distill.pool.placing import Place, check_numbers, choose_gpus, divide_cpu
from genssd.distill.rounds.config import DistillConfig
from genssd.distill.runs.journal import read_number, write_json
from genssd.distill.runs.progress import Progress
from genssd.distill.runs.writing import remove_directory
from genssd.distill.train.checkpoints import STATE, list_checkpoints
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.division import divide_step
from genssd.distill.train.processes import train_in_processes
from genssd.distill.train.reading import read_state
from genssd.distill.train.trainer import run_train
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import quote
from genssd.engine.setup.memory import choose_device


def check_places(config: DistillConfig) -> None:
    """Raise InputError where the machine has no such devices, or too few processes train for train.fsdp."""
    check_numbers(config.processes, config.devices)
    count = divide_step(config.train, _count_places(config)).processes
    _list_places(config, count)
    if config.train.fsdp and count == 1:
        raise InputError(
            "train.fsdp shards the model over several processes, and one trains: give processes or devices, and a "
            "train.per_device_train_batch_size times train.gradient_accumulation_steps that they can divide"
        )


def train_round(config: DistillConfig, number: int, student: str, report: Progress) -> float:
    """Train a student on the kept trajectories of a round, unless that is done; return the loss of the last step.

    config: one whose trainings have a number of threads. A training that was interrupted goes on from its last
    checkpoint.
    """
    directory = Path(config.output_dir) / f"round-{number}" / "train"
    finished = directory / "finished.json"
    if finished.exists():
        return read_number(finished, "loss")
    report = report.within(f"round {number}, train")
    checkpoints = list_checkpoints(directory)
    count = _choose_count(config, checkpoints[-1] if checkpoints else None, report)
    places = _list_places(config, count)
    if directory.exists() and not checkpoints:
        remove_directory(directory)  # it ended before its first checkpoint
    training = _make_config(config, number, student, count, resume=bool(checkpoints))
    if places:
        loss = train_in_processes(training, places, report=report_training(report)).loss
    else:
        loss = run_train(training, report=report_training(report)).loss
    write_json(finished, {"loss": loss})
    return loss


def _make_config(config: DistillConfig, number: int, student: str, processes: int, *, resume: bool) -> TrainConfig:
    """Return the config of a round's training for each of its processes."""
    division = divide_step(config.train, processes)
    assert division.processes == processes
    assert config.train.threads is not None
    settings = {f.name: getattr(config.train, f.name) for f in dataclasses.fields(config.train)} | {
        "per_device_train_batch_size": division.per_device_train_batch_size,
        "gradient_accumulation_steps": division.gradient_accumulation_steps,
        "threads": max(1, config.train.threads // processes),
    }
    rounds = range(1, number + 1) if config.restart else (number,)
    return TrainConfig(
        **settings,
        **config.as_student_settings(),
        allow_eval_overlap=config.allow_eval_overlap and bool(config.train.eval_data),
        model_name_or_path=config.student if config.restart else student,
        data=tuple(str(Path(config.output_dir) / f"round-{r}" / "kept.jsonl") for r in rounds),
        output_dir=str(Path(config.output_dir) / f"round-{number}" / "train"),
        resume_from_checkpoint="last" if resume else None,
    )


def _choose_count(config: DistillConfig, checkpoint: Path | None, report: Progress) -> int:
    """Return the number of processes of a training: the one that it was begun with, or as many as divide its steps.

    checkpoint: the last one of the training; None where it begins. Raises InputError where this run has fewer devices
    than the training was begun with.
    """
    available = _count_places(config)
    if checkpoint is None:
        count = divide_step(config.train, available).processes
        if count < available:
            size = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
            examples = format_count(size, "example")
            report.note(f"{count} of {available} processes train: so many divide the {examples} of a step evenly")
        return count
    begun = read_state(checkpoint).settings.get("processes")
    if not isinstance(begun, int) or begun < 1 or divide_step(config.train, begun).processes != begun:
        raise InputError(
            f"{checkpoint / STATE} names {quote(begun)} as its number of processes, which cannot divide a step of this "
            f"run; remove {checkpoint.parent} to train the round again"
        )
    if begun > available and (config.devices is not None or choose_device(config.train.device).type != "cpu"):
        raise InputError(
            f"{checkpoint.parent} was begun by {format_count(begun, 'process')}, and this run has "
            f"{format_count(available, 'device')}: name {begun} with devices, or remove {checkpoint.parent} to train "
            "the round again"
        )
    return begun


def _count_places(config: DistillConfig) -> int:
    """Return the largest number of training processes, one on MIG instances, which cannot be joined.

    Raises InputError where the machine has no such devices.
    """
    if config.devices is not None:
        places = choose_gpus(config.devices, config.train.device, 1, None)
        return 1 if any(place.is_instance for place in places) else len(places)
    return config.processes or 1


def _list_places(config: DistillConfig, count: int) -> Sequence[Place]:
    """Return the places of so many training processes; none where this process trains. Raises InputError."""
    threads = config.train.threads or 1
    if config.devices is not None:  # also a single one, which need not be the first
        return choose_gpus(config.devices, config.train.device, threads, None)[:count]
    return divide_cpu(count, config.train.device, threads, None) if count > 1 else ()
