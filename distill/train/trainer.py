"""`genssd train`: fine-tuning and distillation of a transformers model on selected trajectories.

    loss = sum over completion tokens of weight * loss of the token / sum of the weights, over one optimizer step

losses.py defines the loss of a token. The weight of a row is its field `weight`, or 1 if it has none.

OUTPUT_DIR/                   a save_pretrained directory: weights, config, tokenizer, chat template. The weights have
                              the data type of the checkpoint that the training began from (saving.py)
OUTPUT_DIR/run.json           the options, and the settings that decide the result
OUTPUT_DIR/README.md          the model card: data, options, result and command (model_card.py)
OUTPUT_DIR/summary.json       counts of steps, tokens and examples, and the losses
OUTPUT_DIR/metrics.jsonl      one line per logged step, and one per evaluation
OUTPUT_DIR/best/              the model with the smallest loss on eval_data, with a card of its own
OUTPUT_DIR/checkpoint-N/      a save_pretrained directory in float32, with optimizer.safetensors and trainer_state.json,
                              from which training is resumed exactly; with fsdp the shards of every process
OUTPUT_DIR/bad_batch.jsonl    the examples of a step whose loss is not finite

A training has these phases: read the inputs and build (build.py), resume (resume.py), then in a loop take a step
(step.py), evaluate (evaluation.py) and save (checkpoints.py), as scheduled (schedule.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genssd.distill.runs.effects import check_effects
from genssd.distill.runs.hub_upload import prepare_repository, upload_model
from genssd.distill.runs.metrics import METRICS_FILE, Metrics, NoMetrics, check_monitor
from genssd.distill.train.build import Training, TrainingInputs, build_training, read_inputs
from genssd.distill.train.checkpoints import TrainerState, remove_old_checkpoints, save_checkpoint
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.directories import remove_leftovers
from genssd.distill.train.distributed import World
from genssd.distill.train.evaluation import measure_eval_loss
from genssd.distill.train.model_card import CardInputs, write_card
from genssd.distill.train.resume import (
    EarlierFiles,
    collect_settings,
    find_start,
    fix_date,
    read_progress,
    restore,
)
from genssd.distill.train.saving import save_final_model
from genssd.distill.train.schedule import Schedule
from genssd.distill.train.step import StepResult, take_step, write_completions
from genssd.distill.train.threads import fix_threads
from genssd.engine.common.errors import InputError
from genssd.engine.host.threads import announce
from genssd.engine.setup.memory import choose_device
from genssd.kernels.threads import torch_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """Progress of a training after an optimizer step."""

    step: int
    """Number of optimizer steps taken."""
    fraction_done: float
    """Fraction of the training that is done, in [0, 1]."""
    epoch: float
    """Number of epochs done, with the fraction of the current one."""
    loss: float
    """Loss of the step."""
    cross_entropy: float | None
    """Cross-entropy of the step per completion token, nats. None where kd_ratio is 1."""
    divergence: float | None
    """Divergence from the teacher in the step per completion token, nats. None where kd_ratio is 0."""
    attention: float | None
    """Loss on attention to key words in the step per example. None without key_attention."""
    learning_rate: float
    """Learning rate of the step."""
    tokens: int
    """Number of completion tokens trained so far."""
    tokens_per_second: float
    """Number of completion tokens trained per second since the training was started or resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """Result of a training."""

    output_dir: Path
    steps: int
    """Number of optimizer steps taken."""
    tokens: int
    """Number of completion tokens trained."""
    loss: float
    """Loss of the last step."""
    examples: int
    """Number of examples in the data."""
    left_out: dict[str, int]
    """Number of rows that were not trained on, by reason."""
    wrong: int
    """Number of rows that were trained on although their field `correct` is false."""
    undecided: int
    """Number of rows that were trained on although their response could not be judged."""
    eval_overlap: dict[str, int] | None
    """Number of rows of the data, and of those whose question stands in eval_data exactly or nearly; None without
    eval_data."""
    seconds: float
    """Duration of the run."""
    best_eval_loss: float | None
    """Loss on eval_data of the model in best/; None without eval_data."""


Report = Callable[[TrainProgress], None]
"""Function that takes the progress after every step."""


