"""Changes of the checkpoints of a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from genssd.distill.train.checkpoints import OPTIMIZER, STATE, compute_checksum, compute_checksums


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
