"""The machine's part in the choices: memory for caches and weights, the device, and the dtype of a checkpoint.

On a CPU nothing takes memory before it is written: a cache is allocated whole, and the kernel gives it a page of memory
when a token is first stored there. A process beyond the limit of its cgroup is killed without a word at that time. So
the budget of the caches leaves room for everything else, and what cannot fit is refused before it is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from genssd.engine.cache.page_list import count_promised_bytes
from genssd.engine.checkpoints.basic_config import is_supported
from genssd.engine.checkpoints.config import ModelConfig, load_config
from genssd.engine.checkpoints.config_files import read_config
from genssd.engine.checkpoints.parameters import match_parameters, model_tensors
from genssd.engine.checkpoints.weights import WeightFiles
from genssd.engine.common.errors import CapacityError, InputError
from genssd.engine.common.model_choices import Role
from genssd.engine.host.machine import available_memory
from genssd.engine.models.runner import MAX_ROWS
from genssd.kernels.native import bfloat16_instructions

logger = logging.getLogger(__name__)

N = TypeVar("N", bound=str)
"""What names a model: its role, or another name."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


COPIES = 4
"""Copies of the largest tensor that exist while weights are loaded: tensors are read one after the other, converted,
and joined with up to two others before they are packed."""
BASE_BYTES = 64 << 20
"""Memory that a CPU process keeps free besides tensors: results and texts, stacks and arenas of threads, libraries."""


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; on the CPU, what this process can still take (machine.py)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory(promised=count_promised_bytes())


def cache_budget(
    device: torch.device,
    memory_bytes: int | None,
    free_fraction: float,
    *,
    working_bytes: int = 0,
    reserved_bytes: int = 0,
) -> int:
    """Return the size of all caches in bytes: memory_bytes, or a fraction of the device's free memory.

    working_bytes: memory that the computation takes besides; on a CPU the fraction leaves at least so much, and
    BASE_BYTES. reserved_bytes: free memory that something else will take before the caches, such as weights that are
    not loaded yet. Raises CapacityError where that is more than there is. A memory_bytes beyond the free memory is
    taken, with a warning, since memory is used only as the caches fill.
    """
    free, kept = max(0, available_bytes(device) - reserved_bytes), working_bytes + BASE_BYTES
    if device.type != "cpu":
        return int(free_fraction * free) if memory_bytes is None else memory_bytes
    if memory_bytes is None:
        if free <= kept:
            raise CapacityError(
                f"{free:,} bytes of memory are free for this process, and {kept:,} are kept for the computation: "
                "nothing is left for the key-value cache; raise the limit of memory, or give memory_bytes"
            )
        return min(int(free_fraction * free), free - kept)
    if memory_bytes > max(0, free - kept):
        logger.warning(
            "memory_bytes is %s; with %s bytes for the computation that may be more than the %s bytes that are free",
            f"{memory_bytes:,}",
            f"{kept:,}",
            f"{free:,}",
        )
    return memory_bytes


def check_bytes_fit(
    needed: int,
    purpose: str,
    device: torch.device,
    *,
    remedy: str = "raise the limit of memory, or take a smaller model",
) -> None:
    """Check that a CPU has so many bytes of free memory.

    Raises CapacityError that names them, their purpose and the remedy.
    """
    if device.type == "cpu" and needed > (free := available_bytes(device)):
        raise CapacityError(
            f"{purpose} take {needed:,} bytes, and {free:,} bytes of memory are free for this process; {remedy}"
        )


def check_weights_fit(directories: Mapping[N, Path], dtypes: Mapping[N, torch.dtype], device: torch.device) -> None:
    """Check that a CPU has memory for the weights of models before they are read.

    directories, dtypes: place and data type in memory of every model, by role or another name. Raises CapacityError
    naming the bytes, CheckpointError on a directory that cannot be used.
    """
    if device.type != "cpu" or not directories:
        return
    sizes = [count_weight_bytes(directory, dtypes[role]) for role, directory in directories.items()]
    needed = sum(packed for packed, _ in sizes) + max(copied for _, copied in sizes)
    names = " and ".join(f"{role} {directory}" for role, directory in directories.items())
    check_bytes_fit(needed, f"the weights of {names} with the copies made while they are loaded", device)


def count_weight_bytes(directory: Path, dtype: torch.dtype) -> tuple[int, int]:
    """Return the size of a checkpoint's weights in a data type, and of the copies that exist while they are loaded.

    Only the headers of the weight files are read. Raises CheckpointError on a directory that cannot be used.
    """
    weights = WeightFiles.open(directory)
    if is_supported(read_config(directory)):
        matched = match_parameters(weights, ModelConfig.load(directory))
        tensors = [weights.tensors[name] for name in matched.values()]
    else:
        tensors = model_tensors(weights)
    largest = max(tensor.num_elements for tensor in tensors)
    return sum(tensor.num_elements for tensor in tensors) * dtype.itemsize, COPIES * largest * dtype.itemsize


def count_working_bytes(values_per_token: int, dtype: torch.dtype, vocabulary: int, max_num_seqs: int) -> int:
    """Return the memory of the largest forward pass of a model, and of the logits of a decoding batch with copies.

    values_per_token: number of values of one token that a forward pass holds at once. vocabulary: rows of the head.
    """
    return MAX_ROWS * values_per_token * dtype.itemsize + 3 * 4 * max_num_seqs * vocabulary


def choose_device(name: str | None) -> torch.device:
    """Return the named device; for None, CUDA where torch sees a device, else the CPU. Raises InputError on others."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; supported: cpu, cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r} was asked for, but torch finds no CUDA device")
    return device


def choose_dtype(directory: Path, dtype: str, device: torch.device) -> torch.dtype:
    """Return the named dtype; for "auto" the checkpoint's own where the device computes in it, else float32.

    Raises InputError on an unknown name.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    stored = DTYPES.get(load_config(directory).dtype or "float32", torch.float32)
    if device.type == "cpu" and (stored == torch.float16 or not cpu_has_bf16()):
        return torch.float32
    return stored


def describe_float32(
    dtypes: Mapping[str, torch.dtype] | Mapping[Role, torch.dtype], device: torch.device
) -> str | None:
    """Return a line for the log on models that compute in float32 although the CPU multiplies bfloat16 in hardware.

    dtypes: what `choose_dtype` chose for "auto", by the name of the model. None where no model does, or the CPU
    does not.
    """
    roles = [f"the {role}" for role, dtype in dtypes.items() if dtype == torch.float32]
    instructions = bfloat16_instructions() if device.type == "cpu" else None
    if not roles or instructions is None:
        return None
    return (
        f"{' and '.join(roles)} {'computes' if len(roles) == 1 else 'compute'} in float32; --dtype bfloat16 would take "
        f"this CPU's instructions for bfloat16 ({instructions}), which is usually faster"
    )


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 numbers in hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
