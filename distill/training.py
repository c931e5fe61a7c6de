"""`genssd train`: supervised fine-tuning of a transformers model on selected trajectories.

    loss = sum over completion tokens of -weight log p(token) / sum of their weights, over one optimizer step

A row's weight is its field `weight`, 1 where it has none.

OUTPUT_DIR/                   a save_pretrained directory: weights, config, tokenizer, chat template
OUTPUT_DIR/metrics.jsonl      one line per logged step
OUTPUT_DIR/checkpoint-N/      the same plus optimizer.safetensors and trainer_state.json: training resumes exactly
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genssd.distill.checkpoints import (
    Position,
    data_fingerprint,
    find_checkpoint,
    remove_later_checkpoints,
    remove_old_checkpoints,
    restore,
    save_checkpoint,
)
from genssd.distill.examples import Example, ExampleSet, read_examples
from genssd.distill.journal import Journal, complete_rows, truncate, write_json
from genssd.distill.run_directory import claim
from genssd.distill.student_model import load_model, save_model
from genssd.engine.checkpoint import fingerprint, locate
from genssd.engine.config import ModelConfig
from genssd.engine.errors import InputError, NumericsError
from genssd.engine.memory import choose_device, cpu_has_bf16
from genssd.engine.text import Tokenizer
from genssd.kernels.cross_entropy import linear_cross_entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Supervised fine-tuning on the completions of JSONL rows; the names are those of TrainingArguments."""

    model_name_or_path: str
    """The student to start from: hub id or local directory."""
    data: tuple[str, ...]
    """JSONL files: selections of `genssd select`, or messages, or prompt and completion."""
    output_dir: str = "runs/train"
    statuses: tuple[str, ...] = ("finished",)
    """Which rows of a selection to train on: finished, length, pruned."""
    max_length: int = 4096
    """Longer rows are left out, and counted."""
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    """Optimizer steps instead of epochs."""
    max_train_tokens: int | None = None
    """Completion tokens instead of epochs: training ends with the step that reaches them."""
    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    """Share of the training during which the learning rate rises."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool | None = None
    """Compute in bf16 over float32 weights. None: on a GPU that has it."""
    gradient_checkpointing: bool = False
    logging_steps: int = 10
    save_steps: int | None = None
    """Write a checkpoint every so many steps."""
    save_total_limit: int | None = 2
    """Keep only the newest checkpoints."""
    resume_from_checkpoint: str | None = None
    """A checkpoint directory, or "last"."""
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "logging_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "max_train_tokens", "save_steps", "save_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_train_tokens is not None:
            raise InputError("give max_steps or max_train_tokens, not both")
        for name in ("num_train_epochs", "learning_rate", "max_grad_norm", "adam_epsilon"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be >= 0, not {self.weight_decay}")
        if not self.data:
            raise InputError("data must name at least one file")


SETTINGS_OF_THE_RESULT = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "max_train_tokens",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "seed",
)
"""What must not change between the parts of one training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """After an optimizer step. share: of the training, 0..1; tokens: completion tokens trained so far."""

    step: int
    share: float
    epoch: float
    loss: float
    learning_rate: float
    tokens: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSummary:
    """What a training left behind."""

    output_dir: Path
    steps: int
    tokens: int
    loss: float
    """Of the last step."""
    examples: int
    left_out: dict[str, int]
    seconds: float


def run_train(config: TrainConfig, report: Callable[[TrainProgress], None] = lambda progress: None) -> TrainSummary:
    """Train and save. Raises GenssdError on bad input and on a loss that is not finite (naming the rows' batch)."""
    started = time.monotonic()
    source = locate(config.model_name_or_path)
    output_dir = Path(config.output_dir)
    tokenizer = Tokenizer(source)
    longest = min(config.max_length, ModelConfig.load(source).max_position_embeddings)
    data = read_examples(config.data, tokenizer, max_length=longest, statuses=config.statuses)
    with claim(output_dir, "train"):
        return _train(config, tokenizer, data, source, output_dir, report, started)


def _train(
    config: TrainConfig,
    tokenizer: Tokenizer,
    data: ExampleSet,
    source: Path,
    output_dir: Path,
    report: Callable[[TrainProgress], None],
    started: float,
) -> TrainSummary:
    trainer = _Trainer(config, tokenizer, data.examples, source, output_dir)
    write_json(output_dir / "run.json", {"command": "train", "config": dataclasses.asdict(config)})
    loss = trainer.train(report)
    return TrainSummary(
        output_dir=output_dir,
        steps=trainer.position.step,
        tokens=trainer.position.tokens,
        loss=loss,
        examples=len(data.examples),
        left_out=dict(data.left_out),
        seconds=time.monotonic() - started,
    )


