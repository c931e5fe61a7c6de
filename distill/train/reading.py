"""Reading a checkpoint of a training: everything in it is checked before anything of it is used.

A file, a key or a number that is missing or not what a training writes is an error that names it: continued from it,
the training would give another model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genssd.distill.runs.journal import read_json
from genssd.distill.train.checkpoints import (
    MOMENTS,
    OPTIMIZER,
    STATE,
    TrainedModel,
    TrainerState,
    compute_checksum,
    compute_checksums,
    describe_remedy,
    find_step,
)
from genssd.engine.errors import CheckpointError, InputError
from genssd.engine.quoting import one_line, quote

MAX_COUNT = 1 << 62
"""Largest number of steps, epochs or tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Files of a checkpoint other than the weights, as read from disk."""

    path: Path
    state: TrainerState
    tensors: Mapping[str, Tensor]
    """Extra parameters and the optimizer's state, by name."""
    rng_states: Sequence[Tensor]
    """State of the random generators of every process, uint8."""


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


def read_checkpoint(path: Path, trained: TrainedModel, state: TrainerState, num_processes: int) -> Checkpoint:
    """Read the optimizer's state and the random generators of a checkpoint.

    trained: a model of the same shapes. state: of the checkpoint. Raises CheckpointError naming the file and the tensor
    that is missing, has another shape or data type, or holds a value that AdamW does not have.
    """
    expected = _list_expected(trained, num_processes)
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
        if fault := _find_tensor_fault(name, tensor, expected[name], state.step):
            raise make_damaged_error(path, OPTIMIZER, f"{name} {fault}")
    steps = [int(tensor) for name, tensor in tensors.items() if name.endswith("/step")]
    if max(steps, default=0) != state.step:
        raise make_damaged_error(path, OPTIMIZER, f"it is of step {max(steps, default=0)}, {STATE} of {state.step}")
    rng_states = [tensors.pop(f"rng/{rank}") for rank in range(num_processes)]
    return Checkpoint(path=path, state=state, tensors=tensors, rng_states=rng_states)


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
    for name in dict.fromkeys(("config.json", OPTIMIZER, *files)):
        if name not in files:
            raise make_damaged_error(path, STATE, f"files has no {name}")
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing; {describe_remedy(path)}")


def _list_expected(trained: TrainedModel, num_processes: int) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    """Return the data type and the shape of every tensor of optimizer.safetensors, by name; None for any shape."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        f"rng/{rank}": (torch.uint8, None) for rank in range(num_processes)
    }
    expected |= {f"extra/{name}": (p.dtype, tuple(p.shape)) for name, p in trained.extra_parameters.items()}
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


def _find_tensor_fault(
    name: str, tensor: Tensor, expected: tuple[torch.dtype, tuple[int, ...] | None], step: int
) -> str | None:
    """Return what is wrong with a tensor of optimizer.safetensors, or None. step: number of steps taken."""
    dtype, shape = expected
    if tensor.dtype != dtype:
        return f"is of {tensor.dtype}, not {dtype}"
    if shape is not None and tuple(tensor.shape) != shape:
        return f"has the shape {list(tensor.shape)}, not {list(shape)}"
    if dtype == torch.uint8:
        return None if tensor.ndim == 1 else f"has the shape {list(tensor.shape)}"
    if not torch.isfinite(tensor).all():
        return "holds NaN or infinity"
    if name.endswith("/exp_avg_sq") and bool((tensor < 0).any()):
        return "holds a negative mean of squares"
    if name.endswith("/step") and not (float(tensor).is_integer() and 0 <= float(tensor) <= step):
        return f"is {float(tensor):g}, not a number of steps up to {step}"
    return None
