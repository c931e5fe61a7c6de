"""Reading a checkpoint of a training: everything in it is checked before anything of it is used.

A file, a key or a number that is missing or not what a training writes is an error that names it: continued from it,
the training would give another model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from genssd.distill.runs.journal import read_json
from genssd.distill.train.checkpoints import (
    MOMENTS,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    TrainedModel,
    TrainerState,
    compute_checksum,
    compute_checksums,
    describe_remedy,
    find_step,
    is_sharded,
)
from genssd.distill.train.shards import SHARDS, load_shards, read_shapes
from genssd.engine.common.errors import CheckpointError, InputError
from genssd.engine.common.quoting import one_line, quote

TensorKind = tuple[torch.dtype, tuple[int, ...]]
"""Data type and shape of a tensor."""
MAX_COUNT = 1 << 62
"""Largest number of steps, epochs or tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Files of a checkpoint other than the weights, as read from disk."""

    path: Path
    state: TrainerState
    tensors: Mapping[str, Tensor]
    """Extra parameters, weights of shards and the optimizer's state, by name; from shards, sharded as this process
    needs them."""


def make_damaged_error(path: Path, file: str, fault: str) -> CheckpointError:
    """Return the error for a damaged file of the checkpoint in a directory, with what to do."""
    return CheckpointError(f"{path / file} is damaged: {fault}; {describe_remedy(path)}")


def read_state(path: Path) -> TrainerState:
    """Read trainer_state.json of the checkpoint in a directory. Raises CheckpointError naming the key at fault."""
    try:
        fields = read_json(path / STATE)
    except InputError as error:
        raise CheckpointError(f"{error}; {describe_remedy(path)}") from None
    fault = _find_fault(fields)
    checksum = fields.pop("checksum", None)
    if fault is None and compute_checksum(fields) != checksum:
        fault = "checksum is not that of the other keys, which were changed"
    if fault is None and find_step(path) not in (None, fields["step"]):
        fault = f"step is {fields['step']}, but the directory is {path.name}"
    if fault is not None:
        raise make_damaged_error(path, STATE, fault)
    files = fields.pop("files")
    state = TrainerState(**fields)
    _check_names(path, files)
    return state


def check_files(path: Path) -> None:
    """Check that the files of a checkpoint have the checksums in its trainer_state.json. Raises CheckpointError."""
    recorded = read_json(path / STATE)["files"]
    try:
        found = compute_checksums(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; {describe_remedy(path)}") from None
    for name in recorded:
        if found.get(name) != recorded[name]:
            raise make_damaged_error(path, name, f"its content has another checksum than {STATE} gives")


def read_checkpoint(path: Path, trained: TrainedModel, state: TrainerState) -> Checkpoint:
    """Read the optimizer's state of a checkpoint and, from shards, the trained weights.

    trained: a model of the same shapes. state: of the checkpoint. Raises CheckpointError naming the file and the tensor
    that is missing, has another shape or data type, or holds a value that AdamW does not have.
    """
    file = SHARDS if is_sharded(path) else OPTIMIZER
    tensors = _read_shards(path, trained) if is_sharded(path) else _read_whole(path, trained)
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if fault := _find_value_fault(name, local, state.step):
            raise make_damaged_error(path, file, f"{name} {fault}")
    steps = [int(tensor) for name, tensor in tensors.items() if name.endswith("/step")]
    if max(steps, default=0) != state.step:
        raise make_damaged_error(path, file, f"it is of step {max(steps, default=0)}, {STATE} of {state.step}")
    return Checkpoint(path=path, state=state, tensors=tensors)


def _read_whole(path: Path, trained: TrainedModel) -> dict[str, Tensor]:
    """Read optimizer.safetensors."""
    expected = _list_expected(trained, "extra/", trained.extra_parameters)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path / OPTIMIZER, framework="pt") as file:
            names = set(file.keys())
            if fault := _compare_names(names, expected.keys()):
                raise make_damaged_error(path, OPTIMIZER, fault)
            for name in sorted(names):
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise make_damaged_error(path, OPTIMIZER, one_line(error)) from None
    for name, tensor in tensors.items():
        if fault := _compare_kinds((tensor.dtype, tuple(tensor.shape)), expected[name]):
            raise make_damaged_error(path, OPTIMIZER, f"{name} {fault}")
    return tensors


def _read_shards(path: Path, trained: TrainedModel) -> dict[str, Tensor]:
    """Read the parts of the shards that this process needs."""
    trainable = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    expected = _list_expected(trained, WEIGHTS, trainable)
    names = [name for name in read_json(path / STATE)["files"] if name.startswith(f"{SHARDS}/")]
    try:
        shapes = read_shapes([path / name for name in names])
    except InputError as error:
        raise CheckpointError(f"{error}; {describe_remedy(path)}") from None
    if fault := _compare_names(set(shapes), expected.keys()):
        raise make_damaged_error(path, SHARDS, fault)
    for name, kind in shapes.items():
        if fault := _compare_kinds(kind, expected[name]):
            raise make_damaged_error(path, SHARDS, f"{name} {fault}")
    tensors = {f"{name}/step": torch.zeros(()) for name in trainable}
    for name, parameter in trainable.items():
        tensors |= {f"{name}/{key}": torch.zeros_like(parameter) for key in MOMENTS}
        tensors[f"{WEIGHTS}{name}"] = torch.zeros_like(parameter)
    try:
        load_shards(path / SHARDS, tensors)
    except InputError as error:
        raise CheckpointError(f"{error}; {describe_remedy(path)}") from None
    return tensors


def _find_fault(fields: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the keys or the values of trainer_state.json, or None."""
    known = {*(field.name for field in dataclasses.fields(TrainerState)), "files", "checksum"}
    for name in sorted(known - fields.keys()):
        return f"it has no {name}"
    for name in sorted(fields.keys() - known):
        return f"it has an unknown key {quote(name)}"
    for name, least in (("step", 1), ("epoch", 0), ("batch", 1), ("tokens", 1)):
        value = fields[name]
        if type(value) is not int or not least <= value <= MAX_COUNT:
            return f"{name} must be an integer of at least {least}, not {quote(value)}"
    loss = fields["best_eval_loss"]
    if loss is not None and (type(loss) is not float or not math.isfinite(loss)):
        return f"best_eval_loss must be a finite number or null, not {quote(loss)}"
    if not isinstance(fields["settings"], dict):
        return "settings must be an object"
    files = fields["files"]
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        return "files must be an object of checksums"
    return None


