"""`genssd train`: fine-tuning and distillation of a transformers model on selected trajectories.

    loss = sum over completion tokens of weight * loss of the token / sum of their weights, over one optimizer step

losses.py says what a token's loss is. A row's weight is its field `weight`, 1 where it has none.

OUTPUT_DIR/                   a save_pretrained directory: weights, config, tokenizer, chat template
OUTPUT_DIR/metrics.jsonl      one line per logged step, and one per evaluation
OUTPUT_DIR/best/              the model with the least loss on eval_data
OUTPUT_DIR/checkpoint-N/      the same plus optimizer.safetensors and trainer_state.json: training resumes exactly
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from genssd.distill.data.examples import Example, ExampleSet, read_examples
from genssd.distill.runs.journal import complete_rows, read_json, truncate, write_json, write_jsonl
from genssd.distill.train.checkpoints import (
    Position,
    data_fingerprint,
    find_checkpoint,
    remove_later_checkpoints,
    remove_old_checkpoints,
    restore,
    rng_state,
    save_checkpoint,
)
from genssd.distill.train.config import SETTINGS_OF_THE_RESULT, TrainConfig, schedule
from genssd.distill.train.distributed import World, whole
from genssd.distill.train.forward import ForwardPass
from genssd.distill.train.losses import Loss
from genssd.distill.train.metrics import Metrics, Silence
from genssd.distill.train.models import add_adapters, check_layout, load_model, load_teacher, save_model
from genssd.distill.train.on_policy import Rollouts
from genssd.engine.checkpoint import fingerprint, locate
from genssd.engine.config import ModelConfig
from genssd.engine.errors import InputError, NumericsError
from genssd.engine.memory import choose_device, choose_dtype, cpu_has_bf16
from genssd.engine.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgress:
    """After an optimizer step. share: of the training, 0..1; tokens: completion tokens trained so far."""

    step: int
    share: float
    epoch: float
    loss: float
    cross_entropy: float | None
    """A part of the loss: per token, nats. None where kd_ratio is 1."""
    divergence: float | None
    """The other part. None where kd_ratio is 0."""
    attention: float | None
    """The part from attention on key words: per example. None without it."""
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
    best_eval_loss: float | None
    """On eval_data."""


def run_train(config: TrainConfig, report: Callable[[TrainProgress], None] = lambda progress: None) -> TrainSummary:
    """Train and save. Raises GenssdError on bad input and on a loss that is not finite (naming the rows' batch)."""
    started = time.monotonic()
    source = locate(config.model_name_or_path)
    output_dir = Path(config.output_dir)
    tokenizer = Tokenizer(source)
    longest = min(config.max_length, ModelConfig.load(source).max_position_embeddings)
    if config.teacher_model_name_or_path is not None:
        teacher = ModelConfig.load(locate(config.teacher_model_name_or_path))
        longest = min(longest, teacher.max_position_embeddings)
    data = read_examples(config.data, tokenizer, max_length=longest, statuses=config.statuses)
    held_out: tuple[Example, ...] = ()
    if config.eval_data:
        held_out = read_examples(config.eval_data, tokenizer, max_length=longest, statuses=config.statuses).examples
    if config.kd_loss != "distillm2" and any(example.rejected for example in (*data.examples, *held_out)):
        raise InputError(
            "the data hold preference pairs, which kd_loss distillm2 alone learns from (or TRL's trainers)"
        )
    if config.uses_rows:
        for example in (*data.examples, *held_out):
            if example.topk is None:
                raise InputError(
                    f"{example.where}: no teacher_topk of this student's tokenizer, which kd_ratio needs; select with "
                    "--teacher-topk, or name a teacher_model_name_or_path"
                )
    world = World.join(choose_device(config.device), shard=config.fsdp)
    with world.claim(output_dir, "train"):
        return _train(config, world, tokenizer, data, held_out, source, output_dir, report, started)


def _train(
    config: TrainConfig,
    world: World,
    tokenizer: Tokenizer,
    data: ExampleSet,
    held_out: Sequence[Example],
    source: Path,
    output_dir: Path,
    report: Callable[[TrainProgress], None],
    started: float,
) -> TrainSummary:
    trainer = _Trainer(config, world, tokenizer, data.examples, held_out, source, output_dir)
    world.wait()  # until all have seen what the directory holds
    if world.is_main:
        write_json(output_dir / "run.json", {"command": "train", "config": dataclasses.asdict(config)})
    loss = trainer.train(report if world.is_main else lambda progress: None)
    world.wait()
    return TrainSummary(
        output_dir=output_dir,
        steps=trainer.position.step,
        tokens=trainer.position.tokens,
        loss=loss,
        examples=len(data.examples),
        left_out=dict(data.left_out),
        seconds=time.monotonic() - started,
        best_eval_loss=trainer.position.best_eval_loss,
    )


class _Trainer:
    def __init__(
        self,
        config: TrainConfig,
        world: World,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        source: Path,
        output_dir: Path,
    ) -> None:
        self._config = config
        self._world = world
        self._tokenizer = tokenizer
        self._examples = examples
        self._held_out = held_out
        self._output_dir = output_dir
        self._device = choose_device(config.device)
        values = json.loads(json.dumps(dataclasses.asdict(config)))  # as they read back
        settings = {name: values[name] for name in SETTINGS_OF_THE_RESULT}
        settings |= {"model": fingerprint(source), "data": data_fingerprint(examples), "processes": world.size}
        self.position = Position(settings)
        resume = find_checkpoint(config.resume_from_checkpoint, output_dir)
        torch.manual_seed((config.seed + world.rank) % (1 << 63))  # what is dropped out differs between processes
        # adapters are restored by the checkpoint, over the model that they were trained on
        start = source if resume is None or config.use_peft else resume
        self._model = load_model(start, tokenizer, self._device, attn_implementation=config.attn_implementation)
        check_layout(self._model, config.layout)
        if config.use_peft:
            add_adapters(
                self._model,
                r=config.lora_r,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                targets=config.lora_target_modules,
            )
        self._rollouts: Rollouts | None = None
        if config.lmbda:
            options = config.rollout
            self._rollouts = Rollouts(
                self._model,
                source,
                tokenizer,
                options,
                share=config.lmbda,
                seed=config.seed,
                max_length=config.max_length,
            )
        if config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.torch_compile:
            for layer in self._model.base_model.layers:
                layer.compile(dynamic=True)
        teacher: Any = None
        if config.teacher_model_name_or_path is not None:
            directory = locate(config.teacher_model_name_or_path)
            teacher = load_teacher(directory, tokenizer, self._device, choose_dtype(directory, "auto", self._device))
            check_layout(teacher, config.layout)
        bf16 = _use_bf16(config.bf16, self._device)
        self._forward = ForwardPass(self._model, teacher, tokenizer, config, layout=config.layout, bf16=bf16)
        world.split(self._model, self._forward.module)
        self._extra = self._forward.extra_parameters()
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._model, self._extra, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        if resume is not None:
            self.position = restore(
                resume, self._model, self._optimizer, settings, self._extra, rank=world.rank, device=self._device
            )
            best = output_dir / "best"
            best_step = read_json(best / "best.json")["step"] if (best / "best.json").exists() else None
            world.wait()  # until all have looked
            if best_step is None:
                self.position.best_eval_loss = None  # a crash came between the old and the new one
            if world.is_main:
                remove_later_checkpoints(output_dir, self.position.step)
                if best_step is not None and best_step > self.position.step:
                    shutil.rmtree(best)  # of a future that is run again

    def train(self, report: Callable[[TrainProgress], None]) -> float:
        """Run to the end and save the model; return the last step's loss."""
        config, position = self._config, self.position
        metrics = self._output_dir / "metrics.jsonl"
        logged = [(row, end) for row, end in complete_rows(metrics) if row.get("step", 0) <= self.position.step]
        main = self._world.is_main
        if main:
            truncate(metrics, logged[-1][1] if logged else 0)
        self._model.train()
        loss = next((float(row["loss"]) for row, _ in reversed(logged) if "loss" in row), math.nan)
        started, tokens_before = time.monotonic(), position.tokens
        with Metrics(metrics, config.report_to) if main else Silence() as log:
            for batch in self._steps():
                after = self._share(steps=1, tokens=sum(example.num_completion for example in batch))
                learning_rate = config.learning_rate * schedule(self._share(), after, config)
                taken = self._step(*self._on_policy(batch), learning_rate)
                loss = taken.loss
                position.step += 1
                position.tokens += taken.tokens
                progress = TrainProgress(
                    step=position.step,
                    share=min(1.0, self._share()),
                    epoch=position.epoch + position.batch / self._steps_per_epoch,
                    loss=loss,
                    cross_entropy=taken.cross_entropy,
                    divergence=taken.divergence,
                    attention=taken.attention,
                    learning_rate=learning_rate,
                    tokens=position.tokens,
                    tokens_per_second=(position.tokens - tokens_before) / (time.monotonic() - started),
                )
                report(progress)
                if position.step % config.logging_steps == 0 or self._share() >= 1.0:
                    known = {name: v for name, v in dataclasses.asdict(progress).items() if v is not None}
                    log.log({**known, "grad_norm": taken.grad_norm})
                if self._held_out and self._evaluation_is_due():
                    log.log(self._evaluate())
                if config.save_steps and position.step % config.save_steps == 0:
                    save_checkpoint(
                        self._output_dir,
                        self._model,
                        self._tokenizer,
                        self._optimizer,
                        position,
                        extra=self._extra,
                        rng=self._world.gather([rng_state(self._device)]),
                        write=main,
                    )
                    if config.save_total_limit is not None and main:
                        remove_old_checkpoints(self._output_dir, config.save_total_limit)
        save_model(self._model, self._tokenizer, self._output_dir, write=main)
        return loss

    def _evaluation_is_due(self) -> bool:
        every = self._config.eval_steps
        due = self.position.batch == self._steps_per_epoch if every is None else self.position.step % every == 0
        return due or self._share() >= 1.0

    def _evaluate(self) -> dict[str, float]:
        """The loss on the held-out examples; the model is kept if there was no smaller one."""
        self._model.eval()
        total = _Sums()
        with torch.no_grad():
            for part, counts in self._world.share(self._parts(self._held_out)):
                total.add(self._forward.loss(part, counts=counts, own=False, when=f"step {self.position.step}"))
        self._model.train()
        means = self._means(total, self._held_out)
        best = self.position.best_eval_loss
        if not math.isfinite(means["loss"]):
            raise NumericsError(
                f"the loss on eval_data is {means['loss']} after step {self.position.step}; lower learning_rate, or "
                f"look for broken rows. Checkpoints in {self._output_dir} are kept"
            )
        if best is None or means["loss"] < best:
            self.position.best_eval_loss = means["loss"]
            building, final = self._output_dir / "best.tmp", self._output_dir / "best"
            if self._world.is_main:
                shutil.rmtree(building, ignore_errors=True)
            save_model(self._model, self._tokenizer, building, write=self._world.is_main)
            if self._world.is_main:  # a crash never leaves half a model under the final name
                write_json(building / "best.json", {"step": self.position.step, **means})
                shutil.rmtree(final, ignore_errors=True)
                building.rename(final)
        return {"step": self.position.step, **{f"eval_{name}": value for name, value in means.items()}}

    @property
    def _step_size(self) -> int:
        """Examples of one optimizer step."""
        config = self._config
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * self._world.size

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
            order = self._order(random.Random(f"{self._config.seed}:{position.epoch}"))
            while position.batch < self._steps_per_epoch:
                if self._share() >= 1.0:
                    return
                chosen = order[position.batch * size : (position.batch + 1) * size]
                position.batch += 1
                yield [self._examples[i] for i in chosen]
            position.epoch, position.batch = position.epoch + 1, 0

    def _order(self, dice: random.Random) -> list[int]:
        """A new order of the examples; as a tree, those of one prompt stay together."""
        if self._config.layout != "tree":
            order = list(range(len(self._examples)))
            dice.shuffle(order)
            return order
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, example in enumerate(self._examples):
            groups.setdefault(example.input_ids[: example.num_prompt], []).append(i)
        shuffled = list(groups.values())
        dice.shuffle(shuffled)
        return [i for group in shuffled for i in group]

    def _on_policy(self, batch: Sequence[Example]) -> tuple[Sequence[Example], bool]:
        """The step's examples, and whether the student has written them."""
        step, world = self.position.step + 1, self._world
        if self._rollouts is None or not self._rollouts.due(step):
            return batch, False
        return world.gather(self._rollouts.write(batch, step, range(world.rank, len(batch), world.size))), True

    def _step(self, batch: Sequence[Example], own: bool, learning_rate: float) -> _Taken:
        """One optimizer step. own: whether the student wrote the completions."""
        scale = self._world.loss_factor / (_weight(batch) or 1.0)  # weight 0: nothing to learn
        total = _Sums()
        for part, counts in self._world.share(self._parts(batch)):
            loss = self._forward.loss(part, counts=counts, own=own, when=f"step {self.position.step + 1}")
            total.add(loss)
            step_loss = loss.total * scale
            if loss.attention is not None:
                step_loss = step_loss + loss.attention * (self._config.key_attention.weight / len(batch))
            step_loss.backward()  # type: ignore[no-untyped-call]
        trained = [p for p in (*self._model.parameters(), *self._extra.values()) if p.requires_grad]
        self._world.sum_gradients(trained)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(trained, self._config.max_grad_norm)))
        means = self._means(total, batch)
        if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
            self._stop_at(batch, means["loss"], norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return _Taken(
            loss=means["loss"],
            cross_entropy=means.get("cross_entropy"),
            divergence=means.get("divergence"),
            attention=means.get("attention"),
            grad_norm=norm,
            tokens=sum(example.num_completion for example in batch),
        )

    def _parts(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """What one forward pass takes."""
        size = self._config.per_device_train_batch_size
        return [examples[start : start + size] for start in range(0, len(examples), size)]

    def _means(self, total: _Sums, examples: Sequence[Example]) -> dict[str, float]:
        """Over the completion tokens of all processes; of attention over the examples."""
        weight, sums = _weight(examples) or 1.0, self._world.sum(total.sums, self._device)
        attention = sums.pop("attention", None)
        means = {name: value / weight for name, value in sums.items()}
        if attention is not None:
            means["attention"] = attention / len(examples)
            means["loss"] += self._config.key_attention.weight * means["attention"]
        return means

    def _stop_at(self, batch: Sequence[Example], loss: float, norm: float) -> NoReturn:
        path = self._output_dir / "bad_batch.jsonl"
        rows = [
            {"where": e.where, "prompt_ids": e.input_ids[: e.num_prompt], "completion_ids": e.completion_ids}
            for e in batch
        ]
        if self._world.is_main:
            write_jsonl(path, rows)
        raise NumericsError(
            f"the loss is {loss} and its gradient {norm} at step {self.position.step + 1} (epoch "
            f"{self.position.epoch}, batch {self.position.batch}); lower learning_rate, or look for broken rows: the "
            f"batch is in {path}. Checkpoints in {self._output_dir} are kept"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """An optimizer step: means over its tokens."""

    loss: float
    cross_entropy: float | None
    divergence: float | None
    attention: float | None
    grad_norm: float
    tokens: int


class _Sums:
    """Losses of several forward passes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, loss: Loss) -> None:
        parts = {"loss": loss.total, **loss._asdict()}
        del parts["total"]
        for name, value in parts.items():
            if value is not None:
                self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())


def _weight(examples: Sequence[Example]) -> float:
    """Of all completion tokens."""
    return sum(sum(example.token_weights()) for example in examples)


def _parameter_groups(model: Any, extra: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases do not decay."""
    trained = [p for p in (*model.parameters(), *extra.values()) if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _use_bf16(wanted: bool | None, device: torch.device) -> bool:
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    if wanted and not has:
        raise InputError(f"bf16 was asked for, but this {device.type} has no bf16 arithmetic; leave bf16 out")
    return (device.type == "cuda" and has) if wanted is None else wanted
