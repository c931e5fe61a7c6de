"""One optimizer step of a training."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, get_args

import torch

from genssd.distill.answers.forms import Outcome
from genssd.distill.runs.journal import write_jsonl
from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.build import Training
from genssd.distill.train.checkpoints import TrainerState
from genssd.distill.train.distributed import gather_shards
from genssd.distill.train.loss_totals import LossTotals
from genssd.engine.common.errors import NumericsError


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Losses of an optimizer step, as means over its completion tokens, and the size of its gradient."""

    loss: float
    cross_entropy: float | None
    divergence: float | None
    attention: float | None
    """Mean over the examples of the loss on attention to key words."""
    grad_norm: float
    """Norm of the gradient before it is clipped."""
    tokens: int
    """Number of completion tokens of the step."""
    verdicts: Mapping[str, float] = field(default_factory=dict)
    """Number of completions by the judge's verdict, and the divergence of those that were trained on, by name; empty
    where nothing is judged."""


def write_completions(training: Training, state: TrainerState, batch: ExampleBatch) -> ExampleBatch:
    """Return the batch of the next step, with completions by the student if the step is on-policy.

    Every process writes the completions of a shard of the examples.
    """
    rollouts, world, step = training.rollouts, training.world, state.step + 1
    if rollouts is None or not rollouts.plan.is_on_policy(step):
        return batch
    rollouts.take_weights(training.trained.model)
    written = rollouts.write(batch.examples, step, range(world.rank, len(batch.examples), world.size))
    return ExampleBatch(examples=world.gather(written), on_policy=True)


def take_step(training: Training, state: TrainerState, batch: ExampleBatch, learning_rate: float) -> StepResult:
    """Compute the gradient of a batch and change the weights.

    Raises NumericsError when the loss or the gradient is not finite; the batch is then in bad_batch.jsonl.
    """
    config, world, trained = training.config, training.world, training.trained
    totals = _accumulate_gradients(training, batch, step=state.step + 1)
    parameters = trained.trainable_parameters()
    world.sum_gradients(parameters)
    grad_norm = float(gather_shards(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)))
    means = totals.average(batch, world, attention_weight=config.key_attention.weight)
    if not (math.isfinite(means["loss"]) and math.isfinite(grad_norm)):
        _stop_at(training, state, batch, means["loss"], grad_norm)
    for group in trained.optimizer.param_groups:
        group["lr"] = learning_rate
    if any(example.weight for example in batch.examples) or not _is_verified(batch):
        trained.optimizer.step()  # where no completion has the verdict that is trained on, momentum alone would move
    trained.optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=means["loss"],
        cross_entropy=means.get("cross_entropy"),
        divergence=means.get("divergence"),
        attention=means.get("attention"),
        grad_norm=grad_norm,
        tokens=batch.num_completion,
        verdicts=_count_verdicts(batch, means),
    )


def _is_verified(batch: ExampleBatch) -> bool:
    return any(example.outcome is not None for example in batch.examples)


def _count_verdicts(batch: ExampleBatch, means: Mapping[str, float]) -> dict[str, float]:
    """Return the number of completions and the divergence of those that were trained on, by verdict."""
    if not _is_verified(batch):
        return {}
    counts = {f"completions_{outcome}": len(batch.select(outcome).examples) for outcome in get_args(Outcome)}
    return {**counts, **{name: value for name, value in means.items() if name.startswith("divergence_")}}


def _accumulate_gradients(training: Training, batch: ExampleBatch, *, step: int) -> LossTotals:
    """Run the forward and backward passes of this process's shard of a batch; return the totals of their losses."""
    config, world = training.config, training.world
    scale = world.loss_factor / batch.weight
    totals = LossTotals(verified=_is_verified(batch))
    for (index, part), counted in world.shard([*enumerate(batch.split(config.per_device_train_batch_size))]):
        _seed_dropout(config.seed, step, index)
        sums = training.forward.compute_loss(part, counted=counted, when=f"step {step}")
        totals.add(sums, part.outcome)
        loss = sums.total * scale
        if sums.attention is not None:
            loss = loss + sums.attention * (config.key_attention.weight / len(batch.examples))
        loss.backward()  # type: ignore[no-untyped-call]
        training.forward.free_gathered_weights()
    return totals


def _seed_dropout(seed: int, step: int, part: int) -> None:
    """Let the dropout of a forward pass depend on the seed, the step and the part of its batch alone.

    So it is the same in whatever process, and no state of a random generator has to be kept.
    """
    torch.manual_seed(random.Random(f"{seed}:{step}:{part}:dropout").getrandbits(63))


def _stop_at(training: Training, state: TrainerState, batch: ExampleBatch, loss: float, grad_norm: float) -> NoReturn:
    """Write the batch to bad_batch.jsonl and raise NumericsError."""
    path = training.output_dir / "bad_batch.jsonl"
    rows = [
        {"where": e.where, "prompt_ids": e.input_ids[: e.num_prompt], "completion_ids": e.completion_ids}
        for e in batch.examples
    ]
    if training.world.is_main:
        write_jsonl(path, rows)
    raise NumericsError(
        f"the loss is {loss} and its gradient {grad_norm} at step {state.step + 1} (epoch "
        f"{state.epoch}, batch {state.batch}); lower learning_rate, or look for broken rows: the "
        f"batch is in {path}. Checkpoints in {training.output_dir} are kept"
    )