def _check_names(path: Path, files: Mapping[str, str]) -> None:
    """Check that the checkpoint has the files of which it has checksums, among them those that every one has."""
    required = () if any(name.startswith(f"{SHARDS}/") for name in files) else ("config.json", OPTIMIZER)
    for name in dict.fromkeys((*required, *files)):
        if name not in files:
            raise make_damaged_error(path, STATE, f"files has no {name}")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; {describe_remedy(path)}")


def _list_expected(trained: TrainedModel, prefix: str, weights: Mapping[str, Tensor]) -> dict[str, TensorKind]:
    """Return the data type and the shape of every tensor that is read, by name.

    weights: parameters that are read, with the prefix before their names, besides the optimizer's state.
    """
    expected: dict[str, TensorKind] = {f"{prefix}{name}": (p.dtype, tuple(p.shape)) for name, p in weights.items()}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            expected[f"{name}/step"] = (torch.float32, ())
            expected |= {f"{name}/{key}": (parameter.dtype, tuple(parameter.shape)) for key in MOMENTS}
    return expected


def _compare_names(found: set[str], expected: Any) -> str | None:
    for name in sorted(expected - found):
        return f"it has no {name}"
    for name in sorted(found - expected):
        return f"it has {quote(name)}, which this training does not have"
    return None


def _compare_kinds(found: TensorKind, expected: TensorKind) -> str | None:
    if found[0] != expected[0]:
        return f"is of {found[0]}, not {expected[0]}"
    if found[1] != expected[1]:
        return f"has the shape {list(found[1])}, not {list(expected[1])}"
    return None


def _find_value_fault(name: str, tensor: Tensor, step: int) -> str | None:
    """Return what is wrong with the values of a tensor, or None. step: number of steps taken."""
    if not torch.isfinite(tensor).all():
        return "holds NaN or infinity"
    if name.endswith("/exp_avg_sq") and bool((tensor < 0).any()):
        return "holds a negative mean of squares"
    if name.endswith("/step") and not (float(tensor).is_integer() and 0 <= float(tensor) <= step):
        return f"is {float(tensor):g}, not a number of steps up to {step}"
    return None
