"""Checks of memory: the weights and caches of an engine, and a training, before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from genssd.distill.doctor.findings import Finding, Piece
from genssd.distill.doctor.inputs import Inputs, find_max_length
from genssd.distill.doctor.model_files import ModelFiles
from genssd.distill.runs.pool_options import PoolOptions
from genssd.distill.train.activations import BatchShape, estimate_training_bytes
from genssd.distill.train.adapters import add_adapters
from genssd.distill.train.build import choose_bf16
from genssd.distill.train.config import TrainSettings
from genssd.distill.train.division import divide_step
from genssd.engine.checkpoints.address import is_url
from genssd.engine.common.amounts import format_bytes, format_count
from genssd.engine.common.errors import CapacityError, GenssdError
from genssd.engine.host.threads import choose_engine_threads
from genssd.engine.models.transformers_loading import make_empty_model
from genssd.engine.setup.memory import available_bytes, choose_device, choose_dtype, count_weight_bytes
from genssd.engine.setup.memory_plan import MemoryPlan, PlannedModel, plan_memory

TIGHT = 0.9
"""Fraction of the free memory from which on a training is a warning: its activations are an estimate."""


def check_caches(inputs: Inputs) -> list[Finding]:
    """Find how the memory is divided between weights and caches, and how many sequences the caches hold."""
    engine = inputs.settings.engine
    models = inputs.models
    if engine is None or not all(model.has_weights for model in models.values()) or len(models) < _num_models(inputs):
        return []
    name = "memory of the engine"
    foreign = [role for role, model in models.items() if not model.has_own_decoder]
    if foreign:
        line = f"the cache of the {' and the '.join(foreign)} is known when transformers has loaded the model"
        return [Finding(name=name, level="ok", line=line)]
    if isinstance(engine, PoolOptions) and engine.ray is not None:
        line = "that of every node of the Ray cluster is known when its actors have loaded the models"
        return [Finding(name=name, level="ok", line=line)]
    processes = max(1, engine.processes or 1) if isinstance(engine, PoolOptions) else 1
    try:
        device = choose_device(engine.device)
        planned = {
            role: PlannedModel.read(model.directory, choose_dtype(model.directory, engine.dtype, device), device)
            for role, model in models.items()
        }
        plan = plan_memory(
            planned,
            memory_bytes=engine.memory_bytes,
            free_fraction=engine.memory_utilization,
            max_num_seqs=engine.max_num_seqs,
            threads=max(1, choose_engine_threads(engine.threads).count // processes),
            processes=processes,
        )
    except CapacityError as error:
        fix = "raise the limit of memory, take smaller models, or --dtype bfloat16 where it is float32"
        return [Finding(name=name, level="error", line=str(error), fix=fix)]
    except GenssdError:
        return []  # a finding of another check
    return [_judge_caches(inputs, plan, processes)]


def _judge_caches(inputs: Inputs, plan: MemoryPlan, processes: int) -> Finding:
    """Return the finding about the plan of a process: whether it fits, and how many sequences the caches hold."""
    settings = inputs.settings
    longest = max((max(lengths.values()) for lengths in inputs.prompts.list_lengths()), default=0)
    most = min(model.config.max_position_embeddings for model in inputs.models.values())
    length = min(longest + (settings.max_tokens or 0), most)
    # the candidates of a prompt share what is before their chunk
    chunk = settings.search.chunk.longest if settings.search is not None else settings.max_tokens or 0
    per_prompt = length + (settings.sequences - 1) * min(chunk, settings.max_tokens or chunk)
    weights = ", ".join(f"{role} {format_bytes(count)}" for role, count in plan.weight_bytes.items())
    lines = [
        f"free {format_bytes(plan.free_bytes)}{f' for each of {processes} processes' if processes > 1 else ''}",
        f"weights {weights} ({format_bytes(plan.loading_bytes)} while they are loaded)",
        f"computation {format_bytes(plan.working_bytes)}, with up to {plan.max_num_seqs} sequences at once",
        f"caches {format_bytes(plan.cache_bytes)}: {format_count(plan.cache_tokens, 'token')} for each model",
        f"the longest prompt with its response takes {format_count(length, 'token')}, a prompt with all of its "
        f"sequences at most {per_prompt:,}",
    ]
    name, detail = "memory of the engine", (Piece("\n".join(lines)),)
    total = sum(plan.weight_bytes.values()) + plan.working_bytes + plan.cache_bytes
    if plan.loading_bytes > plan.free_bytes:
        return Finding(
            name=name,
            level="error",
            line=f"loading takes {format_bytes(plan.loading_bytes)}, and {format_bytes(plan.free_bytes)} are free",
            detail=detail,
            fix="raise the limit of memory, take smaller models, or --dtype bfloat16 where it is float32",
        )
    if plan.cache_tokens < length:
        return Finding(
            name=name,
            level="error" if plan.cache_tokens <= longest else "warning",
            line=f"the caches hold {format_count(plan.cache_tokens, 'token')}, and the longest prompt with its "
            f"response takes {length:,}",
            detail=detail,
            fix="give more memory (--memory-bytes, --memory-utilization, the container's limit), or lower --max-tokens",
        )
    if total > plan.free_bytes:
        return Finding(
            name=name,
            level="warning",
            line=f"weights, computation and caches take {format_bytes(total)}, and {format_bytes(plan.free_bytes)} are "
            "free: the process may be killed when the caches fill",
            detail=detail,
            fix=f"--memory-bytes {max(0, plan.cache_bytes - (total - plan.free_bytes)):d}, or leave it out",
        )
    at_once = plan.cache_tokens // max(per_prompt, 1)
    line = f"weights {weights}; the caches hold {format_count(plan.cache_tokens, 'token')}"
    if at_once < 1:
        line += ": less than one prompt with all of its sequences; prompts wait for each other, and are slower"
        fix = "give more memory (--memory-bytes, --memory-utilization), or fewer candidates"
        return Finding(name=name, level="warning", line=line, detail=detail, fix=fix)
    if settings.max_tokens is not None:
        line += f": about {format_count(at_once, 'prompt')} of the longest at once"
    return Finding(name=name, level="ok", line=line, detail=detail)


def check_training(inputs: Inputs) -> list[Finding]:
    """Find whether the training fits: weights, gradients, moments, and about the activations of the largest batch."""
    training, student = inputs.settings.training, inputs.student
    if training is None or student is None or not student.has_weights:
        return []
    name = "memory of the training"
    try:
        device = choose_device(training.device)
        bf16 = choose_bf16(training.bf16, device)
        teacher_bytes = _count_teacher_bytes(inputs, device)
        division = divide_step(training, inputs.settings.training_processes)
        free = available_bytes(device) // division.processes
        divided = dataclasses.replace(
            training,
            per_device_train_batch_size=division.per_device_train_batch_size,
            gradient_accumulation_steps=division.gradient_accumulation_steps,
        )
        needed = _count_training_bytes(inputs, divided, student, bf16=bf16) + teacher_bytes
    except GenssdError as error:
        return [Finding(name=name, level="error", line=str(error))]
    batch = _find_batch(inputs, divided)
    each = f" for each of {division.processes} processes" if division.processes > 1 else ""
    teacher = f", of which the teacher's weights take {format_bytes(teacher_bytes)}" if teacher_bytes else ""
    line = (
        f"about {format_bytes(needed)} with batches of {batch.rows} x {format_count(batch.length, 'token')}{teacher}; "
        f"{format_bytes(free)} are free{each}"
    )
    if needed <= TIGHT * free:
        return [Finding(name=name, level="ok", line=line)]
    ways = list(_try_less(inputs, training, student, bf16=bf16, teacher_bytes=teacher_bytes))
    enough = next((way for way, count in ways if count <= TIGHT * free), None)
    detail = (Piece("\n".join(f"{way}: about {format_bytes(count)}" for way, count in ways)),)
    return [
        Finding(
            name=name,
            level="error" if needed > free and device.type == "cpu" else "warning",
            line=line,
            detail=detail,
            fix=enough or "take a smaller student, lower max_length, or raise the limit of memory",
        )
    ]


def _try_less(
    inputs: Inputs, training: TrainSettings, student: ModelFiles, *, bf16: bool, teacher_bytes: int
) -> Iterator[tuple[str, int]]:
    """Yield changes of the options that save memory, each on top of those before, and the bytes that are then taken."""
    steps: list[tuple[str, dict[str, object]]] = []
    if not training.gradient_checkpointing and not training.key_attention.weight:
        steps.append(("--gradient-checkpointing", {"gradient_checkpointing": True}))
    size = training.per_device_train_batch_size
    if size > 1:
        whole = size * training.gradient_accumulation_steps
        flags = f"--per-device-train-batch-size 1 --gradient-accumulation-steps {whole}"
        steps.append((flags, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": whole}))
    if not training.use_peft:
        steps.append(("--use-peft", {"use_peft": True}))
    words: list[str] = []
    for flags, changes in steps:
        training = dataclasses.replace(training, **changes)  # type: ignore[arg-type]
        words.append(flags)
        try:
            needed = _count_training_bytes(inputs, training, student, bf16=bf16)
        except GenssdError:  # peft is not installed
            continue
        yield " ".join(words), needed + teacher_bytes


def _count_training_bytes(inputs: Inputs, training: TrainSettings, student: ModelFiles, *, bf16: bool) -> int:
    """Return about how many bytes a training takes, the student's weights included. Raises GenssdError."""
    model = make_empty_model(student.directory, attn_implementation=training.attn_implementation)
    if training.use_peft:
        add_adapters(
            model,
            r=training.lora_r,
            alpha=training.lora_alpha,
            dropout=training.lora_dropout,
            targets=training.lora_target_modules,
        )
    weights = sum(int(parameter.nbytes) for parameter in model.parameters())
    return weights + estimate_training_bytes(model, _find_batch(inputs, training), training, bf16=bf16)


