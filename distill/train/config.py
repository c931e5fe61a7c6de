"""Options of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from genssd.distill.runs.chat_settings import ChatSettings
from genssd.distill.runs.effects import Need, Needs
from genssd.distill.runs.field_kinds import DataFile, FileName, ModelPath, Operational
from genssd.distill.runs.hub_name import check_repository
from genssd.distill.runs.monitor_options import MonitorName
from genssd.distill.train.loss_options import LossOptions
from genssd.distill.train.rollout_options import RolloutOptions
from genssd.engine.common.errors import InputError
from genssd.engine.common.outcomes import STATUSES
from genssd.engine.common.thread_count import check_threads

Layout = Literal["pad", "pack", "tree"]
"""Arrangement of the examples of a forward pass, see batches.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings(LossOptions):
    """Options of a training that do not name files; their names are those of TrainingArguments and TRL."""

    NEEDS: ClassVar[Needs] = {
        "rollout": Need(lambda o: o.lmbda > 0.0, "an lmbda above 0"),
        "num_train_epochs": Need(
            lambda o: o.max_steps is None and o.max_train_tokens is None, "neither max_steps nor max_train_tokens"
        ),
        **{
            name: Need(lambda o: o.use_peft, "use_peft")
            for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        },
        "eval_steps": Need(lambda o: bool(o.eval_data), "eval_data"),
        "save_total_limit": Need(lambda o: o.save_steps is not None, "save_steps"),
    }

    rollout: RolloutOptions = field(default_factory=RolloutOptions)
    """Options of the completions that the student writes in on-policy steps (see lmbda)."""
    statuses: tuple[str, ...] = ("finished",)
    """Statuses of the rows of a selection to train on: finished, length, budget, pruned. Other rows are left out."""
    max_length: int = 4096
    """Maximum number of tokens in a prompt with its completion; longer rows are left out, and counted."""
    layout: Layout = "pad"
    """Arrangement of the examples of a forward pass: pad (one row each), pack (all in one row, without padding), or
    tree (all in one row, and a prefix that several examples share is computed once)."""
    per_device_train_batch_size: int = 8
    """Number of examples in one forward pass of one process."""
    gradient_accumulation_steps: int = 1
    """Number of forward passes of each process in one optimizer step."""
    num_train_epochs: float = 1.0
    """Number of passes over the data; may be a fraction."""
    max_steps: int | None = None
    """Number of optimizer steps, which then replaces num_train_epochs."""
    max_train_tokens: int | None = None
    """Number of completion tokens, which then replaces num_train_epochs; the step that reaches it is the last one."""
    learning_rate: float = 1e-5
    """Largest learning rate of the training."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the fall of the learning rate after the warmup."""
    warmup_steps: float = 0.03
    """Optimizer steps during which the learning rate rises: a number of steps or, below 1, a fraction of the
    training."""
    weight_decay: float = 0.0
    """Weight decay of AdamW on matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """Decay rate of AdamW's mean of gradients."""
    adam_beta2: float = 0.999
    """Decay rate of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Number that AdamW adds to the denominator of a step."""
    max_grad_norm: float = 1.0
    """Norm to which a larger gradient is clipped."""
    bf16: bool | None = None
    """Compute in bf16, with weights in float32. None: only on a GPU that has bf16 arithmetic."""
    gradient_checkpointing: Operational[bool] = False
    """Compute activations again in the backward pass instead of keeping them, which saves memory and takes time."""
    torch_compile: bool = False
    """Compile the layers (torch.compile, for any length); saves time in long runs only."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: sdpa, eager, flash_attention_2 (only with layout pad). None: the
    default of transformers."""
    use_peft: bool = False
    """Train low-rank adapters (LoRA) instead of all weights; OUTPUT_DIR holds the merged model and adapter/."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Numerator of the scale of the adapters, which is lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Probability of dropout at the input of the adapters."""
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get adapters, or all-linear for every linear module in the layers."""
    fsdp: bool = False
    """Shard weights, gradients and optimizer states over the processes of torchrun (FSDP2), and the weights of the
    teacher; otherwise every process has the full models."""
    eval_data: DataFile[tuple[str, ...]] = ()
    """Data files, as for data, on which the loss is measured during the training; the model with the smallest loss is
    kept in OUTPUT_DIR/best."""
    eval_steps: int | None = None
    """Number of optimizer steps between two measurements on eval_data; None: an epoch. The last step is always
    measured."""
    report_to: Operational[MonitorName] = "none"
    """Monitor that gets the metrics in addition to metrics.jsonl."""
    logging_steps: Operational[int] = 10
    """Number of optimizer steps between two lines of metrics.jsonl; the last step always has a line."""
    save_steps: Operational[int | None] = None
    """Number of optimizer steps between two checkpoints; None: no checkpoints."""
    save_total_limit: Operational[int | None] = 2
    """Maximum number of checkpoints, of which the oldest are removed; None: all are kept."""
    device: Operational[str | None] = None
    """Device of the training: cpu or cuda; None: cuda where there is one."""
    threads: int | None = None
    """Number of CPU threads, on which the last digits of the result depend. None: that of the checkpoint which is
    resumed; for a new training OMP_NUM_THREADS where it is set, else at most the cores that the process is given; fewer
    for a small student with few examples in a forward pass."""
    seed: int = 0
    """Seed of the order of the examples, of dropout and of rollouts."""

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
        for name in ("adam_beta1", "adam_beta2", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if not 0.0 <= self.warmup_steps < math.inf or (self.warmup_steps > 1 and self.warmup_steps % 1):
            raise InputError(
                f"warmup_steps must be a fraction of the training in [0, 1), or a number of steps, not "
                f"{self.warmup_steps:g}"
            )
        if self.warmup_steps >= 1 and self.max_train_tokens is not None:
            raise InputError(
                "warmup_steps must be a fraction below 1 beside max_train_tokens, under which the number of steps is "
                "not known"
            )
        check_threads(self.threads)
        if not 0.0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be >= 0, not {self.weight_decay}")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed must be at least 0 and less than 2**63, not {self.seed}")
        unknown = set(self.statuses) - set(STATUSES)
        if unknown:
            raise InputError(f"statuses: there is no {', '.join(sorted(unknown))}; known: {', '.join(STATUSES)}")
        if self.key_attention.weight and (self.layout != "pad" or self.gradient_checkpointing or self.fsdp):
            raise InputError("key_attention reads every layer once, row by row: layout pad, no checkpointing, no fsdp")
        if self.key_attention.weight and self.attn_implementation is not None:
            raise InputError("key_attention brings its own attn_implementation")
        if self.adaptive_alpha and self.per_device_train_batch_size == 1:
            raise InputError(
                "adaptive_alpha compares the completions of a forward pass: per_device_train_batch_size must be at "
                "least 2"
            )
        if self.key_attention.weight and self.rollout.train_on in ("correct", "wrong"):
            raise InputError("key_attention is a mean over all completions: not with rollout.train_on correct or wrong")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig(TrainSettings, ChatSettings):
    """Fine-tuning and distillation on the completions of rows."""

    NEEDS: ClassVar[Needs] = {"allow_eval_overlap": Need(lambda o: bool(o.eval_data), "eval_data")}

    model_name_or_path: ModelPath[str]
    """Hub id or local directory of the student to start from."""
    # the examples of the data are compared, not their files
    data: Operational[FileName[tuple[str, ...]]]
    """Data files (JSON lines, CSV, Parquet or Arrow, also compressed), - for standard input, or ORG/NAME:SPLIT of the
    Hugging Face hub. Their rows are selections of `genssd select`, or have messages, or a prompt and a completion."""
    output_dir: Operational[FileName[str]] = "runs/train"
    """Directory for the trained model, its checkpoints and metrics."""
    # a guard, which changes no result
    allow_eval_overlap: Operational[bool] = False
    """Train also where questions of the data stand in eval_data, exactly or with other case, spaces or punctuation;
    summary.json counts them."""
    require_correct: bool = False
    """Train only on rows whose field `correct` is true, as select, generate, score and prefix write it; other rows are
    left out, and counted. A row without that field is refused. Without this option wrong responses are trained on as
    well, and the console gives their number."""
    writer: Literal["both", "teacher", "student"] = "both"
    """Whose chunks are trained in rows that two writers wrote (generate with method alternate or relay). The chunks of
    the other model have the weight 0 in the loss; rows without a chunk of this one are left out, and counted. A row
    that does not say who wrote its chunks is refused, unless both are trained."""
    resume_from_checkpoint: Operational[FileName[str | None]] = None
    """Checkpoint directory to resume from; "last" for the newest checkpoint in output_dir, which must have one; "auto"
    for the newest one or, where output_dir has none, the start of the training."""
    overwrite: Operational[bool] = False
    """Remove the model, the checkpoints and the files that an earlier training has written to output_dir, and begin
    anew."""
    push_to_hub: Operational[str | None] = None
    """Repository of the Hugging Face hub, OWNER/NAME, to which the trained model and its card are sent at the end. It
    is made, as a private one, before the training begins, where it does not exist."""

    def __post_init__(self) -> None:
        TrainSettings.__post_init__(self)
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, "push_to_hub")
        if self.overwrite and self.resume_from_checkpoint is not None:
            raise InputError(
                "resume_from_checkpoint goes on with a training, and overwrite removes it: give one of them"
            )
        if not self.data:
            raise InputError("data must name at least one file")
