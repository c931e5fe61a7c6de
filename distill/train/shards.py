"""Sharded checkpoints: every process writes its own shard of each tensor (torch.distributed.checkpoint).

checkpoint-N/shards/shard-<process, from 1>-....safetensors    the slices of a process, with their offsets in the header

The files are safetensors alone: reading them runs no code of theirs. Any number of processes reads them, each the
slices that it needs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from genssd.distill.runs.writing import NO_ROOM
from genssd.engine.common.amounts import format_count
from genssd.engine.common.errors import InputError
from genssd.engine.common.quoting import one_line

SHARDS = "shards"
"""Name of the directory of shards in a checkpoint."""


def save_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the shards of tensors into a directory that exists; every process of a training has to call this.

    tensors: with the same names in every process; sharded ones, and whole ones that are equal in all. Raises InputError
    in all processes when one of them cannot write.
    """
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    try:
        with _without_warnings():
            save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        rank, (fault, _) = min(error.failures.items())
        if not isinstance(fault, OSError | SafetensorError | RuntimeError):
            raise fault from None  # a signal, or a mistake of ours
        reason = (fault.strerror if isinstance(fault, OSError) else None) or one_line(fault)
        room = "; make room on the disk" if isinstance(fault, OSError) and fault.errno in NO_ROOM else ""
        raise InputError(f"{directory} cannot be written by process {rank}: {reason}{room}") from None


def find_shard(directory: Path, rank: int) -> Path | None:
    """Return the file that a process has written into a directory; None where it holds no part of any tensor."""
    return next(iter(directory.glob(f"shard-{rank + 1:05d}-*.safetensors")), None)


def read_shapes(files: Sequence[Path]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the data type and the shape of every tensor in all the shards of a directory, by name.

    Raises InputError naming a file that cannot be read, and a tensor of which a part is missing.
    """
    for path in files:
        with _name_damage(path), safe_open(path, framework="pt") as file:
            file.keys()
    directory = files[0].parent
    with _name_damage(directory):
        metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        assert tensor.properties.dtype is not None
        held, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.size)
        if held != whole:
            raise InputError(f"{directory} is damaged: it has {held:,} of the {format_count(whole, 'value')} of {name}")
        shapes[name] = (tensor.properties.dtype, tuple(tensor.size))
    return shapes


def load_shards(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, sharded or whole, with those of the same names in a directory; each process reads what it needs.

    The names and shapes must be those that `read_shapes` returns. Raises InputError when the parts do not fit together.
    """
    with _without_warnings(), _name_damage(directory):
        load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)


@contextmanager
def _name_damage(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into an InputError that names the path."""
    try:
        yield
    except CheckpointException as error:
        ((fault, _), *_) = error.failures.values()
        if not isinstance(fault, Exception):
            raise fault from None  # a signal
        raise InputError(f"{path} is damaged: {one_line(fault)}") from None
    except Exception as error:  # the readers check nothing, so that anything may come of a wrong header
        raise InputError(f"{path} is damaged: {one_line(error)}") from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what torch warns of: that one process alone reads, which is what is meant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