def _find_batch(inputs: Inputs, training: TrainSettings) -> BatchShape:
    """Return the largest batch of the examples; of responses that are not written yet, the largest that they can be."""
    if inputs.rows.examples:
        return BatchShape.of(inputs.rows.examples, training)
    prompt = max((lengths["student"] for lengths in inputs.prompts.list_lengths()), default=0)
    length = min(prompt + (inputs.settings.max_tokens or 0), find_max_length(inputs))
    return BatchShape.of_equal(training, length=length, prompt=min(prompt, length - 1))


def _count_teacher_bytes(inputs: Inputs, device: torch.device) -> int:
    """Return the size of the weights of the training's teacher in memory; 0 where it has none."""
    teacher = inputs.training_teacher
    if teacher is None or not teacher.has_weights:
        return 0
    if inputs.settings.training is not None and inputs.settings.training.kd_states:  # the head alone
        head = make_empty_model(teacher.directory).get_output_embeddings().weight
        return int(head.numel()) * choose_dtype(teacher.directory, "auto", device).itemsize
    return count_weight_bytes(teacher.directory, choose_dtype(teacher.directory, "auto", device))[0]


def _num_models(inputs: Inputs) -> int:
    """Return the number of models that this machine computes."""
    names = [*inputs.settings.models.values(), *inputs.settings.further_teachers]
    return sum(not is_url(name) for name in names)
