"""Changes of the checkpoints of a training, and of the data types of models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.toys import edit_json

from genssd.distill.train.checkpoints import OPTIMIZER, STATE, compute_checksum, compute_checksums

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def edit_state(path: Path, change: Callable[[dict[str, Any]], Any], *, signed: bool = False) -> None:
    """Change the fields of trainer_state.json. signed: write the checksum of the changed fields."""
    fields = json.loads((path / STATE).read_text())
    change(fields)
    if signed:
        del fields["checksum"]
        fields["checksum"] = compute_checksum(fields)
    (path / STATE).write_text(json.dumps(fields))


def edit_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors of optimizer.safetensors, and write the checksums that they then have."""
    tensors = load_file(path / OPTIMIZER)
    change(tensors)
    save_file(tensors, path / OPTIMIZER)
    sign(path)


def sign(path: Path) -> None:
    """Write the checksums that the files of a checkpoint have."""
    edit_state(path, lambda fields: fields.update(files=compute_checksums(path)), signed=True)


def convert(source: Path, target: Path, dtype: torch.dtype) -> Path:
    """Write a copy of a checkpoint in another data type."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in tensors.items()}, target / "model.safetensors", metadata={"format": "pt"})
    edit_json(target / "config.json", dtype=NAMES[dtype])
    return target


def stored_dtypes(directory: Path) -> tuple[set[torch.dtype], str]:
    """Return the data types of the weights in a directory, and that which its config names."""
    tensors = load_file(directory / "model.safetensors")
    return {tensor.dtype for tensor in tensors.values()}, json.loads((directory / "config.json").read_text())["dtype"]
