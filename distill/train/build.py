"""Building a training: reading its examples, loading its models, and sharding them over the processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from genssd.distill.data.example_files import read_examples
from genssd.distill.data.examples import Example
from genssd.distill.data.overlap import EvalOverlap, find_eval_overlap, list_examples
from genssd.distill.train.activations import check_training_fits
from genssd.distill.train.adapters import add_adapters, load_adapters
from genssd.distill.train.checkpoints import TrainedModel, describe_remedy, is_sharded, list_trainable
from genssd.distill.train.config import TrainConfig
from genssd.distill.train.distributed import World
from genssd.distill.train.ends import add_ends, find_learnt_ends
from genssd.distill.train.forward import ForwardPass
from genssd.distill.train.models import Teacher, check_layout, find_foreign_tokenizer, load_teacher
from genssd.distill.train.on_policy import RolloutPlan, Rollouts, require_no_lead
from genssd.distill.train.row_needs import check_example
from genssd.distill.train.saving import find_stored_dtype
from genssd.engine.checkpoints.checkpoint import locate
from genssd.engine.checkpoints.config import load_config
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.models.transformers_loading import layers_of, load_model
from genssd.engine.setup.memory import choose_dtype, cpu_has_bf16
from genssd.engine.texts.text import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingInputs:
    """Inputs of a training: the student to start from, and the examples."""

    student: Path
    """Directory of the student to start from."""
    tokenizer: Tokenizer
    """Tokenizer of the student."""
    examples: tuple[Example, ...]
    """Examples to train on."""
    held_out: tuple[Example, ...]
    """Examples of eval_data."""
    overlap: EvalOverlap | None
    """Rows of the data whose question stands in eval_data; None without eval_data."""
    left_out: Mapping[str, int]
    """Number of rows that are not trained on, by reason."""
    wrong: int
    """Number of rows that are trained on although their field `correct` is false."""
    undecided: int
    """Number of rows that are trained on although their response could not be judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A training that is ready to take steps, except for how far it is."""

    config: TrainConfig
    world: World
    inputs: TrainingInputs
    trained: TrainedModel
    forward: ForwardPass
    rollouts: Rollouts | None
    """Completions by the student; None: no step is on-policy."""

    @property
    def output_dir(self) -> Path:
        """Directory of all files that the training writes."""
        return Path(self.config.output_dir)


def read_inputs(config: TrainConfig) -> TrainingInputs:
    """Read the examples that the student, and a teacher in memory, have positions for.

    config: one with a template_date. Raises InputError when the rows do not have what the loss needs: the teacher's
    top k, or pairs for distillm2 alone; and when a question of the data stands in eval_data, unless that is allowed.
    """
    student = locate(config.model_name_or_path)
    assert config.template_date is not None, "fix_date has not been called"
    tokenizer = Tokenizer(student).with_chat(config.make_chat_options(config.template_date))
    max_length = min(config.max_length, load_config(student).max_position_embeddings)
    teacher: Tokenizer | None = None
    if config.teacher_model_name_or_path is not None:
        directory = locate(config.teacher_model_name_or_path)
        max_length = min(max_length, load_config(directory).max_position_embeddings)
        if config.is_over_spans:
            foreign = find_foreign_tokenizer(Tokenizer(directory), tokenizer, config)
            teacher = None if foreign is None else foreign.with_chat(tokenizer.chat.options)
    data = read_examples(
        config.data,
        tokenizer,
        max_length=max_length,
        statuses=config.statuses,
        require_correct=config.require_correct,
        require_answers=config.rollout.is_verified,
        teacher=teacher,
        writer=None if config.writer == "both" else config.writer,
    )
    if config.lmbda and teacher is not None:
        require_no_lead(data.examples)
    held_out: tuple[Example, ...] = ()
    overlap: EvalOverlap | None = None
    if config.eval_data:
        held_out = read_examples(
            config.eval_data, tokenizer, max_length=max_length, statuses=config.statuses, teacher=teacher
        ).examples
        overlap = find_eval_overlap(list_examples(data.examples, tokenizer), list_examples(held_out, tokenizer))
        overlap.check(is_allowed=config.allow_eval_overlap)
    for example in (*data.examples, *held_out):  # also: a damaged file is refused before the training begins
        check_example(example, config)
    return TrainingInputs(
        student=student,
        tokenizer=tokenizer,
        examples=data.examples,
        held_out=held_out,
        overlap=overlap,
        left_out=data.left_out,
        wrong=data.wrong,
        undecided=data.undecided,
    )


def build_training(config: TrainConfig, inputs: TrainingInputs, world: World, checkpoint: Path | None) -> Training:
    """Load the models, shard them over the processes and create the optimizer.

    checkpoint: whose weights the student starts from, unless they are shards; `restore` restores everything else of it.
    """
    torch.manual_seed(config.seed)  # new adapters and routers begin as the same ones in all processes
    model = _load_student(config, inputs, world.loading_device, checkpoint)
    ends = find_learnt_ends(inputs.examples, inputs.tokenizer)
    add_ends(model, ends, inputs.tokenizer)
    tokenizer = inputs.tokenizer.with_ends(ends)
    rollouts = None
    if config.lmbda:
        plan = RolloutPlan(
            options=config.rollout, probability=config.lmbda, seed=config.seed, max_length=config.max_length
        )
        # sharded weights, and those under adapters, are no matrices that the engine could run on
        copy_to = world.device if config.fsdp or config.use_peft else None
        rollouts = Rollouts.build(model, inputs.student, tokenizer, plan, copy_to=copy_to)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.torch_compile:
        for layer in layers_of(model):
            layer.compile(dynamic=True)
    teacher = _load_teacher(config, inputs, world)
    bf16 = choose_bf16(config.bf16, world.device)
    forward = ForwardPass.build(model, teacher, tokenizer, config, layout=config.layout, bf16=bf16)
    check_training_fits(model, inputs.examples, config, world.device, bf16=bf16)
    forward.shard_weights(world)
    extra_parameters = forward.extra_parameters()
    trained = TrainedModel(
        model=model,
        tokenizer=tokenizer,
        extra_parameters=extra_parameters,
        optimizer=_create_optimizer(config, list_trainable(model, extra_parameters)),
        saved_dtype=find_stored_dtype(inputs.student),
    )
    return Training(config=config, world=world, inputs=inputs, trained=trained, forward=forward, rollouts=rollouts)


def _load_student(config: TrainConfig, inputs: TrainingInputs, device: torch.device, checkpoint: Path | None) -> Any:
    if checkpoint is not None and is_sharded(checkpoint):
        checkpoint = None
    # adapters belong to the student they were trained on, and are loaded over it
    source = inputs.student if checkpoint is None or config.use_peft else checkpoint
    try:
        model = load_model(source, inputs.tokenizer, device, attn_implementation=config.attn_implementation)
        if source == checkpoint and find_stored_dtype(source) != torch.float32:
            raise CheckpointError(f"{source}: the weights are {find_stored_dtype(source)}, not float32")
    except CheckpointError as error:
        if source != checkpoint:
            raise
        raise CheckpointError(f"{error}; {describe_remedy(source)}") from None
    check_layout(model, config.layout)
    if config.use_peft:
        add_adapters(
            model,
            r=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_target_modules,
        )
        if checkpoint is not None:
            try:
                load_adapters(model, checkpoint / "adapter")
            except CheckpointError as error:
                raise CheckpointError(f"{error}; {describe_remedy(checkpoint)}") from None
    return model


def _load_teacher(config: TrainConfig, inputs: TrainingInputs, world: World) -> Teacher | None:
    """Load the teacher and check that it reads the examples; return None where the loss does not need one in memory."""
    if config.teacher_model_name_or_path is None:
        return None
    directory = locate(config.teacher_model_name_or_path)
    dtype = choose_dtype(directory, "auto", world.device)
    teacher = load_teacher(directory, inputs.tokenizer, world.loading_device, dtype, over_spans=config.is_over_spans)
    check_layout(teacher.model, config.layout)
    for example in (*inputs.examples, *inputs.held_out):
        teacher.check_example(example)
    return teacher


def choose_bf16(bf16: bool | None, device: torch.device) -> bool:
    """Return whether to compute in bf16. Raises InputError when that is required and the device cannot."""
    is_supported = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    if bf16 and not is_supported:
        raise InputError(f"bf16 was asked for, but this {device.type} has no bf16 arithmetic; leave bf16 out")
    return (device.type == "cuda" and is_supported) if bf16 is None else bf16


def _create_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Create AdamW with weight decay on matrices, and none on norms and biases."""
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
