"""What the machine has: free memory, and the dtype a checkpoint runs in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from genssd.engine.config import ModelConfig
from genssd.engine.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; on the CPU what the kernel says can be had without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def choose_device(name: str | None) -> torch.device:
    """The named device; None: CUDA where there is one, else the CPU."""
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
    """The named dtype; "auto" is the checkpoint's own where the device computes in it, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    stored = DTYPES.get(ModelConfig.load(directory).dtype or "float32", torch.float32)
    if device.type == "cpu" and (stored == torch.float16 or not cpu_has_bf16()):
        return torch.float32
    return stored


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return any(flag in text for flag in ("avx512_bf16", "amx_bf16", " bf16 "))
