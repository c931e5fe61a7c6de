"""The loss of a training on eval_data, and the model that has the smallest one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping

import torch

from genssd.distill.runs.journal import write_json
from genssd.distill.runs.writing import TEMPORARY
from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.build import Training
from genssd.distill.train.checkpoints import TrainerState
from genssd.distill.train.directories import publish_directory
from genssd.distill.train.loss_totals import LossTotals
from genssd.distill.train.saving import save_model
from genssd.engine.common.errors import InputError, NumericsError


def measure_eval_loss(training: Training, state: TrainerState) -> dict[str, float]:
    """Measure the losses on eval_data and return them as a row of metrics.jsonl.

    The model is saved to best/ if its loss is smaller than all before. Raises NumericsError when it is not finite.
    """
    means = _compute_means(training, when=f"step {state.step}")
    if not math.isfinite(means["loss"]):
        raise NumericsError(
            f"the loss on eval_data is {means['loss']} after step {state.step}; lower learning_rate, or "
            f"look for broken rows. Checkpoints in {training.output_dir} are kept"
        )
    if state.best_eval_loss is None or means["loss"] < state.best_eval_loss:
        state.best_eval_loss = means["loss"]
        _save_best(training, state.step, means)
    return {"step": state.step, **{f"eval_{name}": value for name, value in means.items()}}


def _compute_means(training: Training, *, when: str) -> dict[str, float]:
    """Return the mean losses on eval_data, of which every process computes a shard."""
    config, world, model = training.config, training.world, training.trained.model
    batch = ExampleBatch(examples=training.inputs.held_out, on_policy=False)
    totals = LossTotals()
    model.eval()
    with torch.no_grad():
        for part, counted in world.shard(batch.split(config.per_device_train_batch_size)):
            totals.add(training.forward.compute_loss(part, counted=counted, when=when))
    training.forward.free_gathered_weights()
    model.train()
    return totals.average(batch, world, attention_weight=config.key_attention.weight)


def _save_best(training: Training, step: int, means: Mapping[str, float]) -> None:
    """Write the model to best/ under a temporary name and rename it, so that a crash leaves no incomplete model."""
    trained, is_main = training.trained, training.world.is_main
    temporary, final = training.output_dir / f"best{TEMPORARY}", training.output_dir / "best"
    try:
        save_model(trained.model, trained.tokenizer, temporary, dtype=trained.saved_dtype, write=is_main)
        if is_main:
            write_json(temporary / "best.json", {"step": step, **means})
            publish_directory(temporary, final)
    except InputError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