def run_train(config: TrainConfig, report: Report = lambda progress: None) -> TrainSummary:
    """Train and save the model.

    Raises GenssdError on bad input, on a loss that is not finite (its batch is written to bad_batch.jsonl), and, when
    the model is complete on disk, where push_to_hub fails.
    """
    started = time.monotonic()
    check_effects(config)
    check_monitor(config.report_to)
    config = fix_date(config)
    if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        prepare_repository(config.push_to_hub)
    inputs = read_inputs(config)
    world = World.join(choose_device(config.device), fsdp=config.fsdp)
    if len(set(world.gather([config.template_date]))) > 1:
        raise InputError("the processes began on different days: give --template-date, or start them again")
    if world.is_main:
        _warn_of_wrong_rows(inputs)
    config, threads = fix_threads(config, world)
    with torch_threads(threads.count), world.claim_run(config, "train") as run:
        if run is not None:
            remove_leftovers(Path(config.output_dir))
        world.wait()  # until they are gone
        settings = collect_settings(config, inputs, world)
        checkpoint = find_start(config)
        state = read_progress(config, inputs, world, checkpoint, settings)
        earlier = EarlierFiles.read(config, state)
        training = build_training(config, inputs, world, checkpoint)
        if checkpoint is not None:
            restore(training, checkpoint, state)
        world.wait()  # until all processes have read the directory
        card = None
        if run is not None:
            card = CardInputs.read(config, inputs.student)
            run.begin()
            run.record()
            earlier.remove_later()
            announce(threads)
        loss = Trainer(training, state, card).train(report, last_loss=earlier.loss)
        summary = TrainSummary(
            output_dir=Path(config.output_dir),
            steps=state.step,
            tokens=state.tokens,
            loss=loss,
            examples=len(inputs.examples),
            left_out=dict(inputs.left_out),
            wrong=inputs.wrong,
            undecided=inputs.undecided,
            eval_overlap=None if inputs.overlap is None else inputs.overlap.counts(),
            seconds=time.monotonic() - started,
            best_eval_loss=state.best_eval_loss,
        )
        if run is not None and card is not None:
            write_card(Path(config.output_dir), config, card, summary)
            known_loss = summary.loss if math.isfinite(summary.loss) else None  # None: no step was left to take
            run.write_summary({**dataclasses.asdict(summary), "loss": known_loss, "output_dir": config.output_dir})
        world.wait()  # until everything is written: a process that leaves early may abort on its way out
    if config.push_to_hub is not None and world.is_main:
        upload_model(config.push_to_hub, summary.output_dir)
    return summary


def _warn_of_wrong_rows(inputs: TrainingInputs) -> None:
    """Say how many rows are trained on although their response is not known to be correct, if there are any."""
    if inputs.wrong or inputs.undecided:
        logging.getLogger("genssd.train").warning(
            "%d of the rows that are trained on have a wrong response, and %d one that could not be judged; "
            "--require-correct leaves them out",
            inputs.wrong,
            inputs.undecided,
        )


class Trainer:
    """Loop over the optimizer steps of a training that is built and resumed.

    card: inputs of the model cards; None in a process that writes no files.
    """

    def __init__(self, training: Training, state: TrainerState, card: CardInputs | None) -> None:
        self._training = training
        self._state = state
        self._card = card
        self._schedule = Schedule(training.config, state, training.inputs.examples, num_processes=training.world.size)

    def train(self, report: Report, *, last_loss: float) -> float:
        """Take the steps that are left and save the model; return the loss of the last step.

        report: called in the main process only. last_loss: that of the steps before, NaN where there are none.
        """
        training, state, schedule = self._training, self._state, self._schedule
        is_main = training.world.is_main
        loss = last_loss
        self._remove_old_checkpoints()  # those that an earlier part could not remove any more
        training.trained.model.train()
        started, tokens_before = time.monotonic(), state.tokens
        with self._open_metrics() as metrics:
            for batch in schedule.iter_batches():
                learning_rate = schedule.learning_rate(batch)
                batch = write_completions(training, state, batch)
                result = take_step(training, state, batch, learning_rate)
                loss = result.loss
                state.step += 1
                state.tokens += result.tokens
                rate = (state.tokens - tokens_before) / (time.monotonic() - started)
                progress = self._measure_progress(result, learning_rate, tokens_per_second=rate)
                if is_main:
                    report(progress)
                if schedule.is_logging_due:
                    metrics.log(_build_row(progress, result))
                if training.inputs.held_out and schedule.is_evaluation_due:
                    metrics.log(measure_eval_loss(training, state, self._card, step_loss=loss))
                if schedule.is_checkpoint_due:
                    self._save_checkpoint()
        trained = training.trained
        save_final_model(
            trained.model, trained.tokenizer, training.output_dir, dtype=trained.saved_dtype, write=is_main
        )
        return loss

    def _open_metrics(self) -> Metrics | NoMetrics:
        if not self._training.world.is_main:
            return NoMetrics()
        return Metrics.open(self._training.output_dir / METRICS_FILE, self._training.config.report_to, "train")

    def _measure_progress(self, result: StepResult, learning_rate: float, *, tokens_per_second: float) -> TrainProgress:
        return TrainProgress(
            step=self._state.step,
            fraction_done=min(1.0, self._schedule.fraction_done()),
            epoch=self._schedule.epoch,
            loss=result.loss,
            cross_entropy=result.cross_entropy,
            divergence=result.divergence,
            attention=result.attention,
            learning_rate=learning_rate,
            tokens=self._state.tokens,
            tokens_per_second=tokens_per_second,
        )

    def _save_checkpoint(self) -> None:
        """Write a checkpoint and remove the oldest ones beyond save_total_limit."""
        training = self._training
        save_checkpoint(training.output_dir, training.trained, self._state, training.world)
        self._remove_old_checkpoints()

    def _remove_old_checkpoints(self) -> None:
        limit = self._training.config.save_total_limit
        if limit is not None and self._training.world.is_main:
            remove_old_checkpoints(self._training.output_dir, limit)


def _build_row(progress: TrainProgress, result: StepResult) -> dict[str, float]:
    """Return a row of metrics.jsonl, without the losses that the step does not have."""
    values = {"share" if name == "fraction_done" else name: v for name, v in dataclasses.asdict(progress).items()}
    return {
        **{name: value for name, value in values.items() if value is not None},
        "grad_norm": result.grad_norm,
        **result.verdicts,
    }
