"""The machine's part in the choices: free memory, the device, and the dtype that a checkpoint runs in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from genssd.engine.config import ModelConfig
from genssd.engine.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available_bytes(device: torch.device) -> int:
    """Return the free memory of a device in bytes; on the CPU, the kernel's estimate of what needs no swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cache_budget(device: torch.device, memory_bytes: int | None, free_fraction: float) -> int:
    """Return the size of all caches in bytes: memory_bytes, or a fraction of the device's free memory."""
    return int(free_fraction * available_bytes(device)) if memory_bytes is None else memory_bytes


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
    stored = DTYPES.get(ModelConfig.load(directory).dtype or "float32", torch.float32)
    if device.type == "cpu" and (stored == torch.float16 or not cpu_has_bf16()):
        return torch.float32
    return stored


def cpu_has_bf16() -> bool:
    """Return whether the CPU multiplies bf16 numbers in hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
