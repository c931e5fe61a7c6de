"""A Hugging Face model directory on disk: its place, its tensors, its fingerprint. Only safetensors are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genssd.engine.config import read_fields
from genssd.engine.errors import CheckpointError

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


def locate(name_or_path: str | Path) -> Path:
    """Return the directory of a checkpoint: a local one, or that of a hub id in the hub's cache.

    Raises CheckpointError when neither exists.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"model directory {name} does not exist")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name} is no local directory and cannot be had from the hub: {error}") from None


def read_tensors(directory: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, sharded or not. Raises CheckpointError naming the file at fault."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for name in shard.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                    tensors[name] = shard.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from None
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in order. Raises CheckpointError where they are missing."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        shards = read_fields(index).get("weight_map")
        if not isinstance(shards, Mapping) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} is no safetensors index: its weight_map must name a file for each tensor")
        files = [directory / name for name in sorted(set(shards.values()))]
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise CheckpointError(f"{directory}: weight files named by {index.name} are missing: {', '.join(missing)}")
        return files
    files = sorted(directory.glob("model*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
    hint = f" (it has {', '.join(pickles)}: pickles are never read; save it with safetensors)" if pickles else ""
    raise CheckpointError(f"{directory} has no safetensors weights{hint}")


def fingerprint(directory: Path) -> str:
    """Return 16 hex digits that change when the config, the tokenizer or the weights do.

    Of a weight file, its size, header and both ends are read, so that a large model is identified in milliseconds.
    """
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        if (directory / name).exists():
            digest.update(name.encode() + (directory / name).read_bytes())
    for file in weight_files(directory):
        size = file.stat().st_size
        with file.open("rb") as stream:
            digest.update(f"{file.name}:{size}".encode() + stream.read(EDGE_BYTES))
            stream.seek(max(0, size - EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def take(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], directory: Path) -> Tensor:
    """Return the named tensor. Raises CheckpointError when it is missing or has another shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{directory}: the weights have no tensor {name}")
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{directory}: {name} has shape {tuple(tensor.shape)}, config.json implies {shape}")
    return tensor
