"""Resuming a training: the checkpoint in its directory, and the settings that must be those of the earlier run."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from genssd.distill.data.examples import Example
from genssd.distill.runs.chat_settings import choose_date
from genssd.distill.runs.directory import RECORD
from genssd.distill.runs.journal import complete_rows, read_json
from genssd.distill.runs.metrics import METRICS_FILE
from genssd.distill.runs.settings import check_same_settings, settings_of
from genssd.distill.runs.writing import truncate
from genssd.distill.train.build import Training, TrainingInputs
from genssd.distill.train.checkpoints import STATE, TrainerState, list_checkpoints, remove_later_checkpoints
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.directories import remove_directory
from genssd.distill.train.distributed import World
from genssd.distill.train.reading import check_files, make_damaged_error, read_checkpoint, read_state
from genssd.distill.train.restoring import restore_checkpoint
from genssd.distill.train.schedule import Schedule
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.common.quoting import quote


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


def find_start(config: TrainConfig) -> Path | None:
    """Return the checkpoint from which a training goes on; None for a training from the beginning.

    Raises InputError as `find_checkpoint` does. A training that overwrites an earlier one removes it when it begins.
    """
    output_dir = Path(config.output_dir)
    if config.overwrite and (output_dir / RECORD).exists():
        return None
    return find_checkpoint(config.resume_from_checkpoint, output_dir)


def find_checkpoint(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, or None for a new training.

    resume_from_checkpoint: a directory, "last" for the newest checkpoint in output_dir, or "auto" for the newest one
    or, where there is none, a new training. Raises InputError when there is no such checkpoint, and when a new training
    would overwrite an earlier one.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume_from_checkpoint is None:
        if checkpoints:
            raise InputError(
                f"{output_dir} holds {checkpoints[-1].name} of an earlier training; pass --resume-from-checkpoint "
                f"last to go on, {_name_remedy(output_dir)}"
            )
        if any(output_dir.glob("*.safetensors")) or (output_dir / "best").exists():
            raise InputError(f"{output_dir} holds a model already; {_name_remedy(output_dir)}")
        return None
    if resume_from_checkpoint == "auto":
        if not checkpoints:
            _check_may_begin_again(output_dir)
        return checkpoints[-1] if checkpoints else None
    if resume_from_checkpoint == "last":
        if not checkpoints:
            raise InputError(
                f"{output_dir} has no checkpoint to resume from; --resume-from-checkpoint auto begins the training then"
            )
        return checkpoints[-1]
    path = Path(resume_from_checkpoint)
    if not (path / STATE).exists():
        raise InputError(f"{path} is no checkpoint: it has no {STATE}")
    return path


def _check_may_begin_again(output_dir: Path) -> None:
    """Raise InputError when the directory holds a model that no killed training of it has left unfinished."""
    is_of_a_training = (output_dir / "run.json").exists()
    is_finished = (output_dir / "config.json").exists()
    if is_finished or (any(output_dir.glob("*.safetensors")) and not is_of_a_training):
        raise InputError(
            f"{output_dir} holds a finished model, and no checkpoint to resume from; {_name_remedy(output_dir)}"
        )


def _name_remedy(output_dir: Path) -> str:
    """Return what else can be done about a directory that holds a training. Only what a run has recorded is removed."""
    is_recorded = (output_dir / RECORD).exists()
    return (
        "pass --overwrite to begin anew, or choose another output_dir" if is_recorded else "choose another output_dir"
    )


def fix_date(config: TrainConfig) -> TrainConfig:
    """Return the config with the date that chat templates print: its own, that of an earlier part, or today's.

    Raises InputError when there is no checkpoint to resume from.
    """
    settings: Mapping[str, object] = {}
    path = find_start(config)
    if path is not None:
        settings = read_state(path).settings
    elif config.resume_from_checkpoint is not None:
        settings = _read_begun(Path(config.output_dir))
    date = settings.get("template_date")
    return dataclasses.replace(config, template_date=choose_date(config, date if isinstance(date, str) else None))


def _read_begun(output_dir: Path) -> Mapping[str, object]:
    """Return the settings in run.json of a training that has no checkpoint yet; empty where it has not begun."""
    path = output_dir / "run.json"
    settings = read_json(path).get("settings") if path.exists() else None
    return settings if isinstance(settings, dict) else {}


def read_progress(
    config: TrainConfig, inputs: TrainingInputs, world: World, path: Path | None, settings: Mapping[str, object]
) -> TrainerState:
    """Return how far a training is, from a checkpoint that is checked as far as it can be without a model.

    path: of the checkpoint; None for a new training. Raises CheckpointError when the checkpoint is damaged, and
    InputError naming a setting that differs.
    """
    output_dir = Path(config.output_dir)
    if path is None:
        if (
            output_dir / "best"
        ).exists() and not config.overwrite:  # of a training without a checkpoint, which begins again
            begun = _read_begun(output_dir)
            now = {name: settings[name] for name in begun if name in settings}
            check_same_settings(begun, now, f"{output_dir} was begun")
        return TrainerState(dict(settings))
    state = read_state(path)
    _check_settings(state.settings, settings, config, path)
    if fault := Schedule(config, state, inputs.examples, num_processes=world.size).find_fault():
        raise make_damaged_error(path, STATE, fault)
    if world.is_main:
        check_files(path)
    return state


def is_of_other_processes(begun: Mapping[str, object], processes: int) -> bool:
    """Return whether the settings of a checkpoint are those of another number of processes."""
    return begun.get("processes") != processes


def _check_settings(begun: Mapping[str, object], now: Mapping[str, object], config: TrainConfig, path: Path) -> None:
    """Check that a checkpoint was trained with these settings.

    On another number of processes the batch of a step may be divided otherwise, and the weights be sharded or not: the
    examples of a step stay the same, which is what is checked. Raises InputError naming what differs.
    """
    subject = f"{path} was trained"
    if not is_of_other_processes(begun, int(str(now["processes"]))):
        check_same_settings(begun, now, subject)
        return
    parts = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
    sizes = [begun.get(name) for name in parts]
    if not all(isinstance(size, int) for size in sizes):
        raise make_damaged_error(path, STATE, f"settings has no {', '.join(parts)}")
    free = {*parts, "fsdp", "threads"}
    if config.adaptive_alpha:  # it compares the completions of a forward pass
        free.remove("per_device_train_batch_size")
    fixed, fixed_now = ({k: v for k, v in settings.items() if k not in free} for settings in (begun, now))
    check_same_settings(fixed, fixed_now, subject)
    before, after = (math.prod(int(str(settings[name])) for name in parts) for settings in (begun, now))
    if before != after:
        shown = " x ".join(f"{name} {begun[name]}" for name in parts)
        raise InputError(
            f"{subject} with {format_count(before, 'example')} in a step ({shown}), not {after}; on "
            f"{format_count(int(str(now['processes'])), 'process')} choose gradient_accumulation_steps and "
            f"per_device_train_batch_size so that their product with the number of processes is {before}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierFiles:
    """What an earlier part of a training has written beside its checkpoints, checked; nothing is changed yet."""

    output_dir: Path
    step: int
    """Step from which the training goes on."""
    best_step: int | None
    """Step of the best model; None without one."""
    metrics_end: int
    """Number of bytes in metrics.jsonl up to the last line of a step that is not taken again."""
    loss: float
    """Loss in the last of these lines; NaN where none has one."""

    @staticmethod
    def read(config: TrainConfig, state: TrainerState) -> EarlierFiles:
        """Read the files of an output directory, and forget the state's best model where it was lost.

        Of a training that is overwritten nothing is left. Raises InputError on a damaged line of metrics.jsonl,
        CheckpointError on a damaged best.json.
        """
        output_dir = Path(config.output_dir)
        if config.overwrite:
            return EarlierFiles(output_dir=output_dir, step=0, best_step=None, metrics_end=0, loss=math.nan)
        best = output_dir / "best"
        best_step = _read_best_step(best) if best.exists() else None
        if best_step is None:
            state.best_eval_loss = None
        end, loss = 0, math.nan
        path = output_dir / METRICS_FILE
        for number, (row, row_end) in enumerate(complete_rows(path), start=1):
            if type(row.get("step")) is not int or not isinstance(row.get("loss", 0.0), float):
                raise InputError(f"{path}, line {number} is damaged: it has no step and loss; remove this line")
            if row["step"] <= state.step:
                end, loss = row_end, float(row.get("loss", loss))
        return EarlierFiles(output_dir=output_dir, step=state.step, best_step=best_step, metrics_end=end, loss=loss)

    def remove_later(self) -> None:
        """Remove what the steps after the checkpoint have written, because they are taken again."""
        remove_later_checkpoints(self.output_dir, self.step)
        if self.best_step is not None and self.best_step > self.step:
            remove_directory(self.output_dir / "best")
        truncate(self.output_dir / METRICS_FILE, self.metrics_end)


def restore(training: Training, path: Path, state: TrainerState) -> None:
    """Restore a training to a checkpoint. state: how far it is, from `read_progress`.

    Raises CheckpointError when the checkpoint is damaged.
    """
    restore_checkpoint(read_checkpoint(path, training.trained, state), training.trained)


def _read_best_step(best: Path) -> int:
    """Return the step of the best model. Raises CheckpointError when best.json does not give it."""
    fields = read_json(best / "best.json")
    step = fields.get("step")
    if type(step) is not int or step < 1:
        raise CheckpointError(
            f"{best / 'best.json'} is damaged: step must be an integer of at least 1, not {quote(step)}; move {best} "
            "away, and the best model of the steps to come is kept there"
        )
    return step