class _Trainer:
    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer, examples: Sequence[Example], source: Path, output_dir: Path
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._examples = examples
        self._output_dir = output_dir
        self._device = choose_device(config.device)
        self._bf16 = _use_bf16(config.bf16, self._device)
        settings = {name: getattr(config, name) for name in SETTINGS_OF_THE_RESULT}
        settings |= {"model": fingerprint(source), "data": data_fingerprint(examples)}
        self.position = Position(settings)
        resume = find_checkpoint(config.resume_from_checkpoint, output_dir)
        torch.manual_seed(config.seed)
        self._model = load_model(resume or source, tokenizer, self._device)
        if config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable()
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        if resume is not None:
            self.position = restore(resume, self._model, self._optimizer, settings)
            remove_later_checkpoints(output_dir, self.position.step)

    def train(self, report: Callable[[TrainProgress], None]) -> float:
        """Run to the end and save the model; return the last step's loss."""
        config, position = self._config, self.position
        metrics = self._output_dir / "metrics.jsonl"
        logged = [(row, end) for row, end in complete_rows(metrics) if row.get("step", 0) <= self.position.step]
        truncate(metrics, logged[-1][1] if logged else 0)
        self._model.train()
        loss = float(logged[-1][0]["loss"]) if logged else math.nan
        started, tokens_before = time.monotonic(), position.tokens
        with Journal(metrics) as log:
            for batch in self._steps():
                after = self._share(steps=1, tokens=sum(example.num_completion for example in batch))
                learning_rate = config.learning_rate * schedule(self._share(), after, config)
                loss, grad_norm, tokens = self._step(batch, learning_rate)
                position.step += 1
                position.tokens += tokens
                progress = TrainProgress(
                    step=position.step,
                    share=min(1.0, self._share()),
                    epoch=position.epoch + position.batch / self._steps_per_epoch,
                    loss=loss,
                    learning_rate=learning_rate,
                    tokens=position.tokens,
                    tokens_per_second=(position.tokens - tokens_before) / (time.monotonic() - started),
                )
                report(progress)
                if position.step % config.logging_steps == 0 or self._share() >= 1.0:
                    log.append({**dataclasses.asdict(progress), "grad_norm": grad_norm})
                if config.save_steps and position.step % config.save_steps == 0:
                    save_checkpoint(self._output_dir, self._model, self._tokenizer, self._optimizer, position)
                    if config.save_total_limit is not None:
                        remove_old_checkpoints(self._output_dir, config.save_total_limit)
        save_model(self._model, self._tokenizer, self._output_dir)
        return loss

    @property
    def _step_size(self) -> int:
        """Examples of one optimizer step."""
        return self._config.per_device_train_batch_size * self._config.gradient_accumulation_steps

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self._step_size)

    def _share(self, steps: int = 0, tokens: int = 0) -> float:
        """How much of the training is done, after so many further steps and tokens."""
        config = self._config
        if config.max_train_tokens is not None:
            return (self.position.tokens + tokens) / config.max_train_tokens
        total = config.max_steps or math.ceil(config.num_train_epochs * self._steps_per_epoch)
        return (self.position.step + steps) / total

    def _steps(self) -> Iterator[list[Example]]:
        """The examples of each optimizer step: a new order every epoch, a function of (seed, epoch) alone."""
        position, size = self.position, self._step_size
        while True:
            order = list(range(len(self._examples)))
            random.Random(f"{self._config.seed}:{position.epoch}").shuffle(order)
            while position.batch < self._steps_per_epoch:
                if self._share() >= 1.0:
                    return
                chosen = order[position.batch * size : (position.batch + 1) * size]
                position.batch += 1
                yield [self._examples[i] for i in chosen]
            position.epoch, position.batch = position.epoch + 1, 0

    def _step(self, batch: Sequence[Example], learning_rate: float) -> tuple[float, float, int]:
        """One optimizer step; returns its loss, gradient norm and completion tokens."""
        tokens = sum(example.num_completion for example in batch)
        weight = sum(example.weight * example.num_completion for example in batch)
        size = self._config.per_device_train_batch_size
        total = 0.0
        for start in range(0, len(batch), size):
            loss = self._loss(batch[start : start + size]) / (weight or 1.0)  # all 0: nothing to learn
            total += float(loss.detach())
            loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_grad_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NumericsError(
                f"the loss is {total} and its gradient {norm} at step {self.position.step + 1} (epoch "
                f"{self.position.epoch}, batch {self.position.batch}); lower learning_rate, or look for broken rows. "
                f"Checkpoints in {self._output_dir} are kept"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, norm, tokens

    def _loss(self, batch: Sequence[Example]) -> Tensor:
        """The weighted sum over the completion tokens of a padded batch."""
        width = max(len(example.input_ids) for example in batch)
        ids = torch.full((len(batch), width), self._pad)
        seen = torch.zeros(len(batch), width, dtype=torch.long)
        trained = torch.zeros(len(batch), width, dtype=torch.bool)
        weight = torch.zeros(len(batch), width)
        for row, example in enumerate(batch):
            length = len(example.input_ids)
            ids[row, :length] = torch.tensor(example.input_ids)
            seen[row, :length] = 1
            trained[row, example.num_prompt : length] = True
            weight[row] = example.weight
        ids, seen, trained = ids.to(self._device), seen.to(self._device), trained.to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            hidden = self._model.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
            # the token at t is predicted from t - 1; rows that are not trained never meet the head
            return linear_cross_entropy(
                hidden[:, :-1][trained[:, 1:]],
                self._model.get_output_embeddings().weight,
                ids[:, 1:][trained[:, 1:]],
                row_weight=weight.to(self._device)[:, 1:][trained[:, 1:]],
            ).total

    @property
    def _pad(self) -> int:
        return self._tokenizer.hf.pad_token_id or 0


def schedule(before: float, after: float, config: TrainConfig) -> float:
    """The learning rate's factor for a step that takes the training from one share to another, both in [0, 1].

    A linear rise to 1 over warmup_ratio, then the scheduler's way down. The rise looks at the end of the step and the
    way down at its beginning, so that neither the first step nor the last is wasted on a rate of zero.
    """
    if before < config.warmup_ratio:
        return min(1.0, after / config.warmup_ratio)
    rest = (before - config.warmup_ratio) / (1.0 - config.warmup_ratio)
    if config.lr_scheduler_type == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * rest)) if config.lr_scheduler_type == "cosine" else 1.0 - rest


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _use_bf16(wanted: bool | None, device: torch.device) -> bool:
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    if wanted and not has:
        raise InputError(f"bf16 was asked for, but this {device.type} has no bf16 arithmetic; leave bf16 out")
    return (device.type == "cuda" and has) if wanted is None else wanted
