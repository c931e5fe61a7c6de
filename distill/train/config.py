"""The options of a training, and what follows from them alone."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from genssd.distill.train.batches import Layout
from genssd.distill.train.losses import LossOptions
from genssd.distill.train.on_policy import RolloutOptions
from genssd.engine.errors import InputError
from genssd.engine.selection import STATUSES


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings(LossOptions):
    """How to train; names are those of TrainingArguments and TRL."""

    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    """How the student writes where lmbda asks for it."""
    statuses: tuple[str, ...] = ("finished",)
    """Which rows of a selection to train on: finished, length, pruned."""
    max_length: int = 4096
    """Longer rows are left out, and counted."""
    layout: Layout = "pad"
    """How examples share a forward pass: padded rows; packed into one row, which wastes nothing; or packed as a tree,
    where trajectories of one prompt share its computation."""
    per_device_train_batch_size: int = 8
    """Examples of one forward pass of one process."""
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
    torch_compile: bool = False
    """Compile the layers (torch.compile, for any length); pays off in long runs."""
    attn_implementation: str | None = None
    """Of transformers: sdpa, eager, flash_attention_2 (with layout pad)."""
    use_peft: bool = False
    """Train low-rank adapters (LoRA) instead of all weights; OUTPUT_DIR holds the merged model and adapter/."""
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    fsdp: bool = False
    """Under torchrun: split weights, gradients and optimizer states over the processes (FSDP2). Else each has all."""
    eval_data: tuple[str, ...] = ()
    """JSONL files whose loss is measured on the way; the model with the least is kept in OUTPUT_DIR/best."""
    eval_steps: int | None = None
    """Measure every so many steps; None: after every epoch. Always at the end."""
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    """Where metrics go beside metrics.jsonl."""
    logging_steps: int = 10
    save_steps: int | None = None
    """Write a checkpoint every so many steps."""
    save_total_limit: int | None = 2
    """Keep only the newest checkpoints."""
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        LossOptions.__post_init__(self)
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "logging_steps",
            "lora_r",
            "lora_alpha",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_steps", "max_train_tokens", "save_steps", "save_total_limit", "eval_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_steps is not None and self.max_train_tokens is not None:
            raise InputError("give max_steps or max_train_tokens, not both")
        for name in ("num_train_epochs", "learning_rate", "max_grad_norm", "adam_epsilon"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be >= 0, not {self.weight_decay}")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed must be at least 0 and less than 2**63, not {self.seed}")
        unknown = set(self.statuses) - set(STATUSES)
        if unknown:
            raise InputError(f"statuses: there is no {', '.join(sorted(unknown))}; known: {', '.join(STATUSES)}")
        if self.fsdp and self.use_peft:
            raise InputError("fsdp splits all weights; adapters go with use_peft alone, on several devices too")
        if self.key_attention.weight and (self.layout != "pad" or self.gradient_checkpointing or self.fsdp):
            raise InputError("key_attention reads every layer once, row by row: layout pad, no checkpointing, no fsdp")
        if self.key_attention.weight and self.attn_implementation is not None:
            raise InputError("key_attention brings its own attn_implementation")
        if self.lmbda and (self.fsdp or self.use_peft):
            raise InputError("lmbda runs the engine on the whole weights: not with fsdp or use_peft")
        if self.eval_steps is not None and not self.eval_data:
            raise InputError("eval_steps needs eval_data")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(TrainSettings):
    """Fine-tuning and distillation on the completions of JSONL rows."""

    model_name_or_path: str
    """The student to start from: hub id or local directory."""
    data: tuple[str, ...]
    """JSONL files: selections of `genssd select`, or messages, or prompt and completion."""
    output_dir: str = "runs/train"
    resume_from_checkpoint: str | None = None
    """A checkpoint directory, or "last"."""

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        if not self.data:
            raise InputError("data must name at least one file")


SETTINGS_OF_THE_RESULT = (
    *(option.name for option in dataclasses.fields(LossOptions)),
    "layout",
    "eval_data",
    "eval_steps",
    "rollout",
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
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "seed",
)
"""What must not change between the parts of one training."""


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
