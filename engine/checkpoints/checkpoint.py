"""A Hugging Face model directory on disk: its place and its fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from genssd.engine.checkpoints.model_names import find_directory
from genssd.engine.checkpoints.weights import weight_files
from genssd.engine.common.errors import CheckpointError
from genssd.engine.common.quoting import one_line

IDENTITY_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
EDGE_BYTES = 1 << 20
"""Number of bytes at the beginning and at the end of each weight file that enter the fingerprint."""


SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Patterns of the names of a checkpoint's files other than its weights."""


def locate(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """Return the directory of a checkpoint: a local one, or that of a hub id in the hub's cache.

    weights: fetch the weight files from the hub as well, if the cache does not have them. Raises CheckpointError when
    neither exists.
    """
    directory = find_directory(name_or_path)
    if directory is not None:
        return directory
    name = str(name_or_path)
    try:
        return Path(snapshot_download(name, allow_patterns=[*SMALL_FILES, *(["*.safetensors"] if weights else [])]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is no local directory and cannot be had from the hub: {one_line(error)}"
        ) from None


def fingerprint(directory: Path) -> str:
    """Return 16 hex digits that change when the config, the tokenizer or the weights do.

    Of a weight file, its size, header and both ends are read, so that a large model is identified in milliseconds.
    """
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        if (directory / name).is_file():
            digest.update(name.encode() + (directory / name).read_bytes())
    for file in weight_files(directory):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{size}".encode() + stream.read(EDGE_BYTES))
            stream.seek(max(0, size - EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
