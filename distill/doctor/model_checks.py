"""Checks of the models by themselves: architecture, backend, weight files, and the rows of embedding and head."""

from __future__ import annotations

from genssd.distill.doctor.findings import Finding, Piece
from genssd.distill.doctor.inputs import Inputs
from genssd.distill.doctor.model_files import ModelFiles
from genssd.engine.checkpoints.config import ModelConfig
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.checkpoints.parameters import count_parameters, count_stored_parameters, match_parameters
from genssd.engine.checkpoints.weights import WeightFiles
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import GenssdError, InputError
from genssd.engine.setup.memory import choose_device, choose_dtype
from genssd.engine.setup.requests import find_missing_rows
from genssd.kernels.tuned import name_of


def check_models(inputs: Inputs) -> list[Finding]:
    """Find who computes each model, and whether its weight files fit its config, by their headers."""
    return [_check_model(inputs, model) for model in inputs.list_models()]


def _check_model(inputs: Inputs, model: ModelFiles) -> Finding:
    name, engine = model.title, inputs.settings.engine
    trains = engine is None or model is inputs.training_teacher
    kind = model.config.model_type
    if not model.has_weights and _is_on_hub(model):
        size = f"{count_parameters(model.config):,} parameters, " if isinstance(model.config, ModelConfig) else ""
        return Finding(
            name=name,
            level="warning",
            line=f"{model.name} ({kind}, {size}not fetched yet): its weights cannot be looked at",
            fix=f"fetch them first (`hf download {model.name}`) to have their headers checked",
        )
    try:
        weights = WeightFiles.open(model.directory)
        if isinstance(model.config, ModelConfig):
            match_parameters(weights, model.config)
        parameters = count_stored_parameters(model.directory)
        if trains and read_config(model.directory).get("quantization_config"):
            raise InputError(f"{model.directory}: weights in MXFP4 are not trained")
        dtype = choose_dtype(model.directory, engine.dtype if engine else "auto", choose_device(_device(inputs)))
    except GenssdError as error:
        return Finding(name=name, level="error", line=str(error))
    facts = f"{model.name} ({kind}, {parameters:,} parameters, {model.config.max_position_embeddings:,} positions)"
    if model is inputs.training_teacher and model not in inputs.models.values():
        return Finding(name=name, level="ok", line=f"{facts} runs in transformers beside the training of the student")
    if engine is None and inputs.settings.training is not None:
        return Finding(name=name, level="ok", line=f"{facts} trains in transformers")
    if model.has_own_decoder:
        return Finding(name=name, level="ok", line=f"{facts} runs in the engine's own decoder, in {name_of(dtype)}")
    return Finding(
        name=name,
        level="warning",
        line=f"{facts} runs in transformers, in {name_of(dtype)}: one sequence at a time, which is slow",
        fix="take a model of a family that the engine computes itself (docs/models.md), or accept the time",
    )


def check_vocabularies(inputs: Inputs) -> list[Finding]:
    """Find whether every embedding has a row for every token, and how many rows are padding."""
    lines, faults = [], []
    for model in inputs.list_models():
        size, used = model.config.vocab_size, model.tokenizer.largest_id + 1
        fault = find_missing_rows(model.tokenizer, size)
        if fault is not None:
            faults.append(fault)
        padding = f", {format_count(size - used, 'row')} of padding that are never drawn" if size > used else ""
        lines.append(f"{model.title}: {format_count(size, 'row')}, {format_count(used, 'token id')}{padding}")
    if faults:
        return [
            Finding(
                name="vocabularies",
                level="error",
                line="; ".join(faults),
                fix="take the tokenizer of that checkpoint, or resize_token_embeddings and save_pretrained",
            )
        ]
    sizes = {model.config.vocab_size for model in inputs.list_models()}
    if len(sizes) < 2:
        return [Finding(name="vocabularies", level="ok", line="; ".join(lines))]
    line = f"the heads have different numbers of rows: {'; '.join(lines)}"
    training = inputs.settings.training
    detail: tuple[Piece, ...] = ()
    if training is not None and training.teacher_model_name_or_path is not None:
        rule = "both softmaxes are taken over the ids that both have" if training.kd_vocabulary == "restrict" else ""
        rule = rule or "each softmax is taken over its own rows, and the ids that one lacks are dropped"
        detail = (Piece(f"kd_vocabulary {training.kd_vocabulary}: {rule}"),)
    return [Finding(name="vocabularies", level="ok", line=line, detail=detail)]


def _device(inputs: Inputs) -> str | None:
    options = inputs.settings.engine or inputs.settings.training
    return None if options is None else options.device


def _is_on_hub(model: ModelFiles) -> bool:
    return str(model.directory) != model.name and "/snapshots/" in str(model.directory)
