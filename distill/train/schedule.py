"""Schedule of a training: which examples each optimizer step takes, its learning rate, and which actions are due."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from genssd.distill.data.examples import Example
from genssd.distill.train.batches import ExampleBatch
from genssd.distill.train.checkpoints import TrainerState
from genssd.distill.train.config import TrainConfig
from genssd.engine.common.amounts import format_count


class Schedule:
    """Schedule of a training, computed from its options and from how far it is.

    `state` is the trainer's own: `iter_batches` counts the epochs and their batches in it, and the trainer counts the
    steps and tokens.
    """

    def __init__(
        self, config: TrainConfig, state: TrainerState, examples: Sequence[Example], *, num_processes: int
    ) -> None:
        self._config = config
        self._state = state
        self._examples = examples
        self._num_processes = num_processes
        self._step_size = (
            config.per_device_train_batch_size * config.gradient_accumulation_steps * num_processes
        )  # examples of one optimizer step
        self._steps_per_epoch = -(-len(examples) // self._step_size)

    def fraction_done(self, more_steps: int = 0, more_tokens: int = 0) -> float:
        """Return the fraction of the training that is done after some more steps and tokens; it may exceed 1."""
        config = self._config
        if config.max_train_tokens is not None:
            return (self._state.tokens + more_tokens) / config.max_train_tokens
        return (self._state.step + more_steps) / self._total_steps

    @property
    def _total_steps(self) -> int:
        """Number of optimizer steps of the training, where no number of tokens ends it."""
        return self._config.max_steps or math.ceil(self._config.num_train_epochs * self._steps_per_epoch)

    @property
    def _warmup(self) -> float:
        """Fraction of the training during which the learning rate rises; 1 or more where it rises to the end."""
        steps = self._config.warmup_steps
        return steps if steps < 1.0 else steps / self._total_steps

    def find_fault(self) -> str | None:
        """Return why the state is none that this training reaches after some steps, or None."""
        state, per_epoch = self._state, self._steps_per_epoch
        if state.batch > per_epoch or state.step != state.epoch * per_epoch + state.batch:
            steps = format_count(per_epoch, "step")
            return f"step {state.step} is not batch {state.batch} of epoch {state.epoch} with {steps}"
        if self._config.max_train_tokens is None and self.fraction_done() > 1.0:
            return f"step {state.step} is beyond the end of the training"
        if self._config.lmbda:
            return None  # how many tokens the student wrote is not known
        replayed = TrainerState(settings={})
        schedule = Schedule(self._config, replayed, self._examples, num_processes=self._num_processes)
        for batch in schedule.iter_batches():
            replayed.step += 1
            replayed.tokens += batch.num_completion
            if replayed.step == state.step:
                break
        if replayed.step < state.step:
            return f"step {state.step} is beyond the end of the training"
        if replayed.tokens != state.tokens:
            return f"tokens is {state.tokens}, but {replayed.tokens} after {format_count(state.step, 'step')}"
        return None

    @property
    def is_finished(self) -> bool:
        """Whether no optimizer step is left."""
        return self.fraction_done() >= 1.0

    @property
    def epoch(self) -> float:
        """Number of epochs done, with the fraction of the current one."""
        return self._state.epoch + self._state.batch / self._steps_per_epoch

    def learning_rate(self, batch: ExampleBatch) -> float:
        """Return the learning rate of the next optimizer step, which takes this batch."""
        after = self.fraction_done(more_steps=1, more_tokens=batch.num_completion)
        return self._config.learning_rate * compute_learning_rate_factor(
            self.fraction_done(), after, warmup=self._warmup, decay=self._config.lr_scheduler_type
        )

    @property
    def is_logging_due(self) -> bool:
        """Whether the metrics of the last step are written."""
        return self._state.step % self._config.logging_steps == 0 or self.is_finished

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the loss on eval_data is measured after the last step."""
        every = self._config.eval_steps
        is_due = self._state.batch == self._steps_per_epoch if every is None else self._state.step % every == 0
        return is_due or self.is_finished

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is written after the last step."""
        every = self._config.save_steps
        return every is not None and self._state.step % every == 0

    def iter_batches(self) -> Iterator[ExampleBatch]:
        """Yield the examples of each optimizer step that is left.

        Every epoch has a new order of the examples, which depends on the seed and the epoch alone.
        """
        state, size = self._state, self._step_size
        while True:
            order = self._shuffle(random.Random(f"{self._config.seed}:{state.epoch}"))
            while state.batch < self._steps_per_epoch:
                if self.is_finished:
                    return
                indices = order[state.batch * size : (state.batch + 1) * size]
                state.batch += 1
                yield ExampleBatch(examples=[self._examples[i] for i in indices], on_policy=False)
            state.epoch, state.batch = state.epoch + 1, 0

    def _shuffle(self, rng: random.Random) -> list[int]:
        """Return the indices of the examples in a new order; with layout tree, those of one prompt stay together."""
        if self._config.layout != "tree":
            order = list(range(len(self._examples)))
            rng.shuffle(order)
            return order
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(self._examples):
            by_prompt.setdefault(example.input_ids[: example.num_prompt], []).append(i)
        groups = list(by_prompt.values())
        rng.shuffle(groups)
        return [i for group in groups for i in group]


def compute_learning_rate_factor(
    before: float, after: float, *, warmup: float, decay: Literal["cosine", "linear", "constant"]
) -> float:
    """Return the factor of the learning rate in a step between two fractions of the training, both in [0, 1].

    The factor rises linearly to 1 during the fraction `warmup` and then falls as `decay` says. The rise depends on the
    fraction after the step and the fall on the one before it, so that neither the first nor the last step has a
    learning rate of 0.
    """
    if before < warmup:
        return min(1.0, after / warmup)
    if decay == "constant":
        return 1.0
    decayed = (before - warmup) / (1.0 - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * decayed)) if decay == "cosine" else 1.0 - decayed
