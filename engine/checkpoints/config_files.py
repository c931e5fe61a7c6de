"""Reading the JSON files of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from genssd.engine.checkpoints.config_fields import refuse_quantized
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import one_line, quote

LFS_POINTER = b"version https://git-lfs"
"""First bytes of the small text file that Git stores in place of a large one."""


def read_config(directory: Path) -> Mapping[str, object]:
    """Return the fields of DIRECTORY/config.json.

    Raises CheckpointError when it is missing, holds no JSON object or names a quantization.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory} has no config.json: not a Hugging Face model directory")
    fields = read_fields(path)
    refuse_quantized(fields, path)
    return fields


def read_fields(path: Path) -> Mapping[str, object]:
    """Return the fields of a checkpoint's JSON file. Raises CheckpointError when it holds no object."""
    refuse_pointer(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{path} must hold a JSON object, not {quote(fields)}")
    return fields


def refuse_pointer(path: Path) -> None:
    """Check that a file is not the pointer that Git LFS leaves in its place. Raises CheckpointError if it is."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError:
        return
    if start == LFS_POINTER:
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in {path.parent}")
